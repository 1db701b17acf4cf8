"""`rewrite` and `make_plan` in Python: passes in order, one plan, one skip a layer, names that follow."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pwrewrite
from pwrewrite.core.errors import OutputError, UsageError, VerificationError
from pwrewrite.core.plan import Plan, SkipReason
from pwrewrite.passes import FactorizeLinear, FactorizePointwise, InsertBottleneck, InsertReduction
from pwrewrite.workflows.rewrite import join_names

X = torch.randn(2, 8, 10, 10, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    ).eval()  # fmt: skip


def test_one_bottleneck() -> None:
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = pwrewrite.rewrite(model, X, [InsertBottleneck(rank=0.5)])
    assert made.report.passed, made.report.verification
    assert [edit.path for edit in made.edits] == ["0", "2"]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert made.report.after["params"] == sum(p.numel() for p in made.model.parameters())
    assert "Structure  verified" in str(made.report)


def test_the_default_is_a_bottleneck() -> None:
    assert pwrewrite.rewrite(net(), X, verify=False).plan.ops[0].pass_name == "insert-bottleneck"


def test_passes_and_a_plan_exclude_each_other() -> None:
    made = pwrewrite.make_plan(net(), X)
    with pytest.raises(UsageError, match="exclude each other"):
        pwrewrite.rewrite(net(), X, [InsertBottleneck()], plan=made.plan)


def test_a_plan_gives_the_same_model_over_several_passes() -> None:
    passes = [InsertBottleneck(0.5), FactorizePointwise(0.25, replan=True), FactorizeLinear(1)]
    planned = pwrewrite.make_plan(net(), X, passes)
    direct = pwrewrite.rewrite(net(), X, passes, verify=False)
    assert planned.plan == direct.plan
    assert planned.report.after == direct.report.after
    assert planned.report.verification is None
    by_plan = pwrewrite.rewrite(net(), X, plan=planned.plan, verify=False)
    applied = pwrewrite.apply(net(), planned.plan)
    with torch.no_grad():
        expected = direct.model(X)
        # The same factors of the same weights, in the same kernels.
        assert torch.equal(by_plan.model(X), expected)
        assert torch.equal(applied(X), expected)
    assert by_plan.names == direct.names


def test_a_second_run_does_nothing() -> None:
    once = pwrewrite.rewrite(net(), X, [InsertBottleneck(0.5)], verify=False)
    again = pwrewrite.rewrite(once.model, X, [InsertBottleneck(0.5)], verify=False)
    assert not again.edits
    assert again.report.delta["params"] == 0
    assert SkipReason.ALREADY_BOTTLENECK in {skip.reason for skip in again.report.skips}


def test_one_skip_a_layer_and_none_for_our_own_parts() -> None:
    made = pwrewrite.rewrite(
        net(), X, [InsertBottleneck(0.5), FactorizePointwise(1.0), InsertReduction(4)], verify=False
    )
    skips = {skip.path: skip.reason for skip in made.report.skips}
    assert len(skips) == len(made.report.skips)
    assert skips == {"3": SkipReason.NO_GAIN}  # more than that it is pointwise, which the other passes say


def test_names_follow_from_pass_to_pass() -> None:
    made = pwrewrite.rewrite(net(), X, [InsertBottleneck(4), FactorizePointwise(2, replan=True)], verify=False)
    parameters = dict(made.model.named_parameters())
    for old, new in made.names.items():
        assert old not in parameters
        assert set(new) <= set(parameters)
    kept = set(dict(net().named_parameters())) - set(made.names)
    assert kept | {name for new in made.names.values() for name in new} == set(parameters)


def test_joining_names() -> None:
    first = {"a.weight": ("a.reduce.weight", "a.core.weight")}
    then = {"a.core.weight": ("a.core.x", "a.core.y"), "b.weight": ("b.core.weight",)}
    assert join_names(first, then) == {
        "a.weight": ("a.reduce.weight", "a.core.x", "a.core.y"),
        "b.weight": ("b.core.weight",),
    }


def test_saving_needs_proof(tmp_path: Path) -> None:
    unproven = pwrewrite.rewrite(net(), X, [InsertBottleneck(0.5)], verify=False)
    with pytest.raises(VerificationError, match="was not verified"):
        unproven.save(tmp_path / "out")
    failed = pwrewrite.rewrite(net(), X, [InsertBottleneck(0.5)], max_error=0.0)
    with pytest.raises(VerificationError, match="verification failed"):
        failed.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    proven = pwrewrite.rewrite(net(), X, [InsertBottleneck(0.5)])
    proven.save(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(pwrewrite.load(tmp_path / "out", net())(X), proven.model(X))
    with pytest.raises(OutputError, match="exists"):
        proven.save(tmp_path / "out")


def test_progress_is_told_with_shares() -> None:
    told: list[tuple[str, float | None]] = []
    pwrewrite.rewrite(net(), X, [InsertBottleneck(0.5)], progress=lambda what, share: told.append((what, share)))
    shares = [share for what, share in told if what.startswith("rewriting ") and share is not None]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert any(what.startswith("verifying") for what, _ in told)


def test_the_mode_of_the_original_is_kept() -> None:
    assert pwrewrite.rewrite(net().train(), X, [InsertBottleneck(0.5)], verify=False).model.training


def test_code_that_asks_what_a_layer_is_takes_the_rewrite_back() -> None:
    """It runs on after the swap and does something else in silence; only the operations that run show it."""

    class Asks(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Conv2d(16, 16, 3, padding=1)
            self.b = torch.nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            if isinstance(self.a, torch.nn.Conv2d):
                y = torch.relu(y)
            result: torch.Tensor = self.b(y)
            return result

    done = pwrewrite.rewrite(Asks(), (torch.randn(1, 16, 8, 8),), passes=[InsertBottleneck(0.5)])
    assert [edit.path for edit in done.edits] == ["b"]
    assert {(s.path, str(s.reason)) for s in done.plan.skips} == {("a", "broke-model")}
    assert done.report.passed


def test_a_later_pass_may_name_a_layer_that_an_earlier_one_replaced() -> None:
    model = nn.Sequential(nn.Conv2d(32, 32, 3), nn.Conv2d(32, 32, 3))
    first, second = InsertBottleneck(0.5, include=["0"]), InsertReduction(0.5, include=["0", "1"])
    done = pwrewrite.rewrite(model, (torch.randn(1, 32, 8, 8),), passes=[first, second])
    assert [(edit.path, edit.method) for edit in done.edits] == [("0", "bottleneck"), ("1", "reduce")]
    with pytest.raises(UsageError, match="matches no layer"):
        pwrewrite.rewrite(model, (torch.randn(1, 32, 8, 8),), passes=[first, InsertReduction(include=["2"])])


@pytest.mark.parametrize("how", ["passes", "plan", "budget", "fuse", "unverified"])
def test_the_result_is_a_copy_where_nothing_was_done_too(how: str) -> None:
    model, x = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.Tanh()).eval(), torch.randn(2, 4, 6, 6)
    result: Any
    if how == "budget":
        result = pwrewrite.rewrite(model, x, budget={"macs": 1.0}, calibration=torch.randn(4, 4, 6, 6))
    elif how in ("fuse", "unverified"):
        result = pwrewrite.fuse(model, x, ["fold-batch-norm"], verify=how == "fuse")
    else:
        result = pwrewrite.rewrite(model, x, Plan() if how == "plan" else ["insert-bottleneck"])
    assert not result.edits
    assert not {*map(id, model.modules())} & {*map(id, result.model.modules())}
    next(result.model.parameters()).data.zero_()
    assert model[0].weight.any()
