"""The fusing passes as torch's own pass infrastructure runs them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_manager import PassManager

from pwrewrite.core.errors import RefusedError
from pwrewrite.layers import PointwiseActivation
from pwrewrite.passes import FUSING, FoldBatchNorm, FusePointwiseActivation, as_graph_pass

X = torch.randn(1, 3, 8, 8)


def net() -> nn.Module:
    layers = (
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.Dropout(),
        nn.ReLU(),
        nn.Conv2d(16, 16, 1),
        nn.Conv2d(16, 4, 1),
    )
    model = nn.Sequential(*layers).eval()
    model[1].running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
    return model


def test_all_of_them_in_a_pass_manager() -> None:
    model = net()
    traced = fx.symbolic_trace(model)
    result = PassManager(passes=[as_graph_pass(kind(), X) for kind in FUSING])(traced)
    fused = result.graph_module
    with torch.no_grad():
        torch.testing.assert_close(fused(X), model(X), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(traced(X), model(X))
    edits = fused.meta["pwrewrite"]["edits"]
    assert Counter(edit.op.action for edit in edits) == {
        "remove": 1, "fold": 1, "merge": 1, "fuse": 1, "channels-last": 1,
    }  # fmt: skip
    assert isinstance(fused.get_submodule("0"), PointwiseActivation)


def test_training_mode_is_refused_where_it_matters() -> None:
    traced = fx.symbolic_trace(net()).train()
    with pytest.raises(RefusedError, match=r"training mode[\s\S]*eval"):
        as_graph_pass(FoldBatchNorm(), X)(traced)
    assert not as_graph_pass(FusePointwiseActivation(), X)(traced).modified
