"""Capturing any model as one graph: `capture`.

The model runs once on ``meta`` tensors under a recorder (see `recorder`), so nothing is computed and its own control flow decides.
Where its code needs values, it is recorded once more with real ones, seeded, and the coverage says so. The model is left exactly
as it was.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CaptureError, InputError
from .layers import find_layers
from .records import Call, Capture, Coverage, Layer, MemoryEvent, NodeInfo, TensorSpec, Window, info
from .recorder import Recorder, map_tensors, tensors_of
from .rules import ShapeError
from .state import untouched

__all__ = [
    "Call",
    "Capture",
    "Coverage",
    "Layer",
    "MemoryEvent",
    "NodeInfo",
    "TensorSpec",
    "Window",
    "capture",
    "info",
]

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]

_REAL_LIMIT = 8 << 30
"""Bytes of weights above which a model without values is not filled with random ones."""


def capture(model: nn.Module, example_inputs: Inputs, *, training: bool = False, values: str = "auto") -> Capture:
    """Captures a model as a graph with shapes and costs, without computing where shapes suffice.

    Args:
        model: Any module; its weights may be on any device, ``meta`` included.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword inputs, real or on ``meta``; tensors may be nested.
        training: Whether the model runs as in training; by default as in evaluation.
        values: ``meta`` (shapes only), ``real`` (compute) or ``auto`` (compute only if the model needs values).

    Returns:
        The capture. ``model`` is as it was before.

    Raises:
        InputError: If ``example_inputs`` is of the wrong kind.
        CaptureError: If the model does not run on these inputs; says which layer refused them.
    """
    if not isinstance(model, nn.Module):
        raise InputError("not a model", expected="a torch.nn.Module", got=type(model).__name__)
    args, kwargs = split_inputs(example_inputs)
    _refuse_lazy(model)
    attempts = {"auto": ("meta", "real"), "meta": ("meta",), "real": ("real",)}.get(values)
    if attempts is None:
        raise InputError("unknown values", expected="auto, meta or real", got=repr(values))
    failure: Exception | None = None
    for attempt in attempts:
        real = attempt == "real"
        if real and failure is not None and _too_large(model):
            break
        recorder = Recorder(model, real=real)
        try:
            with _no_collection(), untouched(model, values=real):
                for module in model.modules():
                    module.training = training
                torch.manual_seed(0)
                _run(recorder, args, kwargs)
        except ShapeError as error:
            raise _refused(error, args, kwargs) from error
        except Exception as error:
            failure = error
            continue
        return _finish(recorder, attempt, failure)
    assert failure is not None
    raise _refused(failure, args, kwargs) from failure


@contextmanager
def _no_collection() -> Iterator[None]:
    """Holds back the garbage collector: a graph is many small objects, none of them garbage yet."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def split_inputs(example_inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as positional and keyword arguments.

    Raises:
        InputError: If they are neither a tensor, a sequence nor a mapping, or hold no tensor.
    """
    if isinstance(example_inputs, Tensor):
        args, kwargs = (example_inputs,), dict[str, Any]()
    elif isinstance(example_inputs, Mapping):
        args, kwargs = (), dict(example_inputs)
    elif isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        args, kwargs = tuple(example_inputs), {}
    else:
        raise InputError(
            "example inputs of a kind that no model takes",
            expected="a tensor, a tuple of positional inputs or a dict of keyword inputs",
            got=type(example_inputs).__name__,
        )
    if not tensors_of((args, kwargs)):
        raise InputError("no tensor among the example inputs", got=repr(example_inputs)[:80])
    return args, kwargs


def _run(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)

    def prepare(t: Tensor) -> Tensor:
        if not recorder.real:
            return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
        if not t.is_meta:
            return t.detach().clone()
        if t.is_floating_point():
            return torch.rand(t.shape, generator=generator, dtype=torch.float32).to(recorder.device, t.dtype)
        return torch.zeros(t.shape, dtype=t.dtype, device=recorder.device)

    recorder.run(map_tensors(args, prepare), map_tensors(kwargs, prepare), input_names(recorder.model, args, kwargs))


def input_names(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """One name per input tensor: the forward parameter's, numbered where one holds several tensors."""
    from inspect import Parameter, signature

    try:
        parameters = [p for p in signature(model.forward).parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
    except (TypeError, ValueError):
        parameters = []
    names: list[str] = []
    for i, value in enumerate(args):
        name = f"input_{i}"
        if parameters:
            p = parameters[min(i, len(parameters) - 1)]
            name = f"{p.name}_{i}" if p.kind is Parameter.VAR_POSITIONAL else p.name if i < len(parameters) else name
        names += _numbered(name, value)
    for name, value in kwargs.items():
        names += _numbered(name, value)
    return names


def _numbered(name: str, value: Any) -> list[str]:
    count = len(tensors_of(value))
    return [name] if isinstance(value, Tensor) else [f"{name}_{i}" for i in range(count)]


def _finish(recorder: Recorder, values: str, failure: Exception | None) -> Capture:
    model, graph = recorder.model, recorder.graph
    unpriced: Counter[str] = Counter()
    inputs = []
    for node in graph.nodes:
        facts = info(node)
        unpriced.update(facts.unpriced)
        if node.op == "placeholder":
            inputs.append((node.name, facts.outputs[0]))
    layers = find_layers(model, graph)
    convolutions = [layer for layer in layers if layer.op != "linear"]
    reached = sum(layer.called for layer in convolutions)
    kind = "whole"
    if recorder.lost or recorder.opaque:
        kind = "islands" if any(layer.called for layer in layers) else "eager"
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    notes = []
    if failure is not None:
        notes.append(f"the model needs values ({_first_line(failure)}): figures are those of one seeded real run")
    if recorder.opaque:
        notes.append(f"TorchScript modules are opaque: {', '.join(p or '(root)' for p in recorder.opaque[:5])}")
    return Capture(
        model=model,
        inputs=tuple(inputs),
        graph=graph,
        layers=layers,
        coverage=Coverage(kind, len(convolutions), reached, tuple(unpriced.most_common()), values),
        memory=tuple(recorder.memory),
        params=sum(p.numel() for p in model.parameters()),
        weight_bytes=sum(t.numel() * t.dtype.itemsize for t in tensors.values()),
        notes=tuple(notes),
        constants=recorder.constants,
    )


def _too_large(model: nn.Module) -> bool:
    return sum(p.numel() * p.dtype.itemsize for p in model.parameters() if p.is_meta) > _REAL_LIMIT


def _refuse_lazy(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
            raise CaptureError(
                "a lazy module has no shapes yet",
                where=path or type(module).__name__,
                hint="run the model once on real inputs first: model(*example_inputs)",
            )


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__


def _refused(error: Exception, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CaptureError:
    shapes = ", ".join("×".join(map(str, t.shape)) or "scalar" for t in tensors_of((args, kwargs)))
    where = getattr(error, "_pw_where", None)
    if isinstance(error, ShapeError):
        return CaptureError(
            f"the model does not take this input: {error}",
            where=where,
            got=f"inputs of shape {shapes}",
            hint="give the shape the model was made for, such as --input 1x3x224x224",
        )
    return CaptureError(
        f"the model does not run on this input: {_first_line(error)}",
        where=where,
        got=f"inputs of shape {shapes}",
        hint="check that model(*example_inputs) runs in plain PyTorch on these inputs",
    )

