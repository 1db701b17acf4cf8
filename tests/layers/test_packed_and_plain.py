"""What fused layers hold in memory, what they do with NaN, and the plain modules that they give back."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pwrewrite.core.convolution import ConvSpec
from pwrewrite.layers import ACTIVATIONS, PointwiseActivation, kernels, packing
from pwrewrite.layers.packing import Compiled, Packed, Pool
from pwrewrite.layers.partitions import CALLS

NUMBERS = {"hardtanh": (-0.5, 0.75), "leaky_relu": (0.2,)}
fused_here = pytest.mark.skipif(torch.float32 not in kernels.CPU_DTYPES, reason="no oneDNN on this machine")


def layer(activation: str, conv: Any = None, **flags: bool) -> PointwiseActivation:
    torch.manual_seed(0)
    conv = conv or nn.Conv2d(8, 12, 3, stride=2, padding=1)
    spec = ConvSpec.of_module(conv)
    return PointwiseActivation.of_layer(conv, spec, activation, NUMBERS.get(activation, ()), **flags).eval()


@fused_here
def test_shapes_share_one_packed_form() -> None:
    made = layer("relu", nn.Conv2d(32, 64, 3, padding=1), channels_last=True)
    with torch.no_grad():
        for n in (8, 16, 24, 32, 40, 48, 56, 64, 72):
            made(torch.randn(1, 32, n, 8))
    assert made._packed is not None
    assert len({id(form) for _, form in made._packed._forms.values()}) <= 2


def test_partitions_are_bounded_and_the_oldest_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.zeros(10)
    holders = [Packed(weight, None) for _ in range(3)]
    pool = Pool(2 * weight.nbytes)
    monkeypatch.setattr(packing, "PARTITIONS", pool)
    entries = [Compiled(lambda x: x, 1, weight.nbytes) for _ in holders]
    key = (torch.Size([1]), True)
    for holder, entry in zip(holders, entries):
        holder.add(key, entry)
    assert [len(holder.compiled) for holder in holders] == [1, 1, 0]  # the first two are in use
    entries[1].used -= 60
    holders[2].add(key, entries[2])
    assert [len(holder.compiled) for holder in holders] == [1, 0, 1]
    del holder, holders[0]
    assert pool.nbytes == weight.nbytes


@fused_here
@pytest.mark.parametrize("shape", [(2, 8, 9, 9), (2, 8, 1, 1)])
@pytest.mark.parametrize("name", sorted(kernels.LOSES_NAN))
def test_nan_stays_nan(name: str, shape: tuple[int, ...]) -> None:
    conv = nn.Conv2d(8, 12, 1) if shape[-1] == 1 else nn.Conv2d(8, 12, 3, stride=2, padding=1)
    made, x = layer(name, conv, channels_last=True, keep_nan=True), torch.randn(shape)
    x[0, 0, 0, 0] = float("nan")
    with torch.no_grad():
        want = ACTIVATIONS[name].plain(conv(x), *NUMBERS.get(name, ()))
        assert want.isnan().any()
        for _ in range(CALLS + 2):
            torch.testing.assert_close(made(x), want, equal_nan=True, atol=2e-6, rtol=1e-5)


@fused_here
def test_nan_stays_nan_behind_a_sum() -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1)
    made, x, other = (
        layer("relu", conv, channels_last=True, keep_nan=True),
        torch.randn(1, 8, 9, 9),
        torch.randn(1, 8, 9, 9),
    )
    other[0, 0, 4, 4] = float("nan")
    kept = other.clone()
    with torch.no_grad():
        want = torch.relu(conv(x) + other)
        for _ in range(CALLS + 2):
            torch.testing.assert_close(made(x, other), want, equal_nan=True, atol=2e-6, rtol=1e-5)
    assert torch.equal(other.nan_to_num(), kept.nan_to_num())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_plain_modules(name: str) -> None:
    made, x = layer(name, keep_nan=True), torch.randn(2, 8, 9, 11)
    plain, act = made.unfused()
    assert type(plain) is nn.Conv2d
    assert plain.weight is made.weight
    assert (act is None) is (name == "none")
    out = plain(x) if act is None else act(plain(x))
    torch.testing.assert_close(out, made(x))


class Residual(nn.Module):
    """Calls a fused layer with and without a residual."""

    def __init__(self, made: nn.Module) -> None:
        super().__init__()
        self.made = made

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        out: Tensor = self.made(x, other)
        return out


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_scripted(name: str) -> None:
    made, x, other = layer(name), torch.randn(2, 8, 9, 11), torch.randn(2, 12, 5, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Sequential(made))
        adding = torch.jit.script(Residual(made))
    torch.testing.assert_close(scripted(x), made(x))
    torch.testing.assert_close(adding(x, other), made(x, other))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(8, 4, 3, stride=2, bias=False),
        nn.Conv2d(8, 4, 4, padding="same"),
        nn.Conv1d(8, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv3d(8, 4, 3, groups=4),
    ],
)
def test_scripted_layers_of_every_kind(conv: Any) -> None:
    same = isinstance(conv, nn.Conv2d) and conv.padding == (0, 0)
    made = layer("relu", conv, same=same)
    scripted = torch.jit.script(made)
    x = torch.randn(2, 8, *(9, 7, 8)[: made.spec.dims])
    torch.testing.assert_close(scripted(x), made(x))
