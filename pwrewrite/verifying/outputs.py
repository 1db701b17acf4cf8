"""What a model returned, flattened: every tensor under a path such as ``[0]['boxes']``, and the containers around them.

Containers, dataclasses and objects with tensors as attributes are looked into; live tensors and a capture's shape
records alike.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..capturing import Capture, TensorSpec, info
from ..core.numbers import dims

_DEPTH = 12


@dataclass(slots=True)
class Flat:
    """A nested value flattened: path to kind (``tensor``, ``list of 2``, …), and path to tensor or `TensorSpec`."""

    kinds: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, Any] = field(default_factory=dict)

    @property
    def floating(self) -> dict[str, Tensor]:
        """The tensors with floating or complex values."""
        return {p: t for p, t in self.tensors.items() if t.dtype.is_floating_point or t.dtype.is_complex}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors' shapes."""
        return {path: tuple(t.shape) for path, t in self.tensors.items()}

    def describe(self) -> str:
        """One line: ``1×1000 float32, 1×10 int64``."""
        shown = [f"{dims(t.shape)} {dtype_text(t.dtype)}" for t in list(self.tensors.values())[:4]]
        more = len(self.tensors) - len(shown)
        return ", ".join(shown) + (f" and {more} more" if more > 0 else "") if shown else "no tensors"


def dtype_text(dtype: torch.dtype) -> str:
    """``float32``."""
    return str(dtype).removeprefix("torch.")


def flatten(
    value: object,
    leaf: Callable[[object], Tensor | TensorSpec | None] = lambda value: value if isinstance(value, Tensor) else None,
) -> Flat:
    """Flattens a nested value; ``leaf`` gives the tensor or spec that a value stands for, None where for none."""
    flat = Flat()
    _flatten(value, "", flat, leaf, 0)
    return flat


def _flatten(
    value: object, path: str, flat: Flat, leaf: Callable[[object], Tensor | TensorSpec | None], depth: int
) -> None:
    tensor = leaf(value)
    if tensor is not None:
        flat.kinds[path], flat.tensors[path] = "tensor", tensor
        return
    name = type(value).__qualname__
    items: list[tuple[str, object]] = []
    if isinstance(value, Mapping):
        items = [(f"[{key!r}]", item) for key, item in value.items()]
        name += f" of {', '.join(repr(key) for key in value)}"
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        items = [(f".{key}", item) for key, item in zip(value._fields, value)]
    elif isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        items = [(f"[{i}]", item) for i, item in enumerate(value)]
        name += f" of {len(items)}"
    elif is_dataclass(value) and not isinstance(value, type):
        items = [(f".{f.name}", getattr(value, f.name)) for f in fields(value)]
    elif hasattr(value, "__dict__") and not callable(value) and depth < _DEPTH:
        items = [(f".{key}", item) for key, item in vars(value).items()]
    flat.kinds[path] = name
    for key, item in items:
        _flatten(item, path + key, flat, leaf, depth + 1)


def flatten_captured(capture: Capture) -> Flat:
    """The output of a captured model, with a `TensorSpec` in place of each tensor."""
    node = next(n for n in capture.graph.nodes if n.op == "output")
    specs = iter(info(node).inputs)

    def leaf(value: object) -> TensorSpec | None:
        return next(specs) if isinstance(value, fx.Node) else None

    return flatten(node.args[0], leaf)


def differences(before: Flat, after: Flat, free: Collection[tuple[str, int]] = ()) -> list[str]:
    """Sentences on what differs in structure, shape or dtype; sizes in ``free``, ``(path, dim)``, may differ."""
    now = {path: after.kinds.get(path, "nothing") for path in before.kinds}
    problems = [f"output{path} was a {k}, now {now[path]}" for path, k in before.kinds.items() if now[path] != k]
    problems += [f"output{path} is new: {kind}" for path, kind in after.kinds.items() if path not in before.kinds]
    for path, old in before.tensors.items():
        new = after.tensors.get(path)
        if new is None:
            continue
        other = [i for i, (a, b) in enumerate(zip(old.shape, new.shape)) if a != b and (path, i) not in free]
        if other or len(old.shape) != len(new.shape):
            problems.append(f"output{path} had shape {dims(old.shape)}, now {dims(new.shape)}")
        if old.dtype != new.dtype:
            problems.append(f"output{path} had dtype {dtype_text(old.dtype)}, now {dtype_text(new.dtype)}")
    return problems


def varying(before: Flat, after: Flat) -> set[tuple[str, int]]:
    """``(path, dim)`` of every size that differs between two outputs of the same rank."""
    shared = [(p, t.shape, after.tensors[p].shape) for p, t in before.tensors.items() if p in after.tensors]
    return {(p, i) for p, a, b in shared if len(a) == len(b) for i in range(len(a)) if a[i] != b[i]}
