"""Other tools' counts as a person, a spreadsheet and a program read them."""

from __future__ import annotations

import csv
import io

import pytest

from pwrewrite.analysis.conventions import Count, Row
from pwrewrite.report import counts
from pwrewrite.report.terminal import text
from pwrewrite.report.to_markdown import markdown

ROWS = (
    Row("conv2d", "", 3, 1_000_000, 1_000_000),
    Row("batch norm", "2 per element", 3, 5_000, 0),
    Row("conv2d", "called as a function: counted as 0", 1, 0, 250_000),
)
SAME = Count("torch", 1_250_000, "MACs", 1_250_000, (Row("conv2d", "", 4, 1_250_000, 1_250_000),))
OTHER = Count("fvcore", 1_005_000, "flops", 1_250_000, ROWS, ("a LSTM counts as 0",))


def test_terminal_page_says_totals_and_reasons() -> None:
    assert text(tuple(counts.blocks([SAME, OTHER])), 80) == (
        "\n"
        "How others count  beside our 1,250,000 MACs\n"
        "torch   1,250,000  MACs   equal\n"
        "fvcore  1,005,000  flops  -245,000 (-19.6%)\n"
        "                          -250,000 conv2d, called as a function: counted as 0\n"
        "                          +5,000 batch norm, 2 per element (3 calls)\n"
        "                          not exact: a LSTM counts as 0\n"
    )


def test_small_reasons_are_summed_up_unless_all_are_wanted() -> None:
    many = Count("thop", 110, "MACs", 0, tuple(Row(f"kind {n}", "", 1, n, 0) for n in range(20, 0, -2)))
    assert counts.reason_texts(many, 6)[-1] == "+20 in 4 smaller reasons"
    assert len(counts.reason_texts(many, 6)) == 7
    assert len(counts.reason_texts(many, 9)) == 10  # "1 smaller" takes the room of the one


@pytest.mark.parametrize(
    ("total", "ours", "said"),
    [
        (1_250_000, 1_250_000, "equal"),
        (1_250_001, 1_250_000, "+1 (<0.1%)"),
        (625_000, 1_250_000, "-625,000 (-50.0%)"),
        (7, 0, "+7"),
    ],
)
def test_difference(total: int, ours: int, said: str) -> None:
    assert counts.difference_text(Count("thop", total, "MACs", ours, ())) == said


def test_markdown_has_every_reason_escaped() -> None:
    odd = Count("thop", 5, "MACs", 0, (Row("a|b", "class My_Conv", 1, 5, 0),))
    lines = markdown(tuple(counts.blocks([SAME, odd]))).splitlines()
    assert lines[0] == "## How others count"
    assert lines[6] == "| torch | 1,250,000 | MACs | equal |"
    assert lines[7] == "| thop | 5 | MACs | +5 |"
    assert lines[8] == r"|  |  |  | +5 a\|b, class My\_Conv |"


def test_csv_adds_up_to_its_total_row() -> None:
    rows = list(csv.DictReader(io.StringIO(counts.Counts(SAME, (OTHER,)).csv(), newline="")))
    assert tuple(rows[0]) == counts.COLUMNS
    for tool in ("torch", "fvcore"):
        *parts, total = [row for row in rows if row["tool"] == tool]
        assert total["kind"] == "total"
        for column in ("counted", "macs", "difference"):
            assert sum(int(row[column]) for row in parts) == int(total[column])


def test_data_is_plain_and_complete() -> None:
    assert counts.convention(OTHER) == {"tool": "fvcore", "total": 1_005_000, "unit": "flops"}
    found = counts.data(OTHER)
    assert (found["macs"], found["difference"], found["caveats"]) == (1_250_000, -245_000, ["a LSTM counts as 0"])
    assert found["rows"][1] == {
        "kind": "batch norm",
        "rule": "2 per element",
        "calls": 3,
        "counted": 5_000,
        "macs": 0,
        "difference": 5_000,
    }
