"""Which channels go, what that loses and what the others do, against brute force."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from pwrewrite.decompose.columns import Reader, eliminate, keep


def _reader(out: int, width: int, *, seed: int, outputs: bool = True, factor: float = 1.0) -> Reader:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    x, g = draw(3 * width, width).cumsum(1), draw(2 * out, out)
    return Reader(draw(out, width), x.mT @ x / len(x), g.mT @ g / len(g) if outputs else None, factor)


def _least_loss(reader: Reader, columns: list[int]) -> float:
    """By least squares: of all maps that read these columns only."""
    rows, moment = reader.rows, reader.moment
    best = rows.new_zeros(rows.shape)
    best[:, columns] = torch.linalg.solve(moment[columns][:, columns], moment[columns] @ rows.mT).mT
    square = (rows - best) @ moment @ (rows - best).mT
    return reader.factor * float(square.trace() if reader.outputs is None else (reader.outputs * square).sum())


def _columns(channels: list[int], size: int) -> list[int]:
    return [channel * size + tap for channel in channels for tap in range(size)]


@pytest.mark.parametrize("sizes", [(1,), (4,), (1, 3)])
def test_every_step_takes_the_channel_that_loses_least(sizes: tuple[int, ...]) -> None:
    channels = 7
    readers = [_reader(5, channels * size, seed=i, factor=1.0 + i) for i, size in enumerate(sizes)]
    found = eliminate(readers, channels)
    left = list(range(channels))
    for step, channel in enumerate(found.order, 1):
        without = {
            c: sum(_least_loss(r, _columns([o for o in left if o != c], s)) for r, s in zip(readers, sizes))
            for c in left
        }
        assert channel == min(without, key=lambda c: without[c])
        left.remove(channel)
        assert found.losses[step] == pytest.approx(without[channel], rel=1e-3)  # a ridge of 1e-6, conditions of 1e3
        assert found.kept(channels - step) == tuple(left)
        assert found.loss(channels - step) == found.losses[step]


def test_updates_that_wait_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = _reader(6, 40 * 3, seed=0)
    waiting = eliminate([reader], 40, 3)
    monkeypatch.setattr("pwrewrite.decompose.columns._WAITING", 1)
    at_once = eliminate([reader], 40, 3)
    assert waiting.order == at_once.order
    assert waiting.losses == pytest.approx(at_once.losses, rel=1e-9)
    assert len(waiting.order) == 37


def test_a_copy_and_a_dead_channel_go_first_and_lose_nothing() -> None:
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x[:, 4], x[:, 2] = 2 * x[:, 1] - x[:, 0], 0
    reader = Reader(torch.ones(3, 6, dtype=torch.float64), x.mT @ x / 200)
    found = eliminate([reader], 6)
    assert found.order[0] == 2
    assert found.losses[2] < 1e-4 * found.losses[3]
    kernel = keep(reader.rows.reshape(3, 6), found.kept(4), reader.moment, None)
    assert torch.allclose(x @ kernel.reconstruct().mT, x @ reader.rows.mT, atol=1e-4)


def test_of_a_diagonal_the_smallest_columns_go() -> None:
    reader = Reader(torch.tensor([[1.0, 2, 3, 1, 1, 1]]), torch.tensor([1.0, 1, 1, 1, 9, 9]), factor=0.5)
    found = eliminate([reader], 3)
    assert found.order == (0, 1)
    assert found.losses == (0.0, 2.5, 7.5)
    assert reader.scale == 0.5 * (1 + 4 + 9 + 1 + 9 + 9)


@pytest.mark.parametrize("shape", [(5, 8), (5, 8, 3), (4, 8, 3, 3)])
def test_what_stays_is_the_least_squares_solution(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(2)
    kernel = torch.randn(*shape, generator=generator, dtype=torch.float64)
    size = kernel[0, 0].numel()
    x = torch.randn(400, 8 * size, generator=generator, dtype=torch.float64).cumsum(1) + 1
    channels = [0, 3, 4, 7]
    mean = x.mean(0)
    kept = keep(kernel, channels, torch.cov(x.mT, correction=0), mean)
    read = torch.cat([x[:, _columns(channels, size)], torch.ones(400, 1, dtype=torch.float64)], 1)
    best = torch.linalg.lstsq(read, x @ kernel.flatten(1).mT).solution
    got = torch.cat([kept.kernel.flatten(1), kept.shift[:, None]], 1).mT
    assert torch.allclose(read @ got, read @ best, atol=1e-3 * float((read @ best).abs().max()))
    assert kept.reconstruct().shape == shape
    assert float(kept.reconstruct()[:, [1, 2, 5, 6]].abs().max()) == 0.0
    (stage,) = kept.stages(transposed=len(shape) > 2)
    assert stage.weight.shape[:2] == ((4, shape[0]) if len(shape) > 2 else (shape[0], 4))


def test_all_channels_are_the_kernel_itself() -> None:
    kernel = torch.randn(3, 4, 3, 3)
    kept = keep(kernel, range(4), torch.eye(36), torch.ones(36))
    assert torch.equal(kept.kernel.float(), kernel)
    assert kept.relative_error == 0
    assert float(kept.shift.abs().max()) < 1e-12


def test_without_a_moment_the_others_stay_and_the_mean_is_made_up_for() -> None:
    kernel, mean = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1.0, 10.0])
    kept = keep(kernel, [0], None, mean)
    assert torch.equal(kept.kernel.float(), kernel[:, :1])
    assert kept.shift.tolist() == [20.0, 40.0]


def test_a_thousand_channels_take_seconds() -> None:
    reader = _reader(64, 1024, seed=3, outputs=False)
    start = time.perf_counter()
    found = eliminate([reader], 1024, 128)
    assert time.perf_counter() - start < 20  # about one: without the waiting minutes
    kept: list[int] = list(found.kept(512))
    exact = _least_loss(reader, kept)
    assert found.loss(512) == pytest.approx(exact, rel=0.02)
    scale: Tensor = torch.tensor(reader.scale)
    assert 0 < exact < float(scale)
