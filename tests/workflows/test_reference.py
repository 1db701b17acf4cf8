"""The comparison with float64: what it lets pass, what it does not, and what it cannot judge."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import pwrewrite
from pwrewrite.workflows.fuse import fuse, reference_check


class Chooses(nn.Module):
    """Returns the maps of the channels with the largest sums, as a detector returns its best boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        scores = y.mean((0, 2, 3))
        chosen = (scores + torch.arange(16)).topk(4).indices.tolist()
        return y[:, chosen]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()


@pytest.mark.parametrize("by_value", [False, True])
def test_a_model_that_computes_something_else_fails(by_value: bool) -> None:
    model, x = network(), torch.randn(2, 3, 12, 12)
    check = reference_check(model, copy.deepcopy(model), x, by_value=by_value)
    assert check is not None
    assert check.passed
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong[2].weight.mul_(1 + 1e-5)
    check = reference_check(model, wrong, x, by_value=by_value)
    assert check is not None
    assert not check.passed


def test_what_decides_by_values_is_judged_where_rounding_does_not_decide() -> None:
    torch.manual_seed(0)
    model, x = Chooses().eval(), torch.randn(2, 3, 12, 12)
    check = reference_check(model, copy.deepcopy(model), x, by_value=True)
    assert check is not None
    assert check.passed
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.conv.weight.mul_(1 + 1e-4)
    check = reference_check(model, wrong, x, by_value=True)
    assert check is not None
    assert not check.passed


def test_where_rounding_decides_there_is_no_check() -> None:
    class Close(Chooses):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(x)
            digits = (y.flatten(1).sum(1) * 1e7).floor().to(torch.int64)  # below what float32 carries
            return y.roll(int(digits[0]) % 5, 1)

    torch.manual_seed(0)
    model, x = Close().eval(), torch.randn(2, 3, 12, 12)
    assert reference_check(model, copy.deepcopy(model), x, by_value=True) is None


def test_a_model_that_is_wrong_is_wrong_on_several_inputs() -> None:
    """The error on one input varies; that on several tells."""
    torch.manual_seed(0)
    model, x = network(), torch.randn(1, 3, 12, 12)
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong[0].weight.mul_(1 + 3e-6)
    check = reference_check(model, wrong, x)
    assert check is not None
    assert not check.passed
    assert "over 4 inputs" in check.detail


def test_a_model_that_takes_only_what_it_was_given_is_still_judged() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.first = nn.Conv2d(3, 4, 3), 0.0

        def forward(self, x: Tensor) -> Tensor:
            if abs(float(x[0, 0, 0, 0]) - self.first) > 1e-3:
                raise ValueError("another input")
            out: Tensor = self.conv(x)
            return out

    torch.manual_seed(0)
    model, x = Picky().eval(), torch.randn(1, 3, 12, 12)
    model.first = float(x[0, 0, 0, 0])
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.conv.weight.mul_(1 + 1e-5)
    check = reference_check(model, wrong, x)
    assert check is not None
    assert not check.passed


def test_a_memory_format_in_which_torch_is_less_exact_is_taken_back() -> None:
    """Group norm in channels_last adds up squares, and loses the variance beside a large mean."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU()]
    model, x = nn.Sequential(*layers).eval(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        model[0].bias.fill_(30.0)
    done = fuse(model, x, thorough=False)
    assert done.report.passed
    taken_back = [skip for skip in done.plan.skips if "verification failed in it, " in skip.detail]
    exact = copy.deepcopy(model).double()(x.double())
    plain, last = model(x), model(x.contiguous(memory_format=torch.channels_last))
    worse = float((last - exact).norm()) > 2 * float((plain - exact).norm())
    assert bool(taken_back) is worse
    assert {e.op.action for e in done.edits} == ({"fuse"} if worse else {"fuse", "channels-last"})


def test_a_memory_format_that_code_does_not_take_at_another_size_is_taken_back_with_that_reason() -> None:
    """At the example's size the pool leaves one position, which a ``view`` takes in any format."""

    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 16, 3)
            self.pool = nn.AvgPool2d(8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.pool(self.conv(x))
            if y.shape[0] > 100:  # no graph has this, so that the view is not made a reshape
                return y.flatten(1)
            return y.view(y.shape[0], -1)

    torch.manual_seed(0)
    done = fuse(Viewing().eval(), torch.randn(1, 3, 16, 16))
    assert done.report.passed
    (skip,) = [skip for skip in done.plan.skips if skip.reason == "broke-model"]
    assert skip.detail.startswith("verification failed in it, spatial sizes: at ")
    assert "does not run: RuntimeError: view size is not compatible" in skip.detail


class Flat(nn.Module):
    """Flattens maps of several positions with ``view``, which takes no channels_last."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
        self.head = head

    def flat(self, x: Tensor) -> Tensor:
        return torch.max_pool2d(torch.relu(self.conv2(torch.relu(self.conv1(x)))), 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.flat(x)
        return self.head(x.view(x.size(0), -1))  # type: ignore[no-any-return]


class Written(Flat):
    def forward(self, x: Tensor) -> Tensor:
        x = self.flat(x)
        x.view(x.size(0), -1).add_(1)
        return self.head(x.flatten(1))  # type: ignore[no-any-return]


class Undecided(Flat):
    def forward(self, x: Tensor) -> Tensor:
        x = self.flat(x)
        return self.head(x.view(len(x), -1) if bool(x.sum() > -1e9) else x.view(-1))  # type: ignore[no-any-return]


def test_views_become_reshapes_where_the_code_can_become_a_graph() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    head = nn.Sequential(nn.Linear(576, 8), nn.ReLU(inplace=True), nn.Linear(8, 2))
    model = Flat(head).eval()
    done = fuse(model, x)
    assert done.report.passed
    assert [(e.method, e.path) for e in done.edits if e.op.action == "channels-last"] == [
        ("reshape", ""),
        ("channels-last", ""),
    ]
    with torch.no_grad():
        torch.testing.assert_close(done.model(x), model(x))
    again = pwrewrite.apply(model, done.plan)  # as a saved one would be carried out
    with torch.no_grad():
        assert torch.equal(again(x), done.model(x))


@pytest.mark.parametrize("kind", [Written, Undecided])
@pytest.mark.parametrize("head", [nn.Linear(576, 2), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(576, 2))])
def test_views_stay_where_code_writes_into_them_or_decides(kind: type[Flat], head: nn.Module) -> None:
    torch.manual_seed(0)
    model, x = kind(head).eval(), torch.randn(2, 3, 16, 16)
    done = fuse(model, x)
    assert done.report.passed
    assert not any(e.method == "reshape" for e in done.edits)
    with torch.no_grad():
        torch.testing.assert_close(done.model(x), model(x))


def test_grey_images_are_fused_though_a_view_takes_no_channels_last() -> None:
    class Digits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 16, 3)
            self.head = nn.Linear(16 * 36, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.max_pool2d(torch.relu(self.conv2(torch.relu(self.conv1(x)))), 2)
            return self.head(x.view(x.shape[0], -1))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, x = Digits().eval(), torch.randn(1, 1, 16, 16)
    done = fuse(model, x)
    assert done.report.passed
    with torch.no_grad():
        torch.testing.assert_close(done.model(x), model(x))


def test_a_fused_model_that_does_not_run_fails() -> None:
    model, x = network(), torch.randn(2, 3, 12, 12)
    check = reference_check(model, nn.Sequential(*model, nn.Flatten(), nn.Linear(3, 3)), x)
    assert check is not None
    assert not check.passed
    assert check.detail.startswith("the fused model does not run: RuntimeError: ")
