"""Decompositions of convolution kernels: tensors in, tensors out.

A kernel is ``(out, in/groups, *k)`` with 1 to 3 spatial axes (`to_forward_layout` brings a transposed convolution's
weight there). Every form returns its factors, its relative error, the kernel that the factors stand for, and the
chain of convolutions that they are:

    form            chain                                        one rank                 every rank
    bottleneck      1×1 → k×k → 1×1                              tucker2                  tucker2_spectrum
    reduce          1×1 → k×k                                    reduction                reduction_spectrum
    expand          k×k → 1×1                                    expansion                expansion_spectrum
    spatial         k×1 → 1×k, (k,1,1) → (1,k,k), …              spatial                  spatial_spectrum
    depthwise       depthwise k×k, some terms → 1×1              depthwise                depthwise_spectrum
    low rank        1×1 → 1×1, linear → linear                   low_rank                 low_rank_spectrum

Which of the original's attributes goes where is said by `Stage.axes`; the algebra and its source by each module. At
full rank every chain is the original convolution, up to rounding.
"""

from .break_even import BreakEven, BreakEvenRanks, ConvShape, FactorCost, break_even_ranks, ratio_ranks
from .depthwise_pair import Depthwise, depthwise, depthwise_spectrum
from .layout import Factors, Stage, from_forward_layout, to_forward_layout
from .low_rank_pair import LowRank, low_rank, low_rank_spectrum
from .one_sided import Expansion, Reduction, expansion, expansion_spectrum, reduction, reduction_spectrum
from .ranks import RankSpec, default_multiple, energy_rank, evbmf_rank, resolve_rank, round_rank
from .spatial_pair import Spatial, spatial, spatial_spectrum
from .spectrum import MatrixSpectrum, Spectrum, Truncation, svd_spectrum
from .tucker import Tucker2, tucker2
from .tucker_spectrum import Tucker2Spectrum, tucker2_spectrum
from .weighting import SideWeight, kernel_loss, side_weight, split_moment

__all__ = [
    "BreakEven",
    "BreakEvenRanks",
    "ConvShape",
    "Depthwise",
    "Expansion",
    "FactorCost",
    "Factors",
    "LowRank",
    "MatrixSpectrum",
    "RankSpec",
    "Reduction",
    "SideWeight",
    "Spatial",
    "Spectrum",
    "Stage",
    "Truncation",
    "Tucker2",
    "Tucker2Spectrum",
    "break_even_ranks",
    "default_multiple",
    "depthwise",
    "depthwise_spectrum",
    "energy_rank",
    "evbmf_rank",
    "expansion",
    "expansion_spectrum",
    "from_forward_layout",
    "kernel_loss",
    "low_rank",
    "low_rank_spectrum",
    "ratio_ranks",
    "reduction",
    "reduction_spectrum",
    "resolve_rank",
    "round_rank",
    "side_weight",
    "spatial",
    "spatial_spectrum",
    "split_moment",
    "svd_spectrum",
    "to_forward_layout",
    "tucker2",
    "tucker2_spectrum",
]
