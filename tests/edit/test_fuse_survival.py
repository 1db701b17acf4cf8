"""Code that asks how wide a map is, and does something else where a merge made it narrower: that merge is left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.passes.infra.pass_base import PassResult

from pwrewrite.core.plan import SkipReason
from pwrewrite.passes import MergePointwise, as_graph_pass
from pwrewrite.workflows.fuse import fuse

X = torch.randn(2, 4, 8, 8)


class Asks(nn.Module):
    """Two layers that cost less as one; the code looks at the map between them."""

    def __init__(self, way: int) -> None:
        super().__init__()
        self.wide, self.narrow, self.way = nn.Conv2d(4, 16, 1), nn.Conv2d(16, 4, 1), way
        self.act, self.other = nn.Tanh(), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        y = self.wide(x)
        width = y.shape[1]
        x = self.narrow(y)
        if self.way == 0:
            return self.act(x) if width > 8 else x  # type: ignore[no-any-return]
        if self.way == 1:
            return x.sin() if width > 8 else x.cos()
        if self.way == 2:
            return x * (width**-0.5)
        if self.way == 3:
            return (self.act if width > 8 else self.other)(x)  # type: ignore[no-any-return]
        return x * (len(y.shape) + width * 0)


def model(way: int) -> nn.Sequential:
    torch.manual_seed(0)
    first, last = (nn.Sequential(nn.Conv2d(4, 12, 1), nn.Conv2d(12, 4, 1)) for _ in range(2))
    return nn.Sequential(first, nn.ELU(), Asks(way), nn.ELU(), last).eval()


@pytest.mark.parametrize(
    ("way", "said"),
    [
        (0, "tanh in 2.act no longer run"),
        (1, "sin in 2 no longer run, cos in 2 run now"),
        (2, "mul in 2 would be called with other numbers"),
        (3, "sigmoid in 2.other run now"),
    ],
)
def test_only_that_merge_is_left(way: int, said: str) -> None:
    before = model(way)
    done = fuse(before, X, [MergePointwise()])
    assert [edit.path for edit in done.edits] == ["0.1", "4.1"]
    (skip,) = [skip for skip in done.plan.skips if skip.path == "2.narrow"]
    assert skip.reason is SkipReason.BROKE_MODEL
    assert said in skip.detail
    assert done.report.passed, done.report.verification
    assert fuse(before, X).report.passed


def test_code_that_does_not_care_is_merged() -> None:
    done = fuse(model(4), X, [MergePointwise()])
    assert [edit.path for edit in done.edits] == ["0.1", "2.narrow", "4.1"]
    assert done.report.passed


def test_a_pass_of_torch_sees_it_too() -> None:
    class Root(torch.fx.GraphModule):
        """A graph module one child of which is code."""

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_module("inner", (x,)))
    found: Any = as_graph_pass(MergePointwise(), X)(Root(nn.ModuleDict({"inner": model(0)}), graph).eval())
    assert isinstance(found, PassResult)
    notes = found.graph_module.meta["pwrewrite"]
    assert [edit.path for edit in notes["edits"]] == ["inner.0.1", "inner.4.1"]
    assert [str(skip.reason) for skip in notes["skips"] if skip.path == "inner.2.narrow"] == ["broke-model"]
