"""Reads ``--labels``: one class for each calibration input."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..core.errors import UsageError
from ..core.files import read_text
from .arrays import LABEL_NAMES, SUFFIXES, open_arrays

_TEXT = (".txt", ".csv")
_EACH = "one integer for each sample"


def open_labels(path: str | Path) -> Tensor:
    """Reads labels, the classes of samples, as ``(samples,)`` of int64.

    Args:
        path: A ``.npy``, ``.npz`` or ``.safetensors`` file with one array of integers, or one called ``labels``; a
            ``.txt`` of integers between white space or commas; a ``.csv`` with one column, or one called ``label``.

    A `UsageError` says that there is no such file, or that it does not hold one integer for each sample.
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
    values = stored.whole()
    if isinstance(values, np.ndarray):
        values = torch.from_numpy(values.astype(np.int64))
    labels: Tensor = values.reshape(-1).to(torch.int64)
    return labels


def _from_text(path: Path) -> Tensor:
    """Labels in a text file."""
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
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
    return torch.tensor([int(word) for _, word in words], dtype=torch.int64)


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
