"""Results as they print: in a terminal, at a prompt and in a notebook, with the same columns and words."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from html import unescape
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import pwrewrite
from pwrewrite.analysis.conventions import count
from pwrewrite.analysis.records import Analysis
from pwrewrite.core.plan import Op, Plan, Skip, SkipReason
from pwrewrite.core.text import LONGEST
from pwrewrite.core.verification import Check, Verification
from pwrewrite.report import html, markdown, render, terminal
from pwrewrite.report.analysis import page
from pwrewrite.report.frontier import picture
from pwrewrite.report.page import Column, Facts, Line, Listing, Notes, Page, Section, Table, Title
from pwrewrite.report.records import Frontier, Point, Report
from pwrewrite.targets import LoadedModel

HINTS = {"bottleneck", "does", "gains", "ranks", "what", "which"}
"""Words of the line below a terminal's table that explains its short column heads."""

Make = Callable[..., Analysis]


def results(analysis: Analysis) -> dict[str, object]:
    totals = {"params": 10, "macs": 100, "flops": 200, "weight_bytes": 40}
    proof = Verification((Check("cost", True, "recounted"),), 1e-7, 1.0)
    skip = Skip("fc", SkipReason.POINTWISE, "a linear map")
    return {
        "analysis": analysis,
        "report": Report("net.py", totals, totals, (), (skip,), proof),
        "proof": proof,
        "plan": Plan((Op("factorize", "stem", "insert-reduce", {}),), (skip,), {"target": "net.py"}),
        "frontier": Frontier("net.py", "macs", {"macs": 100}, "loss", (Point({"macs": 50}, 0.1, 3),)),
    }


@pytest.mark.parametrize("name", ["analysis", "report", "proof", "plan", "frontier"])
def test_every_result_prints_shows_and_sums_itself_up(analysis: Analysis, name: str) -> None:
    result = results(analysis)[name]
    assert len(repr(result)) < 250
    assert repr(result).startswith(f"<{type(result).__name__}")
    assert "\n" not in repr(result)
    assert str(result) == str(result).strip()
    assert len(str(result).splitlines()) >= 2
    shown = result._repr_html_()  # type: ignore[attr-defined]
    assert shown.startswith("<div")
    assert shown.count("<table") == shown.count("</table>") >= 1
    # one vocabulary: each word of the terminal stands in the notebook
    words = set(re.findall(r"[a-z]{4,}", str(result)))
    assert words - set(re.findall(r"[a-z]{4,}", unescape(shown))) <= HINTS


def test_printing_is_what_the_command_shows(analysis: Analysis) -> None:
    assert str(analysis) + "\n" == render(analysis)


def test_fused_models_print_as_the_command_shows_them() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    fused = pwrewrite.fuse(model, torch.zeros(1, 3, 8, 8))
    assert "kernels" in str(fused.report)
    assert "1 norm folded" in str(fused.report)
    assert "fusing" in fused.report.to_dict()
    assert len(repr(fused)) < 300
    assert str(fused) == str(fused.report)
    assert fused._repr_html_() == fused.report._repr_html_()


def test_html_escapes_whatever_comes_from_the_model(make_analysis: Make) -> None:
    evil = "<script>alert('x')</script>&"
    analysis = make_analysis((evil, evil + "1", evil + "2"), target=evil, model_class=evil, notes=(evil,))
    analysis = replace(analysis, coverage=replace(analysis.coverage, capture=evil))
    shown = html(page(analysis))
    assert "<script" not in shown
    assert shown.count("&lt;script&gt;") >= 6


CONTROL = "a\x1b]0;owned\x07\x1b[31mb\r\nc\x9b2J\u202ed"
EVERY: Page = (
    Title(CONTROL, [CONTROL, (CONTROL, CONTROL)]),
    Section("Section", CONTROL),
    Section("Proof", CONTROL, verdict=False),
    Table([Column("head", [CONTROL], full=[CONTROL], code=True), Column("wrap", [CONTROL], wrap=True)]),
    Listing([Column("one", [CONTROL]), Column("two", [CONTROL], joined=True)]),
    Facts([(CONTROL, CONTROL, "")]),
    Notes([CONTROL]),
    Line(CONTROL),
)


@pytest.mark.parametrize("write", [terminal.text, markdown, html])
def test_control_characters_are_spelt_out_wherever_they_come_from(write: Callable[[Page], str]) -> None:
    shown = write(EVERY)
    assert not {c for c in shown if not c.isprintable()} - {"\n"}
    assert shown.count("\\x1b") + shown.count("\\\\x1b") >= 10


