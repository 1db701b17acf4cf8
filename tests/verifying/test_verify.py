"""`verify`: an honest rewrite passes, and every way of breaking one fails the check that is there for it."""

from __future__ import annotations

import copy
import json
import random
from math import inf, nan, sqrt
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from verify_models import APPROXIMATE, EXACT, check, edit, edited, failed, full_rank, net, rough

import pwrewrite
from pwrewrite.capturing import capture, info
from pwrewrite.core.cost import Cost
from pwrewrite.core.errors import InputError, UsageError
from pwrewrite.verifying import verify
from pwrewrite.verifying.divergence import layer_differences
from pwrewrite.verifying.gradients import gradient_difference
from pwrewrite.verifying.inputs import Draws
from pwrewrite.verifying.numerics import exact_limits, relative_difference, roundoff
from pwrewrite.verifying.training import gradient_limit

X = torch.zeros(1, 3, 16, 16)


def recount(model: nn.Module) -> Cost:
    found = capture(model, X)
    return Cost(found.params, sum(info(node).cost.macs for node in found.graph.nodes))


# ------------------------------------------------------------------------------------------------ what passes


def test_an_honest_exact_rewrite_passes_every_check() -> None:
    model, rewritten = net(), edited(net())
    result = verify(model, rewritten, X, edits=EXACT, expected=recount(rewritten))
    assert result.passed, result.failures
    assert [c.name for c in result.checks] == [
        "shapes (static)",
        "shapes (eval)",
        "finite (eval)",
        "numerics (eval)",
        "batch sizes",
        "spatial sizes",
        "state_dict",
        "shapes (train)",
        "finite (train)",
        "numerics (train)",
        "buffers (train)",
        "gradients",
        "cost",
    ]
    assert result.relative_error is not None
    assert 0 < result.relative_error < 1e-6
    assert result.agreement == 1.0
    assert result.diverges_at is None
    assert "float64" in check(result, "numerics (eval)").detail
    assert "8 at 8×8 in a real run" in check(result, "batch sizes").detail
    assert json.loads(json.dumps(result.to_dict()))["passed"]


def test_an_approximate_rewrite_reports_its_error_and_agreement() -> None:
    result = verify(net(), rough(net()), X, edits=APPROXIMATE)
    assert result.passed, result.failures
    assert result.relative_error is not None
    assert 1e-3 < result.relative_error < 0.2
    assert result.agreement is not None
    assert "of 9 samples" in check(result, "numerics (eval)").detail  # one example, and a batch of eight


def test_without_edits_two_models_are_compared_as_approximate() -> None:
    result = verify(net(0), net(1), X)
    assert result.passed
    assert result.relative_error is not None
    assert result.relative_error > 0.1


def test_quick_compares_once() -> None:
    result = verify(net(), edited(net()), X, edits=EXACT, thorough=False)
    names = ["shapes (static)", "shapes (eval)", "finite (eval)", "numerics (eval)"]
    assert [c.name for c in result.checks] == names
    assert any("not checked" in note for note in result.notes)


def test_it_is_a_function_of_the_package() -> None:
    assert pwrewrite.verify(net(), net(), X, thorough=False).passed


# ------------------------------------------------------------------------------------- what is left untouched


def test_models_inputs_modes_and_random_states_are_untouched() -> None:
    model = net().train()
    model.norm.eval()
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    rewritten = edited(model)
    x = torch.randn(2, 3, 16, 16)
    kept = copy.deepcopy(model.state_dict()), copy.deepcopy(rewritten.state_dict()), x.clone()
    flags = [m.training for m in (*model.modules(), *rewritten.modules())]
    state, python = torch.get_rng_state(), random.getstate()
    verify(model, rewritten, x, edits=EXACT)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
    assert [m.training for m in (*model.modules(), *rewritten.modules())] == flags
    assert torch.equal(x, kept[2])
    for now, before in ((model, kept[0]), (rewritten, kept[1])):
        assert all(torch.equal(value, before[name]) for name, value in now.state_dict().items())
    assert torch.equal(model.fc.weight.grad, torch.ones_like(model.fc.weight))
    assert model.stem.weight.grad is None
    assert not any(m._forward_hooks for m in model.modules())


def test_a_model_that_writes_into_its_input_gets_a_copy_each_time() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.mul_(2))

    torch.manual_seed(0)
    model, x = Writes(), torch.randn(1, 3, 8, 8)
    before = x.clone()
    assert verify(model, edited(model), x, edits=EXACT).passed
    assert torch.equal(x, before)


def test_the_same_seed_gives_the_same_verification() -> None:
    assert verify(net(), rough(net()), X) == verify(net(), rough(net()), X)


# ------------------------------------------------------------------------------------------- shapes and dtypes


