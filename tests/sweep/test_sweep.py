"""A few random networks in the ordinary tests; thousands by ``nice python -m sweep 0 3000`` in ``tests``."""

from __future__ import annotations

import warnings

import pytest

from .checks import CHECKS, check
from .networks import network

FOUND = [
    (1003, "full_rank"),  # float64, of which a copy in float64 measures no rounding
    (3009, "full_rank"),
    (3073, "full_rank"),  # another size, where rounding is another
    (6142, "fuse"),  # float64 in the reference of fuse
    (3061, "fuse"),  # an activation that a block which did not run holds, too
    (3086, "fuse"),
    (11, "full_rank"),  # a buffer that counts calls
    (22, "calibrated"),  # no gradients, because of writes into what a layer needs for its own
    (1007, "fuse"),  # a layer in a plain list
    (21554, "fuse"),  # a 1×1 in one of two branches, merged into the convolution before both
    (20348, "fuse"),  # float64, whose rounding a norm amplifies
    (21850, "full_rank"),  # a bias before a norm, whose gradient is rounding, and no other gradient left to compare
    (21607, "calibrated"),  # gradients for a layer in a plain list only
]
"""What was wrong once."""


@pytest.mark.parametrize(("seed", "name"), [*FOUND, *((seed, name) for seed in range(3) for name in CHECKS)])
def test_a_random_network(seed: int, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "fault" not in check(network(seed), name)


@pytest.mark.zoo
@pytest.mark.parametrize("seed", range(3, 300))
def test_many_random_networks(seed: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        faults = {name: result for name in CHECKS if "fault" in (result := check(network(seed), name))}
    assert not faults
