"""An export against its model: which axes may vary, what its outputs should be, and where it departs.

Axes: the batch is axis 0 of the input with most axes, and of those that are as long there. They are tried at two items,
then each alone at three: one that the model takes so has a batch of its own. Inputs without which the others cannot
vary, and those that cannot vary, are found by leaving each out.

Values: another runtime sums in another order and may choose another algorithm (Winograd's loses up to a digit), so an
output may be sixteen times as far from the model in float64 as the model itself is, or 10⁻⁵.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from ..core.errors import PwrewriteError, RefusedError
from ..core.fx_names import keywords_spelt_out
from ..core.nested import tensors_of
from ..core.numbers import dims
from ..engines.exporting import Axes, Call, Format, Program, Run
from .divergence import ROOT, Key, watch
from .inputs import Draws, copied
from .numerics import exact_limits, relative_difference
from .outputs import Flat, dtype_text, flatten
from .rounding import Original
from .runs import run

_FLOOR, _FACTOR = 1e-5, 16.0


def batch_axes(model: nn.Module, draws: Draws, names: Sequence[str]) -> Axes:
    """The batch axes of the input tensors, as labels; empty mappings where the model takes no other batch."""
    tensors = tensors_of((draws.args, draws.kwargs))
    axes: list[dict[int, str]] = [{} for _ in tensors]
    ranks = [t.dim() + t.is_floating_point() / 2 for t in tensors]
    batch = 0 if draws.images is not None else tensors[ranks.index(max(ranks))].shape[:1].numel()
    batched = [i for i, t in enumerate(tensors) if t.dim() and t.shape[0] == batch and batch]

    def takes(sizes: Mapping[int, int]) -> bool:
        call = draws.resized([{0: sizes[i]} if i in sizes else {} for i in range(len(tensors))])
        return run(model, call, seed=0).ran

    size = 2 if batch != 2 else 4
    tried = [batched, *([i for i in batched if i != out] for out in batched), *([i] for i in batched)]
    varied = next((group for group in tried if group and takes(dict.fromkeys(group, size))), [])
    alone = [i for i in varied if len(varied) > 1 and takes({**dict.fromkeys(varied, size), i: size + 1})]
    if len(alone) == len(varied):
        alone = alone[1:]
    for i in varied:
        axes[i] = {0: f"batch_{names[i]}" if i in alone else "batch"}
    return tuple(axes)


@dataclass(frozen=True)
class Expected:
    """What the model makes of a call, computed exactly too, and by output the largest difference to that allowed."""

    sizes: str
    call: Call
    output: Flat
    reference: Flat
    limits: Mapping[str, float]


def expectations(model: nn.Module, draws: Draws, axes: Axes, example: Mapping[str, int]) -> list[Expected]:
    """What the model makes of fresh inputs at two sizes that it takes.

    Args:
        model: The model.
        draws: Makes inputs.
        axes: What may vary.
        example: Labels that are no batch, with their sizes in the example.

    Raises:
        RefusedError: If it does not run twice, or draws random numbers.
    """
    labels = list(dict.fromkeys(label for each in axes for label in each.values()))
    original, expected, error = Original(model, 0), list[Expected](), ""
    for variant, batch in enumerate((1, 3, 2, 5), 1):
        sizes = {label: batch if batch == 1 else batch + k for k, label in enumerate(labels)}
        sizes |= {label: n * (2 if batch % 3 == 0 else 1) for label, n in example.items()}
        call = draws.resized([{axis: sizes[label] for axis, label in each.items()} for each in axes], variant)
        outcome = run(model, call, seed=0)
        if not outcome.ran:
            error = outcome.error
            continue
        if outcome.drew:
            raise RefusedError("the model draws random numbers in evaluation: no export can be compared with it")
        rounding = original.rounding(call, outcome, False, 1)
        limits = exact_limits(rounding.errors, max(rounding.floor, _FLOOR), _FACTOR)
        named = ", ".join(f"{label} {n}" for label, n in sizes.items()) or f"other values ({len(expected) + 1})"
        expected.append(Expected(named, call, outcome.output, rounding.reference, limits))
        if len(expected) == 2:
            return expected
    raise RefusedError("the model does not run at two sizes", got=error)


def compared(
    program: Program, expected: Expected, outputs: Mapping[str, Tensor], exact: bool = True
) -> tuple[list[str], float]:
    """What differs between a runtime's outputs and the model's, and the largest relative difference.

    Without ``exact``, values may differ as long as they are numbers.
    """
    problems, largest = list[str](), 0.0
    names = {program.outputs.get(path, path): path for path in expected.output.tensors}
    for name in (name for name in outputs if name not in names):
        problems.append(f"{name} is new")
    for name, path in names.items():
        wanted, value = expected.output.tensors[path], outputs.get(name)
        if value is None:
            problems.append(f"{name} is missing")
        elif value.shape != wanted.shape:
            problems.append(f"{name} has shape {dims(value.shape)}, not {dims(wanted.shape)}")
        elif value.dtype != wanted.dtype:
            problems.append(f"{name} has dtype {dtype_text(value.dtype)}, not {dtype_text(wanted.dtype)}")
        elif path not in expected.output.floating:
            if exact and not torch.equal(value, wanted):
                problems.append(f"{name} has other values")
        else:
            error = relative_difference(value, expected.reference.tensors[path])
            largest = max(largest, error)
            if not exact and not bool(value.isfinite().all()):
                problems.append(f"{name} holds NaN or Inf")
            elif exact and error > expected.limits.get(path, _FLOOR):
                problems.append(f"{name} differs by {error:.1e}, allowed {expected.limits.get(path, _FLOOR):.1e}")
    return problems, largest


def judge(
    program: Program, expected: Sequence[Expected], result: Run, exact: bool = True
) -> tuple[list[str], float, Expected]:
    """What differs at any of the sizes, the largest relative difference, and the size at which something differs."""
    largest = 0.0
    for each, outputs in zip(expected, result.outputs):
        problems, error = compared(program, each, outputs, exact)
        largest = max(largest, error)
        if problems:
            return [f"at {each.sizes}: {problem}" for problem in problems], largest, each
    return [], largest, expected[0]


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps a copy of every tensor."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.kept: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if isinstance(value, Tensor) and n.op == "call_function":
            self.kept[n] = value.clone()
        return value

    def see(self, call: Call) -> None:
        """Runs a call."""
        args, kwargs = copied(call)
        with torch.no_grad():
            self.run(*args, *kwargs.values())


def first_difference(program: Program, form: Format, folder: Path, expected: Expected) -> str | None:
    """The first layer at which the exported program departs from the model, else the first node of the runtime's graph.

    None where what a runtime computes inside is not known, or all of it agrees.
    """
    limit = max([_FLOOR, *expected.limits.values()])
    with keywords_spelt_out():
        recorder = _Recorder(program.exported.module())
    try:
        recorder.see(expected.call)
    except Exception:
        last = next((n for n in reversed(recorder.kept)), None)
        return f"behind {_place(last)}" if last is not None else ROOT
    place = _departs_from_model(program, recorder.kept, expected, limit)
    if place is not None:
        return place
    try:
        values = form.values(program, folder, expected.call)
        if values:
            with keywords_spelt_out():
                recorder = _Recorder(form.inner(program).module())
            recorder.see(expected.call)
    except (PwrewriteError, RuntimeError):
        return None
    for node, value in recorder.kept.items():
        other = values.get(node.name)
        comparable = other is not None and other.shape == value.shape and value.dtype.is_floating_point
        if comparable and relative_difference(values[node.name], value) > limit:
            return f"{node.name} in {_place(node)}"
    return None


def _place(node: fx.Node) -> str:
    """The path of the module that a node stands for."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]).removeprefix("L['self'].") or ROOT if stack else ROOT


def _departs_from_model(
    program: Program, kept: Mapping[fx.Node, Tensor], expected: Expected, limit: float
) -> str | None:
    """The first module, called once, whose output is another in the exported program."""
    last: dict[str, Tensor] = {}
    for node, value in kept.items():
        last[_place(node)] = value
    real: dict[str, list[Tensor]] = {}
    paths = [path for path, _ in program.model.named_modules() if path in last]

    def see(key: Key, output: object) -> None:
        real.setdefault(key[0], []).extend(t.clone() for t in flatten(output).tensors.values())

    watch(program.model, paths, expected.call, 0, False, see)
    for path, value in last.items():
        own = next(iter(real.get(path, [])), None)
        if own is None or len(real[path]) > 1 or not own.is_floating_point():
            continue
        if own.shape != value.shape or relative_difference(value, own) > limit:
            return path
    return None
