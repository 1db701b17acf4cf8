"""Cost, saving and reloading, gradients."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from verify_models import APPROXIMATE, EXACT, check, edit, edited, failed, full_rank, net, rough

from pwrewrite.capturing import capture, info
from pwrewrite.core.cost import Cost
from pwrewrite.verifying import verify
from pwrewrite.verifying.training import buffer_differences

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


class Versioned(nn.Sequential):
    """Reads what its own version wrote, and keeps the number of its version in one more tensor."""

    _version = 3

    def __init__(self, layers: nn.Sequential, extra: Tensor) -> None:
        super().__init__(*layers)
        self.register_buffer("extra", extra)

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *others: Any) -> None:
        assert metadata["version"] == 3
        super()._load_from_state_dict(state, prefix, metadata, *others)


def test_a_state_keeps_its_versions_and_tensors_of_every_kind() -> None:
    ones = torch.ones(2, 3)
    kinds = ones.to_sparse(), ones.to(torch.complex64).conj(), ones.bool(), ones.bfloat16(), ones.T, torch.tensor(3)
    for extra in kinds:
        versioned = edited(net(), make=lambda conv, extra=extra: Versioned(full_rank(conv), extra))
        result = verify(net(), versioned, X, edits=EXACT)
        assert failed(result) <= ({"state_dict"} if extra.is_sparse else set()), result.failures


def test_a_class_that_cannot_be_read_without_trust_is_found() -> None:
    class Own(torch.Tensor):
        pass

    class Holds(nn.Sequential):
        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[prefix + "own"] = torch.ones(3).as_subclass(Own)

        def _load_from_state_dict(self, state: Any, prefix: str, *others: Any) -> None:
            state.pop(prefix + "own")

    result = verify(net(), edited(net(), make=lambda conv: Holds(*full_rank(conv))), X, edits=EXACT)
    assert failed(result) == {"state_dict"}


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


class InTraining(nn.Sequential):
    """Does something else in training, in real runs."""

    def __init__(self, layers: nn.Sequential, change: Any) -> None:
        super().__init__(*layers)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return self.change(y) if self.training and y.untyped_storage().data_ptr() else y


def refuses(y: Tensor) -> Tensor:
    raise ValueError("not in training")


def test_what_is_wrong_in_training_alone_fails_an_approximate_rewrite_too() -> None:
    wrong = {
        "shapes (train)": [refuses, lambda y: y[..., 1:]],
        "finite (train)": [lambda y: y / 0],
        "gradients": [lambda y: y.detach(), lambda y: y + 0 * (y * 0).sqrt()],
    }
    for name, changes in wrong.items():
        for change in changes:
            other = edited(net(), make=lambda conv, change=change: InTraining(full_rank(conv), change))
            result = verify(net(), other, X, edits=APPROXIMATE)
            assert name in failed(result), name
            assert failed(result) <= {name, "gradients"}, name
    fine = edited(net(), make=lambda conv: InTraining(full_rank(conv), lambda y: y * 2))
    result = verify(net(), fine, X, edits=APPROXIMATE)
    assert result.passed, result.failures
    assert [c.name for c in result.checks][-3:] == ["shapes (train)", "finite (train)", "gradients"]
    assert check(result, "gradients").detail == "11 parameters get one"


def test_what_the_original_does_in_training_is_no_failure() -> None:
    def both(change: Any) -> tuple[nn.Module, nn.Module]:
        original = edited(net(), make=lambda conv: InTraining(nn.Sequential(conv), change))
        return original, edited(original, "conv.0")

    for change in refuses, lambda y: y.detach():
        result = verify(*both(change), X, edits=(edit("conv.0", None),))
        assert result.passed, result.failures


def test_an_approximate_rewrite_may_leave_frozen_what_was() -> None:
    model = net()
    model.tail.weight.requires_grad_(False)
    assert verify(model, rough(model), X, edits=APPROXIMATE).passed
    other = rough(net())
    other.tail.weight.requires_grad_(False)
    result = verify(net(), other, X, edits=APPROXIMATE)
    assert failed(result) == {"gradients"}
    assert "tail.weight got a gradient before" in check(result, "gradients").detail


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


def test_buffers_that_hold_infinities_are_compared() -> None:
    """A causal mask is full of them, and the same ones are no difference."""
    mask = torch.full((3, 3), -torch.inf).triu(1)
    old = {"mask": mask, "norm.mean": torch.tensor([1.0, torch.nan])}
    assert buffer_differences(old, {name: each.clone() for name, each in old.items()}, 1e-6) == []
    other = {"mask": torch.zeros(3, 3), "norm.mean": torch.tensor([1.5, torch.nan])}
    assert [each.split(" by ")[0] for each in buffer_differences(old, other, 1e-6)] == [
        "buffers of the model differ",
        "buffers of norm differ",
    ]
