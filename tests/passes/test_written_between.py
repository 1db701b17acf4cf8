"""No pass moves a layer across a write into what it reads, or keeps for the backward pass what is overwritten."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from check_passes import check_pass
from torch import Tensor, nn
from torch.nn import functional as F

import pwrewrite
from pwrewrite import passes
from pwrewrite.capturing import capture
from pwrewrite.core.plan import Op, Skip, SkipReason


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 1)
        self.n, self.d, self.first = nn.BatchNorm2d(12), nn.Dropout(0.3), nn.BatchNorm2d(8)


class InputActivated(Base):
    def forward(self, x: Tensor) -> Tensor:
        t = self.a(x)
        F.relu_(x)
        return self.b(t)  # type: ignore[no-any-return]


class InputAdded(Base):
    def forward(self, x: Tensor) -> Tensor:
        t = self.a(x)
        x += 1
        return self.b(t) + x  # type: ignore[no-any-return]


class BehindANorm(Base):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = x * 1.0
        t = self.a(h)
        h.relu_()
        return self.b(self.n(t)), h


class IntoAView(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x * 1.0
        t = self.a(h)
        h[0].zero_()
        return self.b(t)  # type: ignore[no-any-return]


class IntoAnItem(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x * 1.0
        t = self.a(h)
        h[:, :1] = 0
        return self.b(t)  # type: ignore[no-any-return]


class ByOut(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x * 1.0
        t = self.a(h)
        torch.add(h, 1, out=h)
        return self.b(t)  # type: ignore[no-any-return]


class WithASum(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x * 1.0
        t = self.a(h)
        h.mul_(2)
        return F.relu(self.b(t) + h)


class CalledTwice(Base):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = x * 1.0
        u = self.a(h)
        h.add_(1)
        v = self.a(h)
        return self.b(u), self.b(v)


class DropoutWritten(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x * 1.0
        y = self.d(h)
        y += 1
        return self.b(self.a(h)) * y  # type: ignore[no-any-return]


class NormBefore(Base):
    """The norm's identity would hand on what is written into before the layer behind it runs."""

    def forward(self, x: Tensor) -> Tensor:
        h = x * 1.0
        y = self.first(h)
        h.zero_()
        return self.b(self.a(y))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", Base.__subclasses__(), ids=lambda kind: kind.__name__)
def test_fused_outputs_are_equal(kind: type[Base]) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    if kind is NormBefore:
        model.a = nn.Conv2d(8, 12, 3)
    for norm in (model.n, model.first):
        nn.init.uniform_(norm.running_mean)  # type: ignore[arg-type]
    x = torch.randn(2, 8, 10, 10)
    fused = pwrewrite.fuse(model, x.clone(), thorough=False)
    assert fused.report.passed, fused.report
    with torch.no_grad():
        expected, got = model(x.clone()), fused.model(x.clone())
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


class Overwritten(nn.Module):
    """A layer whose input is overwritten once it ran."""

    def __init__(self, layer: nn.Module, write: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.layer, self.write, self.other = layer, write, nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = x * 1.0
        y = self.layer(h.view(h.shape))
        self.write(h)
        return y, self.other(h.relu())


COPYING: dict[str, Callable[[], nn.Module]] = {
    "padding mode": lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
    "uneven padding": lambda: nn.Conv2d(8, 8, 2, padding="same"),
}
"""Layers that pad a copy, and keep that for their backward pass."""

WRITES: dict[str, Callable[[Tensor], object]] = {
    "method": lambda h: h.mul_(2),
    "function": F.relu_,
    "module": nn.ReLU(inplace=True),
    "view": lambda h: h.chunk(2, 1)[0].zero_(),
    "item": lambda h: h.__setitem__((slice(None), 0), 1.0),
    "out": lambda h: torch.add(h.detach(), 1, out=h.detach()),
}


BOTTLENECK = passes.InsertBottleneck("50%", include=["layer"])


def proposed(model: nn.Module, each: passes.Pass = BOTTLENECK) -> Op | Skip:
    (proposal,) = (p for p in each.propose(capture(model.eval(), torch.zeros(2, 8, 6, 6))) if p.path == "layer")
    return proposal


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("layer", COPYING)
@pytest.mark.parametrize("write", WRITES)
def test_a_layer_keeps_its_backward_pass_where_its_input_is_overwritten(layer: str, write: str) -> None:
    model = Overwritten(COPYING[layer](), WRITES[write])
    first, second = model(torch.randn(2, 8, 6, 6))
    (first.sum() + second.sum()).backward()
    skips = {"layer": (SkipReason.WRITTEN, "overwritten", "out of place"), "other": SkipReason.EXCLUDED}
    check_pass(BOTTLENECK, model.eval(), torch.randn(2, 8, 6, 6), edits={}, skips=skips)


def test_skipping_it_is_what_verification_asks_for() -> None:
    model, x = Overwritten(COPYING["padding mode"](), WRITES["method"]).eval(), torch.randn(2, 8, 6, 6)
    result = pwrewrite.rewrite(model, x, [BOTTLENECK], thorough=False)
    assert result.report.passed, result.report
    assert [skip.reason for skip in result.plan.skips if skip.path == "layer"] == [SkipReason.WRITTEN]


@pytest.mark.parametrize("write", [*WRITES, "none"])
def test_a_layer_that_keeps_its_input_itself_is_rewritten_all_the_same(write: str) -> None:
    """It has no backward pass where its input is overwritten, before as after."""
    assert isinstance(proposed(Overwritten(nn.Conv2d(8, 8, 3, padding=1), WRITES.get(write, Tensor.numel))), Op)


@pytest.mark.parametrize("layer", COPYING)
def test_reading_an_input_again_does_not_count_as_writing(layer: str) -> None:
    assert isinstance(proposed(Overwritten(COPYING[layer](), lambda h: h.view(-1).add(1))), Op)


def test_a_form_whose_first_factor_pads_a_copy_too_is_no_reason_to_skip() -> None:
    model = Overwritten(COPYING["padding mode"](), WRITES["method"])
    assert isinstance(proposed(model, passes.InsertExpansion("50%", include=["layer"])), Op)
