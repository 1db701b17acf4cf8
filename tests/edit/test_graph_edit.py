"""Turning one module's code into a graph, and a functional call in it into a module."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.guards import Guarded, Levels, at_least, caught, either, multiples, own_error, some_lengths
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

import pwrewrite
from pwrewrite.capturing.code_trace import NotTraceable
from pwrewrite.capturing.guards import required
from pwrewrite.core.convolution import ConvSpec
from pwrewrite.edit.graph_edit import FunctionalCall, Regraphed, to_graph
from pwrewrite.forms.specs import linear_spec


class Code(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.zz = nn.BatchNorm2d(4)
        self.weight = nn.Parameter(torch.randn(6, 2, 3, 1))
        self.other = nn.Parameter(torch.randn(4, 6, 2, 2))
        self.bias = nn.Parameter(torch.randn(6))
        self.flat = nn.Parameter(torch.randn(3, 8))
        self.child = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Dropout())
        self.alias = self.child
        self.register_buffer("count", torch.zeros(1), persistent=False)
        self.register_buffer("stored", None)
        self.tag = ["kept"]

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = self.child(self.zz(x))
        x = torch.conv2d(x, self.weight, self.bias, (2, 1), padding="valid", groups=2)
        x = F.conv_transpose2d(x, weight=self.weight.transpose(0, 1) if False else self.other.transpose(0, 1), stride=2)
        return F.linear(x.flatten(2).mean(-1).repeat(1, 2), self.flat) * scale


X = torch.randn(2, 4, 7, 6, generator=torch.Generator().manual_seed(0))


def test_the_graph_holds_what_the_module_held() -> None:
    module = Code().eval()
    module.child[1].train()
    module.register_forward_pre_hook(lambda *_: None)
    made: Any = to_graph(module)
    assert isinstance(made, Regraphed)
    assert type(made).__name__ == "Code"
    assert list(made.state_dict()) == list(module.state_dict())
    assert dict(made.named_children()) == dict(module.named_children())
    assert made.child is made.alias is module.child
    assert made.tag is module.tag
    assert made._forward_pre_hooks is module._forward_pre_hooks
    assert not made.training
    assert made.child[1].training
    assert torch.equal(module.eval()(X, 2.0), made(X, 2.0))


def test_a_copy_holds_it_too() -> None:
    made: Any = to_graph(Code().eval())
    made.register_forward_hook(lambda *_: None)
    copied = copy.deepcopy(made)
    assert list(copied.state_dict()) == list(made.state_dict())
    assert copied.alias is copied.child is not made.child
    assert copied._non_persistent_buffers_set == {"count"}
    assert len(copied._forward_hooks) == 1
    assert copied.graph is not made.graph
    assert copied.graph.owning_module is copied
    assert torch.equal(copied(X), made(X))
    with torch.no_grad():
        copied.bias.zero_()
    assert not torch.equal(copied(X), made(X))


@pytest.mark.parametrize("copied", [False, True])
def test_what_it_cannot_take_is_raised_and_not_printed(copied: bool, capfd: pytest.CaptureFixture[str]) -> None:
    class Sums(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    made = to_graph(Sums())
    made.recompile()
    with pytest.raises(RuntimeError, match="must match"):
        (copy.deepcopy(made) if copied else made)(X, X[..., :2])
    assert capfd.readouterr() == ("", "")


def test_a_graph_module_is_edited_in_its_own_graph() -> None:
    traced = fx.symbolic_trace(Code().eval())
    for node in traced.graph.nodes:
        node.meta["mine"] = node.name
    made = to_graph(traced)
    assert [node.meta["mine"] for node in made.graph.nodes] == [node.name for node in traced.graph.nodes]
    FunctionalCall(made, "weight").replace("new", nn.Conv2d(4, 6, (3, 1), (2, 1), groups=2))
    assert hasattr(traced, "weight")
    assert torch.isfinite(traced(X)).all()


def test_the_facts_of_a_call() -> None:
    made = to_graph(Code())
    call = FunctionalCall(made, "weight")
    assert call.spec == ConvSpec.of_module(nn.Conv2d(4, 6, (3, 1), (2, 1), groups=2))
    assert call.bias_name == "bias"
    assert call.bias is made.bias
    assert FunctionalCall(made, "flat").spec == linear_spec(8, 3, False)
    with pytest.raises(NotTraceable, match="0 functional calls"):
        FunctionalCall(made, "other")  # what the call reads is its transpose


def test_a_call_is_replaced_and_its_parameters_go() -> None:
    made: Any = to_graph(Code().eval())
    call = FunctionalCall(made, "weight")
    new = nn.Conv2d(4, 6, (3, 1), (2, 1), groups=2)
    new.load_state_dict({"weight": made.weight, "bias": made.bias})
    expected = made(X)
    assert call.replace("child", new) == "child_"
    assert not {"weight", "bias"} & set(dict(made.named_parameters()))
    assert torch.equal(made(X), expected)


def test_a_bias_that_others_read_stays() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(4, 4, 1, 1)), nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight, self.bias) + self.bias.mean()

    made = to_graph(Shared())
    FunctionalCall(made, "weight").replace("new", nn.Conv2d(4, 4, 1))
    assert set(dict(made.named_parameters())) == {"bias", "new.weight", "new.bias"}
    made(X)


def test_a_child_that_was_only_a_holder_goes() -> None:
    class Through(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.held, self.called = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
            self.only = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = F.conv2d(x, self.only.weight, self.only.bias)
            return self.called(F.conv2d(F.conv2d(x, self.held.weight), self.called.weight))

    module = Through()
    made: Any = to_graph(module)
    assert made.held is module.held
    FunctionalCall(made, "only.weight").replace("first", nn.Conv2d(4, 4, 1))
    assert "only" not in dict(made.named_children())
    FunctionalCall(made, "held.weight").replace("new", nn.Conv2d(4, 4, 1, bias=False))
    assert list(made.held.state_dict()) == ["bias"]  # read by nobody, but still a parameter of the model
    FunctionalCall(made, "called.weight").replace("other", nn.Conv2d(4, 4, 1, bias=False))
    assert made.called.weight is not None
    made(X)
    repr(made)


def test_settings_that_the_code_computes() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4, 1, 1))

        def forward(self, x: Tensor, stride: int = 1) -> Tensor:
            return F.conv2d(x, self.weight, stride=stride)

    with pytest.raises(NotTraceable, match="computed by the code"):
        FunctionalCall(to_graph(Computed()), "weight")


class Shortcut(nn.Module):
    """timm's DLA: where a trace holds only what the code does with a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))

    def forward(self, x: Tensor, shortcut: Tensor | None = None, children: list[Tensor] | None = None) -> Any:
        y = F.conv2d(x, self.weight, padding=1)
        if shortcut is None:
            shortcut = x
        return y + shortcut, [shortcut.sum(), shortcut]


