"""Models that froze wrongly, or not at all: caches made on first use, sums behind activations, domains, NaN, forks."""

from __future__ import annotations

import copy
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pwrewrite.core.errors import RefusedError
from pwrewrite.engines import frozen
from pwrewrite.engines.frozen import Frozen, freeze
from pwrewrite.layers import tracing
from pwrewrite.layers.kernels import CPU_DTYPES
from pwrewrite.layers.packing import Pool
from pwrewrite.layers.partitions import CALLS
from pwrewrite.workflows.fuse import fuse

pytestmark = pytest.mark.skipif(
    torch.float32 not in CPU_DTYPES or not tracing.FUSER, reason="no oneDNN graphs on this machine"
)
X = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def close(a: Tensor, b: Tensor) -> None:
    # Some ten layers, each of which rounds sums of some hundred products.
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def both(model: nn.Module, x: Tensor) -> list[nn.Module]:
    """A model as it is, and fused."""
    return [model, fuse(model, x, thorough=False).model]


# ------------------------------------------------------------------------------------------ caches made on first use


class Anchors(nn.Module):
    """A detection head: anchors are made for the first input of a size."""

    shape: Any = None

    def __init__(self, buffer: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.SiLU())
        self.last = nn.Conv2d(16, 9, 1)
        if buffer:
            self.register_buffer("anchors", torch.zeros(0), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.last(self.body(x))
        if self.shape != y.shape:
            rows, columns = (torch.arange(n) + 0.5 for n in y.shape[2:])
            self.anchors = torch.stack(torch.meshgrid(rows, columns, indexing="ij")).flatten(1)
            self.shape = y.shape
        return (y.flatten(2)[:, :2].sigmoid() + self.anchors) * 2, y


@pytest.mark.parametrize("buffer", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_anchors_of_several_sizes(mode: Any, buffer: bool) -> None:
    model, right = Anchors(buffer).eval(), Anchors(buffer).eval()
    made, y = freeze(fuse(model, X).model), torch.randn(1, 3, 64, 32)
    with mode():
        for _ in range(6):
            for x in (X, y):
                for a, b in zip(made(x), right(x)):
                    close(a, b)
    assert made.shapes == [(X.shape,), (y.shape,)]
    assert made.refused == {}
    with torch.no_grad():
        program = torch.export.export(made, (X,))
        close(program.module()(X)[0], right(X)[0])


def test_anchors_at_once() -> None:
    for model in both(Anchors().eval(), X):
        made = freeze(model, X)
        with torch.no_grad():
            close(made(X)[0], Anchors().eval()(X)[0])


class Grows(nn.Module):
    """What it holds depends on every size that it has seen, and so does its output."""

    largest = 0

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] > self.largest:
            self.largest = x.shape[2]
            self.scale = torch.full((1,), float(self.largest))
        out: Tensor = self.conv(x) * self.scale
        return out


def test_a_cache_that_changes_the_output_is_seen() -> None:
    torch.manual_seed(0)
    model, y = Grows().eval(), torch.randn(1, 3, 64, 32)
    made = freeze(model)
    with torch.no_grad():
        for _ in range(CALLS + 1):
            made(X)
        assert made.shapes
        made(y)
        close(made(X), model.conv(X) * 64)


@pytest.mark.parametrize("example", [(), (X,)])
def test_weights_made_in_inference_mode_are_refused_with_the_remedy(example: tuple[Tensor, ...]) -> None:
    """With gradients on, torch itself would refuse to run them: they cannot be saved for a backward pass."""
    with torch.inference_mode():
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).eval()
    with pytest.raises(RefusedError, match=r"made in inference mode(.|\n)*0\.weight(.|\n)*deepcopy"):
        freeze(model, *example)
    for remedy in (copy.deepcopy(model), fuse(model, X, thorough=False).model):
        frozen = freeze(remedy, X)
        with torch.inference_mode():
            expected = model(X)
        for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            with mode():
                close(frozen(X), expected)


def test_a_parameter_replaced_in_inference_mode_gets_no_function() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).eval()
    frozen = freeze(model, X)
    with torch.inference_mode():
        model[0].weight = nn.Parameter(torch.zeros(4, 3, 1, 1))
        for _ in range(CALLS + 1):
            close(frozen(X), model(X))
    assert "0.weight was made in inference mode" in frozen.refused[X.shape,]


