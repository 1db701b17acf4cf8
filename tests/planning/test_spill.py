"""Activations on disk: the same bytes come back, memory stays within its allowance, and nothing is left behind."""

from __future__ import annotations

import errno
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_networks import KINDS, batches, made
from torch import Tensor, nn
from torch.utils import _python_dispatch
from warm_python import python

import pwrewrite
from pwrewrite.core.errors import OutputError
from pwrewrite.core.names import FORM_NAMES
from pwrewrite.core.options import Budget
from pwrewrite.planning import fitting, room
from pwrewrite.planning.lockstep import Lockstep
from pwrewrite.planning.planner import Planner
from pwrewrite.planning.spill import Spill, _File

ALLOWED = 100_000


class Recorded(Spill):
    """Counts what is in memory and how often something is spilled."""

    made_here: list[Recorded] = []

    def __init__(self, allowance: int) -> None:
        super().__init__(allowance)
        self.most = self.most_settled = self.settled = 0
        Recorded.made_here.append(self)

    def counted(self) -> int:
        """Bytes in memory, one by one."""
        return sum(storage.nbytes() for storage in list(self._known.keys()))

    def note(self, number: int, storages: list[torch.UntypedStorage]) -> None:
        super().note(number, storages)
        self.most = max(self.most, self.counted())

    def settle(self, number: int) -> None:
        super().settle(number)
        self.settled += 1
        self.most_settled = max(self.most_settled, self.counted())
        assert self.counted() <= self.held


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files."""
    monkeypatch.setenv("PWREWRITE_CACHE", str(tmp_path / "cache"))
    found = tmp_path / "temporary"
    found.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(found))
    return found


@pytest.fixture
def spilling(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Recorded]]:
    """With next to no memory for activations."""
    monkeypatch.setattr(room, "MEMORY", ALLOWED)
    monkeypatch.setattr(fitting, "Spill", Recorded)
    Recorded.made_here.clear()
    yield Recorded.made_here
    Recorded.made_here.clear()


def fitted(name: str = "plain", count: int = 8, size: int = 16) -> tuple[nn.Module, tuple[str, ...]]:
    """A network within a budget, fitted, and what is said of it."""
    model, inputs = made(name)
    given = batches(name, count=count, size=size)
    options = {"budget": {"macs": 0.6}, "forms": FORM_NAMES}  # several layers, fitted once
    result = pwrewrite.rewrite(model, inputs, **options, calibration=given, verify=False)  # type: ignore[arg-type]
    return result.model, result.report.notes


def planned(count: int = 8) -> tuple[Planner, nn.Module, Any]:
    """A planner, a model with a plan carried out, and the plan."""
    model, inputs = made("plain")
    planner = Planner(model, inputs, batches(count=count), Budget(forms=FORM_NAMES))
    plan = planner.choose(pwrewrite.planning.budget.budgets_of({"macs": 0.5})).plan
    return planner, pwrewrite.apply(model, plan), plan


# -------------------------------------------------------------------------------------------------- refitting


@pytest.mark.parametrize("name", [name for name in KINDS if name != "shared"])  # of which nothing is fitted
def test_spilling_changes_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 200 if name == "linear" else 16
    plain, notes = fitted(name, size=size)
    monkeypatch.setattr(room, "MEMORY", ALLOWED)
    monkeypatch.setattr(fitting, "Spill", Recorded)
    Recorded.made_here.clear()
    spilled, told = fitted(name, size=size)
    (spill,) = Recorded.made_here
    assert spill.written > ALLOWED
    before, after = plain.state_dict(), spilled.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert told == notes  # no input is left out


def test_memory_stays_within_its_allowance(spilling: list[Recorded]) -> None:
    fitted(count=20)
    (spill,) = spilling
    assert spill.settled > 20
    assert spill.most_settled <= ALLOWED
    # One pair of forwards comes on top: per input a map of 16×10×10 at most twice, and its neighbours.
    one_pair = 2 * 16 * 4 * (16 * 100 * 3 + 3 * 100)
    assert spill.most <= ALLOWED + one_pair
    assert spill.most > ALLOWED
    assert spill.held == 0 or spill.counted() == 0


def test_nothing_is_left_behind(spilling: list[Recorded], folder: Path) -> None:
    threads = threading.active_count()
    fitted()
    (spill,) = spilling
    assert spill._file._file.closed
    assert not list(folder.iterdir())
    assert threading.active_count() == threads
    assert not _python_dispatch._is_in_torch_dispatch_mode  # it would keep torch.compile from compiling


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_behind_where_something_happens(
    error: type[BaseException], spilling: list[Recorded], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planner, model, plan = planned()
    threads, state = threading.active_count(), {k: v.clone() for k, v in planner.model.state_dict().items()}

    def say(what: str, share: float | None) -> None:
        if share is not None and share >= 0.5:
            raise error("in the middle")

    planner.say = say
    with pytest.raises(error, match="in the middle"):
        planner.refit(model, plan)
    (spill,) = spilling
    assert spill.written
    assert spill._file._file.closed
    assert not list(folder.iterdir())
    assert threading.active_count() == threads
    assert not _python_dispatch._is_in_torch_dispatch_mode
    assert all(torch.equal(state[key], value) for key, value in planner.model.state_dict().items())
    with torch.no_grad():
        assert bool(torch.isfinite(model(batches()[0])).all())


def test_an_error_inside_a_forward_comes_out(folder: Path) -> None:
    model, threads = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(4, 8, 3)), threading.active_count()
    chunk: Any = ((torch.randn(4, 3, 16, 16),), {})
    with Spill(0) as spill, Lockstep(model, [chunk] * 3, before=["1"], spill=spill) as steps:
        for number, forward in enumerate(steps.forwards):
            assert forward.advance_to("1")
            spill.settle(number)
        spill.wake(0)
        with pytest.raises(RuntimeError, match="channels"):
            steps.forwards[0].advance_to("2")
    assert spill.written
    assert threading.active_count() == threads
    assert not list(folder.iterdir())


def test_a_full_disk_is_said(spilling: list[Recorded], monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    class Full:
        def seek(self, place: int) -> None: ...

        def write(self, data: memoryview) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None: ...

    planner, model, plan = planned()
    threads = threading.active_count()
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **settings: Full())
    with pytest.raises(OutputError, match="No space left on device") as raised:
        planner.refit(model, plan)
    assert raised.value.where == str(folder)
    assert "TMPDIR" in str(raised.value)
    assert threading.active_count() == threads


def test_a_small_disk_leaves_inputs_out_and_says_so(
    spilling: list[Recorded], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda where: SimpleNamespace(free=1_500_000))
    planner, model, plan = planned()
    planner.refit(model, plan)
    (note,) = [note for note in planner.notes if note.startswith("fitted on the first")]
    taken = int(note.split()[4])
    assert 16 <= taken < 96
    assert taken % 16 == 0
    assert f"of {8 * 16} calibration inputs" in note
    assert f"{ALLOWED / 1024**3:.3g} GiB of memory" in note
    assert f"{1_350_000 / 1024**3:.3g} GiB of disk ({folder}; TMPDIR" in note
    (spill,) = spilling
    assert spill._file._end <= 1_350_000


def test_no_disk_at_all_is_no_error(spilling: list[Recorded], monkeypatch: pytest.MonkeyPatch) -> None:
    def none(where: str) -> None:
        raise FileNotFoundError(where)

    monkeypatch.setattr(shutil, "disk_usage", none)
    planner, model, plan = planned()
    planner.refit(model, plan)
    assert any("0 GiB of disk" in note for note in planner.notes)
    assert not spilling


def test_what_fits_into_memory_is_not_spilled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "Spill", None)  # would raise
    fitted()


def test_batches_are_limited_in_number(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks: list[Any] = [((torch.zeros(4, 1),), {})] * 5
    captured = pwrewrite.capture(nn.Linear(1, 1), torch.zeros(1, 1))
    monkeypatch.setattr(shutil, "disk_usage", lambda where: SimpleNamespace(free=0))
    each = room.Room(captured, 20)._sample

    def limited(samples: int) -> room.Room:
        monkeypatch.setattr(room, "MEMORY", samples * each)
        return room.Room(captured, 20)

    assert room.most_chunks() >= 32
    all_of_them = limited(20)
    assert len(list(all_of_them.first(chunks))) == 5
    assert not all_of_them.notes()
    for samples, most, taken, many in ((100, 3, 12, True), (8, 9, 8, False), (9, 9, 8, False), (1, 9, 4, False)):
        monkeypatch.setattr(room, "most_chunks", lambda most=most: most)
        some = limited(samples)
        assert len(list(some.first(chunks))) == taken // 4
        (note,) = some.notes()
        assert note.startswith(f"fitted on the first {taken} of 20 calibration inputs")
        assert ("more batches than run together" in note) == many


# -------------------------------------------------------------------------------------- what a forward may do


class Keeping(nn.Module):
    """Keeps a tensor of the first run for all others, and the last one's input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.stop = nn.Conv2d(3, 3, 3, padding=1), nn.Identity()
        self.table: Tensor | None = None
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.table is None:
            self.table = y * 2
        self.last = y
        half = y[:, :, ::2]
        y = self.stop(y)
        y += self.table
        y = self.stop(y)
        return torch.cat([y[:, :, ::2] - half, self.last[:, :, 1::2]], 2)


