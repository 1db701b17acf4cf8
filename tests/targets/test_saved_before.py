"""What earlier versions saved still loads: folders and plans, written by version 0.1 with `nets.py` beside them."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import pwrewrite
from pwrewrite.core.plan import Plan
from pwrewrite.edit.apply import carry_out
from pwrewrite.targets.storage import read_plan

DATA = Path(__file__).parents[1] / "data" / "v0.1"
FOLDERS = sorted(path.parent.name for path in DATA.glob("*/plan.json"))


@pytest.fixture
def nets(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(DATA))
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    import nets

    return nets


def test_all_kinds_are_here() -> None:
    forms = {op.settings["form"] for name in FOLDERS for op in read_plan(DATA / name) if "form" in op.settings}
    assert forms >= {"bottleneck", "reduce", "expand", "spatial", "depthwise", "pair"}
    assert {op.action for name in FOLDERS for op in read_plan(DATA / name)} >= {"factorize", "project", "fold", "fuse"}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_saved_folder_computes_what_it_did(name: str, nets: Any) -> None:
    target = str(read_plan(DATA / name).model["target"])
    model = pwrewrite.load(DATA / name, getattr(nets, target.rpartition(":")[2])())
    with torch.no_grad():
        output = model(nets.example_inputs)
    expected = load_file(DATA / "expected.safetensors")[name]
    assert torch.allclose(output, expected, rtol=1e-4, atol=1e-6)  # float32, kernels of another machine


@pytest.mark.parametrize(("name", "widths"), [("plan", (4, 4)), ("edited", (3, 6))])
def test_a_plan_is_carried_out(name: str, widths: tuple[int, int], nets: Any) -> None:
    plan = Plan.read(DATA / f"{name}.json")
    result = carry_out(nets.Net(), plan)
    assert not result.skips
    assert [(edit.rank_in, edit.rank_out) for edit in result.edits] == [widths]
    again = json.loads(plan.to_json())
    assert again["ops"] == [dict(op.to_dict()) for op in plan]


def test_a_saved_folder_is_a_target(nets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(DATA)
    loaded = pwrewrite.load_target("bottleneck", base="nets.py:Net")
    assert loaded.example_inputs[0].shape == (2, 3, 8, 8)
    assert loaded.names["body.0.weight"]