def test_a_refused_shape_is_tried_again() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).eval()
    made, handle = Frozen(model), model.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        for _ in range(CALLS):
            made(X)
        assert made.refused
        handle.remove()
        for _ in range(7 * CALLS):
            made(X)
    assert made.shapes
    assert not made.refused


# ---------------------------------------------------------------------------------------------------- sums, in place


class Block(nn.Module):
    """Layers of one class share one SiLU, as detection packages have it."""

    act = nn.SiLU()

    def __init__(self, inputs: int, outputs: int, k: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, k, padding=k // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.bn(self.conv(x)))
        return out


class C2f(nn.Module):
    """Each sum is read by the next block and by the concatenation."""

    def __init__(self, n: int, operation: str = "add") -> None:
        super().__init__()
        self.first = Block(16, 16, 1)
        self.blocks = nn.ModuleList(nn.Sequential(Block(8, 8), Block(8, 8)) for _ in range(n))
        self.last = Block((2 + n) * 8, 16, 1)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(getattr(torch, self.operation)(parts[-1], block(parts[-1])))
        out: Tensor = self.last(torch.cat(parts, 1))
        return out


@pytest.mark.parametrize("operation", ["add", "mul", "sub", "maximum"])
@pytest.mark.parametrize("n", [1, 2])
def test_sums_behind_activations_that_are_read_again(n: int, operation: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(3, 16), C2f(n, operation), C2f(n, operation)).eval()
    for each in both(model, X):
        made = freeze(each, X)
        with torch.no_grad():
            other = torch.randn(1, 3, 32, 32)
            close(made(other), model(other))


def test_an_activation_times_what_it_reads() -> None:
    """A SiLU is a product itself; a second one behind a convolution that both read crashes torch's fuser."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(self.a(x))
            z = y * 1.5 + torch.sigmoid(self.a(x))  # a product with a number, beside another reader of y
            out: Tensor = nn.functional.silu(y) * y / (1 + z.abs()) + y.abs()
            return out

    torch.manual_seed(0)
    model = Gated().eval()
    made = freeze(model, X)
    with torch.no_grad():
        close(made(X), model(X))


@pytest.mark.parametrize("between", [nn.Identity(), nn.ReLU6(), nn.Hardswish()])
@pytest.mark.parametrize("groups", [1, 2, 32])
def test_depthwise_behind_grouped_pointwise(groups: int, between: nn.Module) -> None:
    """Such a pair is one kernel of oneDNN only without groups; torch's fuser asks it for one all the same."""
    torch.manual_seed(0)
    layers = nn.Conv2d(32, 32, 1, groups=groups), between, nn.Conv2d(32, 32, 3, padding=1, groups=32)
    model, x = nn.Sequential(*layers, nn.Conv2d(32, 16, 1)).eval(), torch.randn(1, 32, 14, 14)
    for each in both(model, x):
        close(freeze(each, x)(x), model(x))


def test_what_large_values_leave_that_cancel_each_other() -> None:
    """Corners of boxes that an untrained head puts in one place: their distance is rounding, and read twice."""

    class Boxes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.SiLU())
            self.conv, self.mean = nn.Conv2d(32, 64, 1, bias=False), nn.Conv2d(16, 1, 1, bias=False)
            self.conv.weight.data *= 1e-4
            self.mean.weight.data[:] = torch.arange(16.0).view(1, 16, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            chances = self.conv(self.body(x)).view(len(x), 4, 16, -1).transpose(1, 2).softmax(1)
            first, second = self.mean(chances).view(len(x), 4, -1).chunk(2, 1)
            left, right = ((second - first) / 2).split(1, 1)
            return torch.cat((left * 0.5 - right, left + right * 0.5, first, second), 1)

    torch.manual_seed(0)
    model, x = Boxes().eval(), torch.randn(1, 8, 8, 8)
    torch.testing.assert_close(freeze(model, x)(x), model(x), atol=1e-5, rtol=0.0)


def test_a_constant_is_not_written() -> None:
    """A sum with a parameter of the output's size, which the fuser might take for memory of its own."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.table = nn.Conv2d(3, 8, 3, padding=1), nn.Parameter(torch.randn(1, 8, 32, 32))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.conv(x) + self.table)

    model = Positions().eval()
    kept, made = model.table.detach().clone(), freeze(model, X)
    with torch.no_grad():
        for _ in range(3):
            close(made(X), model(X))
    assert torch.equal(model.table, kept)


class InPlace(nn.Module):
    """Adds in place to what an activation made."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.c, self.d = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, padding=1)
        self.a, self.e = nn.ReLU(inplace), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.c(x)
        y = self.a(self.d(h))
        y += h
        y.mul_(0.5)
        y[:, :4] += 1
        out: Tensor = self.e(self.a(y))
        return out


@pytest.mark.parametrize("inplace", [False, True])
def test_operations_in_place(inplace: bool) -> None:
    torch.manual_seed(0)
    model = InPlace(inplace).eval()
    for each in both(model, X):
        made = freeze(each, X)
        with torch.no_grad():
            close(made(X), model(X))


# ------------------------------------------------------------------------------------------ numbers and scalars


class Head(nn.Module):
    """A function of a convolution's output."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.function = nn.Conv2d(3, 8, 3), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.conv(x))


@pytest.mark.parametrize(
    "function",
    [
        lambda z: z.pow(2).mean() * 0.25,
        lambda z: (z.sum() * 0.25).sigmoid(),
        lambda z: z[0, 0, 0, 0] / 2 + 1,
        lambda z: ((z.sum().exp() + 1).sqrt().sigmoid() * 2).tanh(),
        lambda z: torch.add(z.sum(), z.mean(), alpha=2),
        lambda z: z.sum().mul_(0.5).add_(1),
        lambda z: (z.relu(), torch.stack([z.sum() * 2, z.std() / 3])),
        lambda z: torch.sigmoid(nn.functional.avg_pool2d(z, 2) * z.mean()) * z.max(),
        lambda z: nn.functional.silu(z.mean()) * 2,
    ],
)
def test_numbers_without_axes(function: Callable[[Tensor], Any]) -> None:
    """The fuser gives a scaled scalar an axis, which its readers and callers do not expect."""
    model = Head(function).eval()
    made = freeze(model, X)
    with torch.no_grad():
        other = torch.randn(1, 3, 32, 32)
        torch.testing.assert_close(made(other), model(other), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "function",
    [
        lambda z: z.flatten(1).argmax(1) * 0.5 + 1,
        lambda z: z.argmax() * 2,
        lambda z: z.argmax() / 2 + 1,
        lambda z: (z > 0) * 2.5,
        lambda z: z * torch.tensor(2.5, dtype=torch.float64),
    ],
)
def test_numbers_of_other_dtypes(function: Callable[[Tensor], Tensor]) -> None:
    """The fuser makes a number one of the first operand's dtype: 0.5 becomes 0 beside whole numbers."""
    model = Head(function).eval()
    made = freeze(model, X)
    with torch.no_grad():
        torch.testing.assert_close(made(X), model(X), atol=1e-5, rtol=1e-4)


def test_sizes_that_are_divided() -> None:
    """Windows, as a Swin transformer has them; the width of a head stands in front of a product of matrices."""

    def windows(z: Tensor) -> Tensor:
        n, c, h, w = z.shape
        tiles = z.view(n, c, h // 5, 5, w // 5, 5).permute(0, 2, 4, 3, 5, 1).reshape(h // 5 * (w // 5), 25, c)
        q = tiles.reshape(-1, 25, 2, c // 2).transpose(1, 2)
        scores = (q * (c // 2) ** -0.5).matmul(q.transpose(-2, -1)) + h % 7
        return scores.softmax(-1)

    model = Head(windows).eval()
    made = freeze(model, X)
    with torch.no_grad():
        torch.testing.assert_close(made(X), model(X), atol=1e-5, rtol=1e-4)


def test_heads_side_by_side_in_one_image() -> None:
    """The stride of a lone image is a row's then, which a product's second operand must not show to the fuser."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.q, self.k, self.v = (nn.Conv2d(3, 256, 1) for _ in range(3))
            self.talk, self.listen = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (each(x).reshape(len(x), 8, 32, -1) for each in (self.q, self.k, self.v))
            scores = self.talk(q.permute(0, 1, 3, 2) @ k.permute(0, 1, 2, 3)).softmax(-1)
            out: Tensor = self.listen(scores) @ v.permute(0, 1, 3, 2)
            return out

    for batch in (1, 2):
        model, x = Attention().eval(), X[..., :7, :7].repeat(batch, 1, 1, 1)
        made = freeze(model, x)
        with torch.no_grad():
            close(made(x), model(x))


# ------------------------------------------------------------------------------------------------- domains and NaN


class Spectrogram(nn.Module):
    """Takes powers, which are never negative."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU()]
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(torch.log(x + 1e-6))
        return out


@pytest.mark.parametrize("x", [torch.rand(1, 1, 24, 24), torch.ones(1, 1, 24, 24), torch.zeros(1, 1, 24, 24)])
def test_inputs_to_compare_on_are_of_the_model_s_domain(x: Tensor) -> None:
    torch.manual_seed(0)
    model = Spectrogram().eval()
    for each in both(model, torch.rand(1, 1, 24, 24)):
        made = freeze(each, x)
        with torch.no_grad():
            given = torch.rand(1, 1, 24, 24)
            close(made(given), model(given))


def test_where_all_is_nan_nothing_was_compared() -> None:
    with pytest.raises(RefusedError, match="no finite value"):
        freeze(Spectrogram().eval(), -torch.ones(1, 1, 24, 24))


def relus() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)]
    return nn.Sequential(*layers, nn.ReLU6(), nn.MaxPool2d(2), nn.Conv2d(16, 16, 1), nn.Hardtanh()).eval()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_in_the_input_stays(bad: float) -> None:
    model, one = relus(), X.clone()
    one[0, 0, 4, 4] = bad
    for each in both(model, X):
        made = freeze(each, X)
        with torch.no_grad():
            for x in (one, torch.full_like(X, bad)):
                torch.testing.assert_close(made(x), model(x), equal_nan=True, atol=1e-5, rtol=1e-4)


def test_nan_that_arises_inside_stays_on_request() -> None:
    class Divides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = relus()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.body(torch.sqrt(x))
            return out

    model = Divides().eval()
    made = freeze(model, X.abs(), keep_nan=True)
    assert made.shapes
    with torch.no_grad():
        torch.testing.assert_close(made(X), model(X), equal_nan=True, atol=1e-5, rtol=1e-4)
        close(made(X.abs()), model(X.abs()))


# ------------------------------------------------------------------------------------------------ memory and forks


def test_functions_of_all_models_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [freeze(nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU()).eval()) for _ in range(4)]
    size = sum(p.nbytes for p in models[0].parameters())
    monkeypatch.setattr(frozen, "FUNCTIONS", Pool(2 * size))
    assert [model.make(X) is None for model in models] == [True, True, False, False]  # the first two are in use
    for model in models[:2]:
        for function in model.compiled.values():
            function.used -= 60
    assert models[2].make(X) is None
    assert [len(model.compiled) for model in models] == [0, 1, 1, 0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_while_a_function_is_made() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        small, made, stop = freeze(relus()), freeze(relus()), threading.Event()

        def work() -> None:
            while not stop.is_set():
                made.reset()
                made.make(X)

        thread = threading.Thread(target=work)
        thread.start()
        for _ in range(4):
            time.sleep(0.05)
            child = os.fork()
            if child == 0:
                with torch.no_grad():
                    for _ in range(CALLS + 1):
                        small(X)
                os._exit(0 if small.shapes else 1)
            end = time.monotonic() + 60
            while (done := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < end:
                time.sleep(0.01)
            if done[0] == 0:
                os.kill(child, 9)
                os.waitpid(child, 0)
            assert done == (child, 0)
    finally:
        stop.set()
        thread.join()
        torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_old_weight_norm_is_named_with_its_remedy() -> None:
    model = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 3))).eval()
    with pytest.raises(RefusedError, match="WeightNorm of the older kind"):
        freeze(model, torch.randn(1, 3, 8, 8))


class Nearest(nn.Module):
    """The nearest vectors of a code book, how far they are off, and their numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.then, self.book = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Embedding(16, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.then(self.first(x))
        index = (y.flatten(2).transpose(1, 2) @ self.book.weight.t()).max(-1)[1]
        found = self.book(index).transpose(1, 2).view_as(y)
        return found, nn.functional.mse_loss(y, found), index


def test_outputs_that_are_whole_numbers() -> None:
    model, x = Nearest().eval(), torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    made = freeze(model, x)
    with torch.no_grad():
        for found, right in zip(made(x), model(x)):
            torch.testing.assert_close(found, right)


def test_outputs_that_rounding_turns_over_are_named_so() -> None:
    class Chaotic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3))

        def forward(self, x: Tensor) -> Tensor:
            return (self.body(x) * 1e8).sin()

    with pytest.raises(RefusedError, match="rounding alone changes its outputs"):
        freeze(Chaotic().eval(), X)
