"""Live activations of forwards that stand still: in memory up to an allowance, the rest in a temporary file.

The activations of a forward that was stopped are held by local variables of whatever code the model is made of. They
stay where they are: only the bytes behind them come and go. The storage of a tensor is resized to nothing when its
bytes are on disk and to its old size before they are read, and all views of it see the same. `Spill.watch` is a mode
of torch under which a forward runs: every storage that an operation makes is noted, and what an operation reads is
brought back first, so that a tensor that one forward keeps in the model for the others is safe too.

Who runs forwards together wakes and settles them one by one: settling spills what that one holds as far as all of them
exceed the allowance. The first ones then stay in memory and the last ones go to disk at every stop: forwards go round
and round, and to spill the one that waited longest would be to spill what comes next.

The file lies where ``TMPDIR`` says, and has no name on systems that allow it: when the process ends, it is gone.
"""

from __future__ import annotations

import ctypes
import tempfile
import threading
import weakref
from bisect import insort
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from io import FileIO

import torch
from torch import Tensor, UntypedStorage, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..core.errors import OutputError
from ..core.nested import Args, Kwargs, map_tensors, tensors_of
from .running import Chunk

SMALLEST = 4096
"""Storages of fewer bytes stay in memory and are not counted."""

_TRIMMED = 128 * 1024**2
"""After how many bytes spilled memory is given back to the system."""


def give_back_memory() -> None:
    """Gives memory that is free back to the system: glibc keeps what is freed in pools of a few threads each.

    There it serves no others, and many forwards would take several times the memory of what they hold.
    """
    with suppress(OSError, AttributeError, TypeError):  # there is no such function elsewhere, nor a library to name so
        ctypes.CDLL(None).malloc_trim(0)


@dataclass(eq=False, slots=True)
class _Held:
    """A storage that a forward made, its bytes, and where they are in the file; None while they are in memory."""

    storage: weakref.ref[UntypedStorage]
    nbytes: int
    place: int | None = None


