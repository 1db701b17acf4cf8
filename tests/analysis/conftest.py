"""Captures that several tests of the analysis ask questions of."""

from collections.abc import Callable
from functools import cache

import pytest
import torch

from pwrewrite.capturing import Capture, capture


@cache
def _torchvision(name: str, size: int) -> Capture:
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        model = models.get_model(name, weights=None, **({"init_weights": False} if name == "googlenet" else {}))
    return capture(model, torch.empty(1, 3, size, size, device="meta"))


@pytest.fixture(scope="session")
def torchvision_capture() -> Callable[..., Capture]:
    """``torchvision_capture(name, size=224)``: a torchvision model without weights, captured once."""
    return lambda name, size=224: _torchvision(name, size)
