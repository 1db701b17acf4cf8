"""The last step: files for other runtimes, each run there and compared with the model before it is kept.

The model is exported once by ``torch.export``, with a batch that may vary; every format is written from that program.
What was written then runs in its own runtime on fresh inputs at two batch sizes, neither of them the one it was traced
with, and is held against a float64 copy of the model: shapes, dtypes, number of outputs, and values within what
rounding does to the model itself. What does not agree is not left behind.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..capturing import Inputs
from ..core.errors import RefusedError, UsageError, VerificationError, first_line
from ..core.files import new_folder, read_text
from ..core.option import from_keywords, refuse_unknown
from ..core.options import ExportOptions
from ..edit.apply import copy_of
from ..edit.unfuse import unfuse
from ..engines.exports import FORMATS, Format, formats_of, program_of, tensors_of
from ..engines.timing import time_in_turns
from ..report.exported import SCHEMA, Export, Exported
from ..targets import class_name
from ..targets.storage import check_place
from ..verifying.inputs import Arguments, Draws, map_arguments
from ..verifying.numerics import Bound, compare
from ..verifying.outputs import Flat, dtype_text
from ..verifying.rounding import Original
from ..verifying.runs import Outcome, run
from .steps import Progress, silent
from .subject import Subject, loaded_of

REPORT = "export.json"
NAMES = frozenset({REPORT, *(name for each in FORMATS for name in each.files)})
"""Every file that an export may write."""

_TRACED, _TRIED = 2, (3, 5)
"""Batch sizes: that of the trace, which torch must not take for 1 or for a constant, and those of the comparison."""

_FACTOR = 4.0
"""How much further from float64 than an exact rewrite in torch's own kernels another runtime may be: it sums in tiles,
by Winograd's algorithm, or with other functions."""


@dataclass(frozen=True)
class _Trial:
    """A plain copy of the model, and what it computes.

    Attributes:
        model: The copy, in evaluation mode on the CPU.
        scaled: Which of its input tensors have the batch as their first dim.
        runs: Batch size, None for the example's, with inputs and outcome of each run.
        notes: What a reader should be told.
    """

    model: nn.Module
    scaled: frozenset[int]
    runs: tuple[tuple[int | None, Arguments, Outcome], ...]
    notes: tuple[str, ...] = ()


def export(
    model: Subject,
    example_inputs: Inputs | None = None,
    what: ExportOptions | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    **options: object,
) -> Export:
    """Exports a model, and verifies every file in its own runtime.

    Args:
        model: The model, fused, rewritten or plain, or what `pwrewrite.load_target` gave; it is not changed.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword ones.
        what: Which formats, and where to.
        seed: Of the inputs that are drawn.
        progress: Called at each step.
        **options: Fields of `pwrewrite.core.options.ExportOptions` as keywords: ``to=["onnx", "pt2"], out="dir"``.

    Returns:
        What was written, with sizes, times and errors.

    Raises:
        RefusedError: If the model cannot be traced, or a package is missing.
        VerificationError: If a file does not do what the model does; nothing is left behind then.
        OutputError: If the folder is there, or cannot be written.
    """
    say = progress or silent
    what = what or from_keywords(ExportOptions, options)
    refuse_unknown("export", options, ExportOptions)
    formats = formats_of(what.to)
    if not formats or what.out is None:
        raise UsageError("nothing to export to", expected="formats, and out, a folder")
    loaded = loaded_of(model, example_inputs)
    if any(t.is_meta for t in (*loaded.model.parameters(), *loaded.model.buffers())):
        raise RefusedError("the model has no weights to export", hint="give it weights, or initialise it")
    check_export_place(what.out, force=what.force)
    say("trying the model", None)
    draws = Draws(loaded.example_inputs, torch.device("cpu"), seed)
    trial = _try(unfuse(copy_of(loaded.model)).cpu().eval(), draws, static=what.static)
    args, kwargs = _resized(draws, _TRACED, trial.scaled) if trial.scaled else trial.runs[0][1]
    say("tracing", None)
    scaled = [t for i, t in enumerate(tensors_of((args, kwargs))) if i in trial.scaled]
    program = program_of(trial.model, args, kwargs, scaled)
    names = _names(list(_output(trial.runs[0][2]).tensors))
    results = []
    with new_folder(what.out, NAMES) as scratch:
        for each in formats:
            say(f"writing {each.name}", None)
            try:
                each.write(program, names, scratch)
            except Exception as error:
                raise RefusedError(f"{each.name} cannot be written: {first_line(error)}") from error
            say(f"running {each.name}", None)
            results.append(_verified(each, scratch, trial, seed))
        user_inputs = program.graph_signature.user_inputs
        result = Export(
            target=loaded.target or class_name(loaded.model),
            formats=tuple(results),
            dynamic=tuple(str(name) for i, name in enumerate(user_inputs) if i in trial.scaled),
            outputs=tuple(names),
            weight_bytes=sum(t.nbytes for t in trial.model.state_dict().values()),
            folder=str(what.out),
            notes=tuple(dict.fromkeys((*loaded.notes, *trial.notes))),
        )
        (scratch / REPORT).write_text(result.to_json(), encoding="utf-8")
    return result


def check_export_place(folder: str | Path, *, force: bool = False) -> None:
    """Checks, before any work, that an export can be written to a folder; raises `OutputError`."""
    check_place(folder, force=force, files=NAMES, ours=_is_export)


def _is_export(folder: Path) -> bool:
    try:
        data = json.loads(read_text(folder / REPORT))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(data, dict) and data.get("schema") == SCHEMA


