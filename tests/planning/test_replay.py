"""A model run again with a change: what runs before it is not run again, and the outputs are those of a whole run."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from pwrewrite.planning import replay
from pwrewrite.planning.replay import Replay
from pwrewrite.planning.running import evaluating, run_seeded


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.norm, self.act = nn.BatchNorm2d(4), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.a(x))
        self.act(y)  # what it returns is not used
        y = self.b(y)
        y += x
        return self.act(y)


class Remembers(Residual):
    """Its norm leaves something behind that is read later."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.mean()
        return super().forward(x) + self.seen


class Appends(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.calls = list[int]()

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(1)
        return super().forward(x) * len(self.calls)


class Counts(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.get_buffer("count").add_(1)
        return super().forward(x) * self.get_buffer("count")


class Noisy(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.rand_like(x)


class View(nn.Module):
    """Gives a part of what it reads, which is then written into."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :2]


class Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.part, self.last = nn.Conv2d(4, 4, 1), View(), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        self.part(x).zero_()
        return self.last(x)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.between, self.head = Residual(), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.body(self.between(self.body(x)))
        return self.head(y), y


class Tied(nn.Module):
    """A layer that runs early has the weight of one that runs late."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.middle, self.late = (nn.Conv2d(4, 4, 1) for _ in range(3))
        self.late.weight = self.early.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.late(self.middle(self.early(x)).relu())


class ByName(nn.Module):
    """A layer that nothing calls: its weight is read by other code."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.body = nn.Conv2d(4, 4, 1), Residual()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(nn.functional.conv2d(x, self.kernel.weight))


class Odd(nn.Module):
    """Tensors without memory of their own kind, threads, and an error that the code expects."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.branches = Residual(), nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(3))
        self.register_buffer("mix", torch.eye(6).to_sparse())
        self.product, self.wrong = Product(), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        try:
            x = self.wrong(x)
        except RuntimeError:
            x = torch.vmap(self.branches[0])(x)
        with ThreadPoolExecutor(3) as pool:
            x = torch.stack(list(pool.map(lambda branch: branch(x), self.branches))).sum(0)
        return self.body(self.product(self.get_buffer("mix"), x))


class Product(nn.Module):
    def forward(self, left: Tensor, x: Tensor) -> Tensor:
        return torch.sparse.mm(left, x.flatten(2).transpose(0, 2).flatten(1)[:6]).sum() + x


@contextmanager
def other_weights(modules: Collection[nn.Module]) -> Iterator[None]:
    tensors = [(t, t.detach().clone()) for module in modules for t in module.parameters(recurse=False)]
    try:
        for t, _ in tensors:
            t.data.mul_(0.5).add_(0.1)
        yield
    finally:
        for t, value in tensors:
            t.data.copy_(value)


MODELS = {
    "chain": lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True), Residual(), Residual()),
    "attribute": lambda: nn.Sequential(Residual(), Remembers(), Residual()),
    "list": lambda: nn.Sequential(Residual(), Appends(), Residual()),
    "buffer": lambda: nn.Sequential(Residual(), Counts(), Residual()),
    "noise": lambda: nn.Sequential(Residual(), Noisy(), Noisy()),
    "views": lambda: nn.Sequential(Writes(), Residual(), Writes()),
    "twice": Twice,
    "tied": Tied,
    "by name": ByName,
    "odd": Odd,
    "inference": lambda: nn.Sequential(nn.Conv2d(4, 4, 1), Residual(), Residual()),
}


@pytest.mark.parametrize("room", [None, 3000])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_a_whole_run(name: str, room: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if room is not None:
        monkeypatch.setattr(replay, "_BYTES", room)
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.inference_mode(name == "inference"):
        chunk = (torch.randn(2, 4, 6, 6),), dict[str, Tensor]()
    for path, module in model.named_modules():
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        with torch.no_grad(), evaluating(model):
            again = Replay(model, chunk)
        with torch.no_grad(), evaluating(model), other_weights([module]):
            expected = run_seeded(model, chunk, 0)
        with torch.no_grad(), evaluating(model), other_weights([module]):
            torch.testing.assert_close(again.changed([path]), expected, rtol=0, atol=0)
        with torch.no_grad(), evaluating(model):
            torch.testing.assert_close(again.changed([path]), again.outputs, rtol=0, atol=0)


def test_what_runs_before_a_change_is_not_run_again() -> None:
    model = nn.Sequential(*(Residual() for _ in range(4))).eval()
    ran = list[str]()
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda *_, path=path: ran.append(path))
    with torch.no_grad():
        again = Replay(model, ((torch.randn(2, 4, 6, 6),), {}))
        ran.clear()
        again.changed(["2.b"])
        assert ran == ["2.b", "3.a", "3.b"]
        ran.clear()
        again.changed(["0.a", "3.b"])
    assert ran == [f"{i}.{name}" for i in range(4) for name in "ab"]


def test_what_is_kept_has_an_allowance(monkeypatch: pytest.MonkeyPatch) -> None:
    one = 2 * 4 * 6 * 6 * 4
    monkeypatch.setattr(replay, "_BYTES", 4 * one)
    model = nn.Sequential(*(Residual() for _ in range(4))).eval()
    with torch.no_grad():
        again = Replay(model, ((torch.randn(2, 4, 6, 6),), {}))
    noted = list(again._noted.values())
    assert 0 < sum(call.output.nbytes for call in noted) <= 4 * one
    assert {type(call.module) for call in noted} == {Residual}  # those that save most
