"""Each form of the report: what it says, that it parses back, and that nothing in a model breaks it."""

import csv
import io
import json
import re
from collections.abc import Callable

import pytest
from rich.cells import cell_len
from rich.console import Console

from pwrewrite.analysis.records import Analysis, TreeNode
from pwrewrite.capturing.records import Coverage
from pwrewrite.core.errors import UsageError
from pwrewrite.core.text import plain
from pwrewrite.report import FORMATS, SORTS, View, render, rows, terminal
from pwrewrite.report.analysis import page
from pwrewrite.report.spreadsheet import LAYER_COLUMNS

Make = Callable[..., Analysis]
Golden = Callable[[str, str], None]

EVERY_VIEW = [View(), View(everything=True), View(depth=5), View(top=1), View(top=0)]
NASTY = ("a.[bold red]x[/].y", "p|q`r``s", 'quo"te,comma\nnewline\x1b[31m')


@pytest.mark.parametrize("width", [100, 80])
def test_table(analysis: Analysis, same_as_golden: Golden, width: int) -> None:
    same_as_golden(f"table_{width}.txt", render(analysis, width=width))


def test_table_of_all_layers(analysis: Analysis, same_as_golden: Golden) -> None:
    same_as_golden("table_all.txt", render(analysis, view=View(everything=True)))


def test_tree(analysis: Analysis, same_as_golden: Golden) -> None:
    same_as_golden("tree.txt", render(analysis, view=View(depth=2)))


def test_markdown(analysis: Analysis, same_as_golden: Golden) -> None:
    same_as_golden("report.md", render(analysis, "markdown", View(everything=True)))


def test_csv(analysis: Analysis, same_as_golden: Golden) -> None:
    same_as_golden("report.csv", render(analysis, "csv"))


@pytest.mark.parametrize("view", EVERY_VIEW)
@pytest.mark.parametrize("width", [100, 80, 60])
@pytest.mark.parametrize(
    "names",
    [
        ("stem", "blocks.10.conv", "blocks.2.reduce"),
        tuple(f"backbone.very.long.path.{'x' * 200}.{i}" for i in range(3)),
        tuple(f"模型.残差块.卷积层{'宽' * 60}.{i}" for i in range(3)),
        NASTY,
    ],
    ids=["short", "long", "wide", "nasty"],
)
def test_no_line_is_wider_than_asked(make_analysis: Make, names: tuple[str, ...], width: int, view: View) -> None:
    analysis = make_analysis(names, model_class="模" * 80, target="t" * 300, notes=("n" * 250, "a note " * 40))
    lines = render(analysis, view=view, width=width).splitlines()
    assert max(map(cell_len, lines)) <= width
    assert all(line == line.rstrip() for line in lines)


def test_markup_in_names_is_text(make_analysis: Make) -> None:
    analysis = make_analysis(NASTY, model_class="[blink]Net[/blink]", notes=("[b]note[/b] :smile:",))
    for view in (View(), View(everything=True), View(depth=2)):
        text = render(analysis, view=view)
        assert "[blink]Net[/blink]" in text
        assert "[b]note[/b] :smile:" in text
        assert "a.[bold red]x[/].y" in text or view.depth
        assert "\x1b" not in text


def test_colours_only_where_a_person_looks(make_analysis: Make) -> None:
    def printed(**settings: object) -> str:
        console = Console(file=io.StringIO(), width=100, legacy_windows=False, **settings)  # type: ignore[arg-type]
        console.print(terminal.renderable(page(make_analysis(NASTY))))
        return str(console.file.getvalue())  # type: ignore[attr-defined]

    assert "\x1b[" in printed(force_terminal=True, color_system="truecolor", _environ={})
    assert "\x1b[3" not in printed(force_terminal=True, color_system="truecolor", _environ={}, no_color=True)
    assert "\x1b" not in printed(force_terminal=False, _environ={})


def test_json_parses_back_to_the_same(analysis: Analysis) -> None:
    text = render(analysis, "json")
    assert json.loads(text) == analysis.to_dict()
    assert text.startswith('{\n  "schema": "pwrewrite.analysis/1"')
    assert text.endswith("}\n")


def test_json_and_csv_keep_what_they_are_given(make_analysis: Make) -> None:
    analysis = make_analysis(NASTY, notes=("模型 ×",))
    assert "模型 ×" in render(analysis, "json")
    paths = [layer["path"] for layer in json.loads(render(analysis, "json"))["layers"]]
    rows_ = list(csv.DictReader(io.StringIO(render(analysis, "csv"), newline="")))
    assert [row["path"] for row in rows_] == [plain(path) for path in paths]
    assert set(NASTY) < set(paths)


def test_csv_agrees_with_json_to_the_last_digit(analysis: Analysis) -> None:
    text = render(analysis, "csv")
    assert text.count("\r\n") == len(analysis.layers) + 1
    rows_ = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    assert list(rows_[0]) == list(LAYER_COLUMNS)
    for row, layer in zip(rows_, analysis.to_dict()["layers"], strict=True):
        for key in ("params", "macs", "flops", "in_channels", "out_channels", "weight_bytes", "activation_bytes"):
            assert int(row[key]) == layer[key]
        for key in ("share", "intensity"):
            assert float(row[key]) == layer[key]
        assert json.loads(row["hotspot"]) is layer["hotspot"]
        assert row["skip_reason"] == (layer["skip"]["reason"] if layer["skip"] else "")
        assert int(row["calls"]) == len(layer["calls"])
        if layer["break_even"]:
            assert int(row["break_even_macs_rank_in"]) == layer["break_even"]["macs_rank_in"]
            assert int(row["half_params"]) == layer["break_even"]["half_params"]


