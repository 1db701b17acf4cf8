"""Exporting a model to other runtimes, each export run in its own and compared with the model: `export`.

The model is copied, put into evaluation and onto the CPU, and its fused layers become plain ones (`pwrewrite.unfuse`).
One program of `torch.export` is the source of all formats. An export that does not do what the model does is deleted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from ..capturing import Inputs, split_inputs
from ..capturing.code_trace import untouched
from ..capturing.inputs import input_names
from ..core.declaring import from_keywords, refuse_unknown
from ..core.errors import OutputError, PwrewriteError, RefusedError, UsageError, VerificationError, first_line
from ..core.exports import EXPORT_SCHEMA, Exported, Exports
from ..core.files import lacks_room, new_folder
from ..core.fx_names import named_by_keyword, taken_by_graphs
from ..core.modes import plain_modes
from ..core.names import EXPORT_NAMES
from ..core.nested import tensors_of
from ..core.options import ExportOptions, TargetOptions
from ..edit.actions.plain_layers import unfuse
from ..engines.exporting import Axes, Format, Program, format_named, identifier, measured
from ..targets import open_target
from ..targets.storage import check_place
from ..verifying.exports import Expected, batch_axes, expectations, first_difference, judge
from ..verifying.inputs import Draws
from ..verifying.outputs import Flat, dtype_text
from .int8 import Samples, int8_formats, quantize
from .steps import Progress, silent
from .subject import Subject, loaded_of

REPORT = "export.json"
_FORMATS = [format_named(name) for name in EXPORT_NAMES]
ALL_FILES = (REPORT, *(file for each in _FORMATS for form in (each, each.int8) if form for file in form.files))
"""What an export may have left in its folder."""


@plain_modes()
def export(
    model: Subject,
    example_inputs: Inputs | None = None,
    *,
    target: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Exports:
    """Writes a model for other runtimes, runs each export there at two batch sizes and compares it with the model.

    Args:
        model: A module, or what `pwrewrite.load_target` gives; stays as it is, and is exported in evaluation mode.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword ones; a loaded model has its own.
        target: Name for the report.
        progress: Called at each step.
        **options: Fields of `pwrewrite.core.options.ExportOptions`: ``to``, ``out``, ``dynamic``, ``static``,
            ``force``, ``int8`` with ``calibration``, any iterable of batches.

    Returns:
        What became of each format; ``passed`` tells whether all do what the model does. Only those that do are left in
        ``out``, beside ``export.json``.

    Raises:
        UsageError: If a format is unknown or what it needs is not installed.
        OutputError: If the folder cannot be written, or exists without ``force``.
        RefusedError: If torch cannot export the model, or the model cannot be compared.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     made = export(nn.Conv2d(3, 8, 3), torch.zeros(1, 3, 8, 8), to="pt2", out=f"{folder}/out")
    >>> made.passed, made.inputs
    (True, {'input': 'batch×3×8×8 float32'})
    """
    chosen = from_keywords(ExportOptions, options)
    refuse_unknown("export", options, ExportOptions)
    if chosen.out is None:
        raise UsageError("there is no place to export to", hint="--out DIR, or out=")
    names = (chosen.to,) if isinstance(chosen.to, str) else tuple(dict.fromkeys(chosen.to))
    formats = [format_named(name) for name in names]
    quantized = int8_formats(chosen, formats)
    for each in (*formats, *quantized.values()):
        each.require()
    files = (REPORT, *(file for each in (*formats, *quantized.values()) for file in each.files))
    place = partial(check_place, chosen.out, force=chosen.force, files=ALL_FILES, marker=REPORT, schema=EXPORT_SCHEMA)
    place()
    say = progress or silent
    loaded = loaded_of(model, example_inputs)
    program, expected, notes = _prepared(loaded.model, loaded.example_inputs, chosen, say)
    samples = Samples(chosen, loaded, program.axes) if quantized else None
    args, kwargs = expected[0].call
    with torch.no_grad():
        seconds = measured(lambda: program.model(*args, **kwargs))
    say("torch.export", None)
    if limits := program.limits:
        notes.append(f"the exports hold for {', '.join(limits)}: by other sizes the model's code may decide otherwise")
    weights = {id(t): t.nbytes for t in (*program.model.parameters(), *program.model.buffers())}
    with TemporaryDirectory() as scratch:
        rows = []
        for number, each in enumerate(formats):
            rows.append(_exported(each, program, expected, Path(scratch), _at(say, number / len(formats))))
            if samples is not None and each.name in quantized and rows[-1].passed:
                say(f"{each.name}: calibrating and measuring int8", None)
                rows.append(quantize((each, quantized[each.name]), program, expected, Path(scratch), samples))
        notes += [] if samples is None else samples.notes
        if program.libraries and {"pt2", "source"} & {row.format for row in rows if row.passed}:
            needed = " and ".join(f"import {library}" for library in program.libraries)
            notes.append(f"operations that torch does not have: {needed} before torch.export.load; model.py does")
        name = target or loaded.target or type(loaded.model).__name__
        inputs, outputs = _described(program, expected[0].output)
        result = Exports(name, tuple(rows), inputs, outputs, sum(weights.values()), seconds, (*loaded.notes, *notes))
        if any(row.passed for row in rows):
            with new_folder(chosen.out, files) as folder:
                for file in Path(scratch).iterdir():
                    copyfile(file, folder / file.name)
                (folder / REPORT).write_text(result.to_json(), encoding="utf-8")
                place()  # what came there meanwhile is not ours to replace
    return result


def differing_error(rows: Sequence[Exported]) -> VerificationError:
    """Why an export, the first that differs from the model, is not left behind."""
    first = next(row for row in rows if not row.passed)
    return VerificationError(
        f"the {first.format} export does not do what the model does", where=first.differs_at, got=first.detail
    )


def export_target(target: TargetOptions, options: ExportOptions, *, progress: Progress | None = None) -> Exports:
    """The same for what can be typed."""
    (progress or silent)("loading", None)
    return export(open_target(target), progress=progress, **vars(options))


def _prepared(
    model: nn.Module, example_inputs: Inputs, options: ExportOptions, say: Progress
) -> tuple[Program, list[Expected], list[str]]:
    """What is exported, what it should compute, and notes."""
    tensors = (*model.parameters(), *model.buffers())
    if any(t.is_meta for t in tensors):
        raise RefusedError("the model has no weights to export: they are on meta")
    notes = ["exported in evaluation mode; the model is in training mode"] if model.training else []
    plain = unfuse(model).cpu().eval().requires_grad_(False)
    args, kwargs = split_inputs(example_inputs)
    draws = Draws(example_inputs, torch.device("cpu"), 0)
    names = tuple(input_names(plain, args, kwargs))
    say("which axes may vary", None)
    with untouched(plain):
        axes = batch_axes(plain, draws, names) if not options.static else tuple({} for _ in names)
    if not options.static and not any(axes):
        notes.append("static: the model takes no other batch size than the example's")
    axes, example = _with_dynamic(axes, options.dynamic, names, [tuple(t.shape) for t in tensors_of((args, kwargs))])
    say("running the model at two sizes", None)
    with untouched(plain):  # a size that code keeps of a run would be fixed in the export
        expected = expectations(plain, draws, axes, example)
    labels = list(dict.fromkeys(label for each in axes for label in each.values()))
    sizes = {label: k + 2 for k, label in enumerate(labels)} | example
    inputs = draws.resized([{axis: sizes[label] for axis, label in each.items()} for each in axes])
    return Program(plain, inputs, names, _output_names(expected[0].output, names), axes), expected, notes


def _with_dynamic(
    axes: Axes, texts: Sequence[str], names: Sequence[str], shapes: Sequence[tuple[int, ...]]
) -> tuple[Axes, dict[str, int]]:
    """Axes with those of ``--dynamic``, and the sizes of these in the example."""
    result, example = [dict(each) for each in axes], dict[str, int]()
    for text in texts:
        match = re.fullmatch(r"(\w+):(\d+)(?:=([A-Za-z_]\w*))?", text)
        if match is None or match[1] not in names or int(match[2]) >= len(shapes[names.index(match[1])]):
            known = ", ".join(f"{name}:0 to {name}:{len(shape) - 1}" for name, shape in zip(names, shapes) if shape)
            raise UsageError("--dynamic names no axis of an input", expected=f"{known}, such as x:2=height", got=text)
        place, axis = names.index(match[1]), int(match[2])
        label = match[3] or f"{match[1]}_{axis}"
        result[place][axis] = label
        example[label] = shapes[place][axis]
    return tuple(result), example


def _output_names(output: Flat, taken: Sequence[str]) -> dict[str, str]:
    """Path of an output tensor to its name: a dict's keys as they are, others numbered."""
    names: dict[str, str] = {}
    for path in output.tensors:
        name = identifier(path).lstrip("_")
        name = name if name.isidentifier() else f"output_{name}".rstrip("_")
        while name in taken or name in names.values():
            name += "_out"
        names[path] = name
    return names


