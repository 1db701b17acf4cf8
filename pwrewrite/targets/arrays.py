"""Arrays on disk, read in parts: ``.npy`` (mapped), ``.npz`` (streamed, compressed or not) and ``.safetensors``.

Labels, one class for each calibration input, are one of them, or a text or table of their own.
Nothing is unpickled. Memory holds one part at a time, except of an ``.npz`` member in Fortran order, which has to be
read whole and is refused when it is large. What a header declares is checked against what is there before it is read.
"""

from __future__ import annotations

import csv
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..core.errors import UsageError, shortened
from ..core.files import read_text
from ..core.numbers import dims
from .user_code import suggest_files

SUFFIXES = (".npy", ".npz", ".safetensors")
_TEXT = (".txt", ".csv")

LABEL_NAMES = ("labels", "label", "targets", "target", "y")
"""Under these names labels may lie beside inputs."""

_EACH = "one integer for each sample"

_LARGEST_FORTRAN = 256 << 20
"""Bytes of an array in Fortran order that may be read whole."""

_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
_TORCH_NAMES = {"F": "float", "BF": "bfloat", "I": "int", "U": "uint"}

Rows = np.ndarray | Tensor
"""A part of a stored array: of NumPy, or a tensor from safetensors."""


@dataclass(frozen=True)
class Stored:
    """One array on disk; its name is empty where the file holds one without a name.

    ``parts`` reads it: from a step and a stop, parts of so many rows, up to that row.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    parts: Callable[[int, int], Iterator[Rows]]

    def __str__(self) -> str:
        return f"{self.dtype} {dims(self.shape)}"

    def whole(self) -> Rows:
        """All of it; for one that holds samples."""
        return next(self.parts(self.shape[0], self.shape[0]))

    def samples(self, path: Path) -> int:
        """How many samples it holds, which is the size of its first dim; refuses none."""
        if not self.shape or not self.shape[0]:
            name = f"{self.name} in {path}" if self.name else str(path)
            raise UsageError(f"{name} holds no samples", expected="samples along the first dim", got=str(self))
        return self.shape[0]


def open_arrays(path: Path, also: tuple[str, ...] = ()) -> dict[str, Stored]:
    """The arrays of a file by name; reads no values. A `UsageError` says why it cannot be read.

    Where there is no such file, the hint names ones of the suffixes ``also``, too.
    """
    if not path.is_file():
        what = "not a regular file" if path.exists() else "no such file"
        raise UsageError(f"{what}: {path}", hint=suggest_files(path, (*SUFFIXES, *also)))
    expected = f"one of {', '.join(SUFFIXES)}"
    if path.suffix in _PICKLES:
        hint = "save the arrays alone: numpy.save, numpy.savez or safetensors.torch.save_file"
        raise UsageError(f"{path} is a pickle, which may run code, and is not loaded", expected=expected, hint=hint)
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path} is no file of arrays", expected=expected)
    with _explained(path):
        arrays = _safetensors(path) if path.suffix == ".safetensors" else _numpy(path)
    if not arrays:
        raise UsageError(f"{path} holds no arrays")
    return arrays


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Says what is wrong with a file that cannot be read."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # readers of damaged bytes raise nearly everything
        text = str(error)
        if "pickle" in text or "Python objects" in text or "Object arrays" in text:
            message = f"{path} holds Python objects, which only unpickling reads, and is not loaded"
            hint = "save it as a plain array: numpy.save(path, array.astype('float32'))"
            raise UsageError(message, expected="an array of numbers", hint=hint) from error
        if isinstance(error, OSError) and error.strerror:
            raise UsageError(f"cannot read {path}: {error.strerror}") from error
        got = shortened(text) or type(error).__name__
        raise UsageError(f"{path} is truncated, damaged or no {path.suffix} file", got=got) from error


def _numpy(path: Path) -> dict[str, Stored]:
    """The arrays of a ``.npy`` or ``.npz``, whichever it is by its first bytes."""
    if not path.stat().st_size:
        raise UsageError(f"{path} is empty (0 bytes)")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            members = [name for name in archive.namelist() if name.endswith(".npy")]
            return {m.removesuffix(".npy"): _member(path, archive, m) for m in members}
    with path.open("rb") as file:
        header = _header(file, path.name, path.stat().st_size)
    array = np.load(path, mmap_mode="r", allow_pickle=False)

    def parts(step: int, stop: int) -> Iterator[Rows]:
        yield from (array[start : min(start + step, stop)] for start in range(0, stop, step))

    return {"": Stored("", header.shape, str(header.dtype), parts)}


class _Header(NamedTuple):
    """What a ``.npy`` stream says about its data."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Bytes of the data."""
        return prod(self.shape) * self.dtype.itemsize


def _header(file: IO[bytes], name: str, total: int) -> _Header:
    """The header of a ``.npy`` stream of so many bytes in all, which is left at its data."""
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"{name} has version {version[0]}.{version[1]} of the format")
    header = _Header(*read(file))
    if header.dtype.hasobject:
        raise ValueError(f"{name}: Object arrays cannot be loaded")
    if any(type(size) is not int or size < 0 for size in header.shape):
        raise ValueError(f"{name} declares the shape {header.shape}")
    if header.size > total - file.tell():
        raise ValueError(f"{name} declares {header.size} bytes, and {total - file.tell()} are there")
    return header


