"""`RemoveInferenceNoise` on code: what goes, what must stay, and that one module alone becomes a graph."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from check_passes import check_pass
from torch import Tensor, fx, nn
from torch.nn import functional as F

from pwrewrite.capturing import capture, info
from pwrewrite.core.errors import PwrewriteError
from pwrewrite.core.plan import Plan
from pwrewrite.edit.apply import apply
from pwrewrite.passes import RemoveInferenceNoise
from pwrewrite.targets import load
from pwrewrite.workflows.fuse import fuse
from pwrewrite.workflows.rewrite import Rewritten

X = torch.randn(2, 4, 8, 8)


class Code(nn.Module):
    """One convolution, one activation, a second branch; what the code does with them is the test's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(4, 4, 1), nn.Tanh()
        self.aux = nn.Sequential(nn.Conv2d(4, 2, 1), nn.ReLU())


class Dropped(Code):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.dropout(self.conv(x), 0.3, self.training))


class Unread(Code):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        self.aux(x)
        torch.tanh(x * 2)
        return x


class Assigns(nn.Module):
    """Assigns items of a list and of a tensor, which its own code does not read."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.conv, self.twice = nn.Conv2d(4, 4, 1), twice

    def forward(self, x: list[Tensor]) -> Tensor:
        y = F.relu(F.dropout(self.conv(x[0]), 0.3, self.training))
        x[0] = y
        x[1][:, :2] = 0.5
        if self.twice:
            y = torch.tanh(y) + torch.tanh(y)
            x[0] = y
        return y


class Doubled(Code):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).contiguous().contiguous()
        return torch.reshape(x.flatten(1).view(-1, 16, 16), (-1, 8, 32)).sin()


class Undone(Code):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).permute(0, 2, 3, 1).permute([0, -1, 1, 2])
        return x.transpose(1, 2).transpose(2, 1) + 1


class Twice(Code):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.act(x) * self.act(x) + torch.sin(x) * x.sin() + torch.sin(x)


def run(kind: type[nn.Module]) -> tuple[nn.Module, Rewritten]:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), kind()).eval()
    done = fuse(model, X, [RemoveInferenceNoise()])
    assert done.report.passed, done.report.verification
    for x in (X, torch.randn(3, 4, 8, 8)):
        with torch.no_grad():
            assert torch.equal(done.model(x), model(x))
    return model, done


def operations(model: nn.Module) -> Counter[str]:
    return Counter(info(n).op for n in capture(model, X).graph.nodes)


@pytest.mark.parametrize(
    ("kind", "gone"),
    [
        (Dropped, {"dropout": 1}),
        (Unread, {"conv2d": 1, "relu": 1, "tanh": 1, "mul": 1}),
        (Doubled, {"contiguous": 1, "flatten": 1, "view": 1}),
        (Undone, {"permute": 2, "transpose": 2}),
        (Twice, {"tanh": 1, "sin": 1}),
    ],
)
def test_what_goes(kind: type[nn.Module], gone: dict[str, int], tmp_path: Path) -> None:
    model, done = run(kind)
    (edit,) = done.edits
    assert (edit.kind, edit.method, edit.graph_module, edit.exact) == ("graph", "simplify", "1", "eval")
    assert operations(model) - operations(done.model) == Counter(gone)
    assert type(done.model) is nn.Sequential
    assert isinstance(done.model[1], fx.GraphModule)
    assert list(done.model.state_dict()) == list(model.state_dict())
    done.save(tmp_path / "out")
    assert torch.equal(load(tmp_path / "out", copy.deepcopy(model))(X), done.model(X))


class ReturnsTwo(Code):
    """Returns two results, of which the caller reads one; what nobody reads in its own code is ``spare``."""

    def __init__(self, spare: bool) -> None:
        super().__init__()
        self.spare = nn.Conv2d(4, 4, 1) if spare else None

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if self.spare is not None:
            self.spare(x)
        return self.conv(x), {"chunk": self.aux(self.act(x)).chunk(2, 1)[1], "sum": x + 1}


class ReadsOne(nn.Module):
    def __init__(self, spare: bool) -> None:
        super().__init__()
        self.both = ReturnsTwo(spare)

    def forward(self, x: Tensor) -> Tensor:
        return self.both(x)[0]


@pytest.mark.parametrize("spare", [False, True])
def test_what_code_returns_and_its_caller_leaves_is_not_proposed(spare: bool) -> None:
    done = fuse(ReadsOne(spare).eval(), X, [RemoveInferenceNoise()])
    assert not done.report.skips, done.report.skips
    assert [edit.op.settings["unread"] for edit in done.edits] == [["both.spare"]] * spare
    assert done.report.passed


class SetsData(nn.Conv2d):
    """Masks its weight by setting its data, as autoregressive models do, and drops nothing in evaluation."""

    def __init__(self, drop: float) -> None:
        super().__init__(4, 4, 3)
        self.register_buffer("mask", torch.ones(3, 3).triu())
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = self.weight.data * self.mask
        y = super().forward(x)
        return torch.relu(F.dropout(y, self.drop, self.training)) if self.drop else y


@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_code_that_sets_the_data_of_a_weight_stays(drop: float) -> None:
    model = nn.Sequential(SetsData(drop)).eval()
    done = fuse(model, X, [RemoveInferenceNoise()])
    assert done.report.passed
    assert not done.edits
    said = [skip.detail for skip in done.report.skips]
    assert bool(said) is bool(drop)
    assert all("it sets .data of a tensor, which a graph would not (test_noise_in_code.py:" in each for each in said), (
        said
    )


def test_a_dropout_in_code_no_longer_parts_what_fuses() -> None:
    done = fuse(nn.Sequential(Dropped()).eval(), X)
    assert [e.method for e in done.edits] == ["simplify", "relu"]


class Read(Code):
    """Only the shape is read, of something whose computation a graph cannot leave out."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.aux(x)
        return self.conv(x) * y.shape[1]


