"""Settings of ops: what each action takes, and that anything else is an error that says where."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import torch
from torch import nn

from pwrewrite.capturing import capture
from pwrewrite.core.convolution import ConvSpec
from pwrewrite.core.errors import PlanError, PwrewriteError
from pwrewrite.core.plan import Op, Plan
from pwrewrite.edit.actions.settings import Count, Number, one_of, read
from pwrewrite.edit.apply import apply, carry_out
from pwrewrite.forms.specs import spec_to_dict
from pwrewrite.passes import (
    ChannelsLast,
    FoldBatchNorm,
    FusePointwiseActivation,
    InsertBottleneck,
    MergePointwise,
    Pass,
    RemoveInferenceNoise,
)

SPEC = spec_to_dict(ConvSpec.of_module(nn.Conv2d(4, 6, 3)))


@dataclass(frozen=True)
class Inner:
    path: str
    width: Count


@dataclass(frozen=True)
class Settings:
    layer: ConvSpec
    kind: Annotated[str, one_of("a", "b")]
    on: bool = False
    eps: Number = 0.0
    name: str | None = None
    mode: Annotated[str | None, one_of("x")] = None
    widths: Mapping[str, int] | None = None
    inner: tuple[Inner, ...] = ()
    pair: tuple[str, Count] = ("", 1)


def settings(**given: Any) -> Settings:
    return read(Settings, Op("act", "layer", "test", {"layer": SPEC, "kind": "a", **given}))


def test_what_is_read() -> None:
    got = settings(
        on=True, eps=1, name=None, mode=None, widths={"a": 2}, inner=[{"path": "p", "width": 3}], pair=["q", 2]
    )
    assert got == Settings(
        ConvSpec.of_module(nn.Conv2d(4, 6, 3)), "a", True, 1, widths={"a": 2}, inner=(Inner("p", 3),), pair=("q", 2)
    )
    assert settings(mode="x").mode == "x"


@pytest.mark.parametrize(
    ("given", "message", "expected"),
    [
        ({"colour": 1}, "act has no setting 'colour'", "one of layer, kind"),
        ({"kind": "c"}, "unknown kind", "one of a, b"),
        ({"kind": None}, "kind is not a string", "a string"),
        ({"on": 1}, "on is not true or false", "true or false"),
        ({"eps": float("inf")}, "this eps makes no sense", "a finite number"),
        ({"eps": True}, "eps is not a number", "a number"),
        ({"name": 3}, "name is not a string", "a string"),
        ({"mode": "y"}, "unknown mode", "one of x"),
        ({"widths": [1]}, "widths is not an object", "an object"),
        ({"widths": {"a": 2.0}}, "a is not an integer", "an integer"),
        ({"inner": {}}, "inner is not a list", "a list"),
        ({"inner": [3]}, "inner is not an object", "an object"),
        ({"inner": [{"path": "p"}]}, "act needs the setting 'width'", "an integer"),
        ({"inner": [{"path": "p", "width": 0}]}, "this width makes no sense", "an integer from 1"),
        ({"inner": [{"path": "p", "width": 1, "depth": 2}]}, "act has no setting 'depth'", "one of path, width"),
        ({"pair": ["q"]}, "pair is not a list", "a list"),
        ({"layer": 3}, "not the shape facts of a layer", "what"),
    ],
)
def test_what_is_refused(given: dict[str, Any], message: str, expected: str) -> None:
    with pytest.raises(PlanError) as caught:
        settings(**given)
    assert caught.value.message == message
    assert str(caught.value.expected).startswith(expected)
    assert "of the op for layer" in str(caught.value.where)


def test_what_is_missing() -> None:
    with pytest.raises(PlanError, match="act needs the setting 'kind'"):
        read(Settings, Op("act", "layer", "test", {"layer": SPEC}))


NETWORK = nn.Sequential(
    nn.Conv2d(32, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Dropout(), nn.Conv2d(32, 8, 3), nn.Conv2d(8, 8, 1)
).eval()


@pytest.mark.parametrize(
    "a_pass",
    [
        ChannelsLast(),
        FoldBatchNorm(),
        FusePointwiseActivation(),
        InsertBottleneck(4),
        MergePointwise(),
        RemoveInferenceNoise(),
    ],
    ids=lambda a_pass: type(a_pass).__name__,
)
def test_an_unknown_setting_of_each_action(a_pass: Pass) -> None:
    x = torch.zeros(1, 32, 9, 9)
    model = NETWORK
    if isinstance(a_pass, FusePointwiseActivation):
        model = nn.Sequential(NETWORK[0], NETWORK[2])
    op = next(p for p in a_pass.propose(capture(model, x)) if isinstance(p, Op))
    data = json.loads(Plan((op,)).to_json())
    data["ops"][0]["settings"]["colour"] = "red"
    with pytest.raises(PlanError, match=f"{op.action} has no setting 'colour'") as caught:
        apply(model, Plan.from_json(json.dumps(data, indent=1), "plan.json"))
    assert str(caught.value.where).startswith("plan.json, line ")


VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 10**9, 2**62, 1.5, float("inf"), float("nan"), "", "0", "weight", "code", "..a", [], {}, [[]],
    [1], ["a"], [{}], {"a": 1}, "relu", "bn\0",
)  # fmt: skip


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in JSON data with each of its keys."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def test_mutated_settings_are_carried_out_or_refused() -> None:
    """No other error comes out, whatever stands in a plan."""
    rng, x = random.Random(0), torch.zeros(1, 32, 9, 9)
    captured = capture(NETWORK, x)
    proposed = [
        op
        for a_pass in (ChannelsLast(), FoldBatchNorm(), InsertBottleneck(4), MergePointwise(), RemoveInferenceNoise())
        for op in a_pass.propose(captured)
        if isinstance(op, Op)
    ]
    for _ in range(300):
        op = rng.choice(proposed)
        data = json.loads(json.dumps(op.to_dict()["settings"]))
        container, key = rng.choice(list(places(data)))
        if isinstance(container, dict) and rng.random() < 0.2:
            del container[key]
        else:
            container[key] = rng.choice(VALUES)
        with contextlib.suppress(PwrewriteError):
            carry_out(NETWORK, Plan((Op(op.action, op.path, op.pass_name, data),)), fill=False)
