"""`PointwiseActivation` behaves as the layer and the activation that it stands for, wherever it is used."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from pwrewrite.core.convolution import ConvSpec
from pwrewrite.core.errors import UsageError
from pwrewrite.core.operations import OPERATIONS, Operation
from pwrewrite.forms.specs import linear_spec
from pwrewrite.layers import ACTIVATIONS, PointwiseActivation, kernels
from pwrewrite.layers.kernels import CPU_DTYPES

NUMBERS = {"hardtanh": (-0.5, 0.75), "leaky_relu": (0.2,)}
fused_here = pytest.mark.skipif(torch.float32 not in CPU_DTYPES, reason="no oneDNN on this machine")


def layer(activation: str = "relu", conv: Any = None, **flags: Any) -> tuple[nn.Module, PointwiseActivation]:
    torch.manual_seed(0)
    conv = conv or nn.Conv2d(8, 12, 3, stride=2, padding=1)
    spec = ConvSpec.of_module(conv) if not isinstance(conv, nn.Linear) else linear_spec(
        conv.in_features, conv.out_features, conv.bias is not None
    )  # fmt: skip
    made = PointwiseActivation.of_layer(conv, spec, activation, NUMBERS.get(activation, ()), **flags)
    return conv.eval(), made.eval()


def reference(conv: nn.Module, activation: str, x: Tensor) -> Tensor:
    entry = ACTIVATIONS[activation]
    return entry.plain(conv(x), *NUMBERS.get(activation, ()))


def close(a: Tensor, b: Tensor, factor: float = 1.0) -> None:
    # Two orders of summing some hundred products of about 1, and an activation of slope at most 1.2.
    torch.testing.assert_close(a, b, atol=2e-6 * factor, rtol=1e-5 * factor)


def calls_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records which fused kernels run."""
    from pwrewrite.layers import kernels as module

    calls: list[str] = []
    for name in ("_unary", "_binary"):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _r=real, _n=name, **k: (calls.append(_n), _r(*a, **k))[1])
    return calls


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(name: str, channels_last: bool) -> None:
    conv, made = layer(name, channels_last=channels_last)
    x = torch.randn(2, 8, 9, 11)
    with torch.no_grad():
        close(made(x), reference(conv, name, x))
        close(made(x), reference(conv, name, x))
        wide = torch.randn(3, 8, 20, 7)
        close(made(wide), reference(conv, name, wide))
        close(made(wide[0]), reference(conv, name, wide[0]))
    close(made(x), reference(conv, name, x))


@fused_here
@pytest.mark.parametrize("conv", [nn.Conv2d(8, 12, 3), nn.Conv3d(8, 8, 2), nn.Linear(8, 5)], ids=["2d", "3d", "linear"])
@pytest.mark.parametrize("row", [row for row in OPERATIONS if row.kernel is not None], ids=lambda row: row.name)
def test_the_kernel_of_every_row_is_its_operation(
    row: Operation, conv: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row that names a kernel: it runs, once and nothing else, and does what the row's torch function does."""
    assert row.kernel is not None
    numbers = NUMBERS.get(row.kernel.name, ())
    _, made = layer(row.kernel.name, conv)
    acts: list[str] = []
    for name in ("convolve", "multiply"):
        real = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, _r=real: (acts.append(a[-1][0]), _r(*a))[1])
    monkeypatch.setattr(made, "_plain", lambda *a: pytest.fail("the plain operation ran"))
    x = torch.randn(6, 8) if isinstance(conv, nn.Linear) else torch.randn(2, 8, *(5, 6, 4)[: made.spec.dims])
    with torch.no_grad():
        out = made(x)
        assert acts == [row.kernel.attr]
        before = conv(x)
        assert bool((before > 0).any()) and bool((before < 0).any())  # noqa: PT018 (both sides of every bend)
        for name in row.functions:
            plain = getattr(F, name, None) or getattr(torch, name)
            close(out, plain(before, *numbers))
        for module in row.modules:
            close(out, module(*numbers)(before))
        if not row.functions:
            close(out, F.gelu(before, approximate="tanh"))
            assert row.name == "gelu_tanh"


