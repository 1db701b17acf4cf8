"""Timing takes turns, is kept by shape and device, and gives up what is not faster."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pwrewrite.core.convolution import ConvSpec
from pwrewrite.core.errors import RefusedError, UsageError
from pwrewrite.core.options import Budget
from pwrewrite.core.plan import Plan
from pwrewrite.engines.engine import engine_named
from pwrewrite.engines.timing import Timing, time_models
from pwrewrite.forms.specs import linear_spec
from pwrewrite.planning import latency
from pwrewrite.planning.budget import budgets_of
from pwrewrite.planning.latency import Conditions, LatencyTable, Variant, time_plan
from pwrewrite.planning.latency_search import _aim
from pwrewrite.planning.planner import Planner

SPEC = ConvSpec.of_module(nn.Conv2d(8, 8, 3, padding=1))
CPU = Conditions(torch.device("cpu"), torch.float32, False, 1)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PWREWRITE_CACHE", str(tmp_path))
    return tmp_path


def variants() -> list[Variant]:
    return [
        Variant(SPEC),
        Variant(SPEC, "reduce", (("rank_in", 2),)),
        Variant(SPEC, "spatial", (("rank", 3),), (0,)),
    ]


def test_what_was_measured_is_kept(cache: Path) -> None:
    table = LatencyTable(CPU)
    found = table.times((2, 8, 12, 12), variants())
    assert all(0 < seconds < 10 for seconds in found)
    assert table.measured == 3
    assert table.times((2, 8, 12, 12), variants()[:2]) == found[:2]
    table.save()
    again = LatencyTable(CPU)
    assert again.times((2, 8, 12, 12), variants()) == found
    assert again.measured == 0
    again.times((4, 8, 12, 12), variants()[:1])
    assert again.measured == 1
    other = LatencyTable(Conditions(torch.device("cpu"), torch.float32, False, 2))
    other.times((2, 8, 12, 12), variants()[:1])
    assert other.measured == 1
    assert len(list(cache.rglob("*.json"))) == 1


def test_no_more_is_timed_at_once_than_there_is_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once, in_turns = list[int](), latency.time_in_turns

    def counted(runs: Sequence[Callable[[], object]], *args: Any, **settings: Any) -> list[Timing]:
        at_once.append(len(runs))
        return in_turns(runs, *args, **settings)

    monkeypatch.setattr(latency, "time_in_turns", counted)
    sizes = [4 * variant.moved((2, 8, 12, 12)) for variant in variants()]
    with torch.no_grad():
        for size, variant in zip(sizes, variants()):
            module, x, read = variant.make(torch.device("cpu"), torch.float32), torch.randn(2, 8, 12, 12), 0
            for stage in (each for each in module.modules() if isinstance(each, torch.nn.Conv2d)):
                y = stage(x)
                read += x.numel() + y.numel() + sum(p.numel() for p in stage.parameters())
                x = y
            assert 4 * read == size
    for room, wanted in ((sum(sizes), [4]), (max(sizes), [3, 3]), (1, [3, 3])):
        monkeypatch.setattr(latency, "_ROOM", room)
        at_once.clear()
        assert all(0 < seconds < 10 for seconds in LatencyTable(CPU).times((2, 8, 12, 12), variants()))
        assert at_once == wanted
    assert at_once
    LatencyTable(CPU).times((2, 8, 12, 12), variants()[:1])
    assert at_once[-1] == 2


def test_a_damaged_cache_is_measured_anew(cache: Path) -> None:
    table = LatencyTable(CPU)
    table.times((1, 8, 6, 6), variants()[:1])
    table.save()
    (file,) = cache.rglob("*.json")
    for text in ("{", "[1]", '{"a": "b"}', "", "[" * 100000, '{"a": ' + "9" * 5000 + "}"):
        file.write_text(text)
        again = LatencyTable(CPU)
        assert not file.exists()
        (note,) = again.notes
        assert str(file) in note
        assert "damaged" in note
        again.times((1, 8, 6, 6), variants()[:1])
        assert again.measured == 1


def test_what_others_kept_meanwhile_stays(cache: Path) -> None:
    first, second = LatencyTable(CPU), LatencyTable(CPU)
    one = first.times((1, 8, 6, 6), variants()[:1])
    two = second.times((1, 8, 7, 7), variants()[:1])
    first.save()
    second.save()
    again = LatencyTable(CPU)
    assert again.times((1, 8, 6, 6), variants()[:1]) == one
    assert again.times((1, 8, 7, 7), variants()[:1]) == two
    assert again.measured == 0
    assert [file.suffix for file in cache.rglob("*") if file.is_file()] == [".json"]


def test_a_cache_that_cannot_be_written_is_no_error(cache: Path) -> None:
    (cache / "latency").write_text("not a folder")
    table = LatencyTable(CPU)
    table.times((1, 8, 6, 6), variants()[:1])
    table.save()
    assert [file.name for file in cache.iterdir()] == ["latency"]


def test_each_place_has_times_of_its_own(cache: Path) -> None:
    places = [CPU, replace(CPU, dtype=torch.float64), replace(CPU, channels_last=True), replace(CPU, threads=2)]
    for place in places:
        table = LatencyTable(place)
        table.times((1, 8, 6, 6), variants()[:1])
        assert table.measured == 1
        table.save()
    assert len(list(cache.rglob("*.json"))) == len(places)


def test_measuring_leaves_random_numbers_and_threads_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    timing = latency.time_in_turns

    def watched(runs: list[Callable[[], object]], device: torch.device, **how: Any) -> list[Timing]:
        used.append(torch.get_num_threads())
        return timing(runs, device, **how)

    monkeypatch.setattr(latency, "time_in_turns", watched)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    place = replace(CPU, threads=threads + 1)
    LatencyTable(place).times((1, 8, 6, 6), variants())
    assert used == [threads + 1]
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_what_does_not_run_here_takes_for_ever_and_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    make = Variant.make

    def refusing(self: Variant, device: torch.device, dtype: torch.dtype) -> nn.Module:
        if self.form == "reduce":
            raise RuntimeError("not implemented for this dtype")
        return make(self, device, dtype)

    monkeypatch.setattr(Variant, "make", refusing)
    table = LatencyTable(CPU)
    layer, reduced, spatial = table.times((1, 8, 6, 6), variants())
    assert math.isfinite(layer)
    assert reduced == math.inf
    assert math.isfinite(spatial)
    table.save()
    monkeypatch.setattr(Variant, "make", make)
    again = LatencyTable(CPU)
    assert all(map(math.isfinite, again.times((1, 8, 6, 6), variants())))
    assert again.measured == 3
    monkeypatch.setattr(Variant, "make", refusing)
    with pytest.raises(RuntimeError):
        LatencyTable(CPU).times((2, 8, 6, 6), variants()[1:])


@pytest.mark.parametrize("name", ["torch", "onnxruntime", "openvino"])
def test_an_engine_has_times_of_its_own(name: str, cache: Path) -> None:
    engine = engine_named(name)
    if engine.missing:
        pytest.skip(engine.missing)
    there = replace(CPU, engine=engine)
    table = LatencyTable(there)
    found = table.times((2, 8, 12, 12), variants())
    assert all(0 < seconds < 10 for seconds in found)
    table.save()
    assert LatencyTable(there).times((2, 8, 12, 12), variants()) == found
    plain = LatencyTable(CPU)
    plain.times((2, 8, 12, 12), variants()[:1])
    assert plain.measured == 1


def test_no_cache(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("PWREWRITE_CACHE", "off")
    table = LatencyTable(CPU)
    table.times((1, 8, 6, 6), variants()[:1])
    table.save()
    assert not list(cache.rglob("*.json"))


def test_places_are_those_of_the_model() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)).double()
    assert not Conditions.of(model).channels_last
    place = Conditions.of(model.to(memory_format=torch.channels_last))
    assert place.channels_last
    assert place.dtype is torch.float64
    x = place.arranged(torch.zeros(2, 3, 4, 4, dtype=torch.float64))
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert Variant(linear_spec(4, 3, True)).make(place.device, place.dtype)(torch.zeros(2, 4).double()).shape == (
        2,
        3,
    )


def test_models_are_timed_in_eval_mode_and_left_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout()).train()
    first, second = time_models([model, model], (torch.zeros(2, 4),), {}, seconds=0.01)
    assert first.seconds > 0 < second.seconds
    assert all(module.training for module in model.modules())
    assert time_plan(model, torch.zeros(2, 4), Plan()) == 1.0


class Fake(LatencyTable):
    """Times that are known: the original takes its MACs, what is narrow half of that, other forms more."""

    def times(self, shape: tuple[int, ...], variants: list[Variant]) -> list[float]:  # type: ignore[override]
        return [1.0 if not one.form else 0.5 if one.form == "expand" else 1.5 for one in variants]


def timed(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Every edit makes the whole model that much faster."""
    monkeypatch.setattr(
        "pwrewrite.planning.planner.time_plan", lambda model, inputs, plan, *where: 1 - share * len(plan)
    )


