"""Exact passes leave what is behind a branch: one recorded run decides nothing about the others."""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from check_passes import check_pass
from torch import Tensor, fx, nn
from torch.nn import functional as F

import pwrewrite
from pwrewrite.capturing import capture, control_flow
from pwrewrite.capturing.code_trace import NotTraceable, trace
from pwrewrite.capturing.control_flow import MOST_PATHS, handed_on, paths
from pwrewrite.capturing.eligibility import eligible
from pwrewrite.core.plan import SkipReason
from pwrewrite.passes import FoldBatchNorm, FusePointwiseActivation


def conv(stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1, stride=stride)


class Branches(nn.Module):
    """One of two convolutions, then what is behind both."""

    def __init__(self, decide: Callable[[Tensor], bool], behind: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.behind = conv(), conv(), behind
        self.decide = [decide]  # in a list, so that it is no part of the module

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.behind(self.a(x) if self.decide[0](x) else self.b(x))
        return y


class Nested(nn.Module):
    """The branch is in another module's code than the norm."""

    def __init__(self, behind: nn.Module) -> None:
        super().__init__()
        self.inner, self.behind = Branches(lambda x: x.shape[-1] < 100, nn.Identity()), behind

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.behind(self.inner(x))
        return y


class Behind(nn.Module):
    """A convolution, and code that hands its result to one of two others."""

    def __init__(self, decide: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.a, self.inner = conv(), Branches(decide, nn.Identity())
        self.inner.a, self.inner.b = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(self.a(x))
        return y


class Functional(Nested):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.inner(x))


class Sum(Nested):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.behind(self.inner(x) + x)
        return y


class Loop(nn.Module):
    """Runs as often as the input is wide."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = conv(), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for _ in range(x.shape[-1] // 32):
            y = self.a(y)
        return F.relu(self.n(y))


class Early(nn.Module):
    """Returns before the norm where values are large."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = conv(), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x)
        if y.abs().max() > 1e3:
            return y
        z: Tensor = self.n(y)
        return z


class Chosen(nn.Module):
    """Chooses a layer from a list."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.n = nn.ModuleList(conv() for _ in range(3)), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.n(self.layers[int(x.mean().item() > 0)](x))
        return y


MODELS: dict[str, Callable[[], nn.Module]] = {
    "norm by value": lambda: Branches(lambda x: bool(x.mean() > 0), nn.BatchNorm2d(4)),
    "activation by value": lambda: Branches(lambda x: bool(x.mean() > 0), nn.ReLU()),
    "norm by size": lambda: Branches(lambda x: x.shape[-1] < 100, nn.BatchNorm2d(4)),
    "activation by size": lambda: Branches(lambda x: x.shape[-1] < 100, nn.ReLU()),
    "1×1 by size": lambda: Branches(lambda x: x.shape[-1] < 100, nn.Conv2d(4, 2, 1)),
    "area as a number": lambda: Branches(lambda x: int(x.shape[-1]) * int(x.shape[-2]) < 9000, nn.BatchNorm2d(4)),
    "norm outside": lambda: Nested(nn.BatchNorm2d(4)),
    "activation outside": lambda: Nested(nn.ReLU()),
    "function outside": lambda: Functional(nn.Identity()),
    "sum outside": lambda: Sum(nn.ReLU()),
    "1×1 before the branch by size": lambda: Behind(lambda x: x.shape[-1] < 100),
    "1×1 before the branch by value": lambda: Behind(lambda x: bool(x.mean() > -9)),
    "loop": Loop,
    "early return": Early,
    "chosen from a list": Chosen,
}


@pytest.mark.parametrize("name", MODELS)
def test_fuse_is_right_on_every_way_through_the_code(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    fused = pwrewrite.fuse(model, torch.rand(1, 4, 48, 48), thorough=False)
    assert fused.report.passed
    assert any(
        skip.reason in (SkipReason.DATA_DEPENDENT, SkipReason.SEVERAL_READERS, SkipReason.NOT_TRACED)
        for skip in fused.plan.skips
    )
    for x in (
        torch.rand(1, 4, 48, 48),
        -torch.rand(1, 4, 48, 48),
        torch.rand(1, 4, 160, 160),
        1e5 * torch.rand(1, 4, 48, 48),
    ):
        with torch.no_grad():
            expected, got = model(x), fused.model(x)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


class Harmless(nn.Module):
    """Decides by size, but not about what is behind the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.relu = conv(), nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == 4, "four channels"
        if x.shape[-1] % 2:
            x = F.pad(x, (0, 1))
        return self.relu(self.n(self.a(x)))


def test_decisions_about_something_else_do_not_matter() -> None:
    fused = pwrewrite.fuse(Harmless().eval(), torch.rand(1, 4, 16, 16), thorough=False)
    assert {edit.method for edit in fused.edits} >= {"fold", "relu"}


def test_all_ways_are_found_and_the_module_stays_as_it_was() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.seen = nn.Linear(2, 2), 0

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            if x.sum() > 0:
                return self.a(x) if x.shape[0] > 1 else x  # type: ignore[no-any-return]
            raise ValueError("negative")

    module = Three()
    graphs = paths(module)
    assert graphs is not None
    assert len(graphs) == 2
    assert module.seen == 0
    assert isinstance(handed_on(module, None, module.a, lambda m: False), str)  # the other way returns the input
    assert isinstance(handed_on(module, module.a, None, lambda m: False), str)


def test_too_many_ways_are_unknown() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            for i in range(MOST_PATHS.bit_length()):
                if x.shape[0] > i:
                    x = x + 1
            y: Tensor = self.a(x)
            return y

    many = Many()
    assert paths(many) is None
    assert handed_on(many, many.a, None, lambda m: False) is None


class Ranks(nn.Module):
    """Code that asks for the number of dimensions again and again, and says it where it is another one."""

    def __init__(self, channels: int, more: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.a, self.b, self.more = nn.Linear(channels, channels), nn.Linear(channels, channels), more

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x)
        for i in range(4):
            if len(y.shape) not in (3, 4):
                raise ValueError(f"{i}: 3 or 4 dimensions, not {len(y.shape)}, for {len(y)}")
            y = self.more(y) if len(y.shape) == 3 else y * 2
        return self.b(y)  # type: ignore[no-any-return]


def test_what_is_asked_again_is_answered_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    once = control_flow._trace_once
    monkeypatch.setattr(control_flow, "_trace_once", lambda *given: tried.append(1) or once(*given))
    module = Ranks(4)
    graphs = paths(module)
    assert graphs is not None
    assert len(graphs) == 5  # of more dimensions at first, second, ... or never: ``y * 2`` is another value
    assert len(tried) < 50
    assert handed_on(module, module.b, None, lambda m: False) == ()


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.unsqueeze_(0),
        lambda x: F.relu(x, True),
        lambda x: torch.add(x, 1, out=x),
        lambda x: x.append(x),  # type: ignore[operator]
        lambda x: x.__setitem__(0, 1),
        lambda x: setattr(x, "data", x + 1),
        lambda x: nn.ReLU(True)(x),
    ],
    ids=["method", "function", "out", "list", "item", "attribute", "module"],
)
def test_what_may_have_changed_is_asked_anew(change: Callable[[Tensor], object]) -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x if x.shape[0] > 1 else x + 1
            y = y if x.shape[0] > 1 else y + 2
            change(x)
            return y if x.shape[0] > 1 else y + 3

    graphs = paths(Twice())
    assert graphs is not None
    assert len(graphs) == 4


