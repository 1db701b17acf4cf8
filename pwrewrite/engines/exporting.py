"""What an export format is, and what it is given: a program of `torch.export` with names for its inputs and outputs.

A format writes files from a `Program` and runs them in the runtime that they are for. It is one file,
``NAME_format.py``, that ends in ``FORMAT = Name()``, and an entry in `pwrewrite.core.names.EXPORT_NAMES`.

Axes that may vary get one symbol per label. Where the code of the model asks for more than that (a multiple of
something, another label's size), torch chooses the relation itself; an axis that it freezes is refused, never kept
silently.
"""

from __future__ import annotations

import re
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from functools import cached_property, wraps
from importlib import import_module, util
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.export import Dim, ExportedProgram, ShapesCollection

from ..capturing.code_trace import untouched
from ..core.errors import RefusedError, UsageError, first_line, line_of_model
from ..core.names import EXPORT_NAMES
from ..core.nested import Args, Kwargs, is_plain, map_tensors, tensors_of
from .axis_limits import axis_limits

Call = tuple[Args, Kwargs]
"""Positional and keyword arguments."""

Axes = tuple[Mapping[int, str], ...]
"""For each input tensor the axes that may vary, with their labels; axes of one label vary together."""

SECONDS = 0.5
"""About how long a runtime is timed."""


@dataclass(frozen=True)
class Program:
    """A model as it is exported: in evaluation, on the CPU, without layers of pwrewrite's own kernels."""

    model: nn.Module
    inputs: Call  # what it is traced with
    input_names: tuple[str, ...]  # one per input tensor
    outputs: Mapping[str, str]  # path of an output tensor, such as ``['out']``, to its name
    axes: Axes
    calibration: Sequence[Call] = ()  # inputs of the kind that it will see, for what is quantized

    @cached_property
    def exported(self) -> ExportedProgram:
        """The program; raises `RefusedError` where torch cannot make it, or freezes an axis that is to vary."""
        labels = {label: Dim(label) for axes in self.axes for label in axes.values()}
        try:
            return self._export(labels)
        except Exception as error:
            if not labels:
                raise _refused(error) from error
        try:
            program = self._export(dict.fromkeys(labels, Dim.AUTO))
        except Exception as error:
            raise _refused(error) from error
        nodes = {node.name: node for node in program.graph.nodes}
        shapes = [nodes[n].meta["val"].shape for n in program.graph_signature.user_inputs if n in nodes]
        for name, axes, shape in zip(self.input_names, self.axes, shapes):
            for axis, label in axes.items():
                if str(shape[axis]).isdecimal():  # a plain number, or a symbol that stands for one
                    raise RefusedError(
                        f"torch.export freezes the axis {label}",
                        where=f"axis {axis} of {name}",
                        got=f"always {shape[axis]}",
                        hint="x.shape[0] in place of len(x) and int(…) in the model, and no size that it keeps of a "
                        "call; or --static",
                    )
        return program

    @property
    def libraries(self) -> list[str]:
        """Modules, imported here, that bring operations of the program which torch does not have."""
        targets = [node.target for node in self.exported.graph.nodes if isinstance(node.target, OpOverload)]
        return sorted({t.namespace for t in targets if t.namespace in sys.modules} - {"torch"})

    @cached_property
    def _plain(self) -> bool:
        """Whether the model returns plain containers, which are known wherever an export is read."""
        args, kwargs = map_tensors(self.inputs, torch.clone)
        with torch.no_grad(), untouched(self.model):
            return is_plain(self.model(*args, **kwargs))

    def _export(self, labels: Mapping[str, object]) -> ExportedProgram:
        args, kwargs = self.inputs
        shapes = ShapesCollection()  # type: ignore[no-untyped-call]
        for tensor, axes in zip(tensors_of(self.inputs), self.axes):
            if axes:
                shapes[tensor] = {axis: labels[label] for axis, label in axes.items()}
        forms = nullcontext() if self._plain else _plain_outputs(self.model)
        with torch.no_grad(), _quiet(), untouched(self.model), forms:
            made = torch.export.export(self.model, args, kwargs, dynamic_shapes=shapes if labels else None)
        _drop_idle_squeezes(made)
        _bound_by_alike(made)
        _spread_sizes(made)
        return made

    @property
    def limits(self) -> list[str]:
        """What the sizes of axes that vary must be beside numbers, where the model's code decides by them."""
        nodes = {node.name: node.meta.get("val") for node in self.exported.graph.nodes}
        values = [nodes.get(str(name)) for name in self.exported.graph_signature.user_inputs]
        varying = dict[str, tuple[object, int]]()
        for value, axes, tensor in zip(values, self.axes, tensors_of(self.inputs)):
            if isinstance(value, Tensor):
                for axis, label in axes.items():
                    varying.setdefault(label, (value.shape[axis], tensor.shape[axis]))
        return list(axis_limits(varying))

    @property
    def output_sizes(self) -> list[tuple[str, ...]]:
        """The shape of every output tensor, in numbers and in the labels of axes that vary, such as ``2*batch``."""
        signature = self.exported.graph_signature
        values = {node.name: node.meta.get("val") for node in self.exported.graph.nodes}
        labels = dict[str, str]()
        for name, axes in zip(signature.user_inputs, self.axes):
            value = values.get(name) if isinstance(name, str) else None
            if isinstance(value, Tensor):
                labels |= {str(value.shape[axis]): label for axis, label in axes.items()}
        outputs = [values.get(name) for name in signature.user_outputs if isinstance(name, str)]
        known = re.compile(r"\b[A-Za-z]\w*\b")
        return [
            tuple(known.sub(lambda symbol: labels.get(symbol[0], symbol[0]), str(size)) for size in value.shape)
            for value in outputs
            if isinstance(value, Tensor)
        ]

    def feeds(self, call: Call) -> dict[str, Any]:
        """The input arrays of a call by name."""
        return {name: t.numpy() for name, t in zip(self.input_names, tensors_of(call))}

    def check_ports(self, what: str, inputs: Sized, outputs: Sized) -> None:
        """Raises `RefusedError` where what was made of it has another number of inputs or outputs."""
        if (len(inputs), len(outputs)) != (len(self.input_names), len(self.outputs)):
            got = f"{len(inputs)} inputs and {len(outputs)} outputs"
            raise RefusedError(f"the {what} has other inputs or outputs than the model", got=got)


