"""`RemoveInferenceNoise`: what does nothing in evaluation goes. Exact in evaluation.

Dropout of every kind, stochastic depth and drop path become identities, so that what lies on both sides of them can be
fused. Torch's own modules are known by their class; others are taken where their class says that they drop something
and they return the very tensor that they are given. Identities in code that has become a graph are left out of it by
the passes that made the graph.
"""

from __future__ import annotations

from ..capture.records import Capture
from ..fused.known import drops, hooked
from ..plan import Estimate, Op, Skip, SkipReason
from .base import Pass, Proposal


class RemoveInferenceNoise(Pass):
    """Makes identities of modules that only act in training."""

    name = "remove-inference-noise"
    summary = "dropout, stochastic depth and drop path become identities"
    exact = "eval"

    def propose(self, capture: Capture) -> list[Proposal]:
        """See `Pass.propose`."""
        proposals: list[Proposal] = []
        for path, module in capture.model.named_modules():
            if not path or not drops(module):
                continue
            if hooked(module):
                proposals.append(Skip(path, SkipReason.HOOKS, "has a hook, which would no longer be called; remove it"))
            else:
                settings = {"kind": type(module).__name__}
                proposals.append(Op("remove", path, self.name, settings, Estimate(0, 0, 0, 0)))
        return proposals
