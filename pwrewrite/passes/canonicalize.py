"""`CanonicalizeActivations`: what code writes out, such as ``x * torch.sigmoid(x)``, becomes torch's activation. Exact.

One kernel in place of several, or none where the next pass fuses it with the layer before. Modules are taken, whatever
they are called: a Swish or an h-swish of hand-written networks, with a gradient function of its own or without. Which
module is one is found out by running it (`pwrewrite.layers.written_out`).
"""

from __future__ import annotations

from ..capturing.records import Capture, info
from ..core.plan import Estimate, Op
from ..core.records import Json
from ..edit.swap import stem
from ..layers.written_out import written_out
from .base import Pass, Proposal
from .patterns import Graph


class CanonicalizeActivations(Pass):
    """Puts torch's own activations in the place of modules that write them out."""

    name = "canonicalize-activations"
    summary = "activations that a module writes out, such as x * sigmoid(x), become torch's own"
    exact = "both"

    def propose(self, capture: Capture) -> list[Proposal]:
        graph, proposals, done = Graph(capture), list[Proposal](), ""
        ran = {path for node in graph.nodes for path in info(node).callers}
        known = {act[1] for node in graph.nodes if (act := graph.activation(node)) is not None}
        for path, module in capture.model.named_modules():
            if path not in ran or path in known or (done and path.startswith(done)):
                continue
            if (found := written_out(module)) is None:
                continue
            (name, numbers), _ = found
            done = stem(path)
            settings: dict[str, Json] = {"activation": name, "kind": type(module).__name__}
            if numbers:
                settings["scalars"] = list(numbers)
            proposals.append(Op("canonicalize", path, self.name, settings, Estimate(0, 0, 0, 0)))
        return proposals
