"""Capturing any model as one graph: `capture`.

The model runs once on ``meta`` tensors under a recorder (see `recorder`), so its own control flow decides. Where its
code needs values, it is recorded once more with real ones, seeded, and the coverage says so.
"""

from __future__ import annotations

import re
from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from ..core.collector import no_collection
from ..core.errors import CaptureError, InputError, first_line, line_of_model
from ..core.nested import Args, Kwargs, map_tensors, tensors_of
from ..core.subjects import check_model
from .inputs import Inputs, example_of, input_names, inputs_of_none, split_inputs
from .inventory import Inventory
from .layers import find_layers
from .lazy import materialized
from .origins import NeedsValues
from .recorder import Recorder, path_of_failure
from .records import Call, Capture, Coverage, Layer, MemoryEvent, NodeInfo, TensorSpec, Window, info
from .shapes import ShapeError
from .state import untouched
from .tensors import byte_count, conventions, element_count, has_shape_only, kind_of
from .threads import one_at_a_time

__all__ = [
    "Call",
    "Capture",
    "Coverage",
    "Inputs",
    "Layer",
    "MemoryEvent",
    "NodeInfo",
    "TensorSpec",
    "Window",
    "capture",
    "info",
    "split_inputs",
]

_REAL_LIMIT = 8 << 30
"""Bytes of weights above which a model without values is not filled with random ones."""


def capture(
    model: nn.Module, example_inputs: Inputs, *, training: bool = False, values: str = "auto", items: bool = False
) -> Capture:
    """Captures a model as a graph with shapes and costs, without computing where shapes suffice.

    Args:
        model: Any module, on any device, ``meta`` included; left as it was. One with lazy modules is copied first.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword inputs, real or on ``meta``.
        training: Whether the model runs as in training; by default as in evaluation.
        values: ``meta`` (shapes only), ``real`` (compute) or ``auto`` (compute only if the model needs values).
        items: Whether each of several tensors that an operation makes (``x.chunk(2)``) gets a ``getitem`` node, so that
            the graph can be executed; otherwise their users read the operation's node.

    Raises:
        InputError: If ``example_inputs`` is of the wrong kind.
        CaptureError: If the model does not run on these inputs; says which layer refused them.

    >>> import torch
    >>> from torch import nn
    >>> captured = capture(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), torch.empty(1, 3, 8, 8, device="meta"))
    >>> [(layer.path, layer.macs) for layer in captured.layers]
    [('0', 7776)]
    """
    check_model(model)
    args, kwargs = split_inputs(example_inputs)
    attempts = {"auto": ("meta", "real"), "meta": ("meta",), "real": ("real",)}.get(values)
    if attempts is None:
        raise InputError("unknown values", expected="auto, meta or real", got=repr(values))
    inventory = Inventory(model)
    if any(isinstance(module, LazyModuleMixin) for module in inventory.modules):
        inventory = Inventory(materialized(model, args, kwargs))
    failure: Exception | None = None
    with one_at_a_time, no_collection():
        for attempt in attempts:
            real = attempt == "real"
            if failure is not None and sum(byte_count(p) for p in inventory.parameters if p.is_meta) > _REAL_LIMIT:
                break
            try:
                recorder = _record(inventory, args, kwargs, real=real, training=training, items=items)
            except ShapeError as error:
                raise _refused(error, inventory.model, args, kwargs) from error
            except Exception as error:
                failure = error
                continue
            return _finish(recorder, attempt, failure)
    assert failure is not None
    raise _refused(failure, inventory.model, args, kwargs) from failure


def _record(inventory: Inventory, args: Args, kwargs: Kwargs, *, real: bool, training: bool, items: bool) -> Recorder:
    """Records the model, once more and deeper where some of it ran outside of torch functions."""
    generator = torch.Generator()

    def prepare(t: Tensor) -> Tensor:
        if not has_shape_only(t) and not real:
            raise NeedsValues(f"a {kind_of(t)} tensor has no form without values")
        if not real:
            return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
        if not t.is_meta:
            return t.detach().clone()
        if t.is_floating_point():
            return torch.rand(t.shape, generator=generator, dtype=torch.float32, device="cpu").to(
                recorder.device, t.dtype
            )
        return torch.zeros(t.shape, dtype=t.dtype, device=recorder.device)

    names = input_names(inventory.model, args, kwargs)
    for deep in (False, True):
        recorder = Recorder(inventory, real=real, deep=deep, items=items)
        with untouched(inventory, values=real):
            for module in inventory.modules:
                if module.training != training:
                    module.__dict__["training"] = training
            if recorder.device.type == "cpu":
                torch.default_generator.manual_seed(0)
            else:  # slower: takes down where it was called for every device that is not in use yet
                torch.manual_seed(0)
            generator.manual_seed(0)
            recorder.run(map_tensors(args, prepare), map_tensors(kwargs, prepare), names)
        if not recorder.origins.lost:
            break
    return recorder


