"""Plans as text: what comes back, and which line is complained about."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pwrewrite.core.errors import PlanError
from pwrewrite.core.json_text import dumps
from pwrewrite.core.plan import Estimate, Op, Plan, Skip, SkipReason

OPS = (
    Op(
        "factorize",
        "layer1.0",
        "insert-bottleneck",
        {"form": "reduce", "widths": {"rank_in": 4}},
        Estimate(9, 4, 90, 40),
    ),
    Op("project", "päth", "project-branch", {"channels": 2, "note": 'a "[\n' + "1]"}),
)
SKIPS = (Skip("a", SkipReason.DEPTHWISE, "mixes no channels"), Skip("b", SkipReason.EXCLUDED, "not meant"))
PLAN = Plan(OPS, SKIPS, {"class": "Net", "params": 9})
TEXT = PLAN.to_json()


def test_a_roundtrip_changes_nothing() -> None:
    assert Plan.from_json(TEXT) == PLAN
    assert Plan.from_json(TEXT).to_json() == TEXT
    assert Plan.from_json(json.dumps(json.loads(TEXT))) == PLAN
    assert len(PLAN) == 2
    assert list(PLAN) == list(OPS)
    assert "päth" in TEXT


def test_keys_this_version_does_not_know_at_the_top_are_left_alone() -> None:
    data = {"names": {"ops": [1, {"path": 2}]}, **PLAN.to_dict()}
    assert Plan.from_json(json.dumps(data, indent=2)) == PLAN


def test_lists_of_numbers_stay_in_a_line() -> None:
    data = {"a": [1, 2.5, True, None], "b": [[1, 2], [3, 4]], "c": [{"x": [1]}], "d": [], "e": ["[ 1,\n 2 ]", 1]}
    text = dumps(data)
    assert json.loads(text) == data
    assert '"a": [1, 2.5, true, null],\n' in text
    assert '"b": [[1, 2], [3, 4]],\n' in text
    assert '"x": [1]\n' in text


def test_joined_plans() -> None:
    """Skips of layers that the other carries out are dropped, and 'not meant' where more is known."""
    first = Plan(OPS[:1], (Skip("päth", SkipReason.EXCLUDED, "x"), Skip("a", SkipReason.EXCLUDED, "x"), SKIPS[1]))
    second = Plan(OPS[1:], (SKIPS[0], SKIPS[1], Skip("layer1.0", SkipReason.WRONG_FORM, "x")), {"class": "Net"})
    both = first + second
    assert both.ops == OPS
    assert both.skips == (SKIPS[1], SKIPS[0])
    assert both.model == {"class": "Net"}


def test_where_an_op_came_from() -> None:
    line = TEXT[: TEXT.index('"rank_in"')].count("\n") + 1
    read = Plan.from_json(TEXT, "p.json").ops[0]
    assert read.where("rank_in") == f"p.json, line {line} (rank_in of the op for layer1.0)"
    start = TEXT[: TEXT.index('"action"')].count("\n")
    assert read.where("channels").startswith(f"p.json, line {start} ")  # that of another op is not taken for it
    assert OPS[0].where("rank_in") == "rank_in of the op for layer1.0"
    assert "text" not in repr(read)


@pytest.mark.parametrize(
    ("old", "new", "marker", "word"),
    [
        ('"pwrewrite.plan/1"', '"pwrewrite.plan/9"', '"schema"', "version"),
        ('"ops": [', '"opps": [', '"ops"', "ops is a list"),
        ('"action": "factorize"', '"action": 3', '"action"', "'action'"),
        ('"path": "layer1.0",', "", None, "'path'"),
        ('"pass": "insert-bottleneck"', '"pass": null', '"pass"', "'pass'"),
        ('"path": "layer1.0",', '"path": "layer1.0", "rank": 3,', '"rank"', "no 'rank'"),
        ('"params_after": 4', '"params_after": "4"', '"estimate"', "estimate"),
        ('"params_after": 4', '"params_later": 4', '"estimate"', "params_before, params_after"),
        ('"reason": "depthwise"', '"reason": "deepwise"', '"reason"', "one of"),
        ('"reason": "depthwise",', "", None, "a skip needs"),
        ('"skipped": [', '"skipped": 3, "x": [', '"skipped"', "skipped is a list"),
        ('"class": "Net",', '"class": "Net",,', '"class"', "not JSON"),
        ('"params": 9', '"params": 9,', None, "a comma after the last entry"),
    ],
)
def test_nonsense_is_told_with_its_line(old: str, new: str, marker: str | None, word: str) -> None:
    text = TEXT.replace(old, new, 1)
    with pytest.raises(PlanError) as caught:
        Plan.from_json(text, "my.json")
    assert word in str(caught.value)
    assert str(caught.value.where).startswith("my.json, line ")
    if marker is not None and marker in text:
        line = text[: text.index(marker)].count("\n") + 1
        assert str(caught.value.where).startswith(f"my.json, line {line}")


@pytest.mark.parametrize("data", [[], 3, None, {}, {"schema": "pwrewrite.plan/1"}])
def test_what_is_no_plan(data: Any) -> None:
    with pytest.raises(PlanError):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize("entry", [3, None, []])
def test_entries_that_are_no_objects(entry: Any) -> None:
    for key in ("ops", "skipped"):
        data = {**PLAN.to_dict(), key: [entry]}
        with pytest.raises(PlanError):
            Plan.from_json(json.dumps(data))


def test_the_second_of_two_ops_has_its_own_line() -> None:
    text = TEXT.replace('"path": "päth"', '"path": 1')
    with pytest.raises(PlanError) as caught:
        Plan.from_json(text, "p")
    assert caught.value.where == f"p, line {text[: text.index(': 1,')].count(chr(10)) + 1}"


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(TEXT, encoding="utf-8")
    assert Plan.read(file) == PLAN
    with pytest.raises(PlanError, match="cannot read"):
        Plan.read(tmp_path / "none.json")
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="cannot read"):
        Plan.read(file)


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ('"rank_in": 4', '"rank_in": Infinity', "none or too large"),
        ('"rank_in": 4', '"rank_in": -Infinity', "none or too large"),
        ('"rank_in": 4', '"rank_in": NaN', "none or too large"),
        ('"rank_in": 4', '"rank_in": 1e999', "none or too large"),
        ('"rank_in": 4', '"rank_in": ' + "9" * 30, "none or too large"),
        ('"rank_in": 4', '"rank_in": ' + "9" * 5000, "none or too large"),
        ('"rank_in": 4', '"rank_in": ' + "[" * 100000 + "]" * 100000, "nested too deeply"),
        ('"class": "Net"', '"class": ["Net"]', "model.class is a string"),
        ('"class": "Net"', '"target": 3', "model.target is a string"),
        ('"class": "Net"', '"args": [["width", 3]]', "model.args is an object"),
        ('"class": "Net"', '"args": "width=3"', "model.args is an object"),
        ('"class": "Net"', '"inputs": {"shape": [1]}', "model.inputs is a list"),
        ('"class": "Net"', '"inputs": [[1, 3, 8, 8]]', "not shapes"),
        ('"class": "Net"', '"inputs": [{"shape": [1, -3], "dtype": "float32"}]', "not shapes"),
        ('"class": "Net"', '"inputs": [{"shape": [1, true], "dtype": "float32"}]', "not shapes"),
        ('"class": "Net"', '"inputs": [{"shape": "1x3", "dtype": "float32"}]', "not shapes"),
        ('"class": "Net"', '"inputs": [{"shape": [1, 3], "dtype": 32}]', "not shapes"),
        ('"class": "Net"', '"inputs": [{"shape": [1, 3]}]', "not shapes"),
        ('"class": "Net"', '"inputs": [{"shape": [1, 3], "dtype": "float32", "name": 1}]', "not shapes"),
    ],
)
def test_values_that_no_plan_holds(old: str, new: str, word: str) -> None:
    assert old in TEXT
    with pytest.raises(PlanError, match=word) as caught:
        Plan.from_json(TEXT.replace(old, new, 1), "my.json")
    assert len(str(caught.value)) < 600
    assert "my.json" in str(caught.value)


def test_a_plan_that_is_no_regular_file_or_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path(os.devnull), tmp_path):
        with pytest.raises(PlanError, match=r"not a regular file|directory"):
            Plan.read(path)
    with open(tmp_path / "large", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(PlanError, match="larger than 256 MiB"):
        Plan.read(tmp_path / "large")