@fused_here
@pytest.mark.parametrize(
    ("conv", "batch", "kernels_run"),
    [
        (nn.Conv2d(4, 4, 1), 1, []),  # torch itself does not take oneDNN
        (nn.Conv2d(4, 4, 3, padding=1), 1, []),
        (nn.Conv2d(4, 4, 3, padding=1), 2, ["none"]),  # the activation runs behind the kernel
        (nn.Conv2d(4, 32, 3, padding=1), 1, ["swish"]),
        (nn.Conv2d(4, 8, 3, padding=1), 2, ["swish"]),
    ],
)
def test_few_channels_are_not_brought_into_blocks(
    conv: nn.Conv2d, batch: int, kernels_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        plain, made = layer("silu", conv)
        acts: list[str] = []
        real = kernels.convolve
        monkeypatch.setattr(kernels, "convolve", lambda *a: (acts.append(a[-1][0]), real(*a))[1])
        x = torch.randn(batch, 4, 8, 8)
        with torch.no_grad():
            close(made(x), F.silu(plain(x)))
    finally:
        torch.set_num_threads(threads)
    assert acts == kernels_run


@fused_here
@pytest.mark.parametrize("conv", [nn.Conv2d(8, 12, 3), nn.Linear(8, 5)], ids=["2d", "linear"])
@pytest.mark.parametrize("wrong", [{"attr": "silu"}, {"attr": "hardtanh"}, {"attr": "gelu", "algorithm": "fast"}])
def test_a_wrong_kernel_is_an_error_that_names_the_row(
    wrong: dict[str, str], conv: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ACTIVATIONS, "silu", replace(ACTIVATIONS["silu"], **wrong))  # type: ignore[arg-type]
    _, made = layer("silu", conv)
    x = torch.randn(2, 8) if isinstance(conv, nn.Linear) else torch.randn(2, 8, 5, 5)
    with torch.no_grad(), pytest.raises(UsageError, match="kernel of the operation 'silu'") as raised:
        made(x)
    assert raised.value.where == "the row 'silu' of pwrewrite.core.operations"
    assert repr(wrong["attr"]) in str(raised.value.got)


@fused_here
def test_any_other_error_of_a_kernel_stays_torchs_own() -> None:
    _, made = layer("silu")
    with torch.no_grad(), pytest.raises(RuntimeError, match="8") as raised:
        made(torch.randn(2, 5, 9, 9))
    assert not isinstance(raised.value, UsageError)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 4, 1, bias=False),
        nn.Conv2d(8, 4, 3, dilation=2, groups=2, padding="same"),
        nn.Conv2d(8, 4, 4, padding="same"),
        nn.Conv2d(8, 4, 3, padding="valid"),
        nn.Conv2d(8, 4, (1, 5), padding=(0, 2), padding_mode="reflect"),
        nn.Conv2d(8, 4, 3, padding=(1, 2), padding_mode="circular", stride=(1, 2)),
        nn.Conv1d(8, 4, 3, padding=1),
        nn.Conv3d(8, 4, 3, padding=1),
        nn.Linear(8, 5),
        nn.Linear(8, 5, bias=False),
    ],
)
def test_every_kind_of_layer(conv: nn.Module, channels_last: bool) -> None:
    plain, made = layer("relu", conv, channels_last=channels_last)
    dims = {"Conv1d": 1, "Conv3d": 3, "Linear": -1}.get(type(conv).__name__, 2)
    x = torch.randn(2, 3, 8) if dims < 0 else torch.randn(2, 8, *(9, 11, 7)[:dims])
    with torch.no_grad():
        close(made(x), F.relu(plain(x)))
        close(made(x[:1]), F.relu(plain(x[:1])))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 1, 9, 9), (1, 8, 1, 1), (2, 8, 1, 1), (2, 1, 1, 1), (2, 8, 9, 9)])
