"""Losses of changes of several layers at once: measured as if carried out, and taken into the plan."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_regions import Block, images, network
from torch import Tensor, nn

import pwrewrite
from pwrewrite.core.options import Budget
from pwrewrite.core.plan import Op, Plan
from pwrewrite.planning.allocator import Choice
from pwrewrite.planning.groups import Candidate, JointGroup, Prices
from pwrewrite.planning.measuring import LossMeter, exact_loss
from pwrewrite.planning.planner import Planner
from pwrewrite.planning.running import first_samples
from pwrewrite.planning.settling import settled


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PWREWRITE_CACHE", str(tmp_path / "cache"))


def planner(**settings: object) -> Planner:
    torch.manual_seed(0)
    inverted = nn.Sequential(nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 8, 3))
    normed = nn.Sequential(nn.Conv2d(8, 12, 1), nn.ReLU(), nn.Conv2d(12, 8, 1, bias=False), nn.BatchNorm2d(8))
    model = network(Block(), Block(stride=2), inverted, normed)
    return Planner(model, images(2), images(64), Budget({"macs": 0.5}, **settings), size=64)  # type: ignore[arg-type]


def test_what_is_measured_is_what_the_op_carried_out_loses() -> None:
    made = planner(refit="none")
    assert made.meter is not None
    batch = made.batches
    assert batch is not None
    (x,), _ = first_samples(batch.first()[0], 16)
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    kinds = dict[tuple[str, str, bool], list[tuple[JointGroup, Op]]]()
    for group in made.measured:
        for op in (c.op for c in group.candidates if c.op is not None):
            kinds.setdefault((op.action, op.path, bool(op.settings.get("drop"))), []).append((group, op))
    few = [key for key in kinds if sum(key[::2] == other[::2] for other in list(kinds)[: list(kinds).index(key)]) < 3]
    ops = [kinds[key][place] for key in few for place in sorted({0, len(kinds[key]) - 1})]
    assert {op.action for _, op in ops} == {"narrow", "substitute"}
    assert {op.settings["drop"] for _, op in ops if op.action == "substitute"} == {True, False}
    for group, op in ops:
        rewritten = pwrewrite.rewrite(
            made.model, images(2), Plan((op,)), calibration=images(64), refit="none", verify=False
        )
        with torch.no_grad():
            expected = exact_loss(made.model(x), rewritten.model(x), made.outputs)
        assert made.meter.loss(group, op) == pytest.approx(expected, rel=1e-3, abs=1e-9), (op.action, op.path)
    assert all(torch.equal(value, before[name]) for name, value in made.model.state_dict().items())


def test_a_plan_is_made_of_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    made, asked = planner(), list[Op]()

    def bad(self: LossMeter, group: JointGroup, op: Op, samples: int) -> float:
        asked.append(op)
        return 1e6

    monkeypatch.setattr(LossMeter, "loss", bad)
    choice = made.choose(pwrewrite.planning.budget.budgets_of({"macs": 0.7}))
    assert asked
    assert {op.action for op in choice.plan.ops} == {"factorize"}
    assert len(asked) == len({id(op) for op in asked})


def test_after_a_rough_look_only_places_without_a_measurement_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made, asked = planner(), list[Op]()

    def measured(self: LossMeter, group: JointGroup, op: Op, samples: int) -> float:
        asked.append(op)
        return 1.0

    monkeypatch.setattr(LossMeter, "loss", measured)
    first, second = [group for group in made.measured if len(group.candidates) > 4][:2]
    (a, b, c), (d, *_) = [[x.op for x in group.candidates[1:4] if x.op is not None] for group in (first, second)]
    rough = [Choice(Plan((op,)), 0.0, 0.0, {}) for op in (a, b)]
    exact = [Choice(Plan(ops), 0.0, 0.0, {}) for ops in ((c,), (c, d))]
    found = settled([first, second], made.meter, lambda: exact, made.say, glance=lambda: rough)
    assert found == exact
    assert len(asked) == 2
    assert asked[0] in (a, b)
    assert asked[1] is d


def test_one_of_each_group_speaks_for_a_frontier(monkeypatch: pytest.MonkeyPatch) -> None:
    made, asked = planner(), list[str]()
    low = made.allocator.frontier("macs")

    def tenfold(self: LossMeter, group: JointGroup, op: Op, samples: int) -> float:
        asked.append(f"{op.action} {op.path}")
        return 1e6

    monkeypatch.setattr(LossMeter, "loss", tenfold)
    assert any(op.action != "factorize" for choice in low for op in choice.plan.ops)
    high = made.frontier("macs")
    assert asked
    assert len(asked) == len(set(asked))
    priced = [op for choice in high for op in choice.plan.ops if f"{op.action} {op.path}" in asked]
    assert len(priced) < len([op for choice in low for op in choice.plan.ops if f"{op.action} {op.path}" in asked])


def test_where_a_plan_is_given_no_candidates_are_worked_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, options = network(Block(), Block()), {"calibration": images(64), "verify": False}
    plan = pwrewrite.rewrite(model, images(2), Budget({"macs": 0.6}), **options).plan
    monkeypatch.setattr("pwrewrite.planning.planner.make_candidates", lambda *_: pytest.fail("all were"))
    again = pwrewrite.rewrite(model, images(2), plan, **options)
    assert [edit.op.path for edit in again.edits] == [op.path for op in plan.ops]
    assert again.plan.ops


class Fed(nn.Module):
    """Takes a second input, of the same batch, in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = Block(), Block(), nn.Linear(8, 3)

    def forward(self, x: Tensor, more: dict[str, Tensor]) -> Tensor:
        out: Tensor = self.head((self.second(self.first(x)) + more["shift"][:, :, None, None]).mean((2, 3)))
        return out