def test_modules_that_are_alike_are_followed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    followed = []
    once = control_flow._ways
    monkeypatch.setattr(control_flow, "_ways", lambda module: followed.append(module) or once(module))
    ways = control_flow.Ways()
    double = operator.neg
    same = [Ranks(4), Ranks(4), Ranks(4)]
    assert all(ways.graphs(module) is ways.graphs(same[0]) for module in same)
    assert len(followed) == 1
    others = [Ranks(5), Ranks(4, double), Ranks(4), Ranks(4), Ranks(4)]
    others[2].a = nn.Linear(4, 4, bias=False)
    others[3].extra = object()
    others[4].b = others[4].a
    for other in others:
        ways.graphs(other)
    assert len(followed) == 1 + len(others)


def test_wrapped_code_that_is_not_followed_is_named_so() -> None:
    def plain(self: nn.Module, x: Tensor, **more: object) -> Tensor:
        return x

    @functools.wraps(plain)
    def outer(self: nn.Module, *args: Any, **more: Any) -> Tensor:
        return plain(self, *args, **more)

    kind = type("Wrapped", (nn.Module,), {"forward": outer})
    why = "its forward is wrapped, and takes *args, **kwargs or keywords only"
    assert control_flow.Ways().unfollowed(kind()) == why


def test_more_decisions_than_ways_are_not_tried_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Many(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return sum((x for i in range(MOST_PATHS) if len(x + i)), start=x)

    tried = []
    once = control_flow._trace_once
    monkeypatch.setattr(control_flow, "_trace_once", lambda *given: tried.append(1) or once(*given))
    assert paths(Many()) is None
    assert len(tried) == 1


def test_asking_the_code_leaves_buffers_children_and_attributes_as_they_were() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.other = nn.Linear(2, 2), nn.Linear(2, 2)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls = self.calls + 1
            self.other.last = x
            y: Tensor = self.a(x)
            return y

    module = Writes()
    buffer = module.calls
    assert handed_on(module, module.a, None, lambda m: False) == ()
    assert module.calls is buffer
    assert "last" not in vars(module.other)


class Remembers(nn.Module):
    """Keeps what it makes in containers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.made: list[Tensor] = []
        self.seen: dict[str, Any] = {"sums": [0], "kinds": set()}

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x))
        if not self.made:
            self.made.append(torch.zeros(y.shape[2:]))
        self.seen["sums"].append(y.sum())
        self.seen["kinds"].add("float")
        return y + self.made[0]


def test_asking_the_code_leaves_containers_as_they_were() -> None:
    model = Remembers().eval()
    handed_on(model, model.conv, model.norm, lambda m: False)
    with pytest.raises(NotTraceable, match="sets made, seen"):
        trace(model)
    fused = pwrewrite.fuse(model, torch.randn(1, 3, 8, 8), thorough=False)
    assert fused.report.passed
    assert (model.made, model.seen) == ([], {"sums": [0], "kinds": set()})


class OutsideActivation(nn.Module):
    """Calls an activation that all of its kind have in common, and that is no submodule."""

    act = nn.SiLU()

    def __init__(self, decide: Callable[[Tensor], bool] = lambda x: True) -> None:
        super().__init__()
        self.a, self.n, self.decide = conv(), nn.BatchNorm2d(4), decide

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) if self.decide(x) else x
        return self.act(self.n(y))


def test_a_module_that_is_no_submodule_is_no_reason_not_to_fold() -> None:
    x = torch.rand(1, 4, 16, 16)
    folded = check_pass(FoldBatchNorm(), nn.Sequential(OutsideActivation()).eval(), x, edits={"0.n": "fold"}, skips={})
    left = (SkipReason.DATA_DEPENDENT, "calls a layer that is no submodule of it")
    check_pass(
        FusePointwiseActivation(), folded.model, x, edits={}, skips={"0.a": left, "0.silu": SkipReason.NOT_BEHIND_LAYER}
    )
    by_size = nn.Sequential(OutsideActivation(lambda x: x.shape[-1] < 100)).eval()
    skips = {"0.n": SkipReason.DATA_DEPENDENT}
    check_pass(FoldBatchNorm(), by_size, x, edits={}, skips=skips)


class Pair(nn.Module):
    """Returns what its convolution makes, and its input, both of them wrapped in some way."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.wrap = nn.Conv2d(3, 8, 3), [wrap]

    def forward(self, x: Tensor) -> Any:
        return self.wrap[0](self.conv(x), x)


class Block(nn.Module):
    """A norm behind a part of what a module returns."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], Any], take: Callable[[Any], tuple[Tensor, Any]]) -> None:
        super().__init__()
        self.pair, self.norm, self.take = Pair(wrap), nn.BatchNorm2d(8), [take]

    def forward(self, x: Tensor) -> Any:
        y, other = self.take[0](self.pair(x))
        return self.norm(y), other


class Around(nn.Module):
    """A ReLU behind the first of what a block returns."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.act = block, nn.ReLU()

    def forward(self, x: Tensor) -> Any:
        y, other = self.block(x)
        return self.act(y), other


def unpacked(pair: Any) -> tuple[Tensor, Any]:
    y, other = pair
    return y, other


PARTS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], tuple[Tensor, Any]]]] = {
    "unpacked": (lambda y, x: (y, x), unpacked),
    "second": (lambda y, x: [x, y], lambda pair: (pair[1], pair[0])),
    "deep": (lambda y, x: ((x, y), x), lambda pair: (pair[0][1], pair[1])),
    "named": (lambda y, x: {"y": y, "x": x}, lambda pair: (pair["y"], pair["x"])),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_of_what_a_module_returns_is_followed(name: str) -> None:
    model = Around(Block(*PARTS[name])).eval()
    x = torch.randn(2, 3, 8, 8)
    done = pwrewrite.fuse(model, x, ["fold-batch-norm", "fuse-activation"])
    assert done.report.passed
    assert [edit.op.action for edit in done.edits] == ["fold", "fuse"]
    torch.testing.assert_close(done.model(x), model(x))


READ_ELSEWHERE: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], tuple[Tensor, Any]]]] = {
    "twice in what is returned": (lambda y, x: (y, y), unpacked),
    "from the end, too": (lambda y, x: (x, y), lambda pair: (pair[1], pair[-1])),
    "whole, too": (lambda y, x: (y, x), lambda pair: (pair[0], pair)),
    "inside, too": (lambda y, x: (y, y.shape[0] * y), lambda pair: (pair[0], x_of(pair))),
}