class Outputs(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.found = model, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.found(self.model(x))
        return found


def stepped(model: nn.Module, chunks: list[Any], spill: Spill | None) -> list[Tensor]:
    """Runs all forwards stop by stop and gives the outputs."""
    wrapped, found = Outputs(model), []
    with Lockstep(wrapped, chunks, before=["model.stop", "found"], spill=spill) as steps:
        for turn in range(3):
            for number, forward in enumerate(steps.forwards):
                if spill is not None:
                    spill.wake(number)
                forward.advance()
                if turn == 2:
                    assert forward.path == "found"
                    found.append(forward.value.clone())
                if spill is not None:
                    spill.settle(number)
    return found


def test_views_changes_and_what_the_model_keeps_are_safe() -> None:
    torch.manual_seed(0)
    model, other = Keeping(), Keeping()
    other.load_state_dict(model.state_dict())
    chunks: list[Any] = [((torch.randn(2, 3, 32, 32),), {}) for _ in range(4)]
    plain = stepped(model, chunks, None)
    with Spill(0) as spill:
        spilled = stepped(other, chunks, spill)
        assert other.table is not None
        assert other.table.untyped_storage().nbytes() == 0  # it was spilled with the first forward's
    assert all(torch.equal(a, b) for a, b in zip(plain, spilled, strict=True))
    assert model.table is not None
    assert model.last is not None
    assert other.last is not None
    assert torch.equal(other.table, model.table)
    assert torch.equal(other.last, model.last)


def test_weights_and_inputs_of_the_user_are_never_spilled() -> None:
    """Nor by way of views that operations make of them: of the input at first, of the linear map's weight inside."""
    views = (nn.Unflatten(1, (3, 1)), nn.Flatten(1, 2))
    model = nn.Sequential(*views, nn.Conv2d(3, 64, 3), nn.Flatten(), nn.Linear(64 * 14 * 14, 2048), nn.Identity())
    x = torch.randn(4, 3, 16, 16)
    chunk: Any = ((x,), {})
    with Spill(0) as spill, Lockstep(model, [chunk], before=["5"], spill=spill) as steps:
        steps.forwards[0].advance_to("5")
        spill.settle(0)
        assert spill.held == 0
        assert spill.written == 4 * 2048 * 4
        for kept in (x, *model.parameters()):
            assert kept.untyped_storage().nbytes() == kept.nbytes


def test_inputs_are_kept_as_copies() -> None:
    x = torch.randn(4, 3, 16, 16)
    with Spill(0) as spill:
        (args, kwargs) = spill.keep(3, ((x,), {"more": [x.double()]}))
        assert spill.held == 0
        assert spill.written == 3 * x.nbytes
        spill.wake(3)
        assert torch.equal(args[0], x)
        assert torch.equal(kwargs["more"][0], x.double())
        args[0].zero_()
    assert float(x.abs().sum()) > 0


def test_what_numpy_looks_at_stays_in_memory() -> None:
    with Spill(0) as spill, spill.watch(0):
        x = torch.arange(4096.0) + 1
        seen = x.numpy()
        spill.settle(0)
        assert seen[5] == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.int8, torch.bool])
