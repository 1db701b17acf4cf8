"""What could be trained before can be trained after: frozen parameters, models of inference mode."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pwrewrite
from pwrewrite import passes
from pwrewrite.capturing import capture
from pwrewrite.capturing.code_trace import NotTraceable, trace
from pwrewrite.core.errors import RefusedError
from pwrewrite.core.plan import Edit, Op
from pwrewrite.verifying.gradients import complaints, origins

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A norm behind a convolution, a transposed one, a weight read in the code, and a linear map."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.weight = nn.Parameter(torch.randn(12, 12, 3, 3) * 0.1)
        self.first, self.second = nn.Conv2d(12, 8, 1), nn.Conv2d(8, 12, 1)
        self.up, self.head = nn.ConvTranspose2d(12, 8, 2, 2), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(F.conv2d(self.norm(self.conv(x)).relu(), self.weight, padding=1)))
        return self.head(self.up(x).mean((2, 3)))


REWRITES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bottleneck": lambda model: rewritten(model, passes.InsertBottleneck(0.5, allow_growth=True)),
    "depthwise and linear": lambda model: rewritten(model, passes.SeparateDepthwise(2), passes.FactorizeLinear(2)),
    "fuse": lambda model: checked(pwrewrite.fuse(model.eval(), X)),
}


def rewritten(model: nn.Module, *chosen: passes.Pass) -> nn.Module:
    return checked(pwrewrite.rewrite(model, X, list(chosen)))


def checked(result: pwrewrite.workflows.rewrite.Rewritten) -> nn.Module:
    assert result.report.passed, result.report
    return result.model


@pytest.mark.parametrize("how", REWRITES)
@pytest.mark.parametrize(
    "frozen",
    [
        ["conv.weight"],
        ["conv.bias"],
        ["norm.weight", "norm.bias"],
        ["conv.bias", "norm.bias"],
        ["conv.weight", "norm.weight"],
        ["first.weight"],
        ["first.bias", "second.bias"],
        ["second.weight", "weight", "up.weight", "head.bias"],
    ],
    ids=" ".join,
)
def test_what_is_frozen_in_part_passes(how: str, frozen: list[str]) -> None:
    model = Net().eval()
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    made = REWRITES[how](model)
    assert any(p.requires_grad for p in made.parameters())


def test_a_frozen_layer_stays_frozen() -> None:
    model = Net().eval().requires_grad_(False)
    model.head.requires_grad_(True)
    made = REWRITES["fuse"](REWRITES["bottleneck"](model))
    assert {name for name, p in made.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}


def edit(**renamed: tuple[str, ...]) -> Edit:
    op = Op("factorize", "a", "p", {})
    names = {old.replace("_", "."): tuple(new) for old, new in renamed.items()}
    return Edit(op, "module", "x", None, None, 0, 0, None, None, renamed=names)


def test_origins_go_through_several_edits() -> None:
    first = edit(a_w=("a.one", "a.two"), a_b=("a.two_b",))
    second = Edit(first.op, "module", "x", None, None, 0, 0, None, None, renamed={"a.two": ("a.two.x", "a.two.y")})
    assert origins([first, second])["a.two.y"] == {"a.w"}
    g = torch.ones(1)
    after = {"a.one": None, "a.two.x": None, "a.two_b": g}
    assert complaints({"a.w": None, "a.b": g}, after, origins([first, second])) == []
    assert len(complaints({"a.w": g, "a.b": g}, after, origins([first, second]))) == 2


@pytest.mark.parametrize(("built", "called"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("how", ["rewrite", "budget", "plan", "fuse", "apply"])
def test_inference_mode_makes_no_difference(built: bool, called: bool, how: str) -> None:
    with torch.inference_mode(built):
        model = Net().eval()
    batches = [X + i for i in range(8)]
    with torch.inference_mode(called):
        if how == "fuse":
            made = checked(pwrewrite.fuse(model, X))
        elif how == "rewrite":
            made = rewritten(model, passes.InsertBottleneck(0.5))
        elif how == "budget":
            made = checked(pwrewrite.rewrite(model, X, budget={"macs": 0.8}, calibration=batches))
        else:
            plan = pwrewrite.plan(model, X, {"macs": 0.8}, calibration=batches)
            if how == "plan":
                return
            made = pwrewrite.apply(model, plan)
    assert not any(t.is_inference() for t in (*made.parameters(), *made.buffers()))
    made.train()(X.clone()).sum().backward()
    assert all(p.grad is not None for p in made.parameters())


class Counts(nn.Module):
    """Writes into buffers of its own and of a child, in its code."""

    def __init__(self, child: bool) -> None:
        super().__init__()
        self.conv, self.child = nn.Conv2d(3, 8, 3), child
        self.register_buffer("seen", torch.zeros(()))
        self.conv.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.child:
            self.conv.seen = self.conv.seen + 1
        else:
            self.seen += 1
        return self.conv(x)


@pytest.mark.parametrize("child", [False, True])
def test_a_trace_leaves_buffers_as_they_are(child: bool) -> None:
    model = Counts(child)
    before = dict(model.named_buffers())
    with pytest.raises(NotTraceable, match="seen"):
        trace(model)
    assert all(value is before[name] for name, value in model.named_buffers())
    capture(model, X)
    assert all(value is before[name] for name, value in model.named_buffers())


class CountsInPlace(nn.Module):
    """Counts its calls, in any mode."""

    def __init__(self, replaces: bool) -> None:
        super().__init__()
        self.conv, self.replaces = nn.Conv2d(3, 8, 3), replaces
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.replaces:
            self.calls = self.calls + 1
        else:
            self.calls.add_(1)
        return self.conv(x)


@pytest.mark.parametrize("replaces", [False, True])
def test_buffers_that_count_calls_are_no_difference(replaces: bool) -> None:
    model = CountsInPlace(replaces).eval()
    result = pwrewrite.rewrite(model, X, [passes.InsertBottleneck(1.0, allow_growth=True)])
    assert result.report.passed, result.report.verification
    assert int(model.calls) == 0


class WritesWhatIsNeeded(nn.Module):
    """Has no gradient: what the first convolution read is overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).sigmoid()
        out = self.second(y)
        return (out.tanh() + y.mul_(2.0)).mean((2, 3))


def test_a_model_without_gradients_is_measured_in_activations() -> None:
    torch.manual_seed(0)
    model, batches = WritesWhatIsNeeded().eval(), [X + i for i in range(8)]
    result = pwrewrite.rewrite(model, X, budget={"macs": 0.8}, calibration=batches)
    assert result.report.passed
    assert any("no gradients" in note and "activations" in note for note in result.report.notes)
    with pytest.raises(RefusedError, match="no gradients") as caught:
        pwrewrite.rewrite(model, X, budget={"macs": 0.8}, calibration=batches, sensitivity="loss")
    assert "activations" in str(caught.value.hint)
