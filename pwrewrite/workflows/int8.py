"""Exports in int8: calibrated, timed beside their float32 siblings, and kept where they are faster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..core.declaring import flag_of
from ..core.errors import UsageError, first_line
from ..core.exports import Exported
from ..core.numbers import plural
from ..core.options import Budget, ExportOptions
from ..engines.exporting import Axes, Call, Format, Program
from ..engines.timing import time_in_turns
from ..planning.batches import Batches
from ..planning.outputs import Measured, compare_outputs, kind_of_outputs
from ..planning.running import samples_of
from ..targets import LoadedModel
from ..verifying.exports import Expected, judge
from .what import opened

FASTER = 0.97
"""Below this share of the time in float32, int8 is faster."""
DATA = ("calibration", "batch", "preprocess", "calibration_size")
"""Options that say what to calibrate on."""


def int8_formats(options: ExportOptions, formats: Sequence[Format]) -> dict[str, Format]:
    """The quantized sibling of each format that is to have one, by its name; refuses options that go without."""
    given = [name for name in DATA if getattr(options, name) is not None]
    if given and not options.int8:
        raise UsageError(f"{flag_of(ExportOptions, given[0])} goes with --int8")
    if not options.int8:
        return {}
    siblings = {each.name: sibling for each in formats if (sibling := each.int8) is not None}
    if not siblings:
        raise UsageError("--int8 is for onnx and openvino", got=", ".join(each.name for each in formats))
    if options.calibration is None:
        raise UsageError("--int8 needs inputs to calibrate on", hint="--calibration images.npy")
    return siblings


class Samples:
    """The calibration inputs of an export, in batches that it takes; every fifth is held out to measure on."""

    def __init__(self, options: ExportOptions, loaded: LoadedModel, axes: Axes) -> None:
        data = opened(Budget(**{name: getattr(options, name) for name in DATA}), loaded)
        example = loaded.example_inputs
        args, kwargs = ((), example) if isinstance(example, Mapping) else (example, {})
        self._size = None if any(axes) else samples_of((args,) if isinstance(args, Tensor) else tuple(args), kwargs)
        size, chunk, batch = data.calibration_size, self._size or 32, cast(Any, data.batch)
        self._batches = Batches(cast(Any, data.calibration), example, size=size, chunk=chunk, batch=batch)

    def calibration(self) -> Iterator[Call]:
        """Those to calibrate on."""
        return filter(self._fits, self._batches.calibration())

    def held_out(self) -> Iterator[Call]:
        """Those to measure on."""
        return filter(self._fits, self._batches.held_out())

    def _fits(self, call: Call) -> bool:
        return self._size is None or samples_of(*call) == self._size

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of them."""
        return tuple(self._batches.notes)


def quantize(
    forms: tuple[Format, Format], program: Program, expected: Sequence[Expected], folder: Path, samples: Samples
) -> Exported:
    """Quantizes what a format wrote into a folder, measures speed and loss, and deletes it where it is no faster.

    ``forms`` are the format and its quantized sibling; ``expected`` is what the program should compute.
    """
    form = forms[1]
    try:
        form.write(replace(program, calibration=list(samples.calibration())), folder)
        row, kept = _measured(forms, program, expected, folder, samples)
    except Exception as failure:  # of other people's quantizers, which raise anything
        row, kept = Exported(form.name, False, first_line(failure)), False
    files = [folder / name for name in form.files if (folder / name).exists()]
    size = sum(file.stat().st_size for file in files)
    for file in () if kept else files:
        file.unlink()
    return replace(row, bytes=size, files=tuple(file.name for file in files) if kept else ())


def _measured(
    forms: tuple[Format, Format], program: Program, expected: Sequence[Expected], folder: Path, samples: Samples
) -> tuple[Exported, bool]:
    """What quantizing brought and cost, and whether it is worth keeping."""
    plain, small = (each.run(program, folder, [one.call for one in expected]) for each in forms)
    problems, error, _ = judge(program, expected, small, exact=False)
    first, float32, int8 = expected[0].call, plain.call, small.call
    assert float32 is not None, forms[0].name
    assert int8 is not None, forms[1].name
    kind = kind_of_outputs([*float32(next(samples.held_out())).values()])
    results = (([*float32(call).values()], [*int8(call).values()], call) for call in samples.held_out())
    loss = compare_outputs(results, kind)
    before, after = time_in_turns([partial(float32, first), partial(int8, first)], torch.device("cpu"))
    layers = {path: "int8" if fast else "float32" for path, fast in forms[1].precisions(folder).items()}
    ratio = after.seconds / before.seconds
    detail = "; ".join(problems[:3]) or _gain(ratio, layers, loss)
    facts = (after.seconds, small.engine, error, None, loss.loss, loss.agreement, layers)
    return Exported(forms[1].name, not problems, detail, (), 0, *facts), not problems and ratio < FASTER


def _gain(ratio: float, layers: Mapping[str, str], loss: Measured) -> str:
    others = [path for path, precision in layers.items() if precision != "int8"]
    rest = f" (not {', '.join(others[:3])}{' …' if len(others) > 3 else ''})" if others else ""
    same = "" if loss.agreement is None else f", the same class in {loss.agreement:.1%}"
    return (
        f"{'' if ratio < FASTER else 'not kept, no faster: '}{ratio:.2f} of the time in float32; "
        f"{len(layers) - len(others)} of {plural(len(layers), 'layer')} in int8{rest}; "
        f"loss {loss.loss:.2g}{same} on {plural(loss.samples, 'held-out input')}"
    )
