"""Cost, saving and reloading, gradients."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from verify_models import EXACT, check, edit, edited, failed, full_rank, net, rough

from pwrewrite.capturing import capture, info
from pwrewrite.core.cost import Cost
from pwrewrite.verifying import verify

X = torch.zeros(1, 3, 16, 16)


def recount(model: nn.Module) -> Cost:
    found = capture(model, X)
    return Cost(found.params, sum(info(node).cost.macs for node in found.graph.nodes))


def test_the_recount_must_meet_the_prediction() -> None:
    rewritten = edited(net())
    expected = recount(rewritten)
    assert check(verify(net(), rewritten, X, expected=expected, thorough=False), "cost").passed
    for wrong in (Cost(expected.params - 8, expected.macs), Cost(expected.params, expected.macs + 1)):
        result = verify(net(), rewritten, X, expected=wrong, thorough=False)
        assert failed(result) == {"cost"}
        assert f"predicted {wrong.params if wrong.params != expected.params else wrong.macs:,}" in str(result.failures)


def test_a_lost_parameter_fails_the_recount() -> None:
    rewritten = edited(net())
    expected = recount(rewritten)
    rewritten.conv[1].bias = None
    assert "cost" in failed(verify(net(), rewritten, X, expected=expected, thorough=False))


class Keeps(nn.Module):
    """A convolution whose weight is no parameter."""

    def __init__(self, conv: nn.Conv2d, how: str) -> None:
        super().__init__()
        self.bias = conv.bias
        weight = conv.weight.detach().clone()
        if how == "attribute":
            self.weight = weight
        else:
            self.register_buffer("weight", weight, persistent=how == "buffer")

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=1)


def test_a_weight_outside_the_state_dict_is_found() -> None:
    for how in ("attribute", "temporary"):
        result = verify(net(), edited(net(), make=lambda conv, how=how: Keeps(conv, how)), X, edits=EXACT)
        assert failed(result) == {"state_dict"}, how
        assert any("conv.weight" in note for note in result.notes)
    assert verify(net(), edited(net(), make=lambda conv: Keeps(conv, "buffer")), X, edits=EXACT).passed


def test_a_state_dict_that_drops_a_key_is_found() -> None:
    class Forgets(nn.Sequential):
        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            return None

        def state_dict(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            state = super().state_dict(*args, **kwargs)
            state.pop(kwargs.get("prefix", "") + "0.weight", None)
            return state

    result = verify(net(), edited(net(), make=lambda conv: Forgets(*full_rank(conv))), X, edits=EXACT)
    assert failed(result) == {"state_dict"}
    assert "lacks conv.0.weight" in check(result, "state_dict").detail


def test_shared_weights_reload() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.again = nn.Conv2d(3, 3, 3, padding=1)
            self.again.weight = self.conv.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.again(self.conv(x).relu())

    model = Shared()
    result = verify(model, copy.deepcopy(model), X, edits=EXACT)
    assert result.passed, result.failures


def test_what_safetensors_cannot_hold_is_found() -> None:
    class Extra(nn.Sequential):
        def get_extra_state(self) -> Any:
            return {"rank": 3}

        def set_extra_state(self, state: Any) -> None:
            assert state == {"rank": 3}

    result = verify(net(), edited(net(), make=lambda conv: Extra(*full_rank(conv))), X, edits=EXACT)
    assert failed(result) == {"state_dict"}
    assert "not a tensor in the state_dict: conv._extra_state" in check(result, "state_dict").detail


# --------------------------------------------------------------------------------------------------- gradients


def test_a_frozen_parameter_fails() -> None:
    wrong = edited(net())
    wrong.tail.weight.requires_grad_(False)
    result = verify(net(), wrong, X, edits=EXACT)
    assert failed(result) == {"gradients"}
    assert "tail.weight got a gradient before" in check(result, "gradients").detail


def test_a_new_parameter_without_gradient_fails() -> None:
    wrong = edited(net())
    wrong.conv[0].weight.requires_grad_(False)
    result = verify(net(), wrong, X, edits=EXACT)
    assert failed(result) == {"gradients"}
    assert "conv.0.weight is new and gets no gradient" in check(result, "gradients").detail


def test_the_new_parts_of_a_frozen_layer_may_be_frozen() -> None:
    model = net()
    model.conv.requires_grad_(False)
    rewritten = edited(model)
    rewritten.conv.requires_grad_(False)
    assert verify(model, rewritten, X, edits=EXACT).passed
    model.requires_grad_(False)
    rewritten.requires_grad_(False)
    result = verify(model, rewritten, X, edits=EXACT)
    assert result.passed
    assert any("gradients were not checked" in note for note in result.notes)


def test_a_cut_path_fails_though_outputs_agree() -> None:
    class Cut(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.detach())

    result = verify(net(), edited(net(), make=lambda conv: Cut(*full_rank(conv))), X, edits=EXACT)
    assert failed(result) == {"gradients"}  # the residual still reaches the stem, with another value


def test_gradients_that_are_not_finite_fail() -> None:
    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * float("inf")

    class Spoiled(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return Spoil.apply(super().forward(x)) if torch.is_grad_enabled() else super().forward(x)

    wrong = rough(net())
    wrong.conv = Spoiled(*wrong.conv)
    result = verify(net(), wrong, X)
    assert failed(result) == {"gradients"}
    assert "not finite" in check(result, "gradients").detail


def test_an_output_without_gradient_is_no_failure() -> None:
    class Indices(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).argmax(1)

    model = Indices()
    result = verify(model, edited(model, "net.conv"), X, edits=(edit("net.conv"),))
    assert result.passed, result.failures
    assert any("gradients were not checked" in note for note in result.notes)


class First(nn.Module):
    """An activation before the first layer, which may write into the caller's input."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.relu, self.conv = nn.ReLU(inplace), nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor, more: dict[str, Tensor]) -> Tensor:
        y: Tensor = self.conv(self.relu(x)) + self.relu(more["mask"])
        return y


def test_who_writes_into_the_callers_inputs_is_told() -> None:
    writes, keeps = First(True), First(False)
    keeps.load_state_dict(writes.state_dict())
    inputs = (torch.randn(1, 3, 8, 8), {"mask": torch.randn(1)})
    gone = verify(writes, keeps, inputs)
    assert gone.passed
    assert any("the original writes into its inputs (input 0, input 1.mask)" in note for note in gone.notes)
    new = verify(keeps, writes, inputs)
    assert "input 0 is written into, and was not before" in new.failures[0].detail
    assert not any("writes into its inputs" in note for note in verify(writes, writes, inputs).notes)
    nan = (torch.full((1, 3, 8, 8), torch.nan), {"mask": torch.randn(1)})
    assert not any("written" in check.detail for check in verify(keeps, keeps, nan).checks)


def test_a_rewrite_that_changes_outputs_says_so_beside_its_checks() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    x = torch.randn(2, 3, 8, 8)
    result = verify(model, other, x)
    assert result.passed
    assert result.changed
    assert not result.exact
    assert result.max_error is None
    assert 0 <= result.agreeing <= result.samples >= 8
    data = result.to_dict()
    assert (data["samples"], data["exact"], data["max_error"]) == (result.samples, False, None)
    assert not verify(model, model, x).changed
    assert verify(model, other, x, max_error=9.0).max_error == 9.0