def _try(model: nn.Module, draws: Draws, *, static: bool) -> _Trial:
    """Runs the model in torch: at the example's shapes, and at batch sizes that an export has to take."""
    example = draws.draw()
    first = run(model, example, seed=draws.seed)
    if first.output is None:
        raise RefusedError(f"the model does not run on its example inputs: {first.error}")
    if not first.output.tensors:
        raise RefusedError("the model returns no tensors", got=first.output.describe())
    if first.drew:
        raise RefusedError("the model draws random numbers, so that no two runs agree")
    tensors = tensors_of(example)
    alike = [i for i, t in enumerate(tensors) if t.dim() and t.shape[0] == draws.batch]
    for scaled in dict.fromkeys((frozenset(alike), frozenset(alike[:1]))):
        if static or not scaled:
            break
        resized = [(n, _resized(draws, n, scaled)) for n in _TRIED]
        runs = [(n, inputs, run(model, inputs, seed=draws.seed)) for n, inputs in resized]
        if all(outcome.ran for *_, outcome in runs):
            rest = len(alike) - len(scaled)
            note = f"the batch varies in the first input only: the model does not run where {rest} more vary with it"
            return _Trial(model, scaled, ((None, example, first), *runs), (note,) if rest else ())
    again = draws.draw(variant=1)
    still = ((None, example, first), (None, again, run(model, again, seed=draws.seed)))
    why = "as asked" if static else "the model does not run at other batch sizes"
    return _Trial(model, frozenset(), still, (f"all shapes are fixed to those of the example inputs: {why}",))


def _resized(draws: Draws, batch: int, scaled: frozenset[int]) -> Arguments:
    """Fresh inputs of a batch size; those that do not scale keep the example's values."""
    example = tensors_of(draws.draw())
    number = iter(range(len(example)))
    return map_arguments(draws.draw(batch, variant=1), lambda t: t if (i := next(number)) in scaled else example[i])


def _names(paths: Sequence[str]) -> list[str]:
    """Names of outputs from where they are: ``output`` of a single one, ``boxes`` of ``['boxes']``, ``output_0``."""
    if len(paths) == 1:
        return ["output"]
    names = ["_".join(re.findall(r"\w+", path)) for path in paths]
    return [f"output_{name or i}" if not name or name[0].isdigit() else name for i, name in enumerate(names)]


def _verified(each: Format, folder: Path, trial: _Trial, seed: int) -> Exported:
    """Runs what was written and compares it, run by run.

    Raises:
        VerificationError: At the first that does not agree.
    """
    sizes = tuple(batch for batch, *_ in trial.runs if batch is not None)
    try:
        results = each.run(folder, [tensors_of(inputs) for _, inputs, _ in trial.runs])
    except Exception as error:
        tried = f"to run at batch {', '.join(map(str, sizes))}" if sizes else None
        where = each.files[0]
        raise VerificationError(
            f"{each.name} does not run", where=where, expected=tried, got=first_line(error)
        ) from error
    original, errors, own = Original(trial.model, seed), [0.0], [0.0]
    depth = max(1, sum(hasattr(module, "weight") for module in trial.model.modules()))
    for (batch, inputs, outcome), tensors in zip(trial.runs, results, strict=True):
        expected = _output(outcome)
        problems = _form(expected, tensors)
        if not problems:
            rounding = original.rounding(inputs, outcome, False, depth)
            limits = {path: _FACTOR * limit for path, limit in rounding.limits.items()}
            returned = replace(expected, tensors=dict(zip(expected.tensors, tensors)))
            comparison = compare(rounding.reference, returned, Bound(limits=limits, flips={}))
            problems = [*comparison.exceeded, *(f"output{path} has NaN or Inf" for path in comparison.spoiled)]
            errors.append(comparison.error or 0.0)
            own += rounding.errors.values()
        if problems:
            where = f"{each.files[0]}, batch {batch}" if batch else each.files[0]
            wrong = f"{each.name} does not compute what the model does"
            raise VerificationError(wrong, where=where, got="; ".join(problems[:4]))
    args, kwargs = trial.runs[0][1]
    runs = [partial(trial.model, *args, **kwargs), partial(each.open(folder), tensors_of((args, kwargs)))]
    with torch.no_grad():
        before, after = time_in_turns(runs, torch.device("cpu"), seconds=2.0)
    written = [folder / name for name in each.files if (folder / name).exists()]
    return Exported(
        format=each.name,
        file=each.files[0],
        nbytes=sum(file.stat().st_size for file in written),
        runtime=each.runtime(folder),
        error=max(errors),
        own_error=max(own),
        batches=sizes,
        seconds=after.seconds,
        seconds_before=before.seconds,
    )


def _output(outcome: Outcome) -> Flat:
    if outcome.output is None:
        raise RefusedError(f"the model does not run: {outcome.error}")
    return outcome.output


def _form(expected: Flat, tensors: Sequence[Tensor]) -> list[str]:
    """What is wrong with the number, shapes and dtypes of what a runtime returned."""
    if len(tensors) != len(expected.tensors):
        return [f"{len(tensors)} outputs, expected {len(expected.tensors)}"]
    problems = []
    for (path, before), after in zip(expected.tensors.items(), tensors):
        if before.shape != after.shape or before.dtype != after.dtype:
            texts = (f"{'×'.join(map(str, t.shape))} {dtype_text(t.dtype)}" for t in (after, before))
            problems.append("output{} is {}, expected {}".format(path, *texts))
    return problems
