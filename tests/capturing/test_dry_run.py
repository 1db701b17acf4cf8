"""Runs on shapes alone that record nothing: what a capture would say of the output, or no answer at all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pwrewrite.capturing import capture
from pwrewrite.capturing.dry_run import dry_runs
from pwrewrite.verifying.outputs import differences, flatten, flatten_captured


class Code(nn.Module):
    """A convolution and a buffer, with a forward of its own."""

    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.scale = nn.Conv2d(3, 4, 3, padding=1), nn.Parameter(torch.ones(1, 4, 1, 1))
        self.register_buffer("count", torch.zeros(()))
        self.code = forward

    def forward(self, x: Tensor) -> Any:
        return self.code(self, x)


def shuffled(m: Any, x: Tensor) -> Tensor:
    y = torch.cat([m.conv(x), m.conv(x)], 1).view(len(x), 2, 4, *x.shape[2:])
    return y.transpose(1, 2).contiguous().flatten(1, 2)


def masked(m: Any, x: Tensor) -> dict[str, Tensor]:
    """Tensors with values beside those without: made on the model's device, written into, multiplied."""
    mask = torch.zeros(x.shape[-1], device=x.device)
    mask[::2] = 1
    return {"y": m.conv(x) * mask, "mask": mask, "n": torch.arange(int(mask.sum()))}


ANSWERED: dict[str, Callable[[Any, Tensor], Any]] = {
    "functions": lambda m, x: F.relu(F.conv2d(x, m.conv.weight, m.conv.bias, stride=2)).mean((2, 3)),
    "scaled": lambda m, x: m.scale * m.conv(x) + m.count,
    "shuffled": shuffled,
    "masked": masked,
    "branches": lambda m, x: m.conv(x) if x.shape[-1] > 10 else x.double(),
    "a weight's value": lambda m, x: m.conv(x)[:, : int(m.scale.sum())],
    "moved": lambda m, x: m.conv(x.to("cpu")).to(x.device, torch.float64),
    "where it is": lambda m, x: m.conv(x) if x.is_cpu and not x.is_meta else x,
    "interpolated": lambda m, x: F.interpolate(m.conv(x), scale_factor=2, mode="bilinear"),
}


@pytest.mark.parametrize("name", ANSWERED)
@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (2, 3, 12, 9)])
def test_it_answers_as_a_capture_does(name: str, shape: tuple[int, ...]) -> None:
    model, x = Code(ANSWERED[name]).eval(), torch.empty(shape, device="meta")
    with dry_runs(model) as run:
        out = run(((x,), {}))
    assert out is not None
    captured = flatten_captured(capture(model, x))
    assert captured.shapes == flatten(out).shapes
    assert captured.describe() == flatten(out).describe()
    with torch.no_grad():
        assert not differences(flatten(model(torch.randn(shape))), flatten(out))


def counted(m: Any, x: Tensor) -> Tensor:
    m.count += 1
    return m.conv(x) if m.count < 3 else x


REFUSED: dict[str, Callable[[Any, Tensor], Any]] = {
    "values": lambda m, x: m.conv(x) if x.sum() > 0 else x,
    "a write into the model": counted,
    "a write into a part of it": lambda m, x: (m.scale.data[0].add_(1), m.conv(x))[1],
    "shapes written into values": lambda m, x: m.count.copy_(m.conv(x).mean()),
    "an error": lambda m, x: m.conv(x[:, :2]),
    "a transform": lambda m, x: torch.func.vmap(m.conv)(x),
    "an address": lambda m, x: m.conv(x) if x.data_ptr() else x,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_unusual_has_no_answer_and_leaves_no_trace(name: str) -> None:
    model = Code(REFUSED[name]).eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with dry_runs(model) as run:
        assert run(((torch.empty(2, 3, 8, 8, device="meta"),), {})) is None
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_the_model_and_the_random_state_are_as_before() -> None:
    def remembers(m: Any, x: Tensor) -> Tensor:
        m.last = F.dropout(m.conv(x), training=m.training)
        return m.last

    model, x = Code(remembers).train(), torch.empty(1, 3, 8, 8, device="meta")
    model.conv.eval()
    state, call = torch.get_rng_state(), nn.Module.__call__
    for training in (False, True):
        with dry_runs(model, training=training) as run:
            assert run(((), {"x": x})).shape == (1, 4, 8, 8)
            assert model.last.is_meta
            assert model.conv.training is training
    assert not hasattr(model, "last")
    assert (model.training, model.conv.training) == (True, False)
    assert torch.equal(torch.get_rng_state(), state)
    assert nn.Module.__call__ is call


def test_in_training_a_model_may_return_more() -> None:
    model = Code(lambda m, x: (m.conv(x), x) if m.training else m.conv(x))
    x = torch.empty(1, 3, 8, 8, device="meta")
    with dry_runs(model, training=True) as run:
        assert len(run(((x,), {}))) == 2
    with dry_runs(model) as run:
        assert run(((x,), {})).shape == (1, 4, 8, 8)


def test_hooks_run_and_another_threads_models_are_left_alone() -> None:
    other, real = nn.Conv2d(3, 2, 1), torch.randn(1, 3, 4, 4)
    results = []

    def elsewhere(module: nn.Module, args: object) -> None:
        thread = threading.Thread(target=lambda: results.append(other(real)))
        thread.start()
        thread.join()

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()).eval()
    model[0].register_forward_pre_hook(elsewhere)
    with dry_runs(model) as run:
        assert run(((torch.empty(1, 3, 16, 16, device="meta"),), {})).shape == (1, 196)
    assert torch.equal(results[0], other(real))
