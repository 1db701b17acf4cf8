"""Settings of an op that nobody wrote on purpose are refused with the line, not read as something else."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from pwrewrite.core.convolution import ConvSpec
from pwrewrite.core.errors import PlanError
from pwrewrite.core.plan import Op, Plan
from pwrewrite.edit.apply import carry_out
from pwrewrite.forms.specs import spec_to_dict

DATA = Path(__file__).parents[1] / "data" / "v0.1"
FOLDERS = sorted(path.parent.name for path in DATA.glob("*/plan.json"))


@pytest.fixture
def nets(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(DATA))
    import nets

    return nets


@pytest.mark.parametrize("name", FOLDERS)
def test_unknown_settings(name: str, nets: Any) -> None:
    text = (DATA / name / "plan.json").read_text()
    plan = json.loads(text)
    model = getattr(nets, plan["model"]["target"].rpartition(":")[2])()
    for number in range(len(plan["ops"])):
        changed = copy.deepcopy(plan)
        changed["ops"][number]["settings"]["layr"] = 3
        with pytest.raises(PlanError, match="no setting 'layr'") as caught:
            carry_out(model, Plan.from_json(json.dumps(changed, indent=1), "my.json"), fill=False)
        assert "my.json, line" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("stride", [1.5, 1]),
        ("stride", [True, True]),
        ("padding", [[1.5, 1], [1, 1]]),
        ("groups", 1.5),
        ("groups", "1"),
        ("bias", None),
        ("bias", 1),
        ("transposed", None),
        ("transposed", "no"),
        ("in_channels", 8.0),
        ("padding_mode", None),
        ("dilatation", [1, 1]),
    ],
)
def test_shape_facts_of_another_type(key: str, value: Any, nets: Any) -> None:
    plan = json.loads((DATA / "reduce" / "plan.json").read_text())
    plan["ops"][0]["settings"]["layer"][key] = value
    with pytest.raises(PlanError, match=r"shape facts|not the layer") as caught:
        carry_out(nets.Net(), Plan.from_json(json.dumps(plan)), fill=False)
    assert key in str(caught.value) or "padding" in str(caught.value)


def test_layers_that_are_not_one() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3))
    facts = spec_to_dict(ConvSpec.of_module(model[0]))
    op = Op("merge", "1", "merge-pointwise", {"first": "0", "first_layer": facts, "layer": facts})
    with pytest.raises(PlanError, match="cannot be merged") as caught:
        carry_out(model, Plan((op,)))
    assert "neither is 1×1" in str(caught.value.got)
