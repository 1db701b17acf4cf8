"""Carrying out a plan: what is replaced, what stays, what is refused, and what is taken back."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_networks import fingerprint
from torch import Tensor, nn

from pwrewrite.capturing import capture
from pwrewrite.core.errors import PlanError, RefusedError
from pwrewrite.core.plan import Op, Plan, Skip, SkipReason
from pwrewrite.edit.apply import Applied, apply, carry_out
from pwrewrite.edit.survival import survives
from pwrewrite.edit.swap import copy_of
from pwrewrite.layers.factorized import Factorized
from pwrewrite.passes import FactorizeLinear, InsertBottleneck, Pass

EXACT = InsertBottleneck(1.0, allow_growth=True)


def x_of(dtype: torch.dtype = torch.float64, size: int = 8) -> Tensor:
    return torch.randn(2, 8, size, size, generator=torch.Generator().manual_seed(0)).to(dtype)


X = x_of()


def conv(**settings: Any) -> nn.Conv2d:
    return nn.Conv2d(8, 8, 3, **{"padding": 1, **settings}).double()


def plan_of(model: nn.Module, one: Pass = EXACT, x: Tensor = X) -> Plan:
    found = one.propose(capture(model, x))
    return Plan(tuple(p for p in found if isinstance(p, Op)), tuple(p for p in found if isinstance(p, Skip)))


def done(model: nn.Module, one: Pass = EXACT, x: Tensor = X, *, survive: bool = True) -> Applied:
    """A pass carried out; the model must be as it was."""
    model.eval()
    captured, before = capture(model, x), fingerprint(model)
    applied = carry_out(model, plan_of(model, one, x), probe=survives(captured, x) if survive else None)
    assert fingerprint(model) == before
    return applied


def same(applied: Applied, model: nn.Module, x: Tensor = X) -> bool:
    """Equal in float64: at most ten layers with sums of some hundred products, 1e-16 each."""
    return torch.allclose(applied.model(x), model(x), atol=1e-11)


class Runs(nn.Module):
    """Runs a function of itself; parts are registered."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


# --------------------------------------------------------------------------------------------- what is replaced


def test_a_root_that_is_a_convolution() -> None:
    model = conv()
    applied = done(model)
    assert isinstance(applied.model, Factorized)
    assert applied.edits[0].renamed == {
        "weight": ("reduce.weight", "core.weight", "expand.weight"),
        "bias": ("expand.bias",),
    }
    assert same(applied, model)


def test_every_name_of_a_module_is_replaced() -> None:
    layer = conv()
    inner = nn.ModuleList([layer, nn.ReLU()])
    model = Runs(lambda m, x: m.b(m.listed[0](m.a(x))), a=layer, listed=inner, b=layer)
    applied = done(model)
    changed: Any = applied.model
    assert changed.a is changed.b is changed.listed[0]
    assert isinstance(changed.a, Factorized)
    assert applied.edits[0].aliases == ("listed.0", "b")
    assert same(applied, model)


def test_state_of_the_model_survives() -> None:
    """Hooks on parents, flags of single modules, requires_grad, memory format, and what nothing edits."""
    calls: list[int] = []
    inner = nn.Sequential(conv(), nn.BatchNorm2d(8).double())
    inner.register_forward_hook(lambda *_: calls.append(1))
    model = Runs(lambda m, x: m.block(x), block=inner, spare=nn.Linear(3, 3))
    model.register_buffer("note", torch.ones(2), persistent=False)
    model.eval()
    plan = plan_of(model)
    model.train()
    inner[0].eval()
    inner[0].weight.requires_grad_(False)
    model.to(memory_format=torch.channels_last)
    applied = carry_out(model, plan)
    changed: Any = applied.model
    assert changed.training
    assert not any(m.training for m in changed.block[0].modules())
    assert changed.block[1].training
    flags = {name: p.requires_grad for name, p in changed.block[0].named_parameters()}
    assert flags == {"reduce.weight": False, "core.weight": False, "expand.weight": False, "expand.bias": True}
    assert changed.block[0].core.weight.is_contiguous(memory_format=torch.channels_last)
    assert "note" not in changed.state_dict()
    assert torch.equal(changed.spare.weight, model.spare.weight)
    calls.clear()
    changed(X)
    assert calls == [1]
    assert type(changed) is Runs


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float16, 1e-2), (torch.bfloat16, 1e-1)]
)
def test_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    """A few roundings of the dtype's eps (1e-16, 1e-3, 8e-3) on sums of order 1."""
    torch.manual_seed(0)
    model, x = nn.Sequential(conv(), nn.ReLU(), conv()).to(dtype), x_of(dtype)
    applied = done(model, x=x)
    assert {p.dtype for p in applied.model.parameters()} == {dtype}
    assert torch.allclose(applied.model(x), model(x), atol=tolerance)


