"""Passes: each looks at a capture and proposes. `ALL` lists them in the order in which they are shown."""

from __future__ import annotations

from .base import LayerPass, Pass, Proposal
from .bottleneck import InsertBottleneck, InsertExpansion, InsertReduction
from .graph_pass import as_graph_pass
from .low_rank import FactorizeLinear, FactorizePointwise
from .project import ProjectBranch
from .separable import FactorizeSpatial, SeparateDepthwise

ALL: tuple[type[Pass], ...] = (
    InsertBottleneck,
    InsertReduction,
    InsertExpansion,
    FactorizeSpatial,
    SeparateDepthwise,
    FactorizePointwise,
    FactorizeLinear,
    ProjectBranch,
)
"""Every pass there is."""

__all__ = [
    "ALL",
    "FactorizeLinear",
    "FactorizePointwise",
    "FactorizeSpatial",
    "InsertBottleneck",
    "InsertExpansion",
    "InsertReduction",
    "LayerPass",
    "Pass",
    "ProjectBranch",
    "Proposal",
    "SeparateDepthwise",
    "as_graph_pass",
]
