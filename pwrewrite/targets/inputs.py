"""Example inputs: what ``--input`` says, else what the file, the zoo or the model's first layer tells.

The grammar of one ``--input`` is ``[NAME=]SHAPE[:DTYPE]``, the shape with an ``x`` between the sizes:
``1x3x224x224``, ``1x77:int64``, ``mask=1x1x64x64:bool``. Several make several inputs. Without a dtype the model's own
floating dtype is taken, nearly always float32.

Tensors are made on the CPU from a generator of their own, seeded with 0, so that the global random state stays as it
is: floating and complex ones from a standard normal, integers and booleans from {0, 1}, which index any table of two or
more.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from ..core.errors import InputError, TargetError
from ..core.nested import Args, Kwargs
from ..core.text import did_you_mean
from .defaults import floating_dtype, guess_inputs, is_detection
from .factories import STARS, kind_of, missing_args, parameters_of
from .resolve import TargetInfo
from .user_code import origin_of, running_user_code

#: What a model is called with: positional inputs as a tuple, keyword inputs as a dict.
ExampleInputs = Args | Kwargs

_EXAMPLE = "--input 1x3x224x224, --input 1x77:int64, --input mask=1x1x64x64:bool"
_BETWEEN = r"\s*[xX×*,]\s*"
_ALIASES = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class InputSpec:
    """One parsed ``--input``; without a dtype the model's own, without a name a positional input."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    name: str | None = None


def parse_input(text: str) -> InputSpec:
    """Parses one ``--input``, ``[NAME=]SHAPE[:DTYPE]``; an `InputError` says what does not follow the grammar."""
    name, equals, rest = (part.strip() for part in text.partition("="))
    if not equals:
        rest = name
    elif not name.isidentifier():
        raise InputError(f"cannot read --input {text!r}", got=f"{name!r} as a name", hint=_EXAMPLE)
    sizes, colon, kind = (part.strip() for part in rest.partition(":"))
    if sizes[:1] + sizes[-1:] in ("()", "[]"):  # as Python prints a shape
        sizes = sizes[1:-1].strip().removesuffix(",")
    if not re.fullmatch(rf"[+-]?\d+({_BETWEEN}[+-]?\d+)*", sizes):
        raise InputError(f"cannot read --input {text!r}", expected="[NAME=]SHAPE[:DTYPE]", hint=_EXAMPLE)
    shape = tuple(int(size) for size in re.split(_BETWEEN, sizes))
    if min(shape) < 1:
        raise InputError(f"--input {text!r} has a size of {min(shape)}", expected="sizes of 1 or more")
    return InputSpec(shape, _dtype(kind, text) if colon else None, name if equals else None)


def _dtype(name: str, text: str) -> torch.dtype:
    dtypes = {n: d for n, d in vars(torch).items() if isinstance(d, torch.dtype)}
    known = {n: d for n, d in dtypes.items() if not n.startswith(("q", "bits", "uint1x"))}
    dtype = known.get(_ALIASES.get(name, name.removeprefix("torch.")))
    if dtype is None:
        expected = "float32, float16, bfloat16, float64, int64, int32, uint8, bool, …"
        hint = did_you_mean([*known, *_ALIASES], name, n=3)
        raise InputError(f"--input {text!r} has an unknown dtype {name!r}", expected=expected, hint=hint)
    return dtype


def resolve_inputs(
    model: nn.Module, info: TargetInfo | None, specs: Sequence[str] = ()
) -> tuple[ExampleInputs, tuple[str, ...]]:
    """The inputs to run a model on, as a tuple or a dict by name, and notes on what was assumed.

    The first that is there: ``--input`` (``specs``); ``example_inputs`` (a value or a function) of the file that
    ``info`` tells of; what `guess_inputs` finds. An `InputError` says what does not fit ``forward``, or that nothing
    tells what the model takes.
    """
    with torch.device("cpu"):
        if specs:
            return _from_specs(model, [parse_input(text) for text in specs]), ()
        if info is not None and info.module is not None and hasattr(info.module, "example_inputs"):
            return _from_file(info.module, info.place), ()
        guess = guess_inputs(model, info)
        generator = torch.Generator("cpu").manual_seed(0)
        tensors = tuple(_tensor(shape, floating_dtype(model), generator) for shape in guess.shapes)
        return (list(tensors),) if guess.as_list else tensors, guess.notes