class Spill:
    """Keeps the activations of many forwards, and at most ``allowance`` bytes in memory while none of them runs.

    A context manager: at its end, what is still alive is in memory again, and the file is gone. ``held`` are the bytes
    in memory now, ``written`` those that were written to disk so far.
    """

    def __init__(self, allowance: int) -> None:
        self.allowance, self.held, self.written = allowance, 0, 0
        self._file, self._trimmed_at, self._leaving = _File(), 0, ExitStack()
        self._known: weakref.WeakKeyDictionary[UntypedStorage, _Held] = weakref.WeakKeyDictionary()
        self._of: dict[int, list[_Held]] = {}
        self._lock = threading.RLock()  # forwards take turns, but for a moment after an interruption

    def __enter__(self) -> Spill:
        # Modes set flags of the process and put back what was there. This one is the first to begin and the last to
        # end, so that those of the threads in between, which end in any order, leave nothing behind.
        self._leaving.enter_context(_Watch(self, None))
        self._leaving.callback(self._file.close)
        return self

    def __exit__(self, *error: object) -> None:
        with self._leaving:
            for number in self._of:
                self.wake(number)

    def watch(self, number: int) -> TorchDispatchMode:
        """The mode under which a forward runs; forwards that share a number are woken and settled together."""
        return _Watch(self, number)

    def keep(self, number: int, chunk: Chunk) -> Chunk:
        """A copy of a forward's inputs, which may be spilled like its activations."""
        with self.watch(number):
            args, kwargs = map_tensors(chunk, lambda tensor: tensor.clone())
        self.settle(number)
        return args, kwargs

    def wake(self, number: int) -> None:
        """Brings back all that a forward holds."""
        with self._lock:
            for held in self._of.get(number, ()):
                storage = held.storage()
                if storage is not None:
                    self._restore(held, storage)

    def settle(self, number: int) -> None:
        """Spills what a forward holds, the oldest first, as far as memory holds more than is allowed."""
        with self._lock:
            alive = []
            for held in self._of.get(number, ()):
                if (storage := held.storage()) is not None:
                    alive.append((held, storage))
                elif held.place is None:
                    self.held -= held.nbytes
                else:
                    self._file.free(held.place, held.nbytes)
            self._of[number] = [held for held, _ in alive]
            for held, storage in alive:
                if self.held <= self.allowance:
                    break
                self._spill(held, storage)
        if self.written - self._trimmed_at > _TRIMMED:
            self._trimmed_at = self.written
            give_back_memory()

    def note(self, number: int, storages: list[UntypedStorage]) -> None:
        """Takes note of new storages of a forward."""
        with self._lock:
            for storage in storages:
                if storage.nbytes() >= SMALLEST and storage not in self._known:
                    held = self._known[storage] = _Held(weakref.ref(storage), storage.nbytes())
                    self._of.setdefault(number, []).append(held)
                    self.held += held.nbytes

    def bring(self, storages: list[UntypedStorage]) -> None:
        """Brings back what is about to be read, whosever it is."""
        with self._lock:
            for storage in storages:
                held = self._known.get(storage)
                if held is not None:
                    self._restore(held, storage)

    def _spill(self, held: _Held, storage: UntypedStorage) -> None:
        if held.place is not None or not storage.resizable():  # numpy may look at it
            return
        self.held += storage.nbytes() - held.nbytes  # the code may have resized it
        held.nbytes = storage.nbytes()
        held.place = self._file.write(storage)
        self.written += held.nbytes
        storage.resize_(0)
        self.held -= held.nbytes

    def _restore(self, held: _Held, storage: UntypedStorage) -> None:
        if held.place is None:
            return
        place, held.place = held.place, None  # first, since reading it back is an operation on it too
        storage.resize_(held.nbytes)
        self.held += held.nbytes
        self._file.read(place, storage)
        self._file.free(place, held.nbytes)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tells a `Spill` what operations read and make in the thread that enters it."""

    supports_higher_order_operators = True

    def __init__(self, spill: Spill, number: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._spill, self._number = spill, number

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled parts of a model run as compiled."""
        return True

    def __torch_dispatch__(
        self, func: Callable[..., object], types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        kwargs = kwargs or {}
        read = list(_storages((args, kwargs)))
        self._spill.bring(read)
        out = func(*args, **kwargs)
        if self._number is not None:
            before = set(map(id, read))  # parameters, buffers and views of them are nobody's to spill
            self._spill.note(self._number, [storage for storage in _storages(out) if id(storage) not in before])
        return out


class _File:
    """A temporary file whose parts are used again."""

    def __init__(self) -> None:
        self._file: FileIO | None = None
        self._end = 0
        self._gaps: list[tuple[int, int]] = []

    def write(self, storage: UntypedStorage) -> int:
        """Writes a storage's bytes and says where they are; an `OutputError` where the disk is full."""
        place = self._place(storage.nbytes())
        host = _flat(storage).cpu()
        left = _bytes(host)
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="pwrewrite-", buffering=0)  # noqa: SIM115
            self._file.seek(place)
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise OutputError(
                f"the activations of the calibration inputs cannot be written to disk: {error.strerror or error}",
                where=str(tempfile.tempdir or ""),
                got=f"{self._end / 1024**3:.2f} GiB of them so far",
                hint="make room there, name another folder with TMPDIR, or use fewer inputs (--calibration-size)",
            ) from error
        return place

    def read(self, place: int, storage: UntypedStorage) -> None:
        """Reads a storage's bytes back."""
        assert self._file is not None
        flat = _flat(storage)
        host = flat if flat.device.type == "cpu" else torch.empty_like(flat, device="cpu")
        left = _bytes(host)
        self._file.seek(place)
        while left:
            count = self._file.readinto(left)
            if not count:
                raise OSError("the temporary file of the activations has become shorter")
            left = left[count:]
        if host is not flat:
            flat.copy_(host)

    def free(self, place: int, nbytes: int) -> None:
        """Gives a part back; the end of the file goes back to the disk."""
        insort(self._gaps, (place, nbytes))
        merged: list[tuple[int, int]] = []
        for start, size in self._gaps:
            if merged and sum(merged[-1]) == start:
                start, size = merged[-1][0], merged.pop()[1] + size
            merged.append((start, size))
        if self._file is not None and merged and sum(merged[-1]) == self._end:
            self._end = merged.pop()[0]
            self._file.truncate(self._end)
        self._gaps = merged

    def close(self) -> None:
        """Removes the file."""
        if self._file is not None:
            self._file.close()

    def _place(self, nbytes: int) -> int:
        """Where there is room: in the first gap that is large enough, or at the end."""
        for i, (start, size) in enumerate(self._gaps):
            if size >= nbytes:
                self._gaps[i : i + 1] = [(start + nbytes, size - nbytes)] if size > nbytes else []
                return start
        self._end += nbytes
        return self._end - nbytes


def _storages(value: object) -> Iterator[UntypedStorage]:
    """The storages behind the tensors in a nest, of those that have held."""
    for tensor in tensors_of(value):
        if type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and tensor.device.type != "meta":
            with suppress(NotImplementedError, RuntimeError):  # functorch's tensors have none
                yield tensor.untyped_storage()


def _flat(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _bytes(flat: Tensor) -> memoryview:
    """The bytes of a tensor in main memory; unlike a view of numpy's, it leaves the storage resizable."""
    return memoryview((ctypes.c_char * flat.nbytes).from_address(flat.data_ptr())).cast("B")