def _at(say: Progress, share: float) -> Callable[[str], None]:
    return lambda what: say(what, share)


def _exported(
    each: Format, program: Program, expected: Sequence[Expected], folder: Path, say: Callable[[str], None]
) -> Exported:
    """Writes one format, runs it and compares; deletes it where it differs."""
    say(f"{each.name}: writing")
    error: float | None = None
    seconds, engine, where = None, "", None
    try:
        each.write(program, folder)
        say(f"{each.name}: running at two sizes")
        done = each.run(program, folder, [one.call for one in expected])
        seconds, engine = done.seconds, done.engine
        problems, error, at = judge(program, expected, done)
        where = first_difference(program, each, folder, at) if problems else None
    except PwrewriteError as failure:
        problems = [f"{failure.message}: {failure.got}" if failure.got else failure.message]
    except Exception as failure:  # of other people's exporters and runtimes, which raise anything
        if lacks_room(failure):
            reason = getattr(failure, "strerror", None) or first_line(failure)
            hint = "make room there, or name another place in TMPDIR"
            raise OutputError(
                f"cannot write the {each.name} export: {reason}", where=str(folder), hint=hint
            ) from failure
        problems = [first_line(failure)]
    if any("SyntaxError" in problem for problem in problems) and (named := named_by_keyword(program.model)):
        problems.append(f"torch writes the names of modules into code, and a part of {named} is a keyword: rename it")
    if any("nonexistent attribute" in problem for problem in problems) and (taken := taken_by_graphs(program.model)):
        problems.append(f"graphs of torch have a {taken} of their own: rename the model's {taken}")
    files = [folder / name for name in each.files if (folder / name).exists()]
    size = sum(file.stat().st_size for file in files)
    for file in files if problems else ():
        file.unlink()
    detail = "; ".join(problems[:3]) or f"agrees at {' and at '.join(one.sizes for one in expected)}"
    kept = () if problems else tuple(file.name for file in files)
    return Exported(each.name, not problems, detail, kept, size, seconds, engine, error, where)


def _described(program: Program, output: Flat) -> tuple[dict[str, str], dict[str, str]]:
    """The form of every input and output, as people read it."""
    inputs = {
        name: "×".join(axes.get(i, str(n)) for i, n in enumerate(t.shape)) + f" {dtype_text(t.dtype)}"
        for name, axes, t in zip(program.input_names, program.axes, tensors_of(program.inputs))
    }
    shapes = [tuple(map(str, t.shape)) for t in output.tensors.values()]
    sizes = program.output_sizes
    if list(map(len, sizes)) != list(map(len, shapes)):
        sizes = shapes
    outputs = {
        program.outputs[path]: f"{'×'.join(size) or 'scalar'} {dtype_text(t.dtype)}"
        for (path, t), size in zip(output.tensors.items(), sizes)
    }
    return inputs, outputs
