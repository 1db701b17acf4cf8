"""A capture leaves everything as it was: attributes, containers, buffers, flags, hooks, random states, torch itself."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pwrewrite.capturing import capture
from pwrewrite.core.errors import CaptureError

X = torch.rand(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


class Messy(nn.Module):
    """Its forward does everything to itself that forwards do."""

    def __init__(self, *, fail: bool = False, needs_values: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout()
        self.calls = 0
        self.seen: list[Any] = ["first"]
        self.cache: dict[str, Any] = {"nested": {"list": [1]}}
        self.tags = {"a"}
        self.empty: list[Any] = []
        self.buffer: Tensor
        self.register_buffer("buffer", torch.zeros(4))
        self.constant = torch.ones(4, 1, 1)
        self.fail, self.needs_values = fail, needs_values
        self.drop.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x
        self.seen.append(x)
        self.empty.append(x.shape)
        self.cache["new"] = self.conv(x)
        self.cache["nested"]["list"].append(x)
        self.tags.add("b")
        self.buffer += 1
        self.constant.mul_(2)
        self.constant = self.constant + 1
        self.extra = nn.Conv2d(4, 4, 1)
        self.conv.training = True
        noise = torch.rand(4, 1, 1) * random.random() * np.random.rand()
        x = self.extra(self.drop(self.norm(self.cache["new"]))) + noise + self.constant
        self.train()
        if self.needs_values and x.sum() > 1e9:
            return x
        if self.fail:
            raise RuntimeError("on purpose")
        return x


def snapshot(model: nn.Module) -> list[Any]:
    def copy(value: Any) -> Any:
        if isinstance(value, dict):
            return type(value), id(value), [(k, copy(v)) for k, v in value.items()]
        if isinstance(value, (list, set)):
            return type(value), id(value), [copy(v) for v in value]
        return id(value)

    return [(name, copy(vars(module))) for name, module in model.named_modules()]


def random_states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("needs_values", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_everything_is_as_before(fail: bool, needs_values: bool, training: bool) -> None:
    model = Messy(fail=fail, needs_values=needs_values)
    model.norm.eval()
    before, values = snapshot(model), {k: v.clone() for k, v in model.state_dict().items()}
    states, call = random_states(), nn.Module.__call__
    if fail:
        with pytest.raises(CaptureError, match="on purpose"):
            capture(model, X, training=training)
    else:
        made = capture(model, X, training=training)
        assert made.coverage.capture == "whole"
        assert made.coverage.values == ("real" if needs_values else "meta")
    assert snapshot(model) == before
    assert random_states() == states
    assert nn.Module.__call__ is call
    assert torch.equal(model.constant, torch.ones(4, 1, 1))
    assert {k for k, v in model.state_dict().items() if not torch.equal(v, values[k])} == set()
    assert gc.isenabled()
    assert torch.is_grad_enabled()
    assert (model.training, model.norm.training, model.drop.training) == (True, False, False)


def test_user_tensors_carry_no_mark() -> None:
    table = torch.ones(8)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Flatten())
    weight = model[0].weight

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x + table.to("cpu").contiguous()) * weight.sum()

    x = X.clone()
    capture(Reads(), x)
    for t in (table, weight, x):
        assert not vars(t)


def test_inputs_are_not_written_to() -> None:
    x = X.clone()
    capture(nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1)), x - 2, values="real")
    capture(nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1)), x, values="real")
    assert torch.equal(x, X)


def test_hooks_stay() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1))
    handle = model[0].register_forward_hook(lambda *_: None)
    hooks = dict(model[0]._forward_hooks)
    capture(model, X)
    assert dict(model[0]._forward_hooks) == hooks
    assert "forward" not in vars(model[0])
    handle.remove()
    assert not model[0]._forward_hooks


def test_nothing_of_a_run_stays_alive() -> None:
    class Keeps(nn.Module):
        made: list[Any] = []

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.conv(x)
            Keeps.made.append(weakref.ref(out))
            return out.relu()

    made = capture(Keeps(), X)
    assert Keeps.made[0]() is None
    assert made.coverage.in_graph == 1


def test_gradients_work_afterwards() -> None:
    model = Messy()
    capture(model, X)
    out = model.train()(X)
    out.sum().backward()
    assert model.conv.weight.grad is not None


def test_capturing_twice_gives_the_same() -> None:
    model = Messy()
    first, second = capture(model, X), capture(model, X)
    assert str(first.graph) == str(second.graph)
    assert first.memory == second.memory
    assert first.layers == second.layers


BIG = """
import resource, sys
import torch
from torch import nn
import pwrewrite.capturing  # what it imports is torch's own
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
with torch.device("meta"):
    blocks = [nn.Sequential(nn.Conv2d(2048, 2048, 3, padding=1), nn.BatchNorm2d(2048), nn.ReLU()) for _ in range(160)]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *[nn.Linear(2048, 2048) for _ in range(300)])
