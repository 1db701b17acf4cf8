"""No pass moves a layer across a write into what it reads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pwrewrite


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