def test_weights_on_meta_stay_there() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(8, 8, 3))
    applied = carry_out(model, plan_of(model, InsertBottleneck(4), x_of(torch.float32)))
    assert all(p.is_meta for p in applied.model.parameters())
    assert applied.edits[0].relative_error is None


def test_nothing_random_is_drawn_and_fresh_weights_differ_by_layer() -> None:
    model = nn.Sequential(conv(), conv())
    plan = plan_of(model, InsertBottleneck(4, init="fresh"))
    state = torch.get_rng_state()
    first, second = apply(model, plan), apply(model, plan)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first[0].core.weight, second[0].core.weight)  # type: ignore[index]
    assert not torch.equal(first[0].core.weight, first[1].core.weight)  # type: ignore[index]


def test_a_script_module_is_left_alone() -> None:
    scripted = torch.jit.trace(nn.Sequential(conv(), nn.ReLU()).eval(), X)
    model = Runs(lambda m, x: m.own(m.scripted(x)), scripted=scripted, own=conv()).eval()
    applied = carry_out(model, plan_of(model))
    assert [edit.path for edit in applied.edits] == ["own"]
    assert same(applied, model)


# -------------------------------------------------------------------------------------------- functional calls


class Functional(nn.Module):
    """Two functional convolutions in the root, one through a child, and all that a graph might lose."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(8, 8, 3, 3).double())
        self.second = nn.Parameter(torch.randn(8, 8, 3, 3).double())
        self.bias = nn.Parameter(torch.randn(8).double())
        self.child = conv()
        self.head = nn.Linear(8, 8).double()
        self.unused = nn.Conv2d(1, 1, 1)
        self.extra = nn.Parameter(torch.zeros(3))
        self.register_buffer("kept", torch.ones(1))
        self.register_buffer("scratch", torch.ones(1), persistent=False)
        self.constant = 3

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.first, self.bias, padding=1))
        x = F.conv2d(input=x, weight=self.second, stride=(2, 1), padding="valid")
        x = F.conv2d(x, self.child.weight, self.child.bias, padding=1)
        return F.linear(x.mean((2, 3)), self.head.weight, self.head.bias)


def test_several_functional_calls_in_the_root() -> None:
    torch.manual_seed(0)
    model = Functional()
    model.register_forward_hook(lambda *_: None)
    applied = done(model)
    assert [edit.kind for edit in applied.edits] == ["graph"] * 3
    assert {edit.graph_module for edit in applied.edits} == {""}
    assert same(applied, model)
    changed: Any = applied.model
    assert type(changed).__name__ == "Functional"
    assert changed.constant == 3
    assert len(changed._forward_hooks) == 1
    names = set(changed.state_dict())
    assert names >= {"extra", "kept", "unused.weight", "head.weight"}
    assert not names & {"first", "second", "bias", "scratch", "child.weight"}
    assert "scratch" in dict(changed.named_buffers())
    for edit in applied.edits:
        assert set(edit.renamed) - {"bias", "child.bias"} <= {"first", "second", "child.weight"}
        assert all(name in names for new in edit.renamed.values() for name in new)
    linear = done(model, FactorizeLinear(1.0, allow_growth=True))
    assert [edit.path for edit in linear.edits] == ["head"]
    assert same(linear, model)


def test_a_copy_of_an_edited_module_holds_all_of_it() -> None:
    class Twin(Functional):
        def __init__(self) -> None:
            super().__init__()
            self.twin = self.unused

    model = Twin()
    once = done(model).model
    twice = copy_of(once)
    assert list(twice.state_dict()) == list(once.state_dict())
    assert [n for n, _ in twice.named_modules(remove_duplicate=False)] == [
        n for n, _ in once.named_modules(remove_duplicate=False)
    ]
    assert type(twice).__name__ == "Twin"
    assert torch.equal(twice(X), once(X))


@pytest.mark.parametrize(
    ("code", "word"),
    [
        (
            lambda m, x: F.conv2d(x if x.shape[0] > 1 else x * 2, m.weight),
            "it decides by a value or a size, which a graph would hold (test_apply.py:",
        ),
        (
            lambda m, x: (torch._check(x.shape[1] == 8), F.conv2d(x, m.weight))[1],
            "it decides by a value or a size, which a graph would hold (test_apply.py:",
        ),
        (lambda m, x: F.conv2d(x, m.weight) / len(x), "it takes a length, which a graph would hold (test_apply.py:"),
        (lambda m, x: F.conv2d(x, m.weight) * (2 if m.training else 1), "in training"),
        (lambda m, x: (setattr(m, "last", x), F.conv2d(x, m.weight))[1], "sets last"),
        (lambda m, x: F.conv2d(x, m.weight, m.bias * 2), "computed"),
    ],
)
def test_code_that_no_graph_can_hold(code: Callable[..., Any], word: str) -> None:
    class Scope(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8, 3, 3).double())
            self.bias = nn.Parameter(torch.randn(8).double())

        def forward(self, x: Tensor) -> Tensor:
            return code(self, x)

    model = Runs(lambda m, x: m.own(m.scope(x)), scope=Scope(), own=conv()).eval()
    applied = carry_out(model, plan_of(model))
    assert [edit.path for edit in applied.edits] == ["own"]
    (skip,) = applied.skips
    assert skip.reason is SkipReason.NOT_TRACED
    assert word in skip.detail
    assert "last" not in vars(applied.model.scope)  # type: ignore[arg-type]
    assert same(applied, model)


# ------------------------------------------------------------------------------------------------ held elsewhere


def in_a_list(model: Any) -> None:
    model.plain = [model.layer]


def in_a_tuple_in_a_dict(model: Any) -> None:
    model.plain = {"all": (1, model.layer)}


def past_setattr(model: Any) -> None:
    object.__setattr__(model, "plain", model.layer)


def in_dict_of_another(model: Any) -> None:
    vars(model.other)["plain"] = model.layer


def bound_method(model: Any) -> None:
    model.plain = model.layer.forward


def in_a_partial(model: Any) -> None:
    model.plain = functools.partial(torch.utils.checkpoint.checkpoint, model.layer)


def in_a_closure(model: Any) -> None:
    layer = model.layer
    model.plain = lambda x: layer(x)


def in_a_closure_over_self(model: Any) -> None:
    model.plain = lambda x: model.layer(x)


def in_a_default(model: Any) -> None:
    model.plain = lambda x, layer=model.layer: layer(x)


def in_an_object(model: Any) -> None:
    class Box:
        def __init__(self, what: Any) -> None:
            self.what = what

    model.plain = Box(model.layer)


def in_an_unregistered_module(model: Any) -> None:
    model.plain = [nn.Sequential(model.layer)]


def weakly(model: Any) -> None:
    model.plain = weakref.ref(model.layer)


HOLDERS = (
    in_a_list,
    in_a_tuple_in_a_dict,
    past_setattr,
    in_dict_of_another,
    bound_method,
    in_a_partial,
    in_a_closure,
    in_a_closure_over_self,
    in_a_default,
    in_an_object,
    in_an_unregistered_module,
    weakly,
)


@pytest.mark.parametrize("hold", HOLDERS)
def test_a_layer_held_elsewhere(hold: Callable[[nn.Module], None]) -> None:
    model = Runs(lambda m, x: m.other(m.layer(x)), layer=conv(), other=conv())
    hold(model)
    applied = done(model)
    skips = {skip.path: skip for skip in applied.skips}
    assert skips["layer"].reason is SkipReason.HELD_ELSEWHERE
    assert "plain" in skips["layer"].detail
    if hold is not in_a_closure_over_self:  # through the model it reaches every layer
        assert [edit.path for edit in applied.edits] == ["other"]
    assert same(applied, model)


def test_what_holds_a_parent_holds_no_layer() -> None:
    model = Runs(lambda m, x: m.block(x), block=nn.Sequential(conv()))
    model.plain = [model.block]  # type: ignore[assignment]
    object.__setattr__(model.block, "parent", model)
    model.block.register_forward_hook(lambda *_, model=model: None)
    assert [edit.path for edit in done(model).edits] == ["block.0"]


# --------------------------------------------------------------------------------------------------- taken back


def test_code_that_reads_layers_is_respected() -> None:
    """Ops that break the model become skips; all others are carried out, however many break."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.c0(x).to(m.c1.weight.dtype)
        x = m.c3(m.c2(m.c1(x)))
        assert m.c4.weight.shape[0] == 8
        return m.c5(m.c4(x))

    model = Runs(run, **{f"c{i}": conv() for i in range(6)})
    applied = done(model)
    assert [skip.path for skip in applied.skips] == ["c1", "c4"]
    assert {skip.reason for skip in applied.skips} == {SkipReason.BROKE_MODEL}
    assert all("has no attribute 'weight'" in skip.detail for skip in applied.skips)
    assert [edit.path for edit in applied.edits] == ["c0", "c2", "c3", "c5"]
    assert same(applied, model)