def _member(path: Path, archive: zipfile.ZipFile, member: str) -> Stored:
    with archive.open(member) as file:
        header = _header(file, member, archive.getinfo(member).file_size)
    shape, dtype = header.shape, header.dtype
    if header.fortran and header.size > _LARGEST_FORTRAN:
        message = f"{member} in {path} is stored in Fortran order, of which no part can be read alone"
        expected = f"C order, or at most {_LARGEST_FORTRAN >> 20} MiB"
        hint = "numpy.savez(path, numpy.ascontiguousarray(array))"
        raise UsageError(message, expected=expected, got=f"{header.size >> 20} MiB", hint=hint)

    def parts(step: int, stop: int) -> Iterator[Rows]:
        with _explained(path), zipfile.ZipFile(path) as archive, archive.open(member) as file:
            _header(file, member, archive.getinfo(member).file_size)
            if header.fortran:
                whole = np.frombuffer(_exactly(file, header.size, member), dtype).reshape(shape, order="F")
                yield from (whole[start : min(start + step, stop)] for start in range(0, stop, step))
                return
            for start in range(0, stop, step):
                part = (min(step, stop - start), *shape[1:])
                yield np.frombuffer(_exactly(file, prod(part) * dtype.itemsize, member), dtype).reshape(part)

    return Stored(member.removesuffix(".npy"), shape, str(dtype), parts)


def _exactly(file: IO[bytes], size: int, name: str) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise EOFError(f"{name} ends after {len(data)} of {size} bytes")
    return data


def _safetensors(path: Path) -> dict[str, Stored]:
    from safetensors import safe_open

    def stored(name: str, shape: Sequence[int], dtype: str) -> Stored:
        def parts(step: int, stop: int) -> Iterator[Rows]:
            with _explained(path), safe_open(str(path), framework="pt", device="cpu") as file:
                rows = file.get_slice(name)
                yield from (rows[start : min(start + step, stop)] for start in range(0, stop, step))

        letters = dtype.rstrip("0123456789")
        known = _TORCH_NAMES.get(letters, letters.lower()) + dtype[len(letters) :]
        return Stored(name, tuple(shape), known, parts)

    with safe_open(str(path), framework="pt", device="cpu") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
        return {name: stored(name, part.get_shape(), part.get_dtype()) for name, part in slices.items()}


def open_labels(path: str | Path) -> Tensor:
    """Labels, the classes of samples, as ``(samples,)`` of int64; a `UsageError` says why a file holds none.

    They are the one array of integers in a ``.npy``, ``.npz`` or ``.safetensors`` file, or the one called ``labels``;
    a ``.txt`` of integers between white space or commas; or the one column, or ``label``, of a ``.csv``.
    """
    path = Path(path)
    if path.suffix in _TEXT and path.is_file():
        return _from_text(path)
    if path.is_file() and path.suffix not in SUFFIXES:
        raise UsageError(f"{path} is no file of labels", expected=f"one of {', '.join((*SUFFIXES, *_TEXT))}")
    arrays = open_arrays(path, _TEXT)
    named = [array for name, array in arrays.items() if name in LABEL_NAMES]
    if not named and len(arrays) > 1:
        message = f"nothing says which array in {path} holds the labels"
        raise UsageError(message, expected="labels", got=", ".join(arrays))
    stored = named[0] if named else next(iter(arrays.values()))
    stored.samples(path)
    if not stored.dtype.startswith(("int", "uint")) or len([n for n in stored.shape[1:] if n != 1]):
        raise UsageError(f"{path} holds no labels", expected=_EACH, got=str(stored))
    return torch.from_numpy(np.asarray(stored.whole()).astype(np.int64)).reshape(-1)


def _from_text(path: Path) -> Tensor:
    with _explained(path):
        lines = read_text(path).splitlines()
    rows = [(number, line) for number, line in enumerate(lines, 1) if line.strip() and not line.startswith("#")]
    if path.suffix == ".csv":
        words = _column(path, rows)
    else:
        words = [(number, word) for number, line in rows for word in re.split(r"[\s,]+", line.strip(" ,\t"))]
    for number, word in words:
        if not re.fullmatch(r"[+-]?\d{1,18}", word):
            raise UsageError(f"{path}, line {number}: not a label", expected=_EACH, got=repr(word[:40]))
    if not words:
        raise UsageError(f"{path} holds no labels", expected=_EACH)
    return torch.tensor([int(word) for _, word in words], dtype=torch.int64, device="cpu")


def _column(path: Path, rows: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """The column of labels of a table, with its line numbers."""
    cells = [(number, [cell.strip() for cell in next(csv.reader([line]))]) for number, line in rows]
    if not cells:
        return []
    head = [cell.lower() for cell in cells[0][1]]
    named = [place for place, cell in enumerate(head) if cell in (*LABEL_NAMES, "class", "class_id")]
    if len(named) != 1 and len(head) > 1:
        message, expected = f"nothing says which column of {path} holds the labels", "one column, or one called label"
        raise UsageError(message, expected=expected, got=", ".join(cells[0][1]))
    place = named[0] if named else 0
    if short := next((number for number, row in cells if len(row) <= place), None):
        raise UsageError(f"{path}, line {short}: no label", expected=f"{len(head)} columns")
    header = bool(named) or not re.fullmatch(r"[+-]?\d+", head[0])
    return [(number, row[place]) for number, row in cells[header:]]