def test_inputs_that_cannot_be_cut_are_taken_whole() -> None:
    torch.manual_seed(0)
    batches = [(images(32), {"shift": torch.randn(32, 8)})] * 3
    result = pwrewrite.rewrite(Fed().eval(), batches[0], Budget({"macs": 0.5}, calibration=batches), verify=False)
    assert result.edits


def test_where_losses_are_not_those_of_the_model_nothing_is_measured() -> None:
    assert planner(sensitivity="activations").meter is None
    assert Planner(network(Block()), images(2), None, Budget({"macs": 0.9})).meter is None


def test_prices_of_others_follow_the_nearest() -> None:
    ops = [Op("narrow", "a", "narrow", {"n": n}) for n in range(4)]
    candidates = [Candidate(0.0, {}), *(Candidate(10.0**n, {}, frozenset("a"), op) for n, op in enumerate(ops))]
    prices = Prices()
    assert [prices.priced(c) for c in candidates] == candidates
    prices.learn(candidates[1], 3.0)
    prices.learn(candidates[4], 1e4)
    priced = [prices.priced(c) for c in candidates]
    assert [c.loss for c in priced] == pytest.approx([0.0, 3.0, 30.0, 1000.0, 1e4])
    assert [prices.priced(c).loss for c in priced] == pytest.approx([0.0, 3.0, 30.0, 1000.0, 1e4])
    assert prices.knows(priced[1])
    assert not prices.knows(priced[2])


def test_the_unit_is_that_of_the_prediction() -> None:
    scores = torch.randn(16, 5, generator=torch.Generator().manual_seed(0))
    assert exact_loss(scores, scores + 3, "logits") == pytest.approx(0, abs=1e-9)  # a shift says nothing
    assert exact_loss(scores, scores + 0.1 * scores, "logits") > 0.005  # half of a hundredth, and the divergence
    assert exact_loss([scores, scores[:3]], [1.1 * scores, 1.2 * scores[:3]], "values") == pytest.approx(0.005 + 0.02)


def test_samples_are_cut_and_nothing_else_is() -> None:
    x, scale = torch.zeros(100, 3), torch.tensor(2.0)
    (args, kwargs) = first_samples(((x, scale, [1, 2]), {"y": list(range(100))}), 32)
    first, second, third = args
    assert isinstance(first, Tensor)
    assert len(first) == 32
    assert second is scale
    assert third == [1, 2]
    assert kwargs["y"] == list(range(32))