def _finish(recorder: Recorder, values: str, failure: Exception | None) -> Capture:
    inventory, origins = recorder.inventory, recorder.origins
    graph = origins.graph
    unpriced: Counter[str] = Counter()
    inputs = []
    for node in graph.nodes:
        facts = info(node)
        if facts.unpriced:
            unpriced.update(facts.unpriced)
        if node.op == "placeholder":
            inputs.append((node.name, facts.outputs[0]))
    layers = find_layers(inventory, graph)
    convolutions = [layer for layer in layers if layer.op != "linear"]
    kind = "whole"
    if origins.lost or recorder.opaque:
        kind = "islands" if any(layer.calls for layer in layers) else "eager"
    notes = []
    if failure is not None:
        notes.append(f"the model needs values ({value_need(failure)}): figures are those of one seeded real run")
    if recorder.opaque:
        notes.append(f"TorchScript modules are opaque: {', '.join(p or '(root)' for p in recorder.opaque[:5])}")
    if origins.lost:
        unpriced["unseen code"] += origins.lost
        lost = "tensors come from code that torch functions do not show: the totals may be too low"
        notes.append(f"{origins.lost} {lost}")
    if origins.outside:
        size = sum(map(element_count, origins.outside))
        notes.append(
            f"{len(origins.outside)} weights ({size:,} elements) outside model.parameters(), which no column of "
            "parameters counts: a list instead of a ModuleList, or modules made in forward?"
        )
    notes += [*recorder.notes, *conventions(inventory.kinds)]
    called = sum(layer.called for layer in convolutions)
    coverage = Coverage(kind, len(convolutions), called, tuple(unpriced.most_common()), values)
    recorded = (inventory.model, tuple(inputs), graph, layers, coverage, tuple(recorder.liveness.events))
    return Capture(*recorded, inventory.size, inventory.nbytes, tuple(notes), origins.constants)


def value_need(failure: Exception) -> str:
    """Why a model does not run on shapes alone, and the line of its code that does not."""
    unknown = re.match(r"(\S+): attempted to run this operator with Meta tensors", str(failure))
    line = line_of_model(failure)
    if unknown:
        why = f"torch cannot tell the shape that {unknown[1]} gives"
    elif isinstance(failure, NeedsValues):
        why = str(failure)
    else:
        why = first_line(failure)
    return f"{why}, in {line}" if line else why


def _refused(error: Exception, model: nn.Module, args: Args, kwargs: Kwargs) -> CaptureError:
    shapes = ", ".join("×".join(map(str, t.shape)) or "scalar" for t in tensors_of((args, kwargs)))
    if empty := inputs_of_none(model, args, kwargs):
        shapes += f", and None for {', '.join(empty)}"
    where, line = path_of_failure(error), line_of_model(error)
    if line and not (where and isinstance(error, ShapeError)):  # a module that is called tells enough of shapes
        where = f"{where}, in {line}" if where else line
    what = f"the model does not run on this input: {first_line(error)}"
    hint = "check that model(*example_inputs) runs in plain PyTorch on these inputs"
    dtype = re.search(r"takes (\w+), got (\w+)$", str(error)) if isinstance(error, ShapeError) else None
    shape = next((t.shape for t in tensors_of((args, kwargs)) if dtype and str(t.dtype) == f"torch.{dtype[2]}"), None)
    if dtype and shape is not None:
        what, shapes = f"the model does not take this input: {error}", f"{shapes}, {dtype[2]}"
        hint = f"give inputs of the dtype that it computes in, such as --input {'x'.join(map(str, shape))}:{dtype[1]}"
    elif isinstance(error, ShapeError):
        what = f"the model does not take this input: {error}"
        hint = (
            f"give the shape the model was made for, such as --input {example_of(model)}, or define example_inputs in "
            "its file; without both it is taken from the model's first layer"
        )
    return CaptureError(what, where=where, got=f"inputs of shape {shapes}", hint=hint)
