"""Frozen models run no reference kernel of oneDNN, whatever way their tensors lie in memory."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from math import inf

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pwrewrite.core.errors import RefusedError
from pwrewrite.engines import frozen
from pwrewrite.engines.frozen import freeze
from pwrewrite.engines.timing import Timing
from pwrewrite.layers.strides import keep_kernels
from pwrewrite.layers.tracing import FUSER

WIDTH, TOKENS = 32, 49


class TalkingHeads(nn.Module):
    """Attention whose heads are mixed before and after the softmax (Shazeer et al. 2020), by q, k and v of one map."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.before, self.behind = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, 4, -1).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * 0.3) @ k.transpose(-2, -1)
        scores = self.before(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(-1)
        scores = self.behind(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return (scores @ v).transpose(1, 2).reshape(batch, tokens, -1)


class Gate(nn.Module):
    """The halves of a wider map, one of which gates the other (Shazeer 2020), in some way."""

    def __init__(self, how: str, layer: nn.Module, dim: int) -> None:
        super().__init__()
        self.how, self.layer, self.dim = how, layer, dim
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.layer(x).chunk(2, self.dim)
        if self.how == "plain":
            return self.out(a * b) if self.dim == -1 else F.relu(a * b)
        if self.how == "scaled":
            return F.relu(a * 0.3) + b
        if self.how == "behind a layer":
            return self.out(a) * b if self.dim == -1 else F.relu(a) * b
        return {"gelu": F.gelu, "silu": F.silu, "sigmoid": torch.sigmoid, "relu": F.relu}[self.how](a) * b


class Normed(nn.Module):
    """A sum or product behind a layer norm, as after attention where norms come last (Liu et al. 2022, Swin V2)."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.norm, self.how = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), how

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.a(x))
        return y + x if self.how == "plus" else y * x


class Cosine(nn.Module):
    """The scores of attention by the angle between queries and keys (Liu et al. 2022, Swin V2)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.qkv(x).unflatten(2, (2, 4, -1)).permute(2, 0, 3, 1, 4).unbind()
        return F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)


class TwoLayers(nn.Module):
    """A gated unit of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.a(x)) * self.b(x)


def cases() -> list[tuple[str, nn.Module, Tensor]]:
    """Models with an input each."""
    torch.manual_seed(0)
    tokens, image = torch.rand(2, TOKENS, WIDTH), torch.rand(2, WIDTH, 7, 7)
    image = image.to(memory_format=torch.channels_last)
    wider, conv = nn.Linear(WIDTH, 2 * WIDTH), nn.Conv2d(WIDTH, 2 * WIDTH, 1)
    gates = ("plain", "scaled", "behind a layer", "gelu", "silu", "sigmoid", "relu")
    found: list[tuple[str, nn.Module, Tensor]] = [
        ("talking heads", TalkingHeads(), tokens),
        ("cosine", Cosine(), tokens),
        ("two layers", TwoLayers(), tokens),
        ("norm, plus", Normed("plus"), tokens),
        ("norm, times", Normed("times"), tokens),
    ]
    found += [(f"tokens, {how}", Gate(how, wider, -1), tokens) for how in gates]
    return found + [(f"images, {how}", Gate(how, conv, 1), image) for how in gates]


@pytest.mark.skipif(not FUSER, reason="this build of torch has no oneDNN graphs")
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="kernels are named otherwise there")
def test_no_partition_runs_a_reference_kernel() -> None:
    environment = {**os.environ, "ONEDNN_VERBOSE": "profile_exec"}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert sum("graph,exec" in line for line in lines) > 2 * len(cases())
    assert [line for line in lines if "ref:any" in line or ("simple:any" in line and "binary" in line)] == []


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_what_has_a_kernel_is_not_copied(batch: int, memory_format: torch.memory_format) -> None:
    """A map times its gate, as in squeeze-and-excitation (Hu et al. 2018), and a sum of two maps."""
    x, gate = torch.rand(batch, 8, 5, 5).to(memory_format=memory_format), torch.rand(batch, 8, 1, 1)
    trace = torch._C._create_graph_by_tracing
    graph, _ = trace(lambda x, g: x * g + x.mul(0.5), (x, gate), lambda _: "", True, False, None, ["x", "gate"])
    keep_kernels(graph)
    assert "aten::mul" in str(graph)
    assert "aten::clone" not in str(graph)


@pytest.mark.skipif(not FUSER, reason="this build of torch has no oneDNN graphs")
@pytest.mark.parametrize("name", [name for name, _, _ in cases()])
def test_values_stay(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "_SLOWER", inf)  # so small, it is a matter of chance
    model, x = next((model.eval(), x) for other, model, x in cases() if other == name)
    with torch.no_grad():
        assert torch.allclose(freeze(model, x)(x), model(x), atol=1e-5)


@pytest.mark.skipif(not FUSER, reason="this build of torch has no oneDNN graphs")
def test_a_call_of_a_function_may_cost_what_an_interpreter_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Conv2d(3, 8, 3).eval(), torch.rand(1, 3, 8, 8)
    monkeypatch.setattr(frozen, "time_in_turns", lambda *_, **__: [Timing(2e-5, 0.0), Timing(2e-4, 0.0)])
    assert freeze(model, x).compiled


@pytest.mark.skipif(not FUSER, reason="this build of torch has no oneDNN graphs")
def test_what_seems_slower_on_a_busy_machine_is_timed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval(), torch.rand(1, 3, 8, 8)
    answers = iter([11.8, 2.0, 0.9])
    asked = list[float]()

    def times(*_: object, seconds: float, **__: object) -> list[Timing]:
        asked.append(seconds)
        return [Timing(1.0, 0.0), Timing(next(answers), 0.0)]

    monkeypatch.setattr(frozen, "time_in_turns", times)
    assert freeze(model, x).compiled
    assert asked == sorted(set(asked))  # longer each time
    assert len(asked) == 3


@pytest.mark.skipif(not FUSER, reason="this build of torch has no oneDNN graphs")
def test_what_is_slower_as_a_function_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval(), torch.rand(1, 3, 8, 8)
    expected = model(x)
    monkeypatch.setattr(frozen, "time_in_turns", lambda *_, **__: [Timing(1.0, 0.0), Timing(3.21, 0.0)])
    with pytest.raises(RefusedError, match=r"3\.2 times as long"):
        freeze(model, x)
    lazily = freeze(model)
    for _ in range(5):
        assert torch.equal(lazily(x), expected)
    assert not lazily.compiled


if __name__ == "__main__":
    torch.set_num_threads(1)
    frozen._SLOWER = inf  # so small, it is a matter of chance
    for _, each, given in cases():
        freeze(each.eval(), given)(given)
