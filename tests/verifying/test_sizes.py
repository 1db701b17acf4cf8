"""Other batch and spatial sizes, integer inputs, lists of images, and sizes that depend on values."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from verify_models import APPROXIMATE, EXACT, check, edit, edited, failed, full_rank, net, rough

from pwrewrite.verifying import verify

X = torch.zeros(1, 3, 16, 16)


class Around(nn.Module):
    """Something done to what a layer returns."""

    def __init__(self, layer: nn.Module, change: Any) -> None:
        super().__init__()
        self.layer, self.change = layer, change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.layer(x))


def test_a_rewrite_that_fits_one_batch_size_fails() -> None:
    wrong = edited(net(), make=lambda conv: Around(full_rank(conv), lambda y: y.view(1, 8, *y.shape[2:])))
    result = verify(net(), wrong, X, edits=EXACT)
    assert "batch sizes" in failed(result)
    assert "shapes (eval)" not in failed(result)
    assert result.diverges_at is not None
    assert result.diverges_at.startswith("conv")


def test_values_that_are_right_for_one_batch_size_only_fail() -> None:
    def change(y: Tensor) -> Tensor:
        return y - (y.mean(0, keepdim=True) if len(y) > 1 else 0)

    wrong = edited(net(), make=lambda conv: Around(full_rank(conv), change))
    result = verify(net(), wrong, X, edits=EXACT)
    assert "batch sizes" in failed(result)
    assert "numerics (eval)" not in failed(result)


def test_a_rewrite_that_fits_one_spatial_size_fails() -> None:
    wrong = edited(net(), make=lambda conv: Around(full_rank(conv), lambda y: y.view(-1, 8, 16, 16)))
    result = verify(net(), wrong, X, edits=APPROXIMATE)
    assert "spatial sizes" in failed(result)
    assert "batch sizes" not in failed(result)


def test_what_the_original_does_not_take_is_no_check() -> None:
    class AtMostTwo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 2:
                raise ValueError("no more than two")
            return self.net(x)

    model = AtMostTwo()
    assert verify(model, rough(model, "net.conv"), X, edits=APPROXIMATE).samples == 3
    result = verify(model, edited(model, "net.conv"), X, edits=(edit("net.conv"),))
    assert result.passed, result.failures
    assert "batch sizes that the original does not take: 3" in result.notes
    assert check(result, "batch sizes").detail == "2 statically; 2 in a real run"


def test_one_batch_only_still_gives_several_predictions() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.view(1, 3, 16, 16))

    model = One()
    result = verify(model, rough(model, "net.conv"), X)
    assert result.passed, result.failures
    assert "of 8 samples" in check(result, "numerics (eval)").detail
    assert not any(c.name == "spatial sizes" for c in result.checks)


def test_integer_inputs_are_kept() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 8)
            self.conv = nn.Conv1d(8, 8, 3, padding=1)
            self.fc = nn.Linear(8, 4)

        def forward(self, ids: Tensor, *, mask: Tensor) -> Tensor:
            return self.fc((self.conv(self.embed(ids).transpose(1, 2)) * mask[:, None]).mean(2))

    def halves(conv: nn.Conv1d) -> nn.Module:
        return Around(conv, lambda y: 0.5 * y + 0.5 * y)

    torch.manual_seed(0)
    model = Text()
    inputs = {"ids": torch.tensor([[0, 4, 2, 1, 3, 3, 3, 0]]), "mask": torch.ones(1, 8, dtype=torch.bool)}
    result = verify(model, edited(model, make=halves), inputs, edits=EXACT)
    assert result.passed, result.failures
    assert result.relative_error is not None


def test_given_values_are_used_where_they_say_something() -> None:
    class Picky(nn.Module):
        """Refuses what is not a probability, and has a branch that only large values take."""

        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> Tensor:
            if not x.is_meta and (x.min() < 0 or x.max() > 1):
                raise ValueError("not probabilities")
            return self.net(x)

    model = Picky()
    result = verify(model, edited(model, "net.conv"), torch.full((1, 3, 16, 16), 0.5), edits=(edit("net.conv"),))
    assert result.passed, result.failures
    assert any("does not take random values" in note for note in result.notes)
    assert verify(model, edited(model, "net.conv"), torch.rand(1, 3, 16, 16), edits=(edit("net.conv"),)).passed


class Detector(nn.Module):
    """A list of images in, a list of dicts out; how many boxes depends on values, and training needs targets."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, images: list[Tensor], targets: Any = None) -> Any:
        if self.training and targets is None:
            raise ValueError("targets should not be none when in training mode")
        found = []
        for image in images:
            y = self.head(self.conv(image[None]).relu())[0].flatten(1).T
            boxes = y[(y[:, 0] > 0).nonzero().flatten()]
            found.append({"boxes": boxes[:, 1:], "scores": boxes[:, 0]})
        return found