def test_an_output_is_laid_out_as_the_plain_layers(shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
    """One channel, or one position, is in both formats at once; ``view`` behind it goes by the strides."""
    conv, fused = layer("sigmoid", nn.Conv2d(shape[1], 24, 3, padding=2))
    x = torch.empty(shape, memory_format=memory_format).normal_()
    with torch.no_grad():
        plain, found = torch.sigmoid(conv(x)), [fused(x) for _ in range(12)]
    assert {each.stride() for each in found} == {plain.stride()}
    close(found[-1], plain)


@fused_here
@pytest.mark.parametrize("name", ["relu", "none", "silu"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_residual(name: str, channels_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    conv, made = layer(name, channels_last=channels_last)
    calls = calls_of(monkeypatch)
    x, other = torch.randn(2, 8, 9, 9), torch.randn(2, 12, 5, 5)
    kept = other.clone()
    with torch.no_grad():
        close(made(x, other), ACTIVATIONS[name].plain(conv(x) + other))
        assert torch.equal(other, kept)
        assert calls == ([] if name == "silu" else ["_binary"])
        for odd in (torch.randn(1, 12, 5, 5), torch.randn(12, 1, 1), torch.randn(2, 12, 1, 1)):
            close(made(x, odd), ACTIVATIONS[name].plain(conv(x) + odd))
        assert calls == ([] if name == "silu" else ["_binary"])


@fused_here
def test_fused_only_where_that_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    conv, made = layer("relu")
    calls = calls_of(monkeypatch)
    x = torch.randn(2, 8, 9, 9)
    want = F.relu(conv(x)).detach()

    def plainly() -> None:
        close(made(x), want)
        assert not calls

    plainly()  # a gradient is needed
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            plainly()
        assert counter.get_total_flops() == 2 * 2 * 12 * 8 * 9 * 25
        with torch.backends.mkldnn.flags(enabled=False):
            plainly()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert made(x).dtype is torch.bfloat16
        assert not calls
        close(torch.func.vmap(made)(x.unsqueeze(1)).squeeze(1), want)
        assert torch.jit.trace(made, x, check_trace=False)(x).shape == want.shape
        meta = copy.deepcopy(made).to("meta")
        assert meta(x.to("meta")).shape == want.shape
        assert made(x[:0]).shape == (0, 12, 5, 5)
        assert not calls
        double = copy.deepcopy(made).double()
        close(double(x.double()).float(), want)
        assert not calls
        close(made(x), want)
        assert calls == ["_unary"]
    with torch.inference_mode():
        close(made(x), want)
        close(made(x.contiguous(memory_format=torch.channels_last)), want)
    assert len(calls) == 3
    jvp = torch.func.jvp(made, (x,), (torch.ones_like(x),))[1]
    close(jvp, torch.func.jvp(lambda t: F.relu(conv(t)), (x,), (torch.ones_like(x),))[1], 4)
    frozen = made.requires_grad_(False)
    assert frozen(x.requires_grad_()).requires_grad
    assert len(calls) == 3


def test_gradients_are_those_of_the_layer() -> None:
    conv, made = layer("silu")
    conv = copy.deepcopy(conv)
    x = torch.randn(2, 8, 9, 9)
    made.train()(x).square().sum().backward()
    F.silu(conv(x)).square().sum().backward()
    close(made.weight.grad, conv.weight.grad, 50)  # type: ignore[arg-type]
    close(made.bias.grad, conv.bias.grad, 50)  # type: ignore[union-attr,arg-type]


@fused_here
@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.weight.mul_(2),
        lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}),
        lambda m: setattr(m, "weight", nn.Parameter(m.weight * 3)),
        lambda m: (m.weight.data.mul_(2), m.train(), m.eval()),
        lambda m: setattr(m.weight, "data", m.weight * 3),
        lambda m: m.double().float(),
    ],
)
def test_a_changed_weight_is_packed_anew(change: Any) -> None:
    _, made = layer("relu", channels_last=True)
    x = torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        made(x)
        assert made._packed is not None
        change(made)
        close(made(x), F.relu(F.conv2d(x, made.weight, made.bias, 2, 1)))
        for n in range(3, 12):  # more shapes than are kept
            x = torch.randn(n, 8, 9, 9)
            close(made(x), F.relu(F.conv2d(x, made.weight, made.bias, 2, 1)))


