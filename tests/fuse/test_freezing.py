"""`Frozen` computes what its model computes, by one function only where that is right."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pwrewrite.errors import InputError, RefusedError
from pwrewrite.freezing import Frozen, freeze
from pwrewrite.fused import graphs
from pwrewrite.fused.kernels import CPU_DTYPES
from pwrewrite.fusing import fuse

pytestmark = pytest.mark.skipif(
    torch.float32 not in CPU_DTYPES or not graphs.FUSER, reason="no oneDNN graphs on this machine"
)


class Block(nn.Module):
    """A residual block with squeeze-excite."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.SiLU())
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, 4, 1), nn.ReLU(), nn.Conv2d(4, width, 1), nn.Sigmoid()
        )
        self.last = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return torch.relu(self.last(y * self.squeeze(y)) + x)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU6(), Block(), Block()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)).eval()


@pytest.fixture
def model() -> nn.Module:
    return fuse(network(), torch.randn(2, 3, 20, 20), verify=False).model


def close(a: Tensor, b: Tensor) -> None:
    # Some ten layers, each of which rounds sums of some hundred products.
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def warm(made: nn.Module, x: Tensor) -> Tensor:
    for _ in range(graphs.CALLS):
        out: Tensor = made(x)
    return out


def test_same_values_by_one_function(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = Frozen(model), torch.randn(2, 3, 20, 20)
    with torch.no_grad():
        warm(made, x)
        assert len(made._made) == 1
        other = torch.randn(2, 3, 20, 20)
        kept, want = other.clone(), model(other)
        monkeypatch.setattr(type(model), "forward", lambda *_: pytest.fail("the model ran"))
        first = made(other)
        second = made(torch.randn(2, 3, 20, 20))
        close(first, want)
        assert torch.equal(other, kept)
        assert first.data_ptr() != second.data_ptr()
    with torch.inference_mode():
        close(made(other.clone()), want)


def test_elsewhere_the_model_runs(model: nn.Module) -> None:
    made, x = Frozen(model), torch.randn(2, 3, 20, 20)
    with torch.no_grad():
        warm(made, x)
        assert made._made
        for other in (torch.randn(1, 3, 20, 20), torch.randn(2, 3, 24, 17), x[:, :, ::2], x.clone().requires_grad_()):
            close(made(other), model(other))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert made(x).dtype is model(x).dtype
        with torch.backends.mkldnn.flags(enabled=False):
            close(made(x), model(x))
        close(made(input=x), model(x))
        double = copy.deepcopy(made).double()
        assert not double._made
        close(warm(double, x.double()).float(), made(x))
    out = made(x)
    assert out.requires_grad
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m[0].weight.mul_(2),
        lambda m: m[0].bias.add_(1),
        lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}),
        lambda m: setattr(m[6], "weight", nn.Parameter(m[6].weight * 3)),
        lambda m: setattr(m[6].weight, "data", m[6].weight * 3),
    ],
)
def test_a_changed_weight_is_seen(change: Any, model: nn.Module) -> None:
    made, x = Frozen(model), torch.randn(2, 3, 20, 20)
    with torch.no_grad():
        before = warm(made, x)
        assert made._made
        change(model)
        want = model(x)
        assert not torch.allclose(before, want)
        close(made(x), want)
        close(warm(made, x), want)
        assert made._made
        close(made(x), want)


def test_copies_pickles_and_modes(model: nn.Module) -> None:
    made, x = Frozen(model), torch.randn(2, 3, 20, 20)
    with torch.no_grad():
        want = warm(made, x)
        assert list(made.state_dict()) == [f"model.{name}" for name in model.state_dict()]
        again = copy.deepcopy(made)
        assert not again._made
        close(warm(again, x), want)
        file = io.BytesIO()
        torch.save(made.state_dict(), file)
        file.seek(0)
        again.load_state_dict(torch.load(file))
        close(again(x), want)
        assert not made.train()._made
        assert not made.eval()._made
        for n in range(1, 80):
            made(x[:1].expand(n, -1, -1, -1))
        assert not made._made
        for n in range(1, 6):
            warm(made, torch.randn(n, 3, 20, 20))
        assert made.shapes == [(torch.Size([n, 3, 20, 20]),) for n in (1, 2)]