@pytest.mark.parametrize("write", [terminal.text, markdown, html])
def test_texts_have_a_longest_length(write: Callable[[Page], str]) -> None:
    shown = write((Facts([("got", "x" * 100_000, "")]), Notes(["y" * 100_000])))
    assert LONGEST < len(shown) < 10 * LONGEST


@pytest.mark.parametrize("start", "=+-@")
def test_no_name_in_a_model_is_a_formula_in_a_spreadsheet(make_analysis: Make, start: str) -> None:
    cell = f"{start}HYPERLINK(evil)"
    text = render(make_analysis((cell, "b\x1b[31m", "\t=c")), "csv")
    assert f"\n'{cell}," in text
    assert "\x1b" not in text
    assert "\t" not in text
    assert "\\t=c" in text


def test_the_receptive_field_is_a_column_on_request(make_analysis: Make) -> None:
    analysis = make_analysis()
    (first, second, *rest) = analysis.layers
    analysis = replace(analysis, layers=(first, replace(second, sees_whole_input=True), *rest))
    view = pwrewrite.report.View(everything=True, receptive_field=True)
    text = render(analysis, view=view, width=120)
    assert "sees" in text.splitlines()[6]
    assert re.search(r"^blocks.10.conv .* 31×31 ", text, re.MULTILINE)
    assert re.search(r"^stem .* global ", text, re.MULTILINE)
    assert re.search(r"^unused .* – +not-called", text, re.MULTILINE)
    assert "receptive field" in render(analysis, "markdown", view)
    assert "sees" not in render(analysis, width=120)


@pytest.mark.parametrize(
    "make",
    [
        lambda model, x: pwrewrite.capture(model, x),
        lambda model, x: pwrewrite.analyze(model, x).tree,
        lambda model, x: count(pwrewrite.capture(model, x), "thop"),
        lambda model, x: LoadedModel(model, (x,), "net.py"),
        lambda model, x: pwrewrite.make_plan(model, x, [pwrewrite.passes.InsertBottleneck(0.5)]),
        lambda model, x: pwrewrite.rewrite(model, x, [pwrewrite.passes.InsertBottleneck(0.5)]),
    ],
    ids=["capture", "tree", "count", "loaded", "planned", "rewritten"],
)
def test_whatever_is_returned_is_short_at_a_prompt_and_shown_in_a_notebook(make: Callable[..., object]) -> None:
    layers = [layer for _ in range(30) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())]
    result = make(nn.Sequential(*layers).eval(), torch.zeros(1, 8, 8, 8))
    assert len(repr(result)) < 300
    assert len(str(result)) < 4000
    assert result._repr_html_().startswith("<div")  # type: ignore[attr-defined]


def test_a_plan_that_is_not_carried_out_says_so() -> None:
    planned = pwrewrite.make_plan(
        nn.Sequential(nn.Conv2d(8, 8, 3)), torch.zeros(1, 8, 8, 8), [pwrewrite.passes.InsertBottleneck(0.5)]
    )
    assert "1 layer would be rewritten" in repr(planned)
    assert "would be rewritten" in str(planned)
    assert "NOT VERIFIED" not in str(planned)


def test_the_picture_of_a_frontier_names_its_axes() -> None:
    points = (Point({"macs": 100, "params": 9}, 0.0, 0), Point({"macs": 50, "params": 8}, 0.25, 3))
    frontier = Frontier("<net>\x1b", "macs", {"macs": 4_089_184_256, "params": 10}, "loss", points)
    texts = [element.text for element in ElementTree.fromstring(picture(frontier)).iter() if element.text]
    assert "MACs left, of 4.09 G" in texts
    assert "least predicted loss (square-root scale)" in texts
    assert "<net>\\x1b" in texts


class Reversed(nn.Module):
    """Takes the length of a list, which no graph holds, and is told with the line that does."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList([nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)])

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        return [
            torch.relu(conv(m)) for conv, m in zip(reversed(self.convolutions), reversed(maps), strict=len(maps) > 1)
        ]


def test_what_fusing_left_is_told_with_places_and_whole_reasons() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = Reversed()

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return self.heads([x, x + 1])

    report = pwrewrite.fuse(Net().eval(), torch.zeros(1, 3, 8, 8)).report
    told = " ".join(str(report).split())
    assert report.skips
    assert all(skip.detail in told and f" {skip.reason} " in told and skip.path in told for skip in report.skips)
    assert max(len(skip.detail) for skip in report.skips) > 100


def test_where_nothing_was_fused_there_is_no_list_of_it() -> None:
    report = pwrewrite.fuse(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)).eval(), torch.zeros(1, 3)).report
    assert not report.edits
    assert "Fused" not in str(report)