def test_a_wrong_shape_fails_and_is_located() -> None:
    wrong = edited(net(), make=lambda conv: nn.Sequential(full_rank(conv), nn.ZeroPad2d((0, 0, 0, 1))))
    result = verify(net(), wrong, X)
    assert "shapes (eval)" in failed(result)  # the residual no longer fits
    assert result.diverges_at == "conv"


def test_a_changed_width_of_the_output_is_allowed_only_when_asked() -> None:
    model, other = net(), net(classes=12)
    result = verify(model, other, X)
    assert {"shapes (static)", "shapes (eval)", "shapes (train)"} <= failed(result)
    assert result.diverges_at == "fc"
    allowed = verify(model, other, X, allow_output_change=True)
    assert allowed.passed, allowed.failures
    assert "1×10, now 1×12" in check(allowed, "shapes (eval)").detail
    assert allowed.relative_error is None
    assert any("not compared" in note for note in allowed.notes)


class Cast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double()


def test_a_changed_dtype_fails() -> None:
    other = edited(net(), "fc", make=lambda fc: nn.Sequential(fc, Cast()))
    result = verify(net(), other, X)
    assert {"shapes (static)", "shapes (eval)"} <= failed(result)
    assert "dtype float32, now float64" in check(result, "shapes (eval)").detail


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module, wrap: Any) -> None:
        super().__init__()
        self.model, self.wrap = model, wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.model(x))


def test_nested_outputs_are_compared_leaf_by_leaf() -> None:
    def wrap(y: Tensor) -> Any:
        return {"a": [y, (y.argmax(1), None)], "b": 3}

    model = Wrapped(net(), wrap)
    good = verify(model, Wrapped(edited(net()), wrap), X, edits=(edit("model.conv"),))
    assert good.passed, good.failures
    bad = verify(model, Wrapped(edited(net()), lambda y: {"a": [y, (y.argmax(1),)], "b": 3}), X)
    assert {"shapes (static)", "shapes (eval)"} <= failed(bad)
    assert "output['a'][1] was a tuple of 2, now tuple of 1" in check(bad, "shapes (eval)").detail
    flipped = verify(model, Wrapped(edited(net()), lambda y: {"a": [y, (y.argmin(1), None)], "b": 3}), X, edits=EXACT)
    assert "numerics (eval)" in failed(flipped)
    assert "output['a'][1][0] differs in 1 of 1 values" in check(flipped, "numerics (eval)").detail


# ------------------------------------------------------------------------------------------------- numerics


def test_a_changed_weight_fails_an_exact_edit_and_names_the_layer() -> None:
    wrong = edited(net())
    with torch.no_grad():
        wrong.tail.weight[0, 0] += 1e-3
    result = verify(net(), wrong, X, edits=EXACT)
    assert "numerics (eval)" in failed(result)
    assert result.diverges_at == "tail"


def test_a_dropped_bias_fails() -> None:
    def make(conv: nn.Conv2d) -> nn.Sequential:
        new = full_rank(conv)
        new[1].bias = None
        return new

    result = verify(net(), edited(net(), make=make), X, edits=EXACT)
    assert {"numerics (eval)", "numerics (train)"} <= failed(result)
    assert result.diverges_at == "relu"  # the first outside of what was edited


def test_the_norms_epsilon_is_enough_to_fail() -> None:
    wrong = edited(net())
    wrong.norm.eps = 1e-3
    result = verify(net(), wrong, X, edits=EXACT)
    assert "numerics (eval)" in failed(result)
    assert result.diverges_at == "norm"


def test_max_error_bounds_an_approximate_rewrite() -> None:
    model, other = net(), rough(net())
    measured = verify(model, other, X, thorough=False).relative_error
    assert measured is not None
    assert verify(model, other, X, max_error=2 * measured, thorough=False).passed
    result = verify(model, other, X, max_error=measured / 2)
    assert "numerics (eval)" in failed(result)
    assert result.diverges_at == "conv"


def test_nan_fails_even_without_a_bound() -> None:
    wrong = rough(net())
    with torch.no_grad():
        wrong.conv[1].bias[3] = float("nan")  # type: ignore[index]
    result = verify(net(), wrong, X)
    assert "finite (eval)" in failed(result)
    assert result.diverges_at == "conv"


def test_a_hook_that_kept_the_tensor_itself_would_blame_the_wrong_layer() -> None:
    """``y += x`` writes into what ``conv`` returned; a layer before it must not be blamed for what it added."""
    wrong = edited(net())
    with torch.no_grad():
        wrong.conv[1].weight.mul_(1.01)
    result = verify(net(), wrong, X, edits=APPROXIMATE, max_error=1e-5)
    assert result.diverges_at == "conv"

    class Adds(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.conv, self.after, self.factor = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), factor

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            y += self.factor * x
            return self.after(y)

    torch.manual_seed(0)
    model = Adds(1.0)
    other = copy.deepcopy(model)
    other.factor = 2.0
    assert verify(model, other, X, max_error=1e-3).diverges_at == "after"