def test_sizes_that_depend_on_values_are_not_held_against_an_approximate_rewrite() -> None:
    images = ([torch.rand(3, 16, 16), torch.rand(3, 12, 16)],)
    model = Detector()
    result = verify(model, rough(model, noise=0.3), images, edits=APPROXIMATE)
    assert result.passed, result.failures
    assert any("depend on values were not compared" in note for note in result.notes)
    assert any("does not run in training mode" in note for note in result.notes)
    assert verify(model, edited(model), images, edits=EXACT).passed


def test_a_detector_that_always_finds_as_many_as_it_may() -> None:
    """Other inputs and noise never change the ten boxes; smaller weights, as a factorisation leaves them, do."""

    class Capped(Detector):
        def forward(self, images: list[Tensor], targets: Any = None) -> Any:
            if self.training:
                raise ValueError("targets should not be none when in training mode")
            found = []
            for image in images:
                y = self.head(self.conv(image[None]).relu())[0].flatten(1).T
                found.append({"boxes": y[y.norm(dim=1) > 0.95 * self.usual][:10]})
            return found

    model = Capped()
    images = ([torch.rand(3, 16, 16)],)
    y = model.head(model.conv(images[0][0][None]).relu())[0].flatten(1).T
    model.usual = float(y.detach().norm(dim=1).max())
    smaller = Capped()
    smaller.usual = model.usual
    with torch.no_grad():
        for parameter in smaller.head.parameters():
            parameter *= 0.4
    result = verify(model, smaller, images, edits=APPROXIMATE)
    assert result.passed, result.failures
    assert any("depend on values were not compared" in note for note in result.notes)


def test_a_wrong_structure_is_held_against_it_all_the_same() -> None:
    class Wrong(Detector):
        def forward(self, images: list[Tensor], targets: Any = None) -> Any:
            return [
                {"boxes": d["boxes"][:, :3], "scores": d["scores"].double()} for d in super().forward(images, targets)
            ]

    result = verify(Detector(), Wrong(), ([torch.rand(3, 16, 16)],))
    detail = check(result, "shapes (eval)").detail
    assert not result.passed
    assert "dtype float32, now float64" in detail
    assert "×4, now " in detail


