"""The HTML file of a report: whole, small, closed to the network and to hostile names, with the report's figures."""

from __future__ import annotations

import base64
import gc
import hashlib
import json
import re
import weakref
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.resources import files
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

import pwrewrite
from pwrewrite.analysis.records import Analysis
from pwrewrite.core.plan import Plan
from pwrewrite.report import render
from pwrewrite.report.records import Frontier, Point
from pwrewrite.report.web import SCRIPTS
from pwrewrite.workflows.plan import make_plan
from pwrewrite.workflows.rewrite import Rewritten

HOSTILE = "</script><img src=x onerror=alert(1)>&\"'\u2028\u202e"
X = torch.randn(1, 3, 32, 32)


class Elements(HTMLParser):
    """What a browser would find: elements with attributes, and the text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] == "script" and not data.isspace():
            self.scripts[-1] += data


def data_of(text: str) -> dict[str, Any]:
    return json.loads(next(script for script in Elements(text).scripts if script.startswith("{")))  # type: ignore[no-any-return]


def net(name: str = "stem") -> nn.Module:
    model = nn.Sequential()
    model.add_module(name, nn.Conv2d(3, 32, 3, padding=1))
    model.add_module("norm", nn.BatchNorm2d(32))
    model.add_module("body", nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3)))
    return model.eval()


def rewritten(model: nn.Module | None = None) -> Rewritten:
    return pwrewrite.rewrite(model or net(), X, passes=["insert-bottleneck"], rank=0.25, verify=False)


FRONTIER = Frontier("net.py", "macs", {"macs": 100}, "loss", (Point({"macs": 100}, 0, 0), Point({"macs": 50}, 0.1, 3)))
RESULTS: dict[str, Callable[[], Any]] = {
    "analysis": lambda: pwrewrite.analyze(net(), X),
    "rewrite": rewritten,
    "report": lambda: rewritten().report,
    "plan": lambda: Plan((), (), {"target": "net.py"}),
    "planned": lambda: make_plan(net(), X, passes=["insert-bottleneck"]),
    "fused": lambda: pwrewrite.fuse(net(), X),
    "frontier": lambda: FRONTIER,
}


@pytest.mark.parametrize("name", RESULTS)
def test_nothing_of_a_file_lies_outside_and_its_policy_lets_nothing_in(name: str) -> None:
    text = RESULTS[name]().to_html()
    elements = Elements(text)
    for tag, attributes in elements.found:
        assert tag not in ("img", "iframe", "object", "embed", "form", "base", "a") or attributes == {
            "class": "skip",
            "href": "#main",
        }
        assert not any(key.startswith("on") or key in ("src", "srcset", "action") for key in attributes), (
            tag,
            attributes,
        )
        assert (attributes.get("href") or "#").startswith(("#", "data:,"))
    assert "@import" not in text
    assert set(re.findall(r"url\(([^)]*)", text)) <= {"#arrow"}
    (policy,) = [a["content"] or "" for t, a in elements.found if t == "meta" and "http-equiv" in a]
    assert policy.startswith("default-src 'none'; base-uri 'none'; form-action 'none'")
    code = [script for script in elements.scripts if not script.startswith("{")]
    hashes = {f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in code}
    assert hashes == set(re.findall(r"'sha256-[^']*'", policy))
    assert len(code) == (0 if name == "plan" else len(SCRIPTS))  # a plan on its own has no model to draw


def test_what_others_wrote_comes_with_its_licence() -> None:
    text, licence = (
        RESULTS["analysis"]().to_html(),
        (files("pwrewrite.report") / "assets/dagre.LICENSE.txt").read_text(),
    )
    assert "Permission is hereby granted" in licence
    assert licence in text


def test_densenet201_takes_300_kb_at_most() -> None:
    model, inputs = torchvision.models.densenet201().eval(), torch.randn(1, 3, 224, 224)
    sizes = [len(pwrewrite.analyze(model, inputs).to_html().encode())]
    sizes.append(len(pwrewrite.rewrite(model, inputs, verify=False).to_html().encode()))
    assert max(sizes) <= 300_000


@pytest.mark.parametrize(
    "kind", [pwrewrite.analyze, lambda model, inputs: rewritten(model)], ids=["analysis", "rewrite"]
)
def test_names_of_a_model_never_become_markup(kind: Callable[..., Any]) -> None:
    hostile, harmless = (kind(net(name), X).to_html() for name in (HOSTILE, "stem"))
    tags = [[tag for tag, _ in Elements(text).found] for text in (hostile, harmless)]
    assert tags[0] == tags[1]
    assert "<img" not in hostile
    (module,) = [row[0] for row in data_of(hostile)["models"][0]["modules"] if "onerror" in row[0]]
    assert module == HOSTILE.replace("\u2028", r"\u2028").replace("\u202e", r"\u202e")  # as every report spells it


def check_model(data: dict[str, Any], analysis: Analysis) -> None:
    """The data of a model adds up to what the analysis says."""
    totals = {"params": analysis.params, "macs": analysis.macs, "weights": analysis.weight_bytes}
    totals |= {"memory": analysis.activation_bytes, "peak": analysis.peak.nbytes}
    assert {key: data["totals"][key] for key in totals} == totals
    assert sum(step[4] for step in data["steps"]) == analysis.macs == sum(layer[8] for layer in data["layers"])
    assert sum(module[3] for module in data["modules"]) == analysis.params
    assert max(step[8] for step in data["steps"]) == analysis.peak.nbytes
    assert sum(step[7] for step in data["steps"]) * 1e-9 == pytest.approx(analysis.roofline.seconds, rel=1e-2)
    assert [layer[8] for layer in data["layers"]] == [each.layer.macs for each in analysis.layers]


def test_an_analysis_is_drawn_with_its_figures() -> None:
    analysis = pwrewrite.analyze(net(), X)
    (model,) = data_of(analysis.to_html())["models"]
    check_model(model, analysis)
    names = [row[0] for row in model["modules"]]
    assert names == ["", "stem", "norm", "body", "0", "1", "2"]
    assert [row[1] for row in model["modules"]] == [-1, 0, 0, 0, 3, 3, 3]


def test_a_rewrite_is_drawn_before_and_after_with_the_figures_of_its_report() -> None:
    result = rewritten()
    data = data_of(result.to_html())
    assert result.report.models is not None
    for model, analysis in zip(data["models"], result.report.models, strict=True):
        check_model(model, analysis)
    for model, totals in zip(data["models"], (result.report.before, result.report.after), strict=True):
        assert (model["totals"]["macs"], model["totals"]["params"]) == (totals["macs"], totals["params"])
        assert model["totals"]["peak"] == totals["peak_activation_bytes"]
    before = data["models"][0]
    notes = {before["modules"][layer[0]][0]: before["texts"][layer[15]] for layer in before["layers"]}
    assert notes["0"].startswith("bottleneck 8: MACs 9.44 M → ")


def test_a_frontier_is_drawn_with_its_points() -> None:
    data = data_of(FRONTIER.to_html())
    assert data["frontier"] == {"cost": "macs", "points": [[1.0, 100, 0, 0], [0.5, 50, 0.1, 3]], "chosen": None}


@pytest.mark.parametrize("kind", ["macs", "params"])
def test_a_plan_within_a_budget_is_drawn_on_its_frontier(kind: str) -> None:
    for result in (
        pwrewrite.rewrite(net(), X, budget={kind: 0.6}, verify=False),
        make_plan(net(), X, budget={kind: 0.6}),
    ):
        assert result.report.budget is not None
        curve = data_of(result.to_html())["frontier"]
        shares, losses = [point[0] for point in curve["points"]], [point[2] for point in curve["points"]]
        assert (shares[0], losses[0]) == (1, 0)
        assert shares == sorted(shares, reverse=True)
        assert losses == sorted(losses)
        share, _, loss, layers = curve["chosen"]
        assert curve["cost"] == kind
        assert share == pytest.approx(result.report.budget.reached[kind], rel=1e-3)
        assert loss == pytest.approx(result.report.budget.predicted, rel=1e-3)
        assert layers == len(result.plan.ops)
        assert all(each >= loss * (1 - 1e-3) for part, each in zip(shares, losses) if part <= share)  # none beats it
        assert "frontier" not in result.report.to_dict()
    assert "frontier" not in data_of(rewritten().to_html())


def test_steps_are_worked_out_without_the_model() -> None:
    model = torchvision.models.squeezenet1_1(weights=None)
    analysis, gone = pwrewrite.analyze(model, X), weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert sum(step.cost.macs for step in analysis.steps) == analysis.macs
    assert analysis.steps is analysis.steps


def test_an_analysis_without_its_steps_is_drawn_without_a_graph(analysis: Analysis) -> None:
    data = data_of(render(analysis, "html"))
    assert data["models"][0]["steps"] == []
    assert len(data["models"][0]["layers"]) == len(analysis.layers)
