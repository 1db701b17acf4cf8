"""`RemoveInferenceNoise`: what does nothing in evaluation goes. Exact in evaluation.

Dropout of every kind, stochastic depth and drop path become identities, so that what lies on both sides of them can be
fused. Torch's own modules are known by their class; others are taken where their class says that they drop something
and they return the very tensor that they are given. Identities in code that has become a graph are left out of it by
the passes that made the graph. One that is in training mode in a model that is not is meant to drop, and stays.

In code: functional dropouts that keep a layer from what is behind it, results that nobody reads, the first of two
``contiguous`` or reshapes in a row, permutations that undo each other, equal calls on the same tensors.
"""

from __future__ import annotations

from ..capturing.records import Capture
from ..core.plan import Estimate, Op, Skip, SkipReason
from ..layers.known import drops, hooked
from .base import Pass, Proposal
from .noise_in_code import code_ops
from .patterns import Graph


class RemoveInferenceNoise(Pass):
    """Makes identities of modules that only act in training."""

    name = "remove-inference-noise"
    summary = "dropout and stochastic depth become identities; dead, repeated and undone operations leave the code"
    exact = "eval"

    def propose(self, capture: Capture) -> list[Proposal]:
        """See `Pass.propose`."""
        proposals: list[Proposal] = []
        for path, module in capture.model.named_modules():
            if not path or not drops(module):
                continue
            if module.training and not capture.model.training:
                detail = "in training mode in a model that is not, so it is meant to drop; call eval() on it, too"
                proposals.append(Skip(path, SkipReason.EXCLUDED, detail))
            elif hooked(module):
                proposals.append(Skip(path, SkipReason.HOOKS, "has a hook, which would no longer be called; remove it"))
            else:
                settings = {"kind": type(module).__name__}
                proposals.append(Op("remove", path, self.name, settings, Estimate(0, 0, 0, 0)))
        return [*proposals, *code_ops(Graph(capture), self.name)]