def planner(monkeypatch: pytest.MonkeyPatch, **settings: object) -> Planner:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1) for _ in range(4))).eval()
    monkeypatch.setattr("pwrewrite.planning.planner.LatencyTable", Fake)
    monkeypatch.setattr(
        "pwrewrite.planning.planner.time_models", lambda *given, **how: [Timing(5.0, 0.0), Timing(1.0, 0.0)]
    )
    monkeypatch.setattr(
        "pwrewrite.planning.planner.time_plan", lambda model, inputs, plan, *where: (5 - 0.5 * len(plan)) / 5
    )
    return Planner(model, torch.zeros(1, 3 + 13, 8, 8), None, Budget(**settings))  # type: ignore[arg-type]


def test_a_latency_budget_uses_only_what_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    made = planner(monkeypatch)
    choice = made.choose(budgets_of({"latency": 0.8}))
    assert [op.settings["form"] for op in choice.plan.ops] == ["expand"] * 2
    assert choice.costs["latency"] == pytest.approx(4.0)
    assert {c.op.settings["form"] for one in made.layers for c in one.candidates if c.op} == {"expand"}
    with pytest.raises(RefusedError, match="cannot be met") as caught:
        made.choose(budgets_of({"latency": 0.5}))
    assert "3e+03 ms of 5e+03 ms" in str(caught.value)