class Passed(Shortcut):
    """Only hands it on."""

    def forward(self, x: Tensor, shortcut: Tensor | None = None, children: list[Tensor] | None = None) -> Any:
        return shortcut, [x if children is None else children, F.conv2d(x, self.weight)]


@pytest.mark.parametrize("kind", [Shortcut, Passed])
def test_inputs_that_may_be_left_out(kind: type[nn.Module]) -> None:
    module, y = kind(), torch.randn(2, 4, 7, 6)
    for made in (to_graph(module), to_graph(to_graph(module)), copy.deepcopy(to_graph(module))):
        for given in ((X,), (X, y), (X, None), (X, None, [y]), (X, y, [X])):
            for a, b in zip(tree_leaves(made(*given)), tree_leaves(module(*given)), strict=True):
                assert a is b is None or torch.equal(a, b)
        assert torch.equal(made(X, children=[y])[1][1], module(X, children=[y])[1][1])


def coded(forward: Any) -> Any:
    return type("Coded", (nn.Module,), {"forward": forward})()


@pytest.mark.parametrize(
    ("forward", "said"),
    [
        (lambda self, x, y=None: x if y is None else x + y, "does something else without"),
        (lambda self, x, y=None: x * 2 if y is None else x * 3, "does something else without"),
        (lambda self, x, y=None: x.sin() if y is None else x.cos(), "does something else without"),
        (lambda self, x, y=None: x + (x.sin() if y is None else y.sin()).cos(), None),
        (lambda self, x, y=None: x.cos() + (x.sin() if y is None else y), "does something else without"),
        # Alone each of them has one thing in its place; together they have another.
        (lambda self, x, y=None, z=None: x.sin() + (y if y is not None else x if z is None else z), "y, z optionally"),
        (lambda self, x, y=None, z=None: x.sin() + (x if y is None and z is None else 1), "y, z optionally"),
        (lambda self, x, flag=False: x * 2 if flag is True else x * 3, "takes flag optionally"),
        (lambda self, x, a=None, b=None, c=None, d=None: x, "4 inputs"),
    ],
)
def test_code_that_does_something_else_without_is_refused(forward: Any, said: str | None) -> None:
    module = coded(forward)
    if said is None:
        made = to_graph(module)
        assert torch.equal(made(X), module(X))
        assert torch.equal(made(X, X + 1), module(X, X + 1))
        return
    with pytest.raises(NotTraceable, match=said):
        to_graph(module)