def test_a_zero_output_has_no_relative_error() -> None:
    model = net()
    nn.init.zeros_(model.fc.weight)
    nn.init.zeros_(model.fc.bias)
    same = verify(model, edited(model), X, edits=EXACT)
    assert same.passed, same.failures
    assert same.relative_error == 0
    assert "zero throughout" in check(same, "numerics (eval)").detail
    other = edited(model)
    nn.init.constant_(other.fc.bias, 0.1)
    assert "numerics (eval)" in failed(verify(model, other, X, edits=EXACT))
    assert "numerics (eval)" in failed(verify(model, other, X, max_error=0.01))
    reported = verify(model, other, X)
    assert reported.passed
    assert reported.relative_error is None


def test_exact_only_in_evaluation_says_nothing_about_training() -> None:
    """A folded norm: the same in evaluation, not in training."""

    def fold(model: Any) -> Any:
        model = copy.deepcopy(model)
        model.stem = torch.nn.utils.fusion.fuse_conv_bn_eval(model.stem, model.norm)
        model.norm = nn.Identity()
        return model

    model = net()
    result = verify(model, fold(model), X, edits=(edit("stem", "eval"),))
    assert result.passed, result.failures
    claims = verify(model, fold(model), X, edits=(edit("stem", "both"),))
    assert failed(claims) == {"numerics (train)", "gradients"}


def test_wrong_behaviour_in_training_alone_fails() -> None:
    wrong = edited(net())
    wrong.norm.momentum = 0.3
    result = verify(net(), wrong, X, edits=EXACT)
    assert failed(result) == {"buffers (train)"}
    wrong = edited(net(drop=0.2))
    wrong.drop.p = 0.5
    assert "numerics (train)" in failed(verify(net(), wrong, X, edits=EXACT))


def test_other_random_draws_are_told_instead_of_compared() -> None:
    model = net()
    other = edited(model, make=lambda conv: nn.Sequential(full_rank(conv), nn.Dropout(1e-9)))
    result = verify(model, other, X, edits=EXACT)
    assert any("draw random numbers, and not the same" in note for note in result.notes)
    assert not any(c.name == "numerics (train)" for c in result.checks)


class Skips(nn.Module):
    """Leaves out layers at random in training, as LayerDrop does; one of them ``always``."""

    def __init__(self, drop: nn.Module, always: bool = False) -> None:
        super().__init__()
        self.layers, self.drop = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(6)), drop
        self.always = always

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            if self.training and (float(torch.rand([])) < 0.3 or (self.always and i == 5)):
                continue
            x = x + self.drop(layer(x))
        return x


def test_layers_that_random_numbers_leave_out_are_drawn_again() -> None:
    torch.manual_seed(0)
    model = Skips(nn.Dropout(0.1))
    other, wrong = Skips(nn.Identity()), Skips(nn.Identity(), always=True)
    for made in (other, wrong):
        made.load_state_dict(model.state_dict())
    for seed in range(4):
        assert "gradients" not in failed(verify(model, other, X, seed=seed))
    failures = [c for seed in range(4) for c in verify(model, wrong, X, seed=seed).failures if c.name == "gradients"]
    assert failures
    assert all("layers.5" in c.detail and "layers.4" not in c.detail for c in failures)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    model = net(drop=0.0).to(dtype)
    rewritten = edited(model)
    result = verify(model, rewritten, X.to(dtype), edits=EXACT)
    assert result.passed, result.failures
    wrong = copy.deepcopy(rewritten)
    with torch.no_grad():
        wrong.tail.weight.mul_(1.3)
    assert "numerics (eval)" in failed(verify(model, wrong, X.to(dtype), edits=EXACT))


def test_a_model_that_does_not_run_in_double_is_probed() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> Tensor:
            assert x.dtype == torch.float32
            return self.net(x)

    model = Single()
    result = verify(model, edited(model, "net.conv"), X, edits=(edit("net.conv"),))
    assert result.passed, result.failures
    assert "does not run in float64" in check(result, "numerics (eval)").detail
    wrong = edited(model, "net.conv")
    with torch.no_grad():
        wrong.net.tail.weight.mul_(1.001)
    assert "numerics (eval)" in failed(verify(model, wrong, X, edits=(edit("net.conv"),)))


# -------------------------------------------------------------------------------------------------- meta


