"""Decompositions of convolution kernels: tensors in, tensors out.

A kernel is ``(out, in/groups, *k)`` with up to 3 spatial axes (`to_forward_layout` brings a transposed convolution's
weight there). Every decomposition returns its factors, its relative error, the kernel that the factors stand for, and
the chain of convolutions that they are; at full rank that is the original convolution, up to rounding.

    chain                                            one factorisation, every rank         at some ranks
    1×1 → k×k, k×k → 1×1, k×1 → 1×k, 1×1 → 1×1       split_spectrum (by `first_axes`)      .truncate(rank)
    depthwise k×k, some terms → 1×1                  depthwise_spectrum                    .truncate(terms)
    1×1 → k×k → 1×1                                  Tucker2Spectrum                       tucker2
"""

from .axis_split import AxisSplit, split_spectrum
from .depthwise_pair import Depthwise, depthwise_spectrum
from .last_factor import Nested, PairFactors, solve_last
from .layout import Factors, Stage, from_forward_layout, to_forward_layout
from .ranks import RankSpec, default_multiple, energy_rank, evbmf_rank, resolve_rank, round_rank
from .spectrum import Spectrum
from .tucker import Tucker2, Tucker2Spectrum, tucker2
from .weighting import split_moment

__all__ = [
    "AxisSplit",
    "Depthwise",
    "Factors",
    "Nested",
    "PairFactors",
    "RankSpec",
    "Spectrum",
    "Stage",
    "Tucker2",
    "Tucker2Spectrum",
    "default_multiple",
    "depthwise_spectrum",
    "energy_rank",
    "evbmf_rank",
    "from_forward_layout",
    "resolve_rank",
    "round_rank",
    "solve_last",
    "split_moment",
    "split_spectrum",
    "to_forward_layout",
    "tucker2",
]