def x_of(pair: Any) -> Any:
    return pair[1]


@pytest.mark.parametrize("name", READ_ELSEWHERE)
def test_what_code_reads_elsewhere_is_no_sole_reader(name: str) -> None:
    block = Block(*READ_ELSEWHERE[name])
    key = handed_on(block.pair, block.pair.conv, None, lambda m: False)
    assert key is not None
    if not isinstance(key, str):
        key = handed_on(block, block.pair, block.norm, lambda m: False, key=key)
    assert isinstance(key, str)


class Twice(nn.Module):
    """A sum of what an activation in place makes, and of what is called as its input is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.body = nn.Conv2d(3, 8, 1), nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        z: Tensor = self.body(y) + y
        return z


def test_what_is_read_elsewhere_is_said_as_that() -> None:
    detail = "the model's own code reads what is between them elsewhere, too"
    skips = {"conv1": (SkipReason.DATA_DEPENDENT, detail), "body.0": SkipReason.NOT_BEHIND_LAYER}
    check_pass(FusePointwiseActivation(), Twice().eval(), torch.randn(1, 3, 8, 8), skips=skips)


class ByDtype(nn.Sequential):
    """Normalises in full precision what comes in half."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self[0](x)
        return self[1](y.float()).half() if y.dtype == torch.float16 else self[1](y)  # type: ignore[no-any-return]