def test_on_meta_only_form_is_checked_and_that_is_said() -> None:
    model, rewritten = net().to("meta"), edited(net()).to("meta")
    result = verify(model, rewritten, X, edits=EXACT, expected=recount(net()))
    assert [c.name for c in result.checks] == ["shapes (static)", "cost"]
    assert failed(result) == {"cost"}
    assert any("on meta" in note for note in result.notes)
    assert result.relative_error is None
    wrong = verify(model, net(classes=12).to("meta"), X)
    assert failed(wrong) == {"shapes (static)"}
    assert wrong.diverges_at == "fc"


def test_inputs_on_meta_get_values() -> None:
    result = verify(net(), edited(net()), X.to("meta"), edits=EXACT)
    assert result.passed, result.failures
    assert result.relative_error


# ------------------------------------------------------------------------------------- how the bounds are made


def test_the_floor_is_what_one_layer_rounds() -> None:
    assert roundoff({torch.float32, torch.int64}) == 8 * 2.0**-23
    assert roundoff({torch.float32, torch.bfloat16}) == 2.0**-7
    assert exact_limits({"": 1e-5, "b": 0.0}, 1e-6) == {"": 4e-5, "b": 1e-6}


def test_numbers_too_small_for_all_their_digits_do_not_differ() -> None:
    tiny = torch.full((4, 4), 3e-42)
    assert relative_difference(tiny, tiny.double() * 1.3) == 0
    assert relative_difference(tiny, torch.zeros(4, 4)) == 0
    assert relative_difference(tiny + 1e-30, tiny) > 1
    assert relative_difference(tiny.double() * 1.3, tiny.double()) > 0.2  # in float64 it has all of them


def test_a_gradient_of_rounding_alone_says_nothing() -> None:
    whole = {"conv.weight": torch.full((8,), 1.0), "conv.bias": torch.full((8,), 1e-8)}  # a norm follows the bias
    assert gradient_difference(whole, {"conv.core.weight": torch.ones(4), "conv.bias": -whole["conv.bias"]}) < 1e-4  # type: ignore[operator]
    lost = gradient_difference(whole, {"conv.weight": torch.zeros(8), "conv.bias": whole["conv.bias"]})
    assert lost == pytest.approx(1)
    tenth = whole | {"other.weight": torch.full((8,), 0.01)}
    assert gradient_difference(tenth, {"other.weight": torch.zeros(8)}) == pytest.approx(1)
    undefined = whole | {"scale": torch.tensor(nan), "shift": torch.tensor(inf)}
    assert gradient_difference(undefined, undefined) == 0


def test_gradients_may_differ_as_the_root_of_rounding() -> None:
    assert gradient_limit(1e-9) == 1e-2
    assert gradient_limit(4e-6) == pytest.approx(20 * sqrt(4e-6))
    assert gradient_limit(2e-5) < 0.1
    assert gradient_limit(1e-3) == float("inf")  # nothing can be said


# ------------------------------------------------------------------------------------------------ bad usage


def test_bad_usage_is_refused() -> None:
    with pytest.raises(UsageError):
        verify(net(), net(), X, max_error=-1.0)
    with pytest.raises(InputError):
        verify(net(), "model", X)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="does not run"):
        verify(net(), net(), torch.randn(1, 3, 16, 16).double())


def test_a_capture_that_is_there_is_taken_if_it_is_the_originals() -> None:
    model = net()
    result = verify(model, edited(model), X, edits=EXACT, captured=capture(model, X))
    assert result == verify(model, edited(model), X, edits=EXACT)
    with pytest.raises(InputError, match="another model"):
        verify(net(), edited(model), X, captured=capture(model, X))


def test_progress_is_told() -> None:
    told: list[str] = []
    verify(net(), net(), X, progress=told.append)
    assert told[0] == "shapes, statically"
    assert "training" in told


def test_calls_of_a_layer_are_paired_only_where_there_are_as_many() -> None:
    class Block(nn.Module):
        """One activation module for two places, of which a rewrite may take one away."""

        def __init__(self, both: bool) -> None:
            super().__init__()
            self.first, self.second, self.relu, self.both = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.ReLU(), both

        def forward(self, x: Tensor) -> Tensor:
            y = self.relu(self.first(x)) if self.both else self.first(x).clamp(min=0)
            return self.relu(self.second(y))

    before, after = Block(True).eval(), Block(False).eval()
    after.load_state_dict(before.state_dict())
    given = Draws(torch.randn(2, 3, 8, 8), None, 0).draw()
    found, _, raised = layer_differences(before, after, given, seed=0)
    assert raised is None
    assert {path for path, _ in found} == {"first", "second"}
    assert max(found.values()) < 1e-6
    found, _, _ = layer_differences(before, before, given, seed=0)
    assert ("relu", 1) in found
