"""Layers as partitions of oneDNN's graph interface: the same values, taken where they may be, and dropped in time."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pwrewrite.core.convolution import ConvSpec
from pwrewrite.layers import ACTIVATIONS, PointwiseActivation, tracing
from pwrewrite.layers.kernels import CPU_DTYPES
from pwrewrite.layers.partitions import CALLS

pytestmark = pytest.mark.skipif(
    torch.float32 not in CPU_DTYPES or not tracing.FUSER, reason="no oneDNN graphs on this machine"
)
NUMBERS = {"hardtanh": (-0.5, 0.75), "leaky_relu": (0.2,)}
last = torch.channels_last


def layer(activation: str = "relu", conv: Any = None, **flags: Any) -> PointwiseActivation:
    torch.manual_seed(0)
    conv = conv or nn.Conv2d(8, 12, 3, stride=2, padding=1)
    flags = {"channels_last": True, **flags}
    made: PointwiseActivation = PointwiseActivation.of_layer(
        conv, ConvSpec.of_module(conv), activation, NUMBERS.get(activation, ()), **flags
    )
    return made.eval()


def wanted(made: PointwiseActivation, x: Tensor, residual: Tensor | None = None) -> Tensor:
    return made._plain(x, residual)


def partitions(made: PointwiseActivation) -> int:
    return 0 if made._packed is None else len(made._packed.compiled)


def warm(made: PointwiseActivation, *inputs: Tensor) -> Tensor:
    for _ in range(CALLS):
        out: Tensor = made(*inputs)
    return out


def close(a: Tensor, b: Tensor) -> None:
    # Two orders of summing some hundred products of about 1, and an activation of slope at most 1.2.
    torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(name: str) -> None:
    made, x = layer(name), torch.randn(2, 8, 9, 11)
    with torch.no_grad():
        warm(made, x)
        other = torch.randn(2, 8, 9, 11)
        out = made(other)
        close(out, wanted(made, other))
        assert out.is_contiguous(memory_format=last)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 4, 1, bias=False),
        nn.Conv2d(8, 4, 3, dilation=2, groups=2, padding="same"),
        nn.Conv2d(8, 4, 4, padding="same"),
        nn.Conv2d(8, 4, (1, 5), padding=(0, 2), padding_mode="reflect"),
        nn.Conv2d(8, 4, 3, padding=(1, 2), padding_mode="circular", stride=(1, 2)),
        nn.Conv2d(3, 16, 7, stride=2, padding=3),
    ],
)
@pytest.mark.parametrize("size", [(9, 11), (1, 1), (14, 14)])
def test_every_kind_of_layer(conv: nn.Conv2d, size: tuple[int, int]) -> None:
    made = layer("relu", conv)
    if size == (1, 1) and (made._pad is not None or conv.padding == "same"):
        size = (5, 5)
    x = torch.randn(2, conv.in_channels, *size)
    with torch.no_grad():
        warm(made, x)
        close(made(x), wanted(made, x))
        close(made(x[:1]), wanted(made, x[:1]))


@pytest.mark.parametrize("name", ["relu", "none"])
def test_residual_is_read_and_kept(name: str) -> None:
    made = layer(name, nn.Conv2d(8, 8, 1))
    x, other = torch.randn(2, 8, 9, 9), torch.randn(2, 8, 9, 9).contiguous(memory_format=last)
    with torch.no_grad():
        warm(made, x, other)
        assert partitions(made) == 1
        kept, same = other.clone(), x.contiguous(memory_format=last)
        before = same.clone()
        for _ in range(3):
            close(made(x, other), wanted(made, x, other))
            close(made(same, same), wanted(made, same, same))
        assert torch.equal(other, kept)
        assert torch.equal(same, before)
        for odd in (torch.randn(1, 8, 9, 9), torch.randn(8, 1, 1), torch.randn(2, 8, 9, 9).double()):
            close(made(x, odd).float(), wanted(made, x, odd).float())
        close(made(x), wanted(made, x))


def test_taken_only_where_that_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = layer(), torch.randn(2, 8, 9, 9)
    taken: list[bool] = []
    real = PointwiseActivation._by_partition

    def watched(*arguments: Any) -> Tensor | None:
        out = real(*arguments)
        taken.append(out is not None)
        return out

    monkeypatch.setattr(PointwiseActivation, "_by_partition", watched)

    def is_taken(x: Tensor) -> bool:
        taken.clear()
        close(made(x).float(), wanted(made, x).float())
        return any(taken)

    with torch.no_grad():
        warm(made, x)
        assert partitions(made) == 1
        assert is_taken(x)
        assert is_taken(x.contiguous(memory_format=last))
        assert is_taken(x[:, :, :, torch.arange(9)])
        assert not is_taken(x[:1])
        assert not is_taken(x[0])
        assert not is_taken(x.clone().requires_grad_())
        with torch.backends.mkldnn.flags(enabled=False):
            assert not is_taken(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert made(x).dtype is torch.bfloat16
        threads = torch.get_num_threads()
        torch.set_num_threads(threads + 1)
        try:
            assert not is_taken(x)
        finally:
            torch.set_num_threads(threads)
        close(torch.func.vmap(made)(x.unsqueeze(1)).squeeze(1), wanted(made, x))
    with torch.inference_mode():
        assert is_taken(torch.randn(2, 8, 9, 9))
    assert not is_taken(x)
    assert made(x).requires_grad
    monkeypatch.undo()
    frozen = made.requires_grad_(False)
    close(frozen(x), wanted(made, x))
    assert frozen(x.clone().requires_grad_()).requires_grad
    layout = layer(channels_last=False)
    with torch.no_grad():
        warm(layout, x.contiguous(memory_format=last))
        assert partitions(layout) == 1
        assert layout(x).is_contiguous()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.weight.mul_(2),
        lambda m: m.bias.add_(1),
        lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}),
        lambda m: setattr(m, "weight", nn.Parameter(m.weight * 3)),
        lambda m: setattr(m, "bias", nn.Parameter(m.bias * 3)),
        lambda m: setattr(m, "bias", None),
        lambda m: (m.weight.data.mul_(2), m.train(), m.eval()),
        lambda m: setattr(m.weight, "data", m.weight * 3),
        lambda m: setattr(m.bias, "data", m.bias * 3),
        lambda m: m.double().float(),
    ],
)
def test_a_changed_parameter_is_seen(change: Any) -> None:
    made, x = layer(), torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        warm(made, x)
        assert partitions(made) == 1
        change(made)
        for _ in range(CALLS + 1):
            close(made(x), F.relu(F.conv2d(x, made.weight, made.bias, 2, 1)))
        assert partitions(made) == 1


def test_parameters_passed_in() -> None:
    made, x = layer(), torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        warm(made, x)
        nothing = {name: torch.zeros_like(value) for name, value in made.named_parameters()}
        zero = torch.func.functional_call(made, nothing, x)
        assert not zero.any()
        close(made(x), wanted(made, x))


def test_few_are_kept_and_none_is_made_too_early() -> None:
    made = layer()
    with torch.no_grad():
        for n in range(1, 90):
            x = torch.randn(n, 8, 5, 5)
            close(made(x), wanted(made, x))
        assert partitions(made) == 0
        for n in range(1, 9):
            warm(made, torch.randn(n, 8, 5, 5))
        assert 0 < partitions(made) <= 4
        for n in range(1, 9):
            x = torch.randn(n, 8, 5, 5)
            close(made(x), wanted(made, x))


def test_copies_and_pickles_have_none() -> None:
    made, x = layer("silu"), torch.randn(1, 8, 9, 9)
    with torch.no_grad():
        want = warm(made, x)
        assert partitions(made) == 1
        file = io.BytesIO()
        torch.save(made, file)
        file.seek(0)
        for other in (copy.deepcopy(made), torch.load(file, weights_only=False)):
            assert other._packed is None
            close(other(x), want)
        assert list(made.state_dict()) == ["weight", "bias"]


def test_settings_of_torch_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = layer(), torch.randn(1, 8, 9, 9)
    before = torch._C._jit_llga_enabled()
    with torch.no_grad():
        warm(made, x)
    assert torch._C._jit_llga_enabled() is before
    monkeypatch.setattr(tracing, "FUSER", False)
    other = layer()
    with torch.no_grad():
        close(warm(other, x), wanted(other, x))
    assert partitions(other) == 0


def test_where_the_fuser_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no fuser")

    monkeypatch.setattr(tracing._C, "_create_graph_by_tracing", broken)
    made, x = layer(), torch.randn(1, 8, 9, 9)
    with torch.no_grad():
        for _ in range(3):
            close(warm(made, x), wanted(made, x))
    assert partitions(made) == 0


def test_in_several_threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    made, xs = layer(), [torch.randn(1, 8, 9, 9) for _ in range(4)]

    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            for _ in range(40):
                out: Tensor = made(x)
        return out

    with torch.no_grad():
        want = [wanted(made, x) for x in xs]
    with ThreadPoolExecutor(4) as pool:
        for out, right in zip(pool.map(run, xs), want):
            close(out, right)


def test_exported_and_compiled_after_warming() -> None:
    made, x = layer(), torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        want = warm(made, x)
        close(torch.compile(made, backend="eager", fullgraph=True)(x), want)
    program = torch.export.export(made, (x,))
    close(program.module()(x), want)


def test_a_map_of_one_position_is_a_product() -> None:
    for name in ACTIVATIONS:
        made, x = layer(name, nn.Conv2d(8, 12, 1)), torch.randn(3, 8, 1, 1)
        with torch.no_grad():
            out = made(x)
            close(out, wanted(made, x))
            assert out.shape == (3, 12, 1, 1)
            close(made(x, out), wanted(made, x, out))


def test_negative_views_are_negative() -> None:
    """``torch._neg_view`` marks a tensor whose memory holds the opposite, which a kernel does not see."""
    made, x = layer(), torch.randn(1, 8, 9, 9).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        want = made(-x)
        torch.testing.assert_close(made(torch._neg_view(x)), want)
        warm(made, x)
        torch.testing.assert_close(made(torch._neg_view(x)), want)
