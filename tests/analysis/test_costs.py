"""What a model costs, against limits and against another model."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import pwrewrite
from pwrewrite.analysis.costs import Costs, compare
from pwrewrite.analysis.gates import judge
from pwrewrite.core.errors import InputError, PlanError
from pwrewrite.core.options import GateOptions
from pwrewrite.report.costs import sentence


def net(width: int = 8, *, more: bool = False) -> nn.Sequential:
    layers = [nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 4, 1)]
    return nn.Sequential(*layers, *([nn.Conv2d(4, 4, 3)] if more else []))


X = torch.empty(1, 3, 10, 10, device="meta")


def costs(model: nn.Module) -> Costs:
    return Costs.of(pwrewrite.analyze(model, X))


def test_costs_by_hand() -> None:
    found = costs(net())
    assert (found.params, found.macs) == (8 * 27 + 8 + 4 * 8 + 4, 64 * (8 * 27 + 32))
    assert found.weight_bytes == 4 * found.params
    assert found.peak_bytes == 4 * 300 + 2 * 4 * 8 * 64  # the input, and the ReLU's own and output
    assert found.inputs == ("1×3×10×10 float32",)
    assert [(path, layer.what) for path, layer in found.layers.items()] == [
        ("0", "3×3 conv2d 3→8"),
        ("2", "1×1 conv2d 8→4"),
    ]


def test_a_file_gives_the_same_as_the_analysis() -> None:
    analysis = pwrewrite.analyze(net(), X)
    assert Costs.from_json(analysis.to_json(), analysis.target) == Costs.of(analysis)


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("{", PlanError, "is not JSON"),
        ("[]", InputError, "is not an analysis"),
        ('{"schema": "pwrewrite.plan/1"}', InputError, "pwrewrite.plan/1"),
        ('{"schema": "pwrewrite.analysis/1"}', InputError, "not a whole analysis"),
        (
            '{"schema": "pwrewrite.analysis/1", "totals": 3, "model": {}, "layers": {}}',
            InputError,
            "not a whole analysis",
        ),
    ],
)
def test_a_file_that_is_no_analysis(text: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        Costs.from_json(text, "main.json")


@pytest.mark.parametrize("value", [-5, "many", 2.5, True, None])
@pytest.mark.parametrize("layer", [False, True])
def test_a_file_with_a_number_that_is_none_is_refused_by_name(layer: bool, value: object) -> None:
    data = pwrewrite.analyze(net(), X).to_dict()
    part: dict[str, object] = data["layers"][1] if layer else data["totals"]  # type: ignore[index, assignment]
    part["macs"] = value
    where = "layer 2" if layer else "totals"
    with pytest.raises(InputError, match=f"macs of {where} is {value!r}, not a whole number"):
        Costs.from_json(json.dumps(data), "main.json")


def test_layers_that_are_added_removed_and_changed() -> None:
    difference = compare(costs(net()), costs(net(16, more=True)))
    assert {(layer.path, layer.change) for layer in difference.layers} == {
        ("0", "changed"),
        ("2", "changed"),
        ("3", "added"),
    }
    assert difference.same == 0
    assert [layer.path for layer in difference.most_grown("params")] == ["0", "3", "2"]
    back = compare(costs(net(16, more=True)), costs(net()))
    assert {(layer.path, layer.change) for layer in back.layers} >= {("3", "removed")}
    assert back.most_grown("params") == []
    assert compare(costs(net()), costs(net())).layers == ()
    total = sum(layer.growth("macs") for layer in difference.layers)
    assert total == difference.after.macs - difference.before.macs


def test_the_factors_of_a_layer_are_one_row() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 1))
    x = torch.randn(1, 16, 9, 9)
    small = pwrewrite.rewrite(model, x, passes=[pwrewrite.passes.InsertBottleneck(rank=0.25)]).model
    difference = pwrewrite.diff(pwrewrite.analyze(model, x), pwrewrite.analyze(small, x))
    (row,) = difference.layers
    assert (row.path, row.change, difference.same) == ("0", "changed", 1)
    assert row.after.what == "1×1 conv2d 16→4 + 3×3 conv2d 4→4 + 1×1 conv2d 4→16"
    assert row.growth("macs") == difference.after.macs - difference.before.macs


def test_the_factors_of_a_layer_are_one_row_the_other_way_round() -> None:
    model, x = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 1)), torch.randn(1, 16, 9, 9)
    small = pwrewrite.rewrite(model, x, passes=[pwrewrite.passes.InsertBottleneck(rank=0.25)]).model
    before, after = pwrewrite.analyze(small, x), pwrewrite.analyze(model, x)
    (row,) = pwrewrite.diff(before, after).layers
    assert (row.path, row.change, row.after.what) == ("0", "changed", "3×3 conv2d 16→16")
    grown = pwrewrite.check(model, x, baseline=before).findings[0]
    assert grown.layers == (("0", after.params - before.params),)


def test_the_factors_of_a_model_that_is_one_layer_are_one_row() -> None:
    model, x = nn.Conv2d(16, 16, 3), torch.randn(1, 16, 9, 9)
    small = pwrewrite.rewrite(model, x, passes=[pwrewrite.passes.InsertBottleneck(rank=0.25)]).model
    there, back = (pwrewrite.analyze(each, x) for each in (model, small))
    assert [(row.path, row.change) for row in pwrewrite.diff(there, back).layers] == [("", "changed")]
    assert [(row.path, row.change) for row in pwrewrite.diff(back, there).layers] == [("", "changed")]


def verdicts(model: nn.Module, baseline: Costs | None = None, **limits: object) -> dict[str, str]:
    check = judge(pwrewrite.analyze(model, X), GateOptions(**limits), baseline)  # type: ignore[arg-type]
    return {finding.kind: finding.severity for finding in check.findings}


def test_a_limit_is_the_most_there_may_be() -> None:
    params, macs = costs(net()).params, costs(net()).macs
    assert verdicts(net(), max_params=params, max_macs=macs - 1) == {"params": "passed", "macs": "failed"}
    assert verdicts(net(), max_weights=4 * params - 1) == {"weight_bytes": "failed"}
    assert verdicts(net(), max_peak_memory=5296) == {"peak_bytes": "passed"}
    assert verdicts(net(), max_peak_memory=5295) == {"peak_bytes": "failed"}


def test_warnings_begin_at_a_part_of_the_limit() -> None:
    macs = costs(net()).macs
    assert verdicts(net(), max_macs=2 * macs, warn_at=0.5) == {"macs": "warning"}
    assert verdicts(net(), max_macs=2 * macs + 2, warn_at=0.5) == {"macs": "passed"}
    assert verdicts(net(), max_macs=macs - 1, warn_at=0.5) == {"macs": "failed"}


def test_a_baseline_allows_no_growth_unless_told() -> None:
    before = costs(net())
    assert verdicts(net(), before) == {"params": "passed", "macs": "passed"}
    assert verdicts(net(9), before) == {"params": "failed", "macs": "failed"}
    assert verdicts(net(9), before, max_increase={"macs": 0.5}) == {"macs": "passed"}
    assert verdicts(net(9), before, max_increase={"macs": 0.2}, warn_at=0.5) == {"macs": "warning"}
    assert verdicts(net(9), before, max_increase={"weights": 0.01, "peak-memory": 1}) == {
        "weight_bytes": "failed",
        "peak_bytes": "passed",
    }


def test_the_guilty_layers_are_named() -> None:
    check = judge(pwrewrite.analyze(net(16, more=True), X), GateOptions(max_params=1), costs(net()))
    alone, grown, macs = check.findings
    assert alone.layers[0] == ("0", 16 * 27 + 16)
    assert grown.layers == (("0", 8 * 28), ("3", 4 * 36 + 4), ("2", 32))
    assert macs.severity == "failed"
    assert "0 (+224), 3 (+148), 2 (+32)" in sentence(grown)


def test_other_inputs_than_the_baseline_are_said() -> None:
    before = Costs.of(pwrewrite.analyze(net(), torch.empty(1, 3, 12, 12, device="meta")))
    check = judge(pwrewrite.analyze(net(), X), GateOptions(), before)
    assert check.notes[0] == "the baseline was analysed with other inputs: 1×3×12×12 float32, here 1×3×10×10 float32"


def test_an_operation_without_a_formula_fails_where_it_must_not_be() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.inv(x)

    x = torch.empty(1, 4, 4, device="meta")
    check = judge(pwrewrite.analyze(Odd(), x), GateOptions(strict=True))
    assert [(f.kind, f.severity, f.value) for f in check.findings] == [
        ("unpriced", "failed", sum(n for _, n in check.findings[0].layers))
    ]


def test_results_print_as_pages_and_are_json() -> None:
    check = pwrewrite.check(net(), X, max_macs="1k", max_params="1M", target="small.py")
    text = str(check)
    assert text.startswith("small.py\n1 of 2 limits exceeded: MACs")
    assert repr(check) == "<GateResult of small.py: 1 of 2 limits exceeded: MACs>"
    assert "<table" in check._repr_html_()
    assert json.loads(check.to_json())["findings"][1]["severity"] == "failed"
    difference = pwrewrite.diff(pwrewrite.analyze(net(), X), pwrewrite.analyze(net(more=True), X))
    assert "1 added, 2 layers the same" in str(difference)
    data = json.loads(difference.to_json())
    assert data["layers"][0]["path"] == "3"
    assert data["totals"]["params"] == [260, 408]