class Written(Code):
    """Equal calls, one of whose results is written into."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        a, b = torch.sin(x), torch.sin(x)
        a += 1
        return a * b


class Between(Code):
    """Equal calls, between which their input changes."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        a = torch.sin(x)
        x.mul_(2)
        return a + torch.sin(x)


class Effect(Code):
    """A result that nobody reads, of a call that does more."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x.add_(1)
        torch.relu_(x[:, :2])
        return x


class Drawn(Code):
    """Numbers from a generator are not equal."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * (1 + 0 * (torch.rand_like(x) + torch.rand_like(x)))


class Parted(Code):
    """A copy that matters, since what comes out is written into."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        y = x.permute(0, 2, 3, 1).reshape(-1).reshape(2, -1)
        y.mul_(2)
        return torch.cat([y.flatten(), x.flatten()])


@pytest.mark.parametrize("kind", [Read, Written, Between, Effect, Drawn])
def test_what_must_stay(kind: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), kind()).eval()
    check_pass(RemoveInferenceNoise(), model, X, edits={})


def test_a_copy_that_matters() -> None:
    check_pass(RemoveInferenceNoise(), Parted().eval(), X, within=0)


def test_hooks_see_what_they_saw() -> None:
    model = nn.Sequential(Unread()).eval()
    seen: list[Any] = []
    model[0].get_submodule("aux.0").register_forward_hook(lambda m, i, o: seen.append(o))
    done = fuse(model, X, [RemoveInferenceNoise()], verify=False)
    seen.clear()
    done.model(X)
    assert len(seen) == 1


def test_a_dropout_that_is_meant_to_drop_stays() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Dropout(), nn.Dropout()).eval()
    model[1].train()
    done = fuse(model, X, [RemoveInferenceNoise()], verify=False)
    assert [e.path for e in done.edits] == ["2"]
    assert [(s.path, "meant to drop" in s.detail) for s in done.plan.skips] == [("1", True)]


class Attends(nn.Module):
    """Hands its dropout's probability to a function in training, and never calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.attend, self.drop = nn.Dropout(0.1), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        p = self.attend.p if self.training else 0.0
        return self.drop(nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=p))


def test_a_dropout_that_is_not_called_stays() -> None:
    done = fuse(nn.Sequential(Attends()).eval(), torch.randn(2, 4, 8))
    assert done.report.passed, done.report.verification
    assert [edit.path for edit in done.edits] == ["0.drop"]
    assert done.model.train()(torch.randn(2, 4, 8)).shape == (2, 4, 8)


def test_errors_of_edited_plans() -> None:
    model = nn.Sequential(Unread()).eval()
    text = fuse(model, X, [RemoveInferenceNoise()]).plan.to_json()
    for old, new, said in (
        ('"unread": [\n          "0.aux"\n        ]', '"unread": 3', "unread is not a list"),
        ('"path": "0"', '"path": "9"', "no module"),
        ('"path": "0"', '"path": "0.act"', "nothing in its own code goes unread|does not trace"),
    ):
        assert old in text
        with pytest.raises(PwrewriteError, match=said):
            apply(model, Plan.from_json(text.replace(old, new)))


class Assigned(nn.Module):
    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.inner = Assigns(twice)

    def forward(self, x: Tensor) -> Tensor:
        maps = [x, x.sin()]
        return torch.cat([self.inner(maps), *maps], 1)


def test_items_that_code_assigns_stay() -> None:
    model = Assigned(False).eval()
    done = fuse(model, X)
    assert [e.method for e in done.edits] == ["simplify", "relu"]
    assert done.report.passed
    assert torch.equal(done.model(X)[:, 8:], model(X)[:, 8:])
    done = fuse(Assigned(True).eval(), X)
    assert done.report.passed
    (skip,) = [skip for skip in done.plan.skips if skip.path == "inner"]
    assert "assigns items" in skip.detail