def test_code_that_asks_what_a_layer_is() -> None:
    """It runs on without the ReLU, in the same shapes: only its operations tell."""

    def run(m: Any, x: Tensor) -> Tensor:
        for layer in (m.a, m.b):
            x = F.relu(layer(x)) if isinstance(layer, nn.Conv2d) else layer(x)
        return m.c(x)

    model = Runs(run, a=conv(), b=conv(), c=conv())
    applied = done(model)
    assert [skip.path for skip in applied.skips] == ["a", "b"]
    assert "relu no longer run" in applied.skips[0].detail
    assert same(applied, model)


def test_an_edit_that_builds_on_one_taken_back_goes_too() -> None:
    model = Runs(lambda m, x: m.b(m.a(x)) * (1 if m.a.weight.requires_grad else 2), a=conv(), b=conv())
    inner = Op("factorize", "a.core", "x", plan_of(nn.Sequential(conv(bias=False))).ops[0].settings)
    plan = plan_of(model)
    both = Plan((plan.ops[0], inner, *plan.ops[1:]))
    applied = carry_out(model, both, probe=survives(capture(model, X), X))
    assert [(skip.path, skip.reason) for skip in applied.skips] == [
        ("a", SkipReason.BROKE_MODEL),
        ("a.core", SkipReason.BROKE_MODEL),
    ]
    assert [edit.path for edit in applied.edits] == ["b"]


