"""Example inputs: what ``--input`` says, else what the file, the zoo or the model's first layer tells.

The grammar of one ``--input`` is ``[NAME=]SHAPE[:DTYPE]``, the shape with an ``x`` between the sizes:
``1x3x224x224``, ``1x77:int64``, ``mask=1x1x64x64:bool``. Several make several inputs. Without a dtype the model's own
floating dtype is taken, nearly always float32.

Tensors are made on the CPU from a generator of their own, seeded with 0, so that the global random state stays as it
is: floating and complex ones from a standard normal, integers and booleans from {0, 1}, which index any table of two or
more.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import InputError, TargetError
from ..core.text import did_you_mean
from .defaults import (
    Guess,
    floating_dtype,
    forward_parameters,
    guess_inputs,
    is_detection,
    random_tensor,
    required_inputs,
)
from .factories import kind_of
from .resolve import TargetInfo
from .user_code import running_user_code

#: What a model is called with: positional inputs as a tuple, keyword inputs as a dict.
ExampleInputs = tuple[Any, ...] | dict[str, Any]

_EXAMPLE = "--input 1x3x224x224, --input 1x77:int64, --input mask=1x1x64x64:bool"
_ALIASES = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class InputSpec:
    """One parsed ``--input``; without a dtype the model's own, without a name a positional input."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    name: str | None = None


def parse_input(text: str) -> InputSpec:
    """Parses one ``--input``, ``[NAME=]SHAPE[:DTYPE]``.

    Raises:
        InputError: It does not follow the grammar, a size is not positive, or there is no such dtype.
    """
    rest = text.strip()
    name, equals, after = rest.partition("=")
    if equals:
        name, rest = name.strip(), after.strip()
        if not name.isidentifier():
            raise InputError(f"cannot read --input {text!r}", got=f"{name!r} as a name", hint=_EXAMPLE)
    sizes, colon, kind = (part.strip() for part in rest.partition(":"))
    if not re.fullmatch(r"[+-]?\d+(\s*[xX×*]\s*[+-]?\d+)*", sizes):
        commas = "; put an x between the sizes, not a comma" if "," in sizes else ""
        raise InputError(f"cannot read --input {text!r}", expected=f"[NAME=]SHAPE[:DTYPE]{commas}", hint=_EXAMPLE)
    shape = tuple(int(size) for size in re.split(r"\s*[xX×*]\s*", sizes))
    if min(shape) < 1:
        raise InputError(f"--input {text!r} has a size of {min(shape)}", expected="sizes of 1 or more")
    return InputSpec(shape, _dtype(kind, text) if colon else None, name if equals else None)


def _dtype(name: str, text: str) -> torch.dtype:
    """The dtype of a name."""
    known = {
        n: d for n, d in vars(torch).items() if isinstance(d, torch.dtype) and not n.startswith(("q", "bits", "uint1x"))
    }
    dtype = known.get(_ALIASES.get(name, name.removeprefix("torch.")))
    if dtype is None:
        raise InputError(
            f"--input {text!r} has an unknown dtype {name!r}",
            expected="float32, float16, bfloat16, float64, int64, int32, uint8, bool, …",
            hint=did_you_mean([*known, *_ALIASES], name, n=3),
        )
    return dtype


def resolve_inputs(
    model: nn.Module, info: TargetInfo | None, specs: Sequence[str] = ()
) -> tuple[ExampleInputs, tuple[str, ...]]:
    """The inputs to run a model on, as a tuple or a dict by name, and notes on what was assumed.

    The first that is there: ``--input`` (``specs``); the file's ``example_inputs`` (a value or a function); timm's
    ``pretrained_cfg``; what torchvision's weight transforms crop to; the first convolution's channels; the first linear
    layer's features. ``info`` is where the model came from; None for one that the caller made.

    Raises:
        InputError: A spec is wrong or does not fit ``forward``, or nothing tells what the model takes.
    """
    with torch.device("cpu"):
        if specs:
            return _from_specs(model, [parse_input(text) for text in specs]), ()
        module = info.module if info else None
        if module is not None and hasattr(module, "example_inputs"):
            return _from_file(module.example_inputs, info.place if info else "", getattr(module, "__file__", None)), ()
        guess = guess_inputs(model, info)
        return _made(guess), guess.notes


