"""Passes among torch's own fx passes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.passes.infra.pass_manager import PassManager
from torch.fx.passes.shape_prop import ShapeProp

from pwrewrite.core.errors import UsageError
from pwrewrite.core.plan import SkipReason
from pwrewrite.layers.factorized import Factorized, FactorizedLinear
from pwrewrite.passes import FactorizeLinear, InsertBottleneck, as_graph_pass


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3))
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        x = nn.functional.conv2d(x, self.weight)
        return self.fc(x.mean((2, 3)))


def drop_relu(graph_module: fx.GraphModule) -> PassResult:
    """Someone else's pass."""
    for node in graph_module.graph.nodes:
        if node.target is torch.relu:
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)
            return PassResult(graph_module, True)
    return PassResult(graph_module, False)


def test_a_pass_in_torchs_pass_manager() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 6, 6)
    traced = fx.symbolic_trace(Model().eval())
    before = traced.code, list(traced.state_dict())
    exact = InsertBottleneck(1.0, allow_growth=True)
    manager = PassManager(
        passes=[as_graph_pass(exact, x), drop_relu, as_graph_pass(FactorizeLinear(2), x)],
        run_checks_after_each_pass=True,
    )
    result = manager(traced)
    changed = result.graph_module
    assert result.modified
    assert (traced.code, list(traced.state_dict())) == before
    assert isinstance(changed.conv, Factorized)
    assert isinstance(changed.fc, FactorizedLinear)
    assert "weight_bottleneck" in dict(changed.named_children())
    assert "relu" not in changed.code
    said = changed.meta["pwrewrite"]
    assert [edit.path for edit in said["edits"]] == ["conv", "weight", "fc"]
    assert all(skip.reason is SkipReason.EXCLUDED for skip in said["skips"])


def test_full_rank_in_the_manager_is_the_same_function() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 6, 6)
    traced = fx.symbolic_trace(Model().eval())
    result = as_graph_pass(InsertBottleneck(1.0, allow_growth=True), x)(traced)
    # float32, two factorised layers, sums of fewer than 100 products each
    assert torch.allclose(result.graph_module(x), traced(x), atol=1e-5)


def test_inputs_from_the_placeholders() -> None:
    traced = fx.symbolic_trace(Model().eval())
    run = as_graph_pass(InsertBottleneck(4))
    assert run.__name__ == "insert-bottleneck"
    with pytest.raises(UsageError, match="'x' says no shape"):
        run(traced)
    ShapeProp(traced).propagate(torch.zeros(2, 8, 6, 6))
    assert run(traced).modified


def test_inputs_from_fake_values() -> None:
    traced = fx.symbolic_trace(Model().eval())
    for node in traced.graph.nodes:
        node.meta["val"] = torch.empty(2, 8, 6, 6, device="meta")
    assert as_graph_pass(InsertBottleneck(4))(traced).modified


def test_nothing_to_do_returns_what_came_in() -> None:
    traced = fx.symbolic_trace(nn.Sequential(nn.ReLU()))
    result = as_graph_pass(InsertBottleneck(), torch.zeros(1, 2))(traced)
    assert result.graph_module is traced
    assert not result.modified