def test_copies_pickles_and_state() -> None:
    conv, made = layer("sigmoid", channels_last=True)
    x = torch.randn(1, 8, 9, 9)
    with torch.no_grad():
        want = made(x)
        assert list(made.state_dict()) == ["weight", "bias"]
        file = io.BytesIO()
        torch.save(made, file)
        file.seek(0)
        for other in (copy.deepcopy(made), torch.load(file, weights_only=False)):
            assert other._packed is None
            close(other(x), want)
    fresh = PointwiseActivation(made.spec, "sigmoid")
    fresh.load_state_dict(conv.state_dict())
    close(fresh(x), torch.sigmoid(conv(x)))
    with torch.no_grad():
        close(torch.func.functional_call(made, {"weight": made.weight * 0}, x), torch.sigmoid(made.bias)[None, :, None, None].expand_as(want))  # type: ignore[arg-type] # fmt: skip # noqa: E501
    assert (fresh.in_channels, fresh.out_channels, fresh.kernel_size, fresh.stride) == (8, 12, (3, 3), (2, 2))
    assert (fresh.padding, fresh.dilation, fresh.groups, fresh.padding_mode) == ((1, 1), (1, 1), 1, "zeros")
    assert "sigmoid" in repr(fresh)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    conv, made = layer("relu", channels_last=True)
    x = torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        want = F.relu(conv(x))
        out = made.to(dtype)(x.to(dtype))
    assert out.dtype is dtype
    # Inputs, weights and the result are rounded once each, to 8 or 11 bits; values are of the order of 1.
    torch.testing.assert_close(out.float(), want, atol=0.05, rtol=0.05)


def test_export_and_compile() -> None:
    conv, made = layer("relu", channels_last=True)
    x = torch.randn(2, 8, 9, 9)
    want = F.relu(conv(x)).detach()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(made, (x,), dynamic_shapes=({0: batch},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file).module()
    close(again(x), want)
    assert again(torch.randn(5, 8, 9, 9)).shape[0] == 5
    with torch.no_grad():
        close(torch.compile(made, backend="eager", fullgraph=True)(x), want)
    traced = torch.fx.symbolic_trace(nn.Sequential(made))
    close(traced(x), want)


def test_same_padding_of_each_input() -> None:
    conv = nn.Conv2d(4, 6, 3, stride=2, bias=False)
    made = PointwiseActivation.of_layer(conv, ConvSpec.of_module(conv), "relu", same=True)
    for size in ((8, 9), (7, 12)):
        x = torch.randn(1, 4, *size)
        pads = [max((-(-n // 2) - 1) * 2 + 3 - n, 0) for n in size]
        padded = F.pad(x, (pads[1] // 2, pads[1] - pads[1] // 2, pads[0] // 2, pads[0] - pads[0] // 2))
        with torch.no_grad():
            close(made(x), F.relu(conv(padded)))
        assert made(x).shape[2:] == tuple(-(-n // 2) for n in size)


def test_refusals() -> None:
    spec = ConvSpec.of_module(nn.Conv2d(3, 4, 1))
    with pytest.raises(UsageError, match="unknown activation"):
        PointwiseActivation(spec, "mish")
    with pytest.raises(UsageError, match="takes 2 number"):
        PointwiseActivation(spec, "hardtanh", (1.0,))
    with pytest.raises(UsageError, match="transposed"):
        PointwiseActivation(ConvSpec.of_module(nn.ConvTranspose2d(3, 4, 1)))
