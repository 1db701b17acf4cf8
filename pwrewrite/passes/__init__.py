"""Passes: each looks at a capture and proposes. `ALL` lists them in the order in which they are shown."""

from __future__ import annotations

from .base import LayerPass, Pass, Proposal
from .bottleneck import InsertBottleneck, InsertExpansion, InsertReduction
from .low_rank import FactorizeLinear, FactorizePointwise
from .separable import FactorizeSpatial, SeparateDepthwise

ALL: tuple[type[Pass], ...] = (
    InsertBottleneck,
    InsertReduction,
    InsertExpansion,
    FactorizeSpatial,
    SeparateDepthwise,
    FactorizePointwise,
    FactorizeLinear,
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
    "Proposal",
    "SeparateDepthwise",
]
