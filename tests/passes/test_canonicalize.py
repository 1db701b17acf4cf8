"""`CanonicalizeActivations`: what is known for an activation by what it computes, what is not, and what stays."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pwrewrite
from pwrewrite.core.errors import PlanError
from pwrewrite.layers.written_out import written_out

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Function(nn.Module):
    """A module whose code is a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class HSigmoid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU6(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + 3) / 6  # type: ignore[no-any-return]


class HSwish(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sigmoid = HSigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.sigmoid(x)  # type: ignore[no-any-return]


class SavingMemory(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return gradient * s * (1 + x * (1 - s))  # type: ignore[no-any-return]


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clamp(0, 6)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Swish(nn.Module):
    beta = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


class Learned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.slope * x)


class OtherInTraining(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x) if self.training else x * torch.sigmoid(x)


def tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


KNOWN: list[tuple[nn.Module, str, tuple[float, ...], bool]] = [
    (Swish(), "silu", (), False),
    (Function(lambda x: x.mul_(x.sigmoid())), "silu", (), True),
    (Function(SavingMemory.apply), "silu", (), False),
    (HSigmoid(), "hardsigmoid", (), False),
    (HSwish(), "hardswish", (), False),
    (Function(lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))), "gelu", (), False),
    (Function(tanh_gelu), "gelu_tanh", (), False),
    (Function(lambda x: 1 / (1 + torch.exp(-x))), "sigmoid", (), False),
    (Function(lambda x: torch.max(x, torch.zeros_like(x))), "relu", (), False),
    (Function(lambda x: x.clamp(min=0).clamp(max=6)), "relu6", (), False),
    (Function(lambda x: torch.where(x > 0, x, 0.2 * x)), "leaky_relu", (0.2,), False),
    (Function(lambda x: x.clamp(-2, 2)), "hardtanh", (-2.0, 2.0), False),
]


@pytest.mark.parametrize(("module", "name", "numbers", "in_place"), KNOWN, ids=[each[1] for each in KNOWN])
def test_what_is_written_out_is_known(module: nn.Module, name: str, numbers: tuple[float, ...], in_place: bool) -> None:
    found = written_out(module)
    assert found is not None
    assert found[0][0] == name
    assert found[0][1] == pytest.approx(numbers)
    assert found[1] is in_place


UNKNOWN = {
    "another slope": Function(lambda x: x * torch.sigmoid(1.702 * x)),
    "constants of few digits": Function(lambda x: x * torch.sigmoid(1.0001 * x)),
    "other far away": Function(lambda x: (x * torch.sigmoid(x)).clamp(max=1e4)),
    "decides by all values": Function(lambda x: x * torch.sigmoid(x) if x.abs().max() < 1e3 else x * 0),
    "reads its neighbours": Function(lambda x: x * torch.softmax(x, -1)),
    "in training another": OtherInTraining(),
    "gradients of its own": Function(StraightThrough.apply),
    "no gradient": Function(lambda x: (x * torch.sigmoid(x)).detach()),
    "a number for NaN": Function(lambda x: (x * torch.sigmoid(x)).nan_to_num(0.0)),
    "learned": Learned(),
    "another shape": Function(lambda x: (x * torch.sigmoid(x)).flatten(1)),
    "in place, and a copy": Function(lambda x: x.mul_(x.sigmoid()).clone()),
    "draws": Function(lambda x: x * torch.sigmoid(x) * (torch.rand_like(x) > -1) + 1e-3 * torch.rand_like(x)),
    "an identity": Function(lambda x: x),
    "torch's own": nn.SiLU(),
}


@pytest.mark.parametrize("module", UNKNOWN.values(), ids=UNKNOWN)
def test_what_differs_anywhere_is_none(module: nn.Module) -> None:
    state = torch.get_rng_state()
    assert written_out(module) is None
    assert torch.equal(torch.get_rng_state(), state)


class Net(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.act, self.head = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), act, nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.head(self.act(self.norm(self.conv(x)))))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "module", [Swish(), HSwish(), Function(SavingMemory.apply)], ids=["swish", "h-swish", "saving"]
)
def test_it_is_fused_with_the_layer_before(module: nn.Module, tmp_path: Any) -> None:
    model = Net(module).eval()
    fused = pwrewrite.fuse(model, X)
    assert fused.report.passed
    assert [e.op.action for e in fused.edits] == ["canonicalize", "fold", "fuse", "fuse", "channels-last"]
    assert fused.after["kernels"] == 2
    with torch.no_grad():
        assert torch.allclose(fused.model(X), model(X), atol=1e-5)
        loaded = pwrewrite.load(fused.save(tmp_path / "fused"), Net(module).eval())
        assert torch.equal(loaded(X), fused.model(X))


class ByName(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(x=self.conv(x)))  # type: ignore[no-any-return]


class ReadsIt(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.conv(x))) * self.act.beta  # type: ignore[no-any-return, operator]


class AsksWhatItIs(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.head(self.act(x) if isinstance(self.act, Swish) else x)  # type: ignore[no-any-return]


class HoldsIt(Net):
    def __init__(self, act: nn.Module) -> None:
        super().__init__(act)
        self.acts = [act]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.acts[0](self.conv(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [ByName, ReadsIt, AsksWhatItIs, HoldsIt])
def test_code_that_needs_the_module_itself_keeps_it(kind: type[Net]) -> None:
    model = kind(Swish()).eval()
    fused = pwrewrite.fuse(model, X)
    assert fused.report.passed
    assert isinstance(fused.model.get_submodule("act"), Swish)
    assert "act" in [skip.path for skip in fused.report.skips]


def test_code_with_gradients_of_its_own_stays() -> None:
    """A graph of the code would have those of what its forward calls."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return StraightThrough.apply(self.conv(x)) + x  # type: ignore[no-any-return]

    for model in (nn.Sequential(nn.Conv2d(3, 3, 1), Function(StraightThrough.apply)), nn.Sequential(Block())):
        fused = pwrewrite.fuse(model.eval(), X)
        assert fused.report.passed
        assert "fuse" not in [e.op.action for e in fused.edits]


def test_a_plan_for_another_activation_is_refused() -> None:
    plan = pwrewrite.fuse(Net(Swish()).eval(), X).plan
    with pytest.raises(PlanError, match="another activation"):
        pwrewrite.apply(Net(HSwish()).eval(), plan)
    data = json.loads(plan.to_json())
    data["ops"][0]["settings"]["activation"] = "hardswish"
    with pytest.raises(PlanError, match="another activation"):
        pwrewrite.apply(Net(Swish()).eval(), pwrewrite.Plan.from_json(json.dumps(data)))