def _made(guess: Guess) -> ExampleInputs:
    """The tensors of a guess."""
    generator = torch.Generator("cpu").manual_seed(0)
    tensors = tuple(_tensor(shape, guess.dtype, generator) for shape in guess.shapes)
    return (list(tensors),) if guess.as_list else tensors


def _tensor(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """One tensor; too large a one is the user's mistake, not a traceback."""
    try:
        return random_tensor(shape, dtype, generator)
    except (RuntimeError, MemoryError) as error:
        raise InputError(f"cannot make an input of {'x'.join(map(str, shape))} {dtype}: {error}") from error


def _from_specs(model: nn.Module, specs: list[InputSpec]) -> ExampleInputs:
    """The tensors of the specs, bound to ``forward``'s parameters."""
    parameters = forward_parameters(model)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    positional = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    star = any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
    plain = [s for s in specs if s.name is None]
    names = [s.name for s in specs if s.name is not None]
    shown = ", ".join(parameters) or "no inputs"
    detection = is_detection(model)
    if repeated := sorted({n for n in names if names.count(n) > 1}):
        raise InputError(f"--input gives {', '.join(repeated)} more than once")
    by_name = {n for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    if unknown := [n for n in names if not takes_any and n not in by_name]:
        raise InputError(
            f"{type(model).__name__}.forward takes no input {', '.join(unknown)}",
            expected=shown,
            hint=did_you_mean(parameters, *unknown),
        )
    if parameters and not star and not detection and len(plain) > len(positional):
        raise InputError(
            f"{type(model).__name__}.forward takes {len(positional)} positional inputs, and {len(plain)} were given",
            expected=shown,
        )
    if names and len(plain) > len(positional):
        raise InputError("unnamed inputs beside named ones cannot be bound to names", expected=shown, hint=_EXAMPLE)
    bound = {*names, *positional[: 1 if detection else len(plain)]} if plain else set(names)
    if twice := [n for n in names if n in positional[: len(plain)]]:
        raise InputError(f"--input gives {', '.join(twice)} twice: by name and by position", expected=shown)
    if lacking := [n for n in required_inputs(model) if n not in bound]:
        raise InputError(
            f"{type(model).__name__}.forward also needs {', '.join(lacking)}",
            expected=shown,
            hint=" ".join(f"--input {n}=SHAPE[:DTYPE]" for n in lacking),
        )
    generator = torch.Generator("cpu").manual_seed(0)
    own = floating_dtype(model)
    tensors = [_tensor(s.shape, s.dtype or own, generator) for s in specs]
    if detection and not names:
        images = [image for t in tensors for image in (t.unbind(0) if t.dim() == 4 else (t,))]
        return ([*images],)
    if not names:
        return tuple(tensors)
    order = iter(positional)
    return {spec.name or next(order): tensor for spec, tensor in zip(specs, tensors, strict=True)}


def _from_file(value: object, place: str, file: str | None) -> ExampleInputs:
    """What a file's ``example_inputs`` says."""
    what = f"example_inputs in {place}"
    if callable(value) and not isinstance(value, Tensor):
        try:
            with running_user_code(what, Path(file) if file else None):
                value = value()
        except TargetError as error:
            raise InputError(
                error.message, where=error.where, expected="a function without arguments, or a value"
            ) from error.__cause__
    if isinstance(value, Tensor):
        return (value,)
    if isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
        return dict(value)
    if isinstance(value, (tuple, list)):
        return tuple(value)
    raise InputError(
        f"{what} is not usable", expected="a tensor, a tuple or list of inputs, or a dict by name", got=kind_of(value)
    )


def describe_inputs(example_inputs: object) -> list[dict[str, object]]:
    """The tensors among nested example inputs, as plain data.

    For each its ``shape`` (a list), its ``dtype`` (``"float32"``) and, under keys of dicts, its ``name`` (``"a.b"``).
    """
    return [
        {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch."), **({"name": name} if name else {})}
        for name, t in _leaves(example_inputs, "")
    ]


def _leaves(value: object, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a nested structure, each with the keys that lead to it."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from _leaves(inner, name)
