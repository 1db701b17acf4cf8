"""A pytest fixture that holds a model against limits: ``model_budget(model, inputs, max_macs="600M")``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import pytest

if TYPE_CHECKING:
    from torch import nn

    from ..analysis.gates import GateResult
    from ..capturing import Inputs


class ModelBudget(Protocol):
    """Fails the test where a model costs more than it may."""

    def __call__(self, model: nn.Module, example_inputs: Inputs, **limits: object) -> GateResult:
        """The limits are those of `pwrewrite.check`: ``max_params``, ``max_macs``, ``baseline``, …."""


@pytest.fixture
def model_budget() -> ModelBudget:
    """Holds a model against limits; a test whose model exceeds one fails with the layers that are to blame."""

    def hold(model: nn.Module, example_inputs: Inputs, **limits: object) -> GateResult:
        from ..workflows.check import check

        holding: Callable[..., GateResult] = check
        verdict = holding(model, example_inputs, **limits)
        if not verdict.passed:
            pytest.fail(str(verdict), pytrace=False)
        return verdict

    return hold