@pytest.mark.parametrize("view", EVERY_VIEW)
@pytest.mark.parametrize("names", [("stem", "blocks.10.conv", "blocks.2.reduce"), NASTY])
def test_markdown_tables_are_whole(make_analysis: Make, names: tuple[str, ...], view: View) -> None:
    text = render(make_analysis(names), "markdown", view)
    tables = re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE)
    assert tables
    for found in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in found.splitlines()}
        assert len(widths) == 1
        assert re.fullmatch(r"\|( (:--|--:) \|)+", found.splitlines()[1])


def test_markdown_code_spans_hold_backticks(make_analysis: Make) -> None:
    text = render(make_analysis(NASTY), "markdown", View(everything=True))
    assert "``` p\\|q`r``s ×2 ```" in text


def test_zero_and_little_are_told_apart(analysis: Analysis) -> None:
    text = render(analysis, view=View(everything=True))
    assert re.search(r"^linear .* <0\.1%", text, re.MULTILINE)
    assert re.search(r"^relu .* 0\.0%", text, re.MULTILINE)


def test_top_and_what_it_leaves_out(analysis: Analysis) -> None:
    text = render(analysis, view=View(top=1))
    assert "blocks.10.conv" in text
    assert "… and 2 more (--top)" in text
    assert "… and 5 more" in render(analysis, view=View(top=1, everything=True))
    assert len(render(analysis, "csv", View(top=2)).splitlines()) == 3


@pytest.mark.parametrize(
    ("sort", "first"),
    [
        ("macs", "blocks.10.conv"),
        ("params", "blocks.10.conv"),
        ("memory", "fc"),
        ("order", "stem"),
        ("name", "blocks.2.reduce"),
    ],
)
def test_orders(analysis: Analysis, sort: str, first: str) -> None:
    assert sort in SORTS
    assert rows.select(analysis, View(sort=sort, everything=True)).reports[0].layer.path == first


def test_by_name_numbers_count_as_numbers(analysis: Analysis) -> None:
    ordered = [r.layer.path for r in rows.select(analysis, View(sort="name", everything=True)).reports]
    assert ordered == ["blocks.2.reduce", "blocks.3.mix", "blocks.10.conv", "fc", "stem", "unused"]
    assert sorted(["2", "10", "a10", "a9.z", "a9"], key=rows.natural) == ["2", "10", "a9", "a9.z", "a10"]


def test_layers_in_the_order_of_the_model(analysis: Analysis) -> None:
    ordered = [r.layer.path for r in rows.select(analysis, View(sort="order", everything=True)).reports]
    assert ordered == ["stem", "blocks.2.reduce", "blocks.3.mix", "blocks.10.conv", "fc", "unused"]


def test_the_running_share_adds_up(analysis: Analysis) -> None:
    selection = rows.select(analysis, View(everything=True))
    assert selection.cumulative[-1] == pytest.approx(1)
    assert list(selection.cumulative) == sorted(selection.cumulative)


def test_without_a_hotspot_the_largest_layers_are_shown(make_analysis: Make) -> None:
    pointwise = tuple(r for r in make_analysis().layers if not r.hotspot)
    text = render(make_analysis(layers=pointwise))
    assert "no k×k convolution is a hotspot; all 3 layers" in text
    assert "pointwise" in text


def test_a_model_without_convolutions_is_told_so(make_analysis: Make) -> None:
    linear = tuple(r for r in make_analysis().layers if r.layer.op == "linear")
    for form in ("table", "markdown"):
        text = render(make_analysis(layers=linear, coverage=Coverage("whole", 0, 0, (), "meta")), form)
        assert "no convolution" in text
        assert "wrong-form" in text


def test_a_model_without_anything(make_analysis: Make) -> None:
    empty = make_analysis(
        layers=(), by_op=(), macs=0, params=0, inputs=(), notes=(), tree=TreeNode("", "Net", 0, 0),
        coverage=Coverage("eager", 0, 0, (), "real"),
    )  # fmt: skip
    for form in FORMATS:
        assert render(empty, form)
    assert "no convolutions and no linear maps" in render(empty)
    assert "(model)" in render(empty, view=View(depth=3))


def test_the_tree_hides_what_costs_nothing_and_marks_what_it_cuts(analysis: Analysis) -> None:
    text = render(analysis, view=View(depth=1))
    assert "├─ blocks …" in text
    assert not re.search(r"[├└]─ relu", text)
    assert render(analysis, view=View(depth=0)).count("(model) …") == 1


@pytest.mark.parametrize("settings", [{"sort": "size"}, {"top": -1}, {"depth": -1}])
def test_a_view_that_makes_no_sense(settings: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        View(**settings)  # type: ignore[arg-type]


def test_what_a_form_cannot_show() -> None:
    with pytest.raises(UsageError, match="every layer"):
        View(top=3).check("json")
    with pytest.raises(UsageError, match="not modules"):
        View(depth=3).check("csv")
    with pytest.raises(UsageError, match="table, json, markdown, csv, html"):
        render(None, "pdf")  # type: ignore[arg-type]
    for form in FORMATS:
        View().check(form)