def test_functional_edits_that_break_are_taken_back_alone() -> None:
    class Scope(Functional):
        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(F.conv2d(x, self.first, self.bias, padding=1))
            return F.conv2d(x, self.second, padding=1)

    def run(m: Any, x: Tensor) -> Tensor:
        assert "second" in dict(m.scope.named_parameters())
        return m.scope(x)

    model = Runs(run, scope=Scope())
    applied = done(model)
    assert [skip.path for skip in applied.skips] == ["scope.second"]
    assert [edit.path for edit in applied.edits] == ["scope.first"]
    assert same(applied, model)


def test_a_probe_that_fails_anyway() -> None:
    def probe(model: nn.Module) -> None:
        raise RuntimeError("never")

    model = nn.Sequential(conv())
    with pytest.raises(RefusedError, match="even as it was: RuntimeError: never"):
        carry_out(model, plan_of(model), probe=probe)


def test_progress_is_told_once_per_layer() -> None:
    seen: list[str] = []
    model = nn.Sequential(conv(), conv())
    carry_out(model, plan_of(model), probe=survives(capture(model, X), X), progress=seen.append)
    assert seen == ["0", "1"]


# ------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float) -> None:
    model = nn.Sequential(nn.Sequential(conv()))
    with torch.no_grad():
        model[0][0].weight[0, 0, 0, 0] = value  # type: ignore[index]
    with pytest.raises(RefusedError) as caught:
        apply(model, plan_of(model))
    assert caught.value.where == "0.0"
    apply(model, plan_of(model, InsertBottleneck(4, init="fresh")))


def test_a_factor_too_large_for_half_precision() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3).half())
    with torch.no_grad():
        model[0].weight.fill_(6e4)  # type: ignore[operator, union-attr]
    with pytest.raises(RefusedError, match="too large for the dtype"):
        apply(model, plan_of(model, x=x_of(torch.float16)))


def test_a_model_that_cannot_be_copied() -> None:
    model = nn.Sequential(conv())
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(RefusedError, match="cannot be copied") as caught:
        apply(model, plan_of(nn.Sequential(conv())))
    assert "locks" in str(caught.value.hint)


