"""Copies of models keep what ``copy.deepcopy`` keeps, also of models that hold tensors with a gradient history."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import spectral_norm, weight_norm

import pwrewrite
from pwrewrite.core.errors import RefusedError
from pwrewrite.core.nested import deep_copy


class Holder(nn.Module):
    """A module that holds something."""

    def __init__(self, **held: Any) -> None:
        super().__init__()
        for name, value in held.items():
            self.register_buffer(name, value) if type(value) is Tensor else setattr(self, name, value)


class OwnWay(nn.Module):
    def __deepcopy__(self, memo: dict[int, Any]) -> OwnWay:
        own = OwnWay()
        own.told = "its own way"  # type: ignore[assignment]
        return own


class Reduced(nn.Module):
    def __reduce__(self) -> tuple[Callable[[], nn.Module], tuple[()]]:
        return nn.Identity, ()


class Left(nn.Module):
    """Leaves something out of its state, and puts something else in."""

    def __getstate__(self) -> dict[str, Any]:
        return {**{k: v for k, v in self.__dict__.items() if k != "file"}, "fresh": [1, [2]]}


def both(model: nn.Module) -> tuple[Any, Any]:
    """A model's copy, and the one that Python makes."""
    return deep_copy(model), copy.deepcopy(model)


def test_tensors_share_in_the_copy_what_they_shared() -> None:
    whole = torch.arange(6.0)
    model = Holder(whole=whole, part=whole[2:4], again=whole, same=whole.detach(), turned=torch.ones(2, 3).T)
    model.kept = [whole, {"part": whole[1:]}]
    model.weight = nn.Parameter(torch.ones(3))
    model.tied = model.weight
    for copied in both(model):
        copied.whole.fill_(7)
        assert copied.part.eq(7).all()
        assert copied.same.eq(7).all()
        assert copied.again is copied.whole is copied.kept[0]
        assert copied.kept[1]["part"].eq(7).all()
        assert copied.turned.stride() == model.turned.stride()
        assert copied.tied is copied.weight is not model.weight
        assert list(copied._buffers) == list(model._buffers)
    assert whole.equal(torch.arange(6.0))


def test_a_tensor_that_is_a_part_comes_before_the_whole() -> None:
    whole = torch.zeros(4)
    model = Holder(part=whole[:2], whole=whole)
    for copied in both(model):
        copied.whole.fill_(1)
        assert copied.part.eq(1).all()


def test_what_modules_hold_is_copied_once_and_to_the_bottom() -> None:
    inner = nn.BatchNorm2d(3)
    shared: dict[Any, Any] = {("a", 1): [inner], "sizes": (1, 2), "deep": ([inner],)}
    model = Holder(
        first=inner, second=Holder(inner=inner, shared=shared), shared=shared, kinds={1, 2}, of=torch.float16
    )
    model.up = [model]
    model.hook = inner.register_forward_hook(lambda module, args, output: output)
    ordered: Any = OrderedDict(a=1)
    ordered.told = ["kept"]
    model.ordered = ordered
    for copied in both(model):
        assert copied.first is copied.second.inner is copied.shared[("a", 1)][0] is copied.shared["deep"][0][0]
        assert copied.shared is copied.second.shared is not model.shared
        assert copied.up[0] is copied
        assert copied.kinds == {1, 2}
        assert copied.kinds is not model.kinds
        assert copied.of is torch.float16
        assert copied.ordered.told == ["kept"]
        assert copied.ordered.told is not ordered.told
        assert len(copied.first._forward_hooks) == 1
        assert copied.first._forward_hooks is not inner._forward_hooks
        assert copied.first._non_persistent_buffers_set is not inner._non_persistent_buffers_set
        assert [name for name, _ in copied.named_modules()] == [name for name, _ in model.named_modules()]


def test_classes_that_copy_in_their_own_way_do() -> None:
    left: Any = Left()
    left.x = 5
    with open(__file__) as left.file:
        for copied in both(nn.Sequential(OwnWay(), Reduced(), left)):
            assert copied[0].told == "its own way"
            assert type(copied[1]) is nn.Identity
            assert not hasattr(copied[2], "file")
            assert copied[2].fresh == [1, [2]]
            assert copied[2].x == 5


class Made(nn.Module):
    """Copied by its settings, as the layers of einops are."""

    def __init__(self, size: int = 2) -> None:
        super().__init__()
        self.size = size

    def __getstate__(self) -> dict[str, Any]:
        return {"size": self.size}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(self.size)


def test_modules_that_are_made_anew_keep_their_mode() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Made()).eval()
    assert copy.deepcopy(model)[2].training
    assert not any(module.training for module in deep_copy(model).modules())
    assert all(module.training for module in deep_copy(model.train()).modules())
    fused = pwrewrite.fuse(model.eval(), torch.randn(1, 3, 8, 8), thorough=False)
    assert fused.report.passed
    assert not any(module.training for module in fused.model.modules())


class Remembers(nn.Module):
    """Keeps what it computed, as code for visualisation does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.seen = nn.Conv2d(3, 4, 3), dict[str, list[Tensor]]()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        self.seen["maps"] = [y]
        self.last = y.mean()
        return y


def test_what_a_run_left_behind_is_copied_by_value() -> None:
    model = Remembers()
    model(torch.randn(1, 3, 8, 8))
    copied = deep_copy(model)
    assert copied.last is not model.last
    assert not copied.last.requires_grad
    torch.testing.assert_close(copied.seen["maps"], [model.seen["maps"][0].detach()])
    assert model.last.grad_fn is not None
    assert copied.conv.weight is not model.conv.weight
    assert copied.conv.weight.requires_grad


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
@pytest.mark.parametrize("ran", [False, True])
def test_a_fresh_model_with_an_old_norm_is_fused_and_rewritten(norm: object, ran: bool) -> None:
    assert callable(norm)
    model = nn.Sequential(norm(nn.Conv2d(3, 16, 3)), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU())
    model.eval()
    x = torch.randn(1, 3, 16, 16)
    if ran:
        model(x)
    fused = pwrewrite.fuse(model, x, thorough=False)
    assert fused.report.passed
    assert [edit.path for edit in fused.edits if edit.method == "relu"] == ["3"]
    left = {skip.path: skip.detail for skip in fused.plan.skips}
    assert "computed from other tensors" in left["1"]
    with torch.no_grad():
        torch.testing.assert_close(fused.model(x), model(x), rtol=1e-4, atol=1e-5)
    assert pwrewrite.rewrite(model, x, [pwrewrite.passes.InsertBottleneck(0.25)], thorough=False).report.passed


def test_views_of_dicts_are_those_of_the_copied_dicts() -> None:
    model = nn.Sequential(OrderedDict(a=nn.Linear(2, 2), b=nn.ReLU()))
    holder = Holder(inner=model, names=model._modules.keys(), sizes={"a": 1}, order=OrderedDict(b=2))
    holder.values, holder.items = holder.sizes.values(), holder.order.items()
    copied = deep_copy(holder)
    copied.inner.append(nn.ReLU())
    copied.sizes["c"] = 3
    assert list(copied.names) == ["a", "b", "2"]
    assert list(copied.values) == [1, 3]
    assert list(copied.items) == [("b", 2)]
    assert list(holder.names) == ["a", "b"]


def test_a_model_that_cannot_be_copied_is_not_exported(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2)).eval()
    model.lines = (line for line in ())
    with pytest.raises(RefusedError, match="the model cannot be copied"):
        pwrewrite.export(model, torch.randn(1, 2), to=["pt2"], out=str(tmp_path / "out"))
