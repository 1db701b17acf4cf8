from hypothesis import given, strategies as st
from rich.cells import cell_len

from pwrewrite.report.page import Column, Table
from pwrewrite.report.terminal import bar, shorten, text


def test_a_path_is_cut_in_its_middle() -> None:
    assert shorten("layer1", 10) == "layer1"
    assert shorten("backbone.body.layer4.2.conv2", 16) == "backb…r4.2.conv2"
    assert shorten("abc", 1) == "…"
    assert shorten("abc", 0) == ""


@given(st.text(max_size=40), st.integers(0, 50))
def test_what_is_cut_fits_even_where_characters_are_wide(told: str, width: int) -> None:
    assert cell_len(shorten(told, width)) <= width or cell_len(told) <= width


def test_bars() -> None:
    assert bar(0, 8) == ""
    assert bar(1e-9, 8) == "▏"
    assert bar(0.5, 8) == "████"
    assert bar(1, 8) == "████████"
    assert bar(1.5, 8) == "████████"


def columns() -> list[Column]:
    return [
        Column("name", ["a.long.path.to.somewhere", "b"], right=False, shrink=10),
        Column("one", ["11111", "1"], keep=2),
        Column("two", ["22222", "2"], keep=1),
        Column("must", ["33333", "3"]),
    ]


def head(width: int) -> list[str]:
    return text((Table(columns()),), width).splitlines()[0].split()


def test_columns_give_way_in_turn() -> None:
    assert text((Table(columns()),), 80).splitlines() == [
        "name                        one    two   must",
        "─────────────────────────────────────────────",
        "a.long.path.to.somewhere  11111  22222  33333",
        "b                             1      2      3",
    ]
    assert head(30) == ["name", "one", "two", "must"]
    assert head(27) == ["name", "one", "must"]
    assert head(20) == ["name", "must"]


@given(st.integers(16, 60))
def test_a_table_never_exceeds_its_width(width: int) -> None:
    assert all(cell_len(line) <= width for line in text((Table(columns()),), width).splitlines())


def test_no_rows() -> None:
    assert text((Table([Column("name", [])]),), 20).splitlines() == ["name", "────"]