@contextmanager
def _plain_outputs(model: nn.Module) -> Iterator[None]:
    """A model that returns plain dicts, tuples and lists meanwhile, in place of the user's own classes."""
    forward = model.forward

    @wraps(forward)
    def plain(*args: Any, **kwargs: Any) -> Any:
        return map_tensors(forward(*args, **kwargs), lambda tensor: tensor, plain=True)

    own = vars(model).get("forward")
    model.forward = plain
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


def _drop_idle_squeezes(program: ExportedProgram) -> None:
    """Takes out of a program what squeezes axes that are not 1, which is nothing in torch and an error in ONNX."""
    aten = torch.ops.aten
    for node in list(program.graph.nodes):
        if node.target is not aten.squeeze.dim or any(user.op == "output" for user in node.users):
            continue
        source, axis = node.args
        size = source.meta["val"].shape[axis] if source.meta["val"].dim() else 1
        if isinstance(size, int) and size != 1:
            node.replace_all_uses_with(source)
            program.graph.erase_node(node)
    program.graph_module.recompile()


def _bound_by_alike(program: ExportedProgram) -> None:
    """Makes both bounds of a clamp floating where one is, as torch does: its exporter to ONNX takes no mixed ones."""
    aten = torch.ops.aten
    clamps = (aten.clamp.default, aten.clamp_.default, aten.clip.default, aten.clip_.default)
    for node in program.graph.nodes:
        if node.target not in clamps:
            continue
        bounds = (*node.args[1:], *node.kwargs.values())
        values = [bound.meta.get("val") if isinstance(bound, fx.Node) else bound for bound in bounds]
        if any(isinstance(value, (float, torch.SymFloat)) for value in values):
            node.args = (node.args[0], *(float(value) if type(value) is int else value for value in node.args[1:]))
            node.kwargs = {key: float(value) if type(value) is int else value for key, value in node.kwargs.items()}
    program.graph_module.recompile()