def test_a_limit_is_tightened_until_the_whole_model_meets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = planner(monkeypatch)
    monkeypatch.setattr(
        "pwrewrite.planning.planner.time_plan", lambda model, inputs, plan, *where: 1 - 0.07 * len(plan)
    )
    choice = made.choose(budgets_of({"latency": 0.8}))
    assert len(choice.plan.ops) == 3
    with pytest.raises(RefusedError, match=r"latency=0\.65 cannot be met") as caught:
        made.choose(budgets_of({"latency": 0.65}))
    assert "at least latency=0.72" in str(caught.value)
    assert "--best-effort" in str(caught.value)
    nearest = planner(monkeypatch, best_effort=True)
    monkeypatch.setattr(
        "pwrewrite.planning.planner.time_plan", lambda model, inputs, plan, *where: 1 - 0.07 * len(plan)
    )
    assert len(nearest.choose(budgets_of({"latency": 0.65})).plan.ops) == 4


def test_a_limit_is_loosened_where_more_was_given_up_than_had_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    made = planner(monkeypatch)
    monkeypatch.setattr("pwrewrite.planning.planner.time_plan", lambda model, inputs, plan, *where: 1 - 0.2 * len(plan))
    choice = made.choose(budgets_of({"latency": 0.8}))  # the layers promise a tenth each, the model saves a fifth
    assert len(choice.plan.ops) == 1
    assert choice.costs["latency"] == pytest.approx(4.0)


def test_the_next_limit_lies_between_the_plans_timed() -> None:
    assert _aim({1.0: 1.0, 0.6: 0.8}, 0.6) == pytest.approx(0.2)  # a fifth saved of two promised
    assert _aim({1.0: 1.0, 0.6: 0.8, 0.2: 0.4}, 0.6) == pytest.approx(0.4)
    assert _aim({1.0: 1.0, 0.6: 0.2}, 0.6) == pytest.approx(0.8)


def test_the_engine_of_a_plan_is_chosen_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = planner(monkeypatch, engine="auto")
    monkeypatch.setattr("pwrewrite.planning.planner.choose", lambda *given: engine_named("torch"))
    engine, session = made.engine
    assert session.ran.engine == "torch"
    assert made.engine[0] is engine
    assert made.notes == ["the fastest engine for this model is torch"]
    with pytest.raises(UsageError, match="unknown engine 'tensorflow'"):
        planner(monkeypatch, engine="tensorflow")


def test_a_gate_keeps_slower_forms_out_of_other_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    free = planner(monkeypatch).choose(budgets_of({"macs": 0.5}))
    gated = planner(monkeypatch, gate="latency").choose(budgets_of({"macs": 0.5}))
    assert {op.settings.get("form", op.action) for op in gated.plan.ops} == {"expand"}
    assert {op.settings.get("form", op.action) for op in free.plan.ops} != {"expand"}


def test_bytes_are_those_that_the_report_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    made = planner(monkeypatch)
    choice = made.choose(budgets_of({"bytes": 0.99}))
    assert choice.costs["bytes"] <= 0.99 * made.original["bytes"]


def test_layers_that_take_longer_alone_than_together_promise_no_more_than_there_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)).eval()
    monkeypatch.setattr(LatencyTable, "times", lambda self, shape, variants: [1.0, *[0.25] * (len(variants) - 1)])
    made = Planner(model, (torch.randn(1, 8, 16, 16),), None, Budget({"latency": 0.6}))
    made.frontier("latency", points=5)
    original = made.original["latency"]
    assert original < 1.0
    whole = sum(layer.candidates[0].costs["latency"] for layer in made.layers)
    assert 0 < whole <= original * (1 + 1e-9)
    assert made.allocator.cheapest("latency", budgets_of({"latency": 0.6}), {}).costs["latency"] > 0