def _tensor(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """One tensor, standard normal if floating or complex, else of {0, 1}; one too large is the user's mistake."""
    try:
        if dtype.is_complex or dtype is torch.float64:
            return torch.randn(shape, dtype=dtype, generator=generator, device="cpu")
        if dtype.is_floating_point:
            return torch.randn(shape, dtype=torch.float32, generator=generator, device="cpu").to(dtype)
        return torch.randint(0, 2, shape, dtype=torch.uint8, generator=generator, device="cpu").to(dtype)
    except (RuntimeError, MemoryError) as error:
        raise InputError(f"cannot make an input of {'x'.join(map(str, shape))} {dtype}: {error}") from error


def _from_specs(model: nn.Module, specs: list[InputSpec]) -> ExampleInputs:
    """The tensors of the specs, bound to ``forward``'s parameters."""
    parameters = parameters_of(model.forward)
    takes_more, takes_any = (any(p.kind is star for p in parameters.values()) for star in STARS)
    known = [n for n, p in parameters.items() if p.kind not in STARS]
    positional = [n for n in known if parameters[n].kind is not inspect.Parameter.KEYWORD_ONLY]
    plain = sum(s.name is None for s in specs)
    names = [s.name for s in specs if s.name is not None]
    shown, forward = ", ".join(parameters) or "no inputs", f"{type(model).__name__}.forward"
    detection = is_detection(model)
    if repeated := sorted({n for n in names if names.count(n) > 1}):
        raise InputError(f"--input gives {', '.join(repeated)} more than once")
    if unknown := [n for n in names if not takes_any and n not in known]:
        message = f"{forward} takes no input {', '.join(unknown)}"
        raise InputError(message, expected=shown, hint=did_you_mean(parameters, *unknown))
    if parameters and not takes_more and not detection and plain > len(positional):
        message = f"{forward} takes {len(positional)} positional inputs, and {plain} were given"
        raise InputError(message, expected=shown)
    if names and plain > len(positional):
        raise InputError("unnamed inputs beside named ones cannot be bound to names", expected=shown, hint=_EXAMPLE)
    if twice := [n for n in names if n in positional[:plain]]:
        raise InputError(f"--input gives {', '.join(twice)} twice: by name and by position", expected=shown)
    bound = {*names, *positional[: min(plain, 1) if detection else plain]}
    if lacking := [n for n in missing_args(model.forward) if n not in bound]:
        hint = " ".join(f"--input {n}=SHAPE[:DTYPE]" for n in lacking)
        raise InputError(f"{forward} also needs {', '.join(lacking)}", expected=shown, hint=hint)
    generator = torch.Generator("cpu").manual_seed(0)
    own = floating_dtype(model)
    tensors = [_tensor(s.shape, s.dtype or own, generator) for s in specs]
    if names:
        order = iter(positional)
        return {spec.name or next(order): tensor for spec, tensor in zip(specs, tensors, strict=True)}
    if detection:
        return ([image for t in tensors for image in (t.unbind(0) if t.dim() == 4 else (t,))],)
    return tuple(tensors)


def _from_file(module: ModuleType, place: str) -> ExampleInputs:
    what, value = f"example_inputs in {place}", module.example_inputs
    if callable(value) and not isinstance(value, Tensor):
        try:
            with running_user_code(what, origin_of(module)):
                value = value()
        except TargetError as error:
            expected = "a function without arguments, or a value"
            raise InputError(error.message, where=error.where, expected=expected) from error.__cause__
    if isinstance(value, Tensor):
        return (value,)
    if isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
        return dict(value)
    if isinstance(value, (tuple, list)):
        return tuple(value)
    expected = "a tensor, a tuple or list of inputs, or a dict by name"
    raise InputError(f"{what} is not usable", expected=expected, got=kind_of(value))


def describe_inputs(example_inputs: object) -> list[dict[str, object]]:
    """The ``shape``, ``dtype`` (``"float32"``) and, under keys of dicts, ``name`` (``"a.b"``) of each nested tensor."""
    return [
        {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch."), **({"name": name} if name else {})}
        for name, t in _leaves(example_inputs, "")
    ]


def _leaves(value: object, name: str) -> list[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        return [(name, value)]
    if isinstance(value, Mapping):
        return [leaf for k, inner in value.items() for leaf in _leaves(inner, f"{name}.{k}" if name else str(k))]
    return [leaf for inner in value for leaf in _leaves(inner, name)] if isinstance(value, (tuple, list)) else []