made = pwrewrite.capturing.capture(model, torch.empty(1, 2048, 32, 32, device="meta"))
assert made.params > 7e9, made.params
assert made.coverage.capture == "whole" and len(made.layers) == 460
print(peak() - before)
"""


def test_seven_billion_parameters_take_no_memory() -> None:
    done = subprocess.run([sys.executable, "-c", BIG], capture_output=True, text=True, check=True, timeout=300)
    assert int(done.stdout) < 400, f"{done.stdout} MiB"


class Writes(nn.Module):
    """Its forward writes into its own tensors, as max-norm constraints do."""

    def __init__(self, way: str, *, needs_values: bool) -> None:
        super().__init__()
        self.conv, self.way, self.needs_values = nn.Conv2d(4, 4, 3), way, needs_values
        self.table = [torch.ones(4)]
        self.scale = torch.ones(1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            if self.way == "in place":
                self.conv.weight.mul_(0.5)
            elif self.way == "by data":
                self.conv.weight.data = torch.renorm(self.conv.weight.data, p=2, dim=0, maxnorm=0.1)
            elif self.way == "by data of data":
                self.conv.weight.data.mul_(0.5)
            elif self.way == "a view":
                self.conv.weight[0].zero_()
            else:
                self.scale += 1
                self.table[0] += 1
        y = self.conv(x) * self.scale
        return y if not self.needs_values or y.sum() > -1e9 else -y


@pytest.mark.parametrize("needs_values", [False, True])
@pytest.mark.parametrize("way", ["in place", "by data", "by data of data", "a view", "attributes"])
def test_what_a_forward_writes_into_its_own_tensors_is_put_back(way: str, needs_values: bool) -> None:
    model = Writes(way, needs_values=needs_values)
    weight, place = model.conv.weight.detach().clone(), model.conv.weight.data_ptr()
    capture(model, X)
    assert torch.equal(model.conv.weight, weight)
    assert model.conv.weight.data_ptr() == place
    assert model.scale.item() == model.table[0][0].item() == 1


@pytest.mark.parametrize("needs_values", [False, True])
@pytest.mark.parametrize("holder", [list, tuple, lambda modules: {"one": modules}])
def test_modules_in_plain_containers_are_left_as_they_were(holder: Any, needs_values: bool) -> None:
    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            normed = nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3))
            self.body, self.held = nn.Conv2d(4, 4, 1), holder([normed, nn.BatchNorm2d(4)])

        def parts(self) -> list[nn.Module]:
            return list(self.held["one"] if isinstance(self.held, dict) else self.held)

        def forward(self, x: Tensor) -> Tensor:
            for part in self.parts():
                x = part(x)
            return x.relu() if needs_values and x.sum() > 0 else x

    model = Holds()
    before = [(b, b.clone(), b._version) for part in model.parts() for b in part.buffers()]
    flags = [module.training for part in model.parts() for module in part.modules()]
    capture(model, X)
    after = [b for part in model.parts() for b in part.buffers()]
    assert len(after) == len(before) == 5
    for (buffer, values, _), now in zip(before, after):
        assert now is buffer
        assert torch.equal(now, values)
    assert flags == [module.training for part in model.parts() for module in part.modules()]
