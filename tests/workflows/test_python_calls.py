"""Python calls take what plainly means something, and refuse the rest in a sentence, as the command does."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import scipy.optimize
import torch
from torch import nn

import pwrewrite
from pwrewrite import passes
from pwrewrite.core.errors import CaptureError, InputError, PlanError, RefusedError, TargetError, UsageError
from pwrewrite.core.options import GateOptions
from pwrewrite.core.plan import Plan

X = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(8, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("inputs", [(2, 8, 16, 16), [2, 8, 16, 16], X.shape, X.numpy(), ((2, 8, 16, 16),), [X.numpy()]])
def test_a_shape_or_an_array_stands_for_a_tensor(inputs: Any) -> None:
    macs = pwrewrite.analyze(net(), X).macs
    assert pwrewrite.analyze(net(), inputs).macs == macs
    result = pwrewrite.rewrite(net(), inputs, passes="insert-bottleneck", thorough=False)
    assert result.report.passed
    assert result.plan.model["inputs"] == [{"shape": [2, 8, 16, 16], "dtype": "float32"}]
    assert pwrewrite.verify(net(), net(), inputs, thorough=False).passed


@pytest.mark.parametrize("inputs", [None, 224, "1x8x16x16", (), (224,), (1, 0, 3), (1, True), object()])
def test_what_stands_for_no_tensor_is_refused(inputs: Any) -> None:
    for call in (pwrewrite.analyze, pwrewrite.rewrite, pwrewrite.fuse):
        with pytest.raises(InputError):
            call(net(), inputs)


@pytest.mark.parametrize(
    "what",
    [
        "insert-bottleneck", ["insert-bottleneck"], [passes.InsertBottleneck], passes.InsertBottleneck(0.5),
        0.5, "macs=50%", {"macs": 0.5}, pwrewrite.Budget(0.5), pwrewrite.Budget({"macs": "50%"}),
    ],
)  # fmt: skip
def test_what_is_done_may_be_said_in_many_ways(what: Any) -> None:
    assert pwrewrite.rewrite(net(), X, what, verify=False).edits


@pytest.mark.parametrize(
    "options",
    [
        {"budget": 0.5}, {"budget": "macs=50%"}, {"budget": ["macs=0.5", "params=0.9"]}, {"budget": {"macs": 0.5}},
        {"budget": 0.8, "forms": "1x1"}, {"passes": ["insert-bottleneck"], "rank": "50%", "include": "3"},
        {"rank": 0.25}, {"settings": "3=reduce:8"}, {"budget": pwrewrite.Budget(0.5), "forms": ["1x1"]},
        {"budget": 0.5, "calibration": torch.randn(64, 8, 16, 16)},
    ],
)  # fmt: skip
def test_options_are_keywords(options: dict[str, Any]) -> None:
    assert pwrewrite.rewrite(net(), X, verify=False, **options).edits


class Nameless(passes.Pass):
    def propose(self, capture: Any) -> list[Any]:
        return []


class TwoMaps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        return self.first(x) + self.second(y)


REFUSED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "no such pass": (lambda: pwrewrite.rewrite(net(), X, ["insert-botleneck"]), UsageError, "did you mean insert-bo"),
    "no pass": (lambda: pwrewrite.rewrite(net(), X, [42]), UsageError, "this is no pass"),
    "no name": (lambda: pwrewrite.rewrite(net(), X, [Nameless()]), UsageError, 'name = "nameless" in class Nameless'),
    "no name to fuse": (lambda: pwrewrite.fuse(net(), X, [Nameless]), UsageError, "a pass without a name"),
    "no folder": (lambda: pwrewrite.load(5), TargetError, "this names no folder"),  # type: ignore[arg-type]
    "no folder to save in": (lambda: pwrewrite.save(None, net(), Plan()), TargetError, "names no folder"),  # type: ignore[arg-type]
    "no model to save": (lambda: pwrewrite.save("x", 5, Plan()), InputError, "not a model"),  # type: ignore[arg-type]
    "nothing to unfuse": (lambda: pwrewrite.unfuse(None), InputError, "not a model"),  # type: ignore[arg-type]
    "a result": (lambda: pwrewrite.unfuse(pwrewrite.fuse(net(), X)), InputError, "its .model is one"),  # type: ignore[arg-type]
    "nothing to freeze": (lambda: pwrewrite.freeze("net.py"), InputError, "load_target"),  # type: ignore[arg-type]
    "no original": (lambda: pwrewrite.apply(None, Plan()), InputError, "not a model"),  # type: ignore[arg-type]
    "data of a plan": (lambda: pwrewrite.apply(net(), {"ops": []}), PlanError, "Plan.from_dict"),  # type: ignore[arg-type]
    "no data of a plan": (lambda: pwrewrite.rewrite(net(), X, {"ops": [{}]}), PlanError, "schema"),
    "a number as plan": (lambda: pwrewrite.rewrite(net(), X, plan=5), PlanError, "this is no plan"),
    "a needed None": (lambda: pwrewrite.analyze(TwoMaps(), (X, None)), CaptureError, "and None for y"),
    "no time to recover": (lambda: pwrewrite.recover(net(), net(), [X], 0), UsageError, "got: '0'"),  # type: ignore[arg-type]
    "no such fusing pass": (lambda: pwrewrite.fuse(net(), X, ["fold-batchnorm"]), UsageError, "mean fold-batch-norm"),
    "no such option": (lambda: pwrewrite.rewrite(net(), X, budgets=0.5), UsageError, "no option 'budgets'"),
    "no such option of verify": (lambda: pwrewrite.verify(net(), net(), X, max_eror=1), UsageError, "mean max_error"),
    "no such kind": (lambda: pwrewrite.rewrite(net(), X, budget={"mac": 0.5}), UsageError, "did you mean macs"),
    "no budget": (lambda: pwrewrite.rewrite(net(), X, budget=object()), UsageError, "neither a number nor text"),
    "no limit": (lambda: pwrewrite.plan(net(), X, None), UsageError, "there is no budget"),
    "no width": (lambda: pwrewrite.rewrite(net(), X, rank="half"), UsageError, "rank is neither a width"),
    "no error": (lambda: pwrewrite.rewrite(net(), X, max_error="small"), UsageError, "max_error makes no sense"),
    "no file": (lambda: pwrewrite.rewrite(net(), X, plan="no.json"), PlanError, "cannot read the plan"),
    "no plan": (lambda: pwrewrite.apply(net(), "plan.json"), PlanError, "Plan.read"),  # type: ignore[arg-type]
    "twice": (lambda: pwrewrite.rewrite(net(), X, 0.5, budget=0.5), UsageError, "twice"),
    "both": (lambda: pwrewrite.rewrite(net(), X, ["insert-bottleneck"], budget=0.5), UsageError, "goes with passes"),
    "a class": (lambda: pwrewrite.analyze(nn.ReLU, X), InputError, "it is a class"),  # type: ignore[arg-type]
    "a text": (lambda: pwrewrite.rewrite("net.py", X), InputError, "load_target"),  # type: ignore[arg-type]
    "no device": (lambda: pwrewrite.analyze(net(), X, device="rtx4090"), UsageError, "82.6T,1008G"),
    "no option of a target": (lambda: pwrewrite.analyze_target("x", input="1x3"), UsageError, "did you mean inputs"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_sentences(case: str) -> None:
    call, kind, said = REFUSED[case]
    with pytest.raises(kind) as refused:
        call()
    assert said in str(refused.value)


def test_texts_are_read_as_the_command_reads_them(tmp_path: Path) -> None:
    assert pwrewrite.analyze(net(), X, hotspot_share="50%").hotspots
    plan = pwrewrite.plan(net(), X, 0.5)
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert pwrewrite.rewrite(net(), X, plan=str(tmp_path / "plan.json"), verify=False).edits


def test_the_data_of_a_plan_stands_for_it() -> None:
    plan = pwrewrite.plan(net(), X, 0.5)
    for how in ({"what": plan.to_dict()}, {"plan": plan.to_dict()}):
        assert pwrewrite.rewrite(net(), X, verify=False, **how).plan.ops == plan.ops
    assert Plan.from_dict(plan.to_dict()) == plan


def test_what_a_solver_prints_stays_off_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    def chatty(*args: Any, **kwargs: Any) -> Any:
        os.write(1, b"from C")
        return solve(*args, **kwargs)

    solve = scipy.optimize.milp
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scipy.optimize, "milp", chatty)
        pwrewrite.plan(net(), X, {"macs": 0.5, "params": 0.7})
    written = capfd.readouterr()
    assert written.out == ""
    assert "from C" in written.err


def exported() -> nn.Module:
    return torch.export.export(net(), (X,)).module()


@pytest.mark.parametrize("call", [pwrewrite.rewrite, pwrewrite.fuse, pwrewrite.make_plan])
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (exported, "an exported program"),
        (lambda: torch.jit.trace(net(), X), "a TorchScript module"),
        (lambda: torch.jit.script(net()), "a TorchScript module"),
    ],
)
def test_graphs_without_layers_are_refused_with_the_reason(call: Any, make: Any, kind: str) -> None:
    with pytest.raises(RefusedError, match=kind) as refused:
        call(make(), X)
    assert "export, script or trace the result" in str(refused.value)
    with pytest.raises(InputError, match="rewrite the module before"):
        call(torch.export.export(net(), (X,)), X)


def test_a_graph_without_layers_inside_a_model_is_noted() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner = nn.Conv2d(8, 8, 3, padding=1), exported()

        def forward(self, x: torch.Tensor) -> Any:
            return self.inner(self.first(x))

    result = pwrewrite.rewrite(Outer(), X, rank=0.25, verify=False)
    assert [edit.path for edit in result.edits] == ["first"]
    assert "inner is an exported program: nothing in it is rewritten" in result.report.notes


def test_gates_and_comparisons_take_analyses() -> None:
    analysis = pwrewrite.analyze(net(), X)
    assert pwrewrite.check(net(), X, baseline=analysis).passed
    wider = nn.Sequential(net(), nn.Linear(10, 9000))
    assert not pwrewrite.check(wider, X, baseline=analysis, max_increase={"macs": 0.02}).passed
    for increase in ({"params": "900%"}, ["params=900%"], "params=900%"):
        assert pwrewrite.check(wider, X, baseline=analysis, max_increase=increase).passed
    for limits in ({"max_macs": -1}, {"max_macs": float("nan")}, {"baseline": analysis, "max_increase": {"mac": 0.1}}):
        with pytest.raises(UsageError, match="makes no sense"):
            pwrewrite.check(net(), X, **limits)
    with pytest.raises(UsageError, match="max_macs makes no sense"):
        pwrewrite.check(net(), X, gate=GateOptions(max_macs="1G"))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"no analysis(.|\n)*got: Sequential\n *try: pwrewrite.analyze"):
        pwrewrite.diff(net(), analysis)  # type: ignore[arg-type]


def test_other_objects_are_refused_in_a_sentence() -> None:
    with pytest.raises(InputError, match=r"no capture(.|\n)*pwrewrite.capture"):
        pwrewrite.graph(net())  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no operation"):
        pwrewrite.register_formula("aten::add", lambda args, kwargs, out: 0)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="the budget limits nothing"):
        pwrewrite.rewrite(net(), X, budget={})


@pytest.mark.parametrize("proposals", [None, ["0"]])
def test_a_pass_that_proposes_no_ops_is_refused(proposals: Any) -> None:
    class Own(passes.Pass):
        name = "own"

        def propose(self, capture: pwrewrite.Capture) -> Any:
            return proposals

    with pytest.raises(UsageError, match="the pass own proposes something else"):
        pwrewrite.rewrite(net(), X, [Own()])