def _spread_sizes(program: ExportedProgram) -> None:
    """Gives operations a size for every axis where one stands for all, as torch takes it: ONNX has no such thing."""
    for node in program.graph.nodes:
        if not isinstance(node.target, OpOverload):
            continue
        for i, argument in enumerate(node.target._schema.arguments):
            sizes = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            single, count = [sizes] if type(sizes) is int else sizes, getattr(argument, "N", None)
            if not count or not isinstance(single, (list, tuple)) or len(single) != 1:
                continue
            if i < len(node.args):
                node.update_arg(i, list(single) * count)
            else:
                node.update_kwarg(argument.name, list(single) * count)
    program.graph_module.recompile()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what is written to stderr until the block has ended, and drops it where it fails: torch prints graphs."""
    with redirect_stderr(StringIO()) as written:
        yield
    sys.stderr.write(written.getvalue())


def _refused(error: Exception) -> RefusedError:
    text, where, hint, got = str(error), None, None, first_line(error)
    if lifted := re.search(r"fake tensor in the exported program.* attribute: (?:(\S+)\.)?\w+\. ", text):
        where = f"the code of {lifted[1]}" if lifted[1] else "the model's own code"
        got = "it computes with a tensor in a way that torch.export cannot trace, such as through .data"
        hint = "where it masks or sets a weight's .data, compute with the weight itself: self.weight * self.mask"
    elif unknown := re.search(r"<class '(?:.*\.)?(\w+)'> in (?:the )?output", text):
        hint = f"return a tuple or a dict in place of a {unknown[1]}"
    elif "data-dependent" in text:
        if line := re.search(r'File "(.+)", line (\d+), in (\w+)\n\s*(.+)', text.rpartition("raised this error")[2]):
            where = f"{line[1]}:{line[2]} in {line[3]}: {line[4]}"
        hint = "torch.where or torch.cond in place of code that decides by the values of tensors"
    where = where or line_of_model(error)
    return RefusedError("torch.export does not take the model", where=where, got=got, hint=hint)


@dataclass(frozen=True, slots=True)
class Run:
    """What a runtime made of several calls."""

    outputs: Sequence[Mapping[str, Tensor]]  # for each call the name of an output to its tensor
    seconds: float  # the median time of the first call
    engine: str  # what ran: runtime and version, provider, precision, threads
    call: Callable[[Call], Mapping[str, Tensor]] | None = None  # runs further inputs, if a process can do it again


class Installable(ABC):
    """A runtime or a kind of export, whose modules may not be there."""

    kind = ""  # how an error calls it before its name
    name: str  # as it is typed
    extra = ""  # the extra of pwrewrite that brings what it needs; empty where torch suffices
    needs: tuple[str, ...] = ()  # the modules that it imports

    @property
    def missing(self) -> str:
        """Why it is not there; empty where it is."""
        absent = [module for module in self.needs if util.find_spec(module) is None]
        return f"needs {', '.join(absent)}, not installed here" if absent else ""

    def require(self) -> None:
        """Raises `UsageError` where it is not there, with the command that installs it."""
        if self.missing:
            hint = f'pip install "pwrewrite[{self.extra}]"' if self.extra else "--engine torch serves without"
            raise UsageError(f"{self.kind}{self.name} {self.missing}", hint=hint)


class Format(Installable):
    """One kind of export."""

    files: tuple[str, ...]  # all files that it may write
    main: str  # the one that a user loads
    int8: Format | None = None  # its quantized sibling

    @abstractmethod
    def write(self, program: Program, folder: Path) -> None:
        """Writes the files."""

    @abstractmethod
    def run(self, program: Program, folder: Path, calls: Sequence[Call]) -> Run:
        """Runs what was written, in its own runtime."""

    def values(self, program: Program, folder: Path, call: Call) -> dict[str, Tensor]:
        """Values inside, by the name of the node of `inner` that they stand for; empty where a runtime gives none."""
        return {}

    def inner(self, program: Program) -> ExportedProgram:
        """The program with the operations that the format has, which may have other names in it."""
        return program.exported

    def precisions(self, folder: Path) -> dict[str, bool]:
        """Each layer with weights, and whether it runs in int8; empty for what is not quantized."""
        return {}


def format_named(name: str) -> Format:
    """The format of a name; raises `UsageError` for another."""
    if name not in EXPORT_NAMES:
        raise UsageError(f"no export format {name!r}", expected=", ".join(EXPORT_NAMES))
    named: Format = import_module(f"{__package__}.{name}_format").FORMAT
    return named


def measured(call: Callable[[], object]) -> float:
    """The median time of a call in seconds, after one to warm up."""
    call()
    times: list[float] = []
    while not times or (len(times) < 50 and sum(times) < SECONDS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def identifier(text: str) -> str:
    """A text as a name: ``[0]['a']`` becomes ``_0_a``."""
    return re.sub(r"\W+", "_", text).rstrip("_")
