"""Passes: each looks at a capture and proposes. `ALL` lists them in the order in which they are shown."""

from __future__ import annotations

from .base import LayerPass, Pass, Proposal
from .canonicalize import CanonicalizeActivations
from .channels_last import ChannelsLast
from .factorizing import (
    FACTORIZING,
    FORM_PASSES,
    FactorizeLinear,
    FactorizePointwise,
    FactorizeSpatial,
    InsertBottleneck,
    InsertExpansion,
    InsertReduction,
    SeparateDepthwise,
)
from .fold_batch_norm import FoldBatchNorm
from .fuse_activation import FusePointwiseActivation
from .graph_pass import as_graph_pass
from .merge_branches import MergeBranches
from .merge_pointwise import MergePointwise
from .narrow import Narrow
from .project import ProjectBranch
from .remove_noise import RemoveInferenceNoise
from .share_reduction import ShareReduction

ALL: tuple[type[Pass], ...] = (*FACTORIZING.values(), Narrow, ProjectBranch, ShareReduction)
"""Every pass of `pwrewrite.rewrite`."""

FUSING: tuple[type[Pass], ...] = (
    RemoveInferenceNoise,
    CanonicalizeActivations,
    FoldBatchNorm,
    MergeBranches,
    MergePointwise,
    FusePointwiseActivation,
    ChannelsLast,
)
"""Every pass of `pwrewrite.fuse`, in the order in which it runs them."""

__all__ = [
    "ALL",
    "FACTORIZING",
    "FORM_PASSES",
    "FUSING",
    "CanonicalizeActivations",
    "ChannelsLast",
    "FactorizeLinear",
    "FactorizePointwise",
    "FactorizeSpatial",
    "FoldBatchNorm",
    "FusePointwiseActivation",
    "InsertBottleneck",
    "InsertExpansion",
    "InsertReduction",
    "LayerPass",
    "MergeBranches",
    "MergePointwise",
    "Narrow",
    "Pass",
    "ProjectBranch",
    "Proposal",
    "RemoveInferenceNoise",
    "SeparateDepthwise",
    "ShareReduction",
    "as_graph_pass",
]