def test_what_is_read_another_way_for_some_inputs_is_said_as_that() -> None:
    model, x = ByDtype(conv(), nn.BatchNorm2d(4)).eval(), torch.randn(1, 4, 8, 8)
    detail = "the model's own code connects them for some inputs only"
    check_pass(FoldBatchNorm(), model, x, skips={"1": (SkipReason.DATA_DEPENDENT, detail)})


class Particular(nn.Sequential):
    """Takes numbers of one type only, which proxies are not."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self[0](x)
        if type(y.shape[0]) is not int:
            raise TypeError("no number")
        return self[1](y)  # type: ignore[no-any-return]


class Often(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for i in range(MOST_PATHS.bit_length()):
            if x.shape[0] > i:
                x = x + 1
        return self[1](self[0](x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "said"),
    [(Particular, r": test_data_dependent\.py:\d+: raise TypeError\(.no number.\)$"), (Often, ": it can go more")],
)
def test_code_that_cannot_be_followed_is_named_by_its_line(kind: type[nn.Sequential], said: str) -> None:
    done = pwrewrite.fuse(kind(conv(), nn.BatchNorm2d(4)).eval(), torch.randn(1, 4, 8, 8), verify=False)
    (skip,) = [each for each in done.report.skips if each.path == "1"]
    assert re.search(f"in a way that cannot be followed{said}", skip.detail), skip.detail


class Checks(nn.Sequential):
    """Refuses inputs of another rank, with an error that torch raises, too."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self[0](x)
        if y.dim() != 4:
            raise RuntimeError("not an image")
        return self[1](y)  # type: ignore[no-any-return]