def without_gradients(self: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = x.sin()
    return x.cos()


def in_half(self: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return x @ x.mT


@pytest.mark.parametrize("forward", [without_gradients, in_half, torch.no_grad()(lambda self, x: x.sin())])
@pytest.mark.parametrize("around", [True, False])
def test_code_that_switches_modes_is_refused(forward: Any, around: bool) -> None:
    with torch.set_grad_enabled(around), pytest.raises(NotTraceable, match="switches gradients or autocast"):
        to_graph(coded(forward))


@torch.no_grad()
def test_modes_around_a_trace_do_not_matter() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = to_graph(coded(lambda self, x: x.sin()))
    assert torch.equal(made(X), X.sin())


def frozen_in_training(self: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(self, mode and False)


@pytest.mark.parametrize("own", [{"train": frozen_in_training}, {"get_extra_state": lambda self: {"version": 1}}])
def test_what_a_class_does_in_its_own_way_would_go_unseen(own: dict[str, Any]) -> None:
    kind = type("Own", (nn.Module,), {"forward": lambda self, x: x.sin(), **own})
    with pytest.raises(NotTraceable, match=f"has {next(iter(own))} of its own"):
        to_graph(kind())


def test_items_are_assigned_where_the_code_does() -> None:
    def forward(self: nn.Module, x: Any) -> Any:
        first = x[0]
        x[0] = x[0].sin()
        x[1][:, 1:] = x[0][:, 1:]
        y = x[0] + first
        x[0] = y
        return y, x[0]

    module = coded(forward)
    made = to_graph(module)
    ours, theirs = [X.clone(), X.clone()], [X.clone(), X.clone()]
    for a, b in zip((*made(ours), *ours), (*module(theirs), *theirs), strict=True):
        assert torch.equal(a, b)
    made.graph.eliminate_dead_code()
    made.recompile()
    again = [X.clone(), X.clone()]
    made(again)
    assert torch.equal(again[1], ours[1])


class WritesIntoItsInput(nn.Module):
    """``+=`` on what the caller holds: a trace would not write there."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x += 1
        return F.conv2d(x, self.weight, padding=1)


class AroundIt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = WritesIntoItsInput()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        return self.inner(y) + y


def test_a_functional_call_behind_an_assignment_in_place_is_left() -> None:
    from pwrewrite.core.plan import SkipReason
    from pwrewrite.passes import InsertReduction
    from pwrewrite.workflows.rewrite import rewrite

    made = rewrite(AroundIt(), torch.randn(1, 8, 6, 6), [InsertReduction(8, allow_growth=True)])
    assert not made.edits
    assert [skip.reason for skip in made.report.skips] == [SkipReason.NOT_TRACED]


class UnreadResult(nn.Module):
    """A functional convolution that runs, and whose result nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.conv = nn.Parameter(torch.randn(8, 4, 3, 3)), nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        F.conv2d(x, self.weight)
        return self.conv(x)


def test_a_functional_call_whose_result_is_not_read_is_rewritten_and_verified() -> None:
    from pwrewrite.passes import InsertBottleneck
    from pwrewrite.workflows.rewrite import rewrite

    made = rewrite(UnreadResult().eval(), torch.randn(1, 4, 8, 8), [InsertBottleneck(0.25, allow_growth=True)])
    assert made.report.passed, made.report.verification
    assert [edit.path for edit in made.edits] == ["weight"]


def test_code_that_only_refuses_by_a_size_is_a_graph_that_refuses() -> None:
    model, x = nn.Sequential(Guarded(), Guarded()).eval(), torch.randn(2, 16, 8, 8)
    graph = to_graph(model[0])
    assert [node.target for node in graph.graph.nodes].count(required) == 4
    assert torch.equal(graph(x), model[0](x))
    fused = pwrewrite.fuse(model, x)
    assert [edit.path for edit in fused.edits if edit.op.action == "fuse"] == [
        "0.first",
        "0.second",
        "1.first",
        "1.second",
    ]
    assert fused.report.passed
    for wrong, kind, said in (
        (x[:, :, 1:], AssertionError, r"guards.py:\d+: assert x.shape\[2\] % 2 == 0"),
        (x[..., 1:], AssertionError, "no map of even size"),
        (x[:, 1:], ValueError, r"guards.py:\d+"),
    ):
        with pytest.raises(kind, match=said):
            fused.model(wrong)
    frozen = pwrewrite.freeze(fused.model, x)
    assert torch.allclose(frozen(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("code", [caught, either, own_error])
def test_code_that_may_go_on_otherwise_is_refused(code: Callable[[Tensor], Tensor]) -> None:
    class Scope(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return code(x)

    with pytest.raises(NotTraceable, match=r"Scope.forward does not trace: it .* value or a size"):
        to_graph(Scope())


def test_a_part_of_a_sequential_is_its_modules() -> None:
    class Stages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = (nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1))
            self.features = nn.Sequential(*layers)

        def forward(self, x: Tensor) -> list[Tensor]:
            first = self.features[0:3](x)
            return [first, self.features[3:](first)]

    model, x = Stages().eval(), torch.randn(2, 16, 8, 8)
    assert all(map(torch.equal, to_graph(model)(x), model(x)))
    fused = pwrewrite.fuse(model, x)
    assert fused.report.passed
    assert [edit.path for edit in fused.edits if edit.op.action == "fuse"] == ["features.0"]


def test_a_function_behind_a_part_of_a_sequential_is_fused() -> None:
    class Stages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.Sigmoid(), nn.Conv2d(16, 16, 1))

        def forward(self, x: Tensor) -> list[Tensor]:
            first = self.features[0:2](x)
            return [first, nn.functional.relu(self.features[2:](first))]

    model, x = Stages().eval(), torch.randn(2, 16, 8, 8)
    fused = pwrewrite.fuse(model, x)
    assert fused.report.passed
    assert not fused.plan.skips
    assert "features.2" in [edit.path for edit in fused.edits if edit.op.action == "fuse"]


def wrapped(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(forward)
    def outer(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        return forward(self, *args, **kwargs)

    return outer


class More(nn.Module):
    """Code that looks at arguments which it does not name, as that of blocks which once took more."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        if len(args) > 0 or kwargs.get("scale") is not None:
            x = x * 2
        return nn.functional.relu(self.conv(x))


class Wrapped(More):
    """The same in a wrapper, with a keyword."""

    @wrapped
    def forward(self, x: Tensor, *, scale: float = 1.0, **kwargs: object) -> Tensor:
        return nn.functional.relu(self.conv(x)) * scale


class Calls(nn.Module):
    """Code that calls another's with more arguments."""

    def __init__(self, block: nn.Module, *args: object, **kwargs: object) -> None:
        super().__init__()
        self.block, self.given, self.named = block, args, kwargs

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, *self.given, **self.named)  # type: ignore[no-any-return]


def test_code_that_looks_at_more_arguments_is_a_graph_for_calls_without() -> None:
    for model in (More().eval(), Wrapped().eval()):
        x, graph = torch.randn(2, 16, 8, 8), to_graph(model)
        assert torch.equal(graph(x), model(x))
        with pytest.raises(TypeError, match=r"for calls without \*\*kwargs, and is given some"):
            graph(x, other=2)
    assert torch.equal(graph(x, scale=0.5), model(x, scale=0.5))
    with pytest.raises(TypeError, match=r"for calls without \*args, and is given some"):
        to_graph(More())(x, 1)


def test_layers_of_code_that_is_given_more_arguments_are_left() -> None:
    x = torch.randn(2, 16, 8, 8)
    for model, fuses in ((Calls(More()), True), (Calls(More(), 1), False), (Calls(More(), scale=2), False)):
        fused = pwrewrite.fuse(model.eval(), x)
        assert fused.report.passed
        assert ("block.conv" in [edit.path for edit in fused.edits]) == fuses
        assert fuses or ["is given some" in skip.detail for skip in fused.plan.skips] == [True]


def test_code_that_goes_on_with_one_length_only_is_a_graph_that_refuses_others() -> None:
    maps = [torch.randn(2, 16, 8, 8) for _ in range(5)]
    model = Levels(4).eval()
    graph = to_graph(model)
    assert all(map(torch.equal, graph(maps[:4]), model(maps[:4])))
    for wrong in (maps, maps[:3]):
        with pytest.raises(AssertionError):
            graph(wrong)
    with pytest.raises(ValueError, match="maps have four dimensions"):
        graph([each[0] for each in maps[:4]])
    fused = pwrewrite.fuse(model, {"maps": maps[:4]})
    assert fused.report.passed
    assert not fused.plan.skips
    assert [edit.op.action for edit in fused.edits].count("fuse") == 4


@pytest.mark.parametrize("code", [some_lengths, at_least, multiples, lambda x: x * len(x)])
def test_code_that_goes_on_with_several_lengths_is_refused(code: Callable[[Tensor], Tensor]) -> None:
    class Scope(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return code(x)

    with pytest.raises(NotTraceable, match=r"Scope.forward does not trace: it takes a length"):
        to_graph(Scope())


def test_a_list_that_grows_is_not_taken_for_one_of_the_length_it_had() -> None:
    class Grows(nn.Module):
        def forward(self, maps: list[Tensor]) -> list[Tensor]:
            if len(maps) != 2:
                raise ValueError("two maps")
            maps.append(maps[0])
            return [x * 2 for x in maps]

    with pytest.raises(ValueError, match="two maps"):
        to_graph(Grows())([torch.randn(2), torch.randn(2)])