def test_every_dtype_comes_back(dtype: torch.dtype) -> None:
    with Spill(0) as spill:
        with spill.watch(0):
            x = (torch.randn(7, 3001) * 3).to(dtype)
        expected = x.clone()
        address = x.untyped_storage()
        spill.settle(0)
        assert address.nbytes() == 0
        spill.wake(0)
        assert torch.equal(x, expected)


def test_places_in_the_file_are_used_again() -> None:
    draw, file = random.Random(0), _File()
    kept: dict[int, tuple[int, Tensor]] = {}
    most = 0
    for turn in range(400):
        if kept and draw.random() < 0.5:
            place, expected = kept.pop(draw.choice(list(kept)))
            found = torch.empty_like(expected)
            file.read(place, found.untyped_storage())
            assert torch.equal(found, expected)
            file.free(place, expected.nbytes)
        else:
            data = torch.randint(256, (draw.randint(1, 9000),), dtype=torch.uint8)
            kept[turn] = (file.write(data.untyped_storage()), data)
        most = max(most, sum(data.nbytes for _, data in kept.values()))
        assert file._end <= 2 * most
    for place, data in kept.values():
        file.free(place, data.nbytes)
    assert (file._end, file._gaps) == (0, [])
    file.close()


_MEASURED = """
import resource, sys, copy
import torch
from torch import nn
from pwrewrite.core.convolution import ConvSpec
from pwrewrite.layers.factorized import build
from pwrewrite.planning.refit import Target, refit
from pwrewrite.planning.spill import Spill
from pwrewrite.forms import FORMS
from pwrewrite.forms.weighted import WeightedLayer

torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(*(nn.Conv2d(16, 16, 1) for _ in range(2))).eval()
changed, targets = copy.deepcopy(model), []
for i, layer in enumerate(model):
    spec = ConvSpec.of_module(layer)
    changed[i] = build(spec, "pair", {"rank": 4})
    changed[i].load_factors(FORMS["pair"].fit(WeightedLayer(layer.weight, spec, None, None), {"rank": 4}), None)
    targets.append(Target(str(i), spec, layer.weight.detach(), None))
def chunks():
    for _ in range(int(sys.argv[1])):
        yield (torch.randn(4, 16, 128, 128),), {}
allowance = int(sys.argv[2])
refit(model, changed, targets, chunks(), spill=Spill(allowance) if allowance else None)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def _largest(chunks: int, allowance: int) -> float:
    """How large a process becomes that fits with so many chunks, in MiB."""
    command = [*python(), "-c", _MEASURED, str(chunks), str(allowance * 1024**2)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1024


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts kilobytes as Linux does")
def test_the_process_stays_small() -> None:
    """36 chunks more hold some 430 MiB more, of each 4 MiB inputs and two maps; 32 MiB are allowed.

    Between what is spilled and what the C library gives back lie some 128 MiB.
    """
    assert _largest(40, 32) < _largest(4, 32) + 250