def test_a_way_that_ends_in_an_error_of_the_code_does_not_matter() -> None:
    model, x = Checks(conv(), nn.BatchNorm2d(4)).eval(), torch.randn(1, 4, 8, 8)
    check_pass(FoldBatchNorm(), model, x, edits={"1": "fold"})


class Merges(nn.Module):
    """Sets the weight that it computes with in evaluation, as models with branches to merge do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.merged = conv(), conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.a(x) + self.b(x)  # type: ignore[no-any-return]
        self.merged.weight.data = self.a.weight + self.b.weight
        return self.merged(x)  # type: ignore[no-any-return]


def test_a_weight_that_code_sets_is_read_by_it() -> None:
    model, x = nn.Sequential(Merges(), nn.ReLU(), conv()).eval(), torch.randn(1, 4, 8, 8)
    assert paths(model[0]) is not None
    captured = capture(model, x)
    (skip,) = [eligible(captured, layer) for layer in captured.layers if layer.path == "0.merged"]
    assert skip is not None
    assert skip.detail == "its weight is also read directly, by set_data, which would see the old one"


class ByType(nn.Sequential):
    """Looks for a word in the name of a type, and gates with a weight."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self[0](x)
        y = y.float() if "Half" in y.type() else y
        return self[1](y) * torch.sigmoid(self[0].bias)[:, None, None]  # type: ignore[no-any-return, arg-type]


def test_asking_what_a_value_holds_is_a_decision() -> None:
    module = ByType(conv(), nn.BatchNorm2d(4)).eval()
    graphs = paths(module)
    assert graphs is not None
    assert [sum(node.target == "float" for node in graph.nodes) for graph in graphs] == [0, 1]
    with pytest.raises(
        NotTraceable, match=r"it asks whether a value holds another.*\(test_data_dependent.py:\d+: y = "
    ):
        trace(module)
    skips = {"sigmoid": (SkipReason.NOT_BEHIND_LAYER, "it follows a weight or constant, not")}
    check_pass(FusePointwiseActivation(), module, torch.randn(1, 4, 8, 8), skips=skips)


class LeftOut(nn.Sequential):
    """Reads a map once more where an input is left out, and has a layer for that input or has it not."""

    def __init__(self, project: nn.Module | None, again: nn.Module | None = None) -> None:
        super().__init__(conv(), nn.BatchNorm2d(4))
        self.project, self.again = project, again
        with torch.no_grad():
            self[1].running_var += 1  # type: ignore[operator]

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            x = x + self.project(skip)  # type: ignore[misc]
        y = self[0](x)
        return self[1](y) + (self.again(y) if skip is None and self.again else 0)  # type: ignore[no-any-return]


