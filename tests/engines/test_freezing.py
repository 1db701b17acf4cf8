"""`Frozen` computes what its model computes, by one function only where that is right."""

from __future__ import annotations

import copy
import io
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pwrewrite.core.errors import InputError, RefusedError
from pwrewrite.engines.frozen import Frozen, freeze
from pwrewrite.layers import tracing
from pwrewrite.layers.kernels import CPU_DTYPES
from pwrewrite.layers.partitions import CALLS
from pwrewrite.workflows.fuse import fuse

pytestmark = pytest.mark.skipif(
    torch.float32 not in CPU_DTYPES or not tracing.FUSER, reason="no oneDNN graphs on this machine"
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
    for _ in range(CALLS):
        out: Tensor = made(x)
    return out


def test_same_values_by_one_function(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = Frozen(model), torch.randn(2, 3, 20, 20)
    with torch.no_grad():
        warm(made, x)
        assert len(made.compiled) == 1
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
        assert made.compiled
        for other in (torch.randn(1, 3, 20, 20), torch.randn(2, 3, 24, 17), x[:, :, ::2], x.clone().requires_grad_()):
            close(made(other), model(other))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert made(x).dtype is model(x).dtype
        with torch.backends.mkldnn.flags(enabled=False):
            close(made(x), model(x))
        close(made(input=x), model(x))
        double = copy.deepcopy(made).double()
        assert not double.compiled
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
        assert made.compiled
        change(model)
        want = model(x)
        assert not torch.allclose(before, want)
        close(made(x), want)
        close(warm(made, x), want)
        assert made.compiled
        close(made(x), want)


def test_copies_pickles_and_modes(model: nn.Module) -> None:
    made, x = Frozen(model), torch.randn(2, 3, 20, 20)
    with torch.no_grad():
        want = warm(made, x)
        assert list(made.state_dict()) == [f"model.{name}" for name in model.state_dict()]
        again = copy.deepcopy(made)
        assert not again.compiled
        close(warm(again, x), want)
        file = io.BytesIO()
        torch.save(made.state_dict(), file)
        file.seek(0)
        again.load_state_dict(torch.load(file))
        close(again(x), want)
        assert not made.train().compiled
        assert not made.eval().compiled
        for n in range(1, 80):
            made(x[:1].expand(n, -1, -1, -1))
        assert not made.compiled
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
            for _ in range(CALLS - 1):  # in the middle of tracing it would be due for a partition of its own
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
    assert len(seen) == 2 * CALLS
    assert next(iter(made.refused.values())).endswith(" has hooks (remove them first)")


@pytest.mark.parametrize("pool", [F.max_pool2d, F.avg_pool2d])
@pytest.mark.parametrize("kernel", [2, (2, 2)])
def test_pools_that_step_by_their_kernel(pool: Any, kernel: Any) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = pool(F.relu(self.conv(x)), kernel)
            return y

    model, x = Pooled().eval(), torch.randn(2, 3, 20, 20)
    with torch.no_grad():
        close(freeze(model, x)(x), model(x))


class Unrolls(nn.Module):
    """Counts on a size in place (Ryali et al. 2023, Hiera), or norms without a bias (Yu et al. 2022, MetaFormer)."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.norm, self.how = nn.Linear(12, 12), nn.LayerNorm(12, bias=False), how

    def forward(self, x: Tensor) -> Tensor:
        y, n = self.linear(x), x.shape[0]
        if self.how == "norm":
            return self.norm(y)
        y = y.view(n, 4, -1, 12)
        if self.how == "times":
            n *= 4
        elif self.how == "plus":
            n += 3 * x.shape[0]
        else:
            n -= -3 * n
        return y.reshape(n, -1, 12)


@pytest.mark.parametrize("how", ["norm", "times", "plus", "minus"])
def test_what_the_fuser_fails_on_is_written_out(how: str) -> None:
    model, x = Unrolls(how).eval(), torch.randn(2, 16, 12)
    nn.init.uniform_(model.norm.weight, 0.5, 2)
    with torch.no_grad():
        close(freeze(model, x)(x), model(x))


@pytest.mark.parametrize("without", [("weight", "bias"), ("bias",)])
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d])
def test_norms_without_weight_or_bias(kind: type[nn.Module], without: tuple[str, ...]) -> None:
    """As behind the last layer of a network for descriptors (HardNet, SOSNet), where the norm cannot be folded."""
    norm = kind(6)
    for name in without:
        norm.register_parameter(name, None)
    nn.init.uniform_(norm.running_mean, -1, 1)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    flat = kind is nn.BatchNorm1d
    model, x = nn.Sequential(nn.ReLU(), norm).eval(), torch.randn((4, 6) if flat else (4, 6, 8, 8))
    with torch.no_grad():
        close(freeze(model, x)(x), model(x))


def test_inputs_that_no_function_takes_are_named() -> None:
    model, x = nn.Embedding(10, 4).eval(), torch.arange(4)
    with pytest.raises(RefusedError, match=r"given a 4 tensor of int64 on cpu"):
        freeze(model, x)
    made = freeze(model)
    with torch.no_grad():
        assert torch.equal(made(x), model(x))
    assert "int64" in made.refused[(x.shape,)]


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
        (Random, "random numbers"),
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
    monkeypatch.setattr(tracing, "FUSER", False)
    with pytest.raises(RefusedError, match="no oneDNN graphs"):
        freeze(model)


class Calls(nn.Module):
    """A convolution and a function."""

    def __init__(self, function: Any, **held: Any) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 4, 3, padding=1), function
        self.register_buffer("row", torch.arange(1.0, 5.0))
        for name, value in held.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def small(function: Any, **held: Any) -> nn.Module:
    torch.manual_seed(0)
    return Calls(function, **held).eval()


@pytest.mark.parametrize(
    "constant",
    [
        lambda m: torch.tensor([1.0, 2.0]),
        lambda m: torch.arange(4.0),
        lambda m: torch.ones(2, 2).triu(),
        lambda m: m.row * 2,
        lambda m: torch.cat([m.row, m.row]),
    ],
)
def test_outputs_that_are_constants_are_new_each_time(constant: Any) -> None:
    x = torch.randn(1, 3, 8, 8)
    for model in (small(lambda m, t: (m.conv(t), constant(m))), small(lambda m, t: [constant(m)])):
        made = freeze(model, x)
        with torch.no_grad():
            want = model(x)[-1]
            made(x)[-1].add_(1)
            assert torch.equal(made(x)[-1], want)
    model = small(lambda m, t: constant(m))
    made = freeze(model, x)
    with torch.no_grad():
        made(x).add_(1)
        assert torch.equal(made(x), model(x))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda m, x: F.dropout(m.conv(x), 1e-6, training=True), "random numbers"),
        (lambda m, x: m.conv(x) * (1 if x.is_contiguous() else 2), "memory format"),
        (lambda m, x: m.conv(x) * x.stride(1), "memory format"),
        (lambda m, x: (setattr(m, "seen", m.conv(x)), m.seen * 2)[1], "attributes of its own"),
        (lambda m, x: (setattr(m, "calls", m.calls + 1), m.conv(x))[1], "attributes of its own"),
        (lambda m, x: (m.log.append(1), m.conv(x))[1], "attributes of its own"),
    ],
)
def test_more_code_that_is_no_function(function: Any, reason: str) -> None:
    model, x = small(function, calls=0, log=[]), torch.randn(2, 3, 8, 8)
    assert reason in str(Frozen(model).make(x))


@pytest.mark.parametrize("function", [lambda m, x: x + 0, lambda m, x: (lambda y: (y, y * 1))(m.conv(x))])
def test_no_two_outputs_become_one(function: Any) -> None:
    """The interpreter makes one tensor of two that are equal; who writes to one must not change the other."""
    model, x = small(function), torch.randn(2, 3, 8, 8)
    made = Frozen(model)
    assert "share memory" in str(made.make(x))
    with torch.no_grad():
        want = model(x)
        kept, out = x.clone(), made(x)
        first = out if isinstance(out, Tensor) else out[0]
        first.add_(1)
        assert torch.equal(x, kept)
        if not isinstance(out, Tensor):
            close(out[1], want[1])


@pytest.mark.parametrize("rate", [0.0, 1e-9])
def test_attention_draws_where_it_drops(rate: float) -> None:
    def attend(model: Any, x: Tensor) -> Tensor:
        tokens = model.conv(x).flatten(2).transpose(1, 2)
        return F.scaled_dot_product_attention(tokens, tokens, tokens, dropout_p=rate)

    model, x = small(attend), torch.randn(2, 3, 8, 8)
    made = Frozen(model)
    reason = made.make(x)
    assert reason is None if rate == 0 else "random numbers" in str(reason)
    with torch.no_grad():
        close(made(x), model(x))


def test_a_model_that_cannot_be_copied_runs() -> None:
    model, x = small(lambda m, t: m.conv(t), held=threading.Lock()), torch.randn(2, 3, 8, 8)
    made = Frozen(model)
    with torch.no_grad():
        close(warm(made, x), model(x))
    assert "cannot be copied" in made.refused[(x.shape,)]


def test_a_tensor_with_a_gradient_history_is_copied_and_watched() -> None:
    held = torch.ones(1, requires_grad=True) * 2
    model, x = small(lambda m, t: m.conv(t) * m.held, held=held), torch.randn(2, 3, 8, 8)
    made = freeze(model, x)
    with torch.no_grad():
        close(made(x), model(x))
        held.mul_(2)
        close(made(x), model(x))


@pytest.mark.parametrize("width", [1, 3])
def test_strides_that_mean_nothing(width: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(width, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Sigmoid()).eval()
    given = [
        torch.randn(width, 2, 10, 10).transpose(0, 1),
        torch.randn(2, 10, 10, width).permute(0, 3, 1, 2),
        torch.empty_strided((2, width, 10, 10), (1000, 77, 13, 1)).normal_(),
        torch.randn(1).expand(2, width, 10, 10),
        torch._neg_view(torch.randn(2, width, 10, 10)),
        torch._neg_view(torch.randn(2, width, 10, 10).to(memory_format=torch.channels_last)),
    ]
    with torch.no_grad():
        for first in given:
            made = freeze(model, first)
            for x in given:
                close(made(x), model(x))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.table.add_(1),
        lambda m: setattr(m, "table", torch.full((4, 1, 1), 3.0)),
        lambda m: m.tables[0].add_(1),
        lambda m: torch.utils.swap_tensors(m.conv.weight, nn.Parameter(torch.randn(4, 3, 3, 3))),
        lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}, assign=True),
    ],
)
def test_other_tensors_that_change(change: Any) -> None:
    held = {"table": torch.ones(4, 1, 1), "tables": [torch.ones(4, 1, 1)]}
    model = small(lambda m, t: m.conv(t) * m.table + m.tables[0], **held)
    x = torch.randn(2, 3, 8, 8)
    made = freeze(model, x)
    with torch.no_grad():
        change(model)
        close(made(x), model(x))
    assert not made.shapes


def test_the_model_trains_by_itself() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout(0.5)).eval(), torch.randn(2, 3, 8, 8)
    made = freeze(model, x)
    model.train()
    with torch.no_grad():
        assert bool((made(x) == 0).any())
        assert not made.shapes
        model.eval()
        model[1].train()
        assert "training mode" in str(made.make(x))


def test_settings_of_the_whole_process() -> None:
    model, x, seen = small(lambda m, t: m.conv(t) * torch.ones(1)), torch.randn(2, 3, 8, 8), list[int]()
    made = freeze(model, x)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
    try:
        with torch.no_grad():
            made(x)
        assert len(seen) == 3
        assert "hooks" in str(made.make(x))
    finally:
        handle.remove()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            assert made(x).dtype is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_shapes_that_fail_are_not_tried_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    made, tried = Frozen(ByValue().eval()), list[int]()
    make = made.make
    monkeypatch.setattr(made, "make", lambda *inputs: (tried.append(1), make(*inputs))[1])
    with torch.no_grad():
        for _ in range(3):
            for n in range(1, 80):
                warm(made, torch.randn(1, 3, 1, n))
    assert len(tried) == len(made.refused) == 8


def test_a_reset_while_a_function_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small(lambda m, t: m.conv(t)), torch.randn(2, 3, 8, 8)
    made, traced = Frozen(model), tracing.traced

    def slow(*args: Any, **options: Any) -> Any:
        found = traced(*args, **options)
        model.conv = nn.Conv2d(3, 4, 3, padding=1)  # another thread does
        made.eval()
        return found

    monkeypatch.setattr(tracing, "traced", slow)
    made.make(x)
    with torch.no_grad():
        close(made(x), model(x))


def test_threads(model: nn.Module) -> None:
    made, wrong = Frozen(model), list[Any]()

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        try:
            with torch.no_grad():
                for i in range(40):
                    x = torch.randn((1 + seed % 3, 3, 20, 20), generator=generator)
                    close(made(x), model(x))
                    if i == 20 and seed == 0:
                        made.reset()
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert not wrong
    assert not torch._C._jit_llga_enabled()


def test_a_forward_that_holds_the_model_runs_no_more_than_it_is_called() -> None:
    model, x = Counts().eval().requires_grad_(False), torch.randn(2, 3, 8, 8)
    model.forward = lambda x: (model.calls.add_(1), model.conv(x))[1]  # type: ignore[method-assign]
    made = Frozen(model)
    with torch.no_grad():
        for _ in range(5):
            made(x)
    assert model.calls.item() == 5
    assert "forward()" in made.refused[(x.shape,)]


class Sums(nn.Module):
    """Several operations of two tensors behind a convolution, whose other sides are read elsewhere too."""

    def __init__(self, way: int) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == 0:
            return self.a(x) + self.b(x) + x  # type: ignore[no-any-return]
        if self.way == 1:
            return (self.a(x) + self.b(x)) * x  # type: ignore[no-any-return]
        y = torch.relu(self.c(x))
        if self.way == 2:
            return self.a(y) + torch.sigmoid(y) + y  # type: ignore[no-any-return]
        return torch.relu(self.a(y) + self.b(y)) + y


@pytest.mark.parametrize("way", range(4))
def test_sums_behind_a_convolution(way: int) -> None:
    """Some of these crash the process where torch's fuser makes one partition of them (RepViT's blocks)."""
    torch.manual_seed(0)
    model, x = Sums(way).eval(), torch.randn(1, 16, 14, 14)
    made = freeze(model, x)
    with torch.no_grad():
        for given in (x, torch.randn(1, 16, 14, 14)):
            close(made(given), model(given))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout])
def test_dropouts_draw_nothing_in_evaluation(kind: type[nn.Dropout], inplace: bool) -> None:
    """Torch says of those in place that they draw, whatever the mode: mobilenet_v3 and efficientnet were refused."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), kind(0.3, inplace=inplace), nn.Conv2d(8, 4, 1)).eval()
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(freeze(model, (x,))(x), model(x))


class Spectrum(nn.Module):
    """Masks a spectrogram."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(33, 33, 1)
        self.register_buffer("window", torch.hann_window(64))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.stft(x, 64, 16, window=self.window, return_complex=True)
        y = y * torch.sigmoid(self.conv(y.abs()))
        return torch.istft(y, 64, 16, window=self.window, length=x.shape[-1])


def test_code_between_spectra_is_a_function() -> None:
    model, x = Spectrum().eval(), torch.randn(2, 1000)
    made = freeze(model, x)
    assert made.shapes
    with torch.no_grad():
        close(made(x), model(x))


class Twice(nn.Module):
    """Reads values inside twice and returns tensors in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(3, 3, 1) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y = self.first(x)
        return self.second(y), (self.third(y), y)


def test_values_inside_are_compared_as_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """In torch 2.15 the fuser cannot run some graphs with scripted branches whose inner values are a tuple."""
    kinds, gather = [], tracing.gather_outputs

    def seen(graph: Any) -> None:
        gather(graph)
        (value,) = graph.outputs()
        kinds.append((value.node().kind(), len(list(value.node().inputs()))))

    monkeypatch.setattr(tracing, "gather_outputs", seen)
    model, x = Twice().eval(), torch.randn(2, 3, 8, 8)
    made = freeze(model, x)
    assert kinds == [("prim::ListConstruct", 4)]
    with torch.no_grad():
        for mine, theirs in zip(made(x)[1], model(x)[1]):
            close(mine, theirs)


def test_what_the_fuser_says_is_told_without_its_graph() -> None:
    graph = "Schema not found for node.\nwithin the graph:\ngraph(%x : Tensor):\n  return (%x)\n:\n"
    told = tracing._reason(RuntimeError(f"\n{graph}"))
    assert told == "torch's tracer or fuser fails: Schema not found for node."
    ran = RuntimeError("The following operation failed:\nTraceback (most recent call last):\nRuntimeError: too large\n")
    assert tracing._reason(ran) == "torch's tracer or fuser fails: RuntimeError: too large"