class Ranked(nn.Module):
    """Returns results in the order of scores that rounding alone decides, as proposals of an untrained detector are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.conv(x)).flatten(2)[0]
        ties = (y[0] - y[0].mean()) * 1e-7 + 1.0
        if not bool(ties.isfinite().all()):
            raise ValueError("not finite")
        return y[:, ties.argsort()]


def test_where_rounding_reorders_results_the_layers_before_are_compared() -> None:
    model, x = Ranked(), torch.randn(1, 3, 24, 24)
    result = verify(model, edited(model), x, edits=EXACT)
    assert check(result, "numerics (eval)").passed, result.failures
    assert "layers before values decide" in check(result, "numerics (eval)").detail
    wrong = edited(model)
    with torch.no_grad():
        wrong.head.weight.mul_(1.01)
    worse = verify(model, wrong, x, edits=EXACT)
    assert "numerics (eval)" in failed(worse)
    assert worse.diverges_at == "head"


def test_what_is_allowed_is_that_of_the_layer_whose_error_is_reported() -> None:
    model, x = Ranked(), torch.randn(1, 3, 24, 24)
    model.head = nn.Sequential(model.head, Around(nn.Identity(), lambda y: y + 3e3 - 3e3))  # rounds to some 1e-4
    detail = check(verify(model, edited(model), x, edits=EXACT), "numerics (eval)").detail
    found = re.fullmatch("error (.*) over the [0-9]+ layers before values decide, allowed (.*) there", detail)
    assert found is not None, detail
    assert float(found[1]) <= float(found[2])


def test_a_branch_above_the_examples_size_is_run() -> None:
    def change(y: Tensor) -> Tensor:
        return y * 2 if y.shape[-1] > 16 else y

    wrong = edited(net(), make=lambda conv: Around(full_rank(conv), change))
    result = verify(net(), wrong, X, edits=EXACT)
    assert failed(result) == {"spatial sizes"}
    below = edited(net(), make=lambda conv: Around(full_rank(conv), lambda y: y * 2 if y.shape[-1] < 16 else y))
    assert "spatial sizes" in failed(verify(net(), below, X, edits=EXACT))


# ------------------------------------------------------------------------- what runs, and what shapes alone can tell

LARGE = torch.zeros(1, 3, 128, 128)


class Counts(nn.Module):
    """Notes mode, batch and width of every real run, of all its copies."""

    def __init__(self, model: nn.Module, seen: list[tuple[bool, int, int]]) -> None:
        super().__init__()
        self.net, self.note = model, seen.append

    def forward(self, x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr():
            self.note((self.training, len(x), x.shape[-1]))
        return self.net(x)


def test_where_no_values_are_compared_the_original_runs_twice() -> None:
    before, after = list[tuple[bool, int, int]](), list[tuple[bool, int, int]]()
    models = Counts(net(), before), Counts(rough(net()), after)
    result = verify(*models, LARGE, edits=(edit("net.conv", None),))
    assert result.passed, result.failures
    assert result.samples == 9
    assert (
        check(result, "spatial sizes").detail == "32×32, 128×160, 129×129 statically; 32×32 and 128×160 in a real run"
    )
    assert check(result, "batch sizes").detail == "2, 3 statically; 8 at 32×32 in a real run"
    assert before == [(False, 1, 128), (False, 8, 32)]
    smaller = [(False, 1, 32), (False, 1, 160), (False, 8, 32), (False, 1, 32), (True, 2, 32)]  # the fourth is reloaded
    assert after == [(False, 1, 128), *smaller]


def test_where_values_are_compared_both_run() -> None:
    for options in {"edits": EXACT}, {"max_error": 9.0}:
        before, after = list[tuple[bool, int, int]](), list[tuple[bool, int, int]]()
        exact = "edits" in options
        models = Counts(net(drop=0.0), before), Counts(edited(net(drop=0.0)), after)
        options = {"edits": (edit("net.conv"),)} if exact else options
        result = verify(*models, LARGE, **options)
        assert result.passed, result.failures
        below = 32 if exact else 64  # a bound is on the example's size, and near borders more is lost
        assert {(False, 1, below), (False, 1, 160), (False, 8, below)} <= set(before)
        assert ((True, 2, 128) in before) is exact


def test_what_a_real_run_at_another_size_shows_fails_without_a_bound_too() -> None:
    def breaks(change: Any) -> Any:
        """A rewrite that goes wrong in real runs below half of the size."""

        def changed(y: Tensor) -> Tensor:
            real = y.untyped_storage().data_ptr() != 0
            return change(y) if real and y.shape[-1] < 64 else y

        return edited(net(), make=lambda conv: Around(full_rank(conv), changed))

    def raises(y: Tensor) -> Tensor:
        raise ValueError("too small")

    result = verify(net(), breaks(lambda y: y * torch.nan), LARGE, edits=APPROXIMATE)
    assert "spatial sizes" in failed(result)
    assert "at 32×32 output has 10 NaN or Inf" in check(result, "spatial sizes").detail
    result = verify(net(), breaks(raises), LARGE, edits=APPROXIMATE)
    assert "at 32×32 the rewritten model does not run: ValueError: too small" in check(result, "spatial sizes").detail
    assert result.diverges_at == "conv"
    result = verify(net(), breaks(lambda y: y.double()), LARGE, edits=APPROXIMATE)
    assert "spatial sizes" in failed(result)
    nan = breaks(lambda y: y * torch.nan)
    assert verify(nan, nan, LARGE, edits=APPROXIMATE).passed  # as the original


def test_a_size_that_only_one_of_the_models_takes_on_shapes_is_told() -> None:
    def narrow(y: Tensor) -> Tensor:
        return y.view(-1, 8, 32, 32) if y.shape[-1] <= 32 else y.view(-1, 8, *y.shape[2:])

    def wrong(y: Tensor) -> Tensor:
        return y.view(-1, 8, 16, 64) if y.shape[-1] <= 32 else y

    fine = edited(net(), make=lambda conv: Around(full_rank(conv), narrow))
    assert verify(net(), fine, LARGE, edits=APPROXIMATE).passed
    result = verify(net(), edited(net(), make=lambda conv: Around(full_rank(conv), wrong)), LARGE, edits=APPROXIMATE)
    assert "spatial sizes" in failed(result)
    assert "at 32×32 the rewritten model does not run" in check(result, "spatial sizes").detail


def test_the_first_size_below_that_the_original_takes_is_tried() -> None:
    class AtLeast(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[-1] < 50:
                raise ValueError("too small")
            return self.net(x)

    result = verify(AtLeast(net()), AtLeast(rough(net())), LARGE, edits=(edit("net.conv", None),))
    assert result.passed, result.failures
    assert (
        check(result, "spatial sizes").detail == "64×64, 128×160, 129×129 statically; 64×64 and 128×160 in a real run"
    )
    assert not any("does not take" in note for note in result.notes)