def test_inputs_that_may_be_left_out_are_decisions() -> None:
    x = torch.randn(1, 4, 8, 8)
    model = LeftOut(conv(), conv()).eval()
    done = pwrewrite.fuse(model, (x, x))
    (detail,) = [skip.detail for skip in done.report.skips if skip.path == "1"]
    assert detail == "the model's own code reads what is between them elsewhere, too"
    torch.testing.assert_close(done.model(x), model(x))


class Joins(nn.Module):
    """Joins a map with another where that is given, or else reads what is between two convolutions once more."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.gate, self.a, self.b, self.c = (nn.Conv2d(8, 8, 1) for _ in range(4))
        self.again = again

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            x = self.gate(x + skip)
        y = F.relu(self.a(x))
        return self.b(y) + (self.c(y) if self.again and skip is None else 0)  # type: ignore[no-any-return]


@pytest.mark.parametrize("again", [False, True])
def test_channels_stay_where_other_layers_read_them_without_an_input(again: bool) -> None:
    x = torch.randn(1, 8, 8, 8)
    plan = pwrewrite.make_plan(Joins(again).eval(), (x, x), passes=["narrow"], rank=0.5).plan
    assert ("a" in {op.path for op in plan.ops}) is not again


def test_a_way_on_which_the_code_lacks_a_layer_does_not_matter() -> None:
    check_pass(FoldBatchNorm(), LeftOut(None).eval(), torch.randn(1, 4, 8, 8), edits={"1": "fold"})


@pytest.mark.parametrize("n", [1, 3, 9])
def test_of_many_inputs_that_may_be_left_out_few_ways_are_tried(n: int) -> None:
    class Several(nn.Module):
        def forward(self, x: Tensor, a=None, b=None, c=None, d=None, e=None, f=None, g=None, h=None, i=None) -> Tensor:  # type: ignore[no-untyped-def]
            given = [each for each in (a, b, c, d, e, f, g, h, i)[:n] if each is not None]
            if not given:
                return x.exp()
            return sum(given, start=x)

    graphs = paths(Several())
    assert graphs is not None
    assert len(graphs) == 2 * 9 + 2
    assert any(node.target == "exp" for graph in graphs for node in graph.nodes)


class Fills(nn.Sequential):
    """Makes tensors of sizes that it gives one by one, as a shortcut that pads channels does."""

    def forward(self, x: Tensor) -> Tensor:
        y = self[1](self[0](x))
        zeros = torch.zeros(y.size(0), 2, y.shape[2], y.shape[3], dtype=y.dtype, device=y.device)
        return F.relu(torch.cat([y, zeros], 1)) + torch.ones(1, 1, 1, 1, device=y.device)


def test_sizes_that_are_given_one_by_one_are_followed() -> None:
    model, x = Fills(conv(), nn.BatchNorm2d(4)).eval(), torch.randn(1, 4, 8, 8)
    check_pass(FoldBatchNorm(), model, x, edits={"1": "fold"})
    graph = fx.GraphModule(model, trace(model))
    for size in (8, 5):
        x = torch.randn(2, 4, size, size)
        assert torch.equal(graph(x), model(x))
    assert fx.symbolic_trace(conv()) is not None  # torch remembers what code that is made says is wrapped


def test_code_that_raises_on_all_ways_is_named_by_its_line() -> None:
    class Raises(nn.Sequential):
        def forward(self, x: Tensor, extra: Tensor | None) -> Tensor:
            y: Tensor = self[0](x)
            for each in [] if extra is None else None:  # type: ignore[attr-defined]
                y = y + each
            return self[1](y)  # type: ignore[no-any-return]

    class Outer(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self[0](x, None)
            return y

    done = pwrewrite.fuse(Outer(Raises(conv(), nn.BatchNorm2d(4))).eval(), torch.randn(1, 4, 8, 8))
    (skip,) = [each for each in done.report.skips if each.path == "0.1"]
    assert re.search(r"cannot be followed: test_data_dependent\.py:\d+: for each in", skip.detail), skip.detail