@pytest.mark.parametrize(
    "odd",
    [
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.GELU(approximate="tanh")),
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout(0.5).train()),
    ],
)
def test_what_cannot_be_one_function(odd: nn.Module) -> None:
    made, x = Frozen(odd.eval()), torch.randn(2, 3, 20, 20)
    with torch.no_grad():
        for _ in range(4):
            close(warm(made, x), odd(x))


class Two(nn.Module):
    """Several outputs in containers."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.body(x)
        return {"out": y, "more": (y + 1, [y * 2], None), "name": "two"}


def test_several_outputs(model: nn.Module) -> None:
    made, x = freeze(Two(model).eval(), torch.randn(2, 3, 20, 20)), torch.randn(2, 3, 20, 20)
    assert made.shapes
    with torch.no_grad():
        found, want = made(x), made.model(x)
    assert found["name"] == "two"
    assert found["more"][2] is None
    assert type(found["more"]) is tuple
    close(found["out"], want["out"])
    close(found["more"][0], want["more"][0])
    close(found["more"][1][0], want["more"][1][0])


def test_a_layer_that_is_called_again_and_again_in_one_run() -> None:
    class Repeats(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act = nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(graphs.CALLS - 1):  # in the middle of tracing it would be due for a partition of its own
                x = self.act(self.conv(x))
            return x

    x = torch.randn(1, 8, 9, 9)
    model = fuse(Repeats().eval(), x, verify=False).model
    for _ in range(3):
        made = freeze(copy.deepcopy(model), x)
        with torch.no_grad():
            close(made(x), model(x))


def test_hooks_stay_with_the_model(model: nn.Module) -> None:
    x, seen = torch.randn(2, 3, 20, 20), list[int]()
    next(iter(model.children())).register_forward_hook(lambda *_: seen.append(1))
    made = freeze(model)
    with torch.no_grad():
        warm(made, x)
        warm(made, x)
    assert len(seen) == 2 * graphs.CALLS
    assert "has hooks" in next(iter(made.refused.values()))


class ByValue(nn.Module):
    """Its code asks for values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y if x.sum() > 0 else -y


class Counts(ByValue):
    """Writes to a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.conv(x) * self.calls
        return out


class Replaces(Counts):
    """Puts another buffer in place of its own."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        out: Tensor = self.conv(x) * self.calls
        return out


class Writes(ByValue):
    """Writes to its input."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x.relu_())
        return out


class Random(ByValue):
    """Returns something else each time."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x + torch.rand_like(x))
        return out


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (ByValue, "needs values"),
        (Counts, "writes to its own buffers"),
        (Replaces, "writes to its own buffers"),
        (Writes, "its inputs"),
        (Random, "other values"),
        (nn.Identity, "a view of an input"),
    ],
)
def test_code_that_is_no_function_stays_as_it_is(kind: type[nn.Module], reason: str) -> None:
    model, x = kind().eval(), torch.randn(2, 3, 8, 8)
    with pytest.raises(RefusedError) as caught:
        freeze(model, x.clone())
    assert reason in str(caught.value)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    made, other = freeze(model), copy.deepcopy(model)
    assert made.make(x.clone()) is not None
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    with torch.no_grad():
        for sign in (1, -1, 1, 1, -1, 1):
            given = sign * torch.rand(2, 3, 8, 8)
            torch.manual_seed(1)
            found = made(given.clone())
            torch.manual_seed(1)
            close(found, other(given.clone()))
    assert not made.shapes


def test_what_freeze_refuses(model: nn.Module) -> None:
    x = torch.randn(2, 3, 20, 20)
    with pytest.raises(RefusedError, match="training mode"):
        freeze(copy.deepcopy(model).train())
    with pytest.raises(RefusedError, match="float32 weights on the CPU"):
        freeze(copy.deepcopy(model).double())
    with pytest.raises(RefusedError, match="float32 weights on the CPU"):
        freeze(copy.deepcopy(model).to("meta"))
    with pytest.raises(RefusedError, match="cannot be frozen"):
        freeze(model, x.double())
    with pytest.raises(InputError, match="positional tensors"):
        freeze(model, {"input": x})
    made = freeze(model, (x,))
    assert made.shapes == [(x.shape,)]
    assert made.refused == {}


def test_without_the_fuser(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "FUSER", False)
    with pytest.raises(RefusedError, match="no oneDNN graphs"):
        freeze(model)