def test_apply_refuses_where_carry_out_skips() -> None:
    model = Runs(lambda m, x: m.layer(x), layer=conv())
    in_a_list(model)
    with pytest.raises(RefusedError, match="held by a list") as caught:
        apply(model, plan_of(model))
    assert caught.value.where == "layer"
    assert caught.value.got == "held-elsewhere"


def test_a_hand_written_op_on_a_layer_that_must_stay() -> None:
    plan = plan_of(nn.Sequential(conv()))
    model = nn.Sequential(conv())
    model[0].register_forward_hook(lambda *_: None)
    (skip,) = carry_out(model, plan).skips
    assert skip.reason is SkipReason.HOOKS


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (nn.Sequential(), ("no module '0'", "another model")),
        (nn.Sequential(nn.ReLU()), ("a layer that is none here", "ReLU")),
        (nn.Sequential(nn.Conv2d(8, 8, 3)), ("another layer", "stride")),
        (nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False)), ("another layer", "no bias")),
        (nn.Sequential(nn.Linear(8, 8)), ("another layer", "linear map")),
    ],
)
def test_a_plan_for_another_model(other: nn.Module, words: tuple[str, ...]) -> None:
    plan = Plan.from_json(plan_of(nn.Sequential(conv())).to_json(), "plan.json")
    with pytest.raises(PlanError) as caught:
        apply(other, plan)
    assert "plan.json, line" in str(caught.value.where)
    for word in words:
        assert word in str(caught.value)


def test_a_plan_carried_out_twice() -> None:
    model = nn.Sequential(conv())
    plan = plan_of(model)
    with pytest.raises(PlanError, match="a layer that is none here") as caught:
        apply(apply(model, plan), plan)
    assert "already" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"action": "factorize"', '"action": "squash"', ("unknown action", "factorize, project")),
        ('"form": "bottleneck"', '"form": "bottle"', ("unknown form", "bottleneck, reduce")),
        ('"init": "weights"', '"init": "zeros"', ("unknown init", "weights, fresh")),
        ('"rank_in": 8', '"rank_in": 0', ("rank_in", "from 1 to 8")),
        ('"rank_in": 8', '"rank_in": 9', ("rank_in", "from 1 to 8")),
        ('"rank_in": 8', '"rank_in": 4.0', ("rank_in", "4.0")),
        ('"rank_in": 8', '"rank_in": true', ("rank_in", "True")),
        ('"rank_in": 8', '"rank": 8', ("widths of bottleneck", "rank_in and rank_out")),
        ('"form": "bottleneck"', '"form": "bottleneck", "axes": [0]', ("no axes",)),
        ('"form": "bottleneck"', '"form": "spatial"', ("widths of spatial",)),
        ('"form": "bottleneck"', '"form": "spatial", "axes": [2]', ("axes", "0, 1")),
        ('"init": "weights"', '"init": "weights", "norm": "batch_norm"', ("no norm",)),
        ('"init": "weights"', '"init": "fresh", "activation": "relux"', ("unknown activation", "relu6")),
        ('"groups": 1', '"groups": 3', ("shape facts", "groups")),
        ('"stride": [1, 1]', '"stride": [1]', ("shape facts",)),
        ('"kernel_size": [3, 3]', '"kernel_size": "3"', ("shape facts",)),
        ('"path": "0"', '"path": "zero"', ("no module 'zero'",)),
    ],
)
def test_a_plan_edited_into_nonsense(old: str, new: str, words: tuple[str, ...]) -> None:
    model = nn.Sequential(conv())
    text = plan_of(model).to_json()
    assert text.count(old) == 1
    line = text[: text.index(old)].count("\n") + 1
    with pytest.raises(PlanError) as caught:
        apply(model, Plan.from_json(text.replace(old, new), "plan.json"))
    assert any(f"plan.json, line {n} " in str(caught.value.where) for n in range(line - 8, line + 2))
    for word in words:
        assert word in str(caught.value)


def test_the_line_is_that_of_the_setting() -> None:
    model = nn.Sequential(conv(), conv())
    text = plan_of(model).to_json()
    at = text.rindex('"rank_out": 8')
    with pytest.raises(PlanError) as caught:
        apply(model, Plan.from_json(text[:at] + '"rank_out": -1' + text[at + 13 :], "plan.json"))
    line = text[:at].count("\n") + 1
    assert caught.value.where == f"plan.json, line {line} (rank_out of the op for 1)"
