"""The whole way to a model that serves: fold, plan, rewrite, refit, fuse, verify, export, measure: `compress`.

Norms are folded before anything is planned, since runtimes fold them, too. The rewritten model is proven against the
original, the fused one against the rewritten one in float64, every export in its own runtime. Each of these is a stage
of `pwrewrite.workflows.stages`; only the times are measured anew in every run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from shutil import copyfile, rmtree
from typing import Any

import torch
from torch import nn

from ..analysis import analyze_capture
from ..analysis.records import Analysis, versions
from ..capturing import Inputs, capture, split_inputs
from ..core.declaring import changed, flag_of, from_keywords
from ..core.errors import OutputError, RefusedError, UsageError
from ..core.exports import Exported
from ..core.files import new_folder, read_text
from ..core.modes import plain_modes
from ..core.names import ENGINE_NAMES
from ..core.nested import hash_tensors, tensors_of
from ..core.numbers import plural
from ..core.options import Budget, CompressOptions, ExportOptions, PassOptions, Proof, TargetOptions
from ..core.plan import Plan
from ..core.processes import world
from ..core.records import Shown
from ..edit.swap import copy_of
from ..engines.choosing import time_everywhere
from ..engines.engine import engine_named, with_threads
from ..engines.exporting import format_named
from ..engines.timing import device_name
from ..passes.fold_batch_norm import FoldBatchNorm
from ..planning.augment import source_of
from ..planning.batches import stable
from ..planning.budget import budgets_of
from ..planning.cache import content_key
from ..planning.calibrating import batches_of
from ..planning.room import samples_in_run
from ..report.readme import compressed_readme
from ..report.records import COMPRESS_SCHEMA, BudgetReport, Compression, Frontier
from ..report.web_data import done_to
from ..targets import LoadedModel, open_target
from ..targets.storage import PLAN, README, REPORT, WEIGHTS, check_place, plan_text, read_names, read_plan, restore
from .export import ALL_FILES, REPORT as EXPORT_REPORT, differing_error, export
from .fuse import drawn_inputs, fuse, outputs_of
from .fuse_timing import latencies
from .int8 import DATA, int8_formats
from .rewrite import rewrite
from .stages import Stages
from .steps import Progress, join_names, silent
from .subject import Subject, loaded_of, plan_from_original
from .what import opened, what_from_keywords, what_of

_FILES = (WEIGHTS, PLAN, REPORT, README, *(f"export/{name}" for name in ALL_FILES))
_DATA = ("calibration", "batch", "preprocess", "labels", "metric", "plan", "first", "augment")
"""Fields of a budget that are known by what comes of them."""


@dataclass(frozen=True, repr=False)
class Compressed(Shown):
    """The result of `compress`: the fused model, the plan that leads to it from the original, and the report."""

    model: nn.Module
    plan: Plan
    report: Compression


def compress(
    model: Subject,
    example_inputs: Inputs | None,
    budget: object,
    calibration: Iterable[object] | str | None = None,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> Compressed:
    """Makes a model smaller and faster within a budget, and takes it to the runtimes where it will serve.

    A stage whose inputs have not changed since an earlier run, finished or not, is not done again.

    Args:
        model: Any module, or what `pwrewrite.load_target` gives; stays as it is.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword ones; a loaded model has its own.
        budget: A `pwrewrite.Budget`, or its limits: ``{"macs": 0.5}``.
        calibration: A few hundred inputs: any iterable of batches.
        progress: Called at each step with what is being done and how much of it is done.
        **options: Fields of `pwrewrite.core.options`: of `CompressOptions` (``out``, ``export``, ``force``), `Budget`,
            `Proof` (``max_error``) and `ExportOptions` (``dynamic``, ``static``, ``int8``).

    Returns:
        The fused copy with its plan and report.

    Raises:
        RefusedError: If the budget cannot be met.
        VerificationError: If a stage or an export does not do what it should; nothing is written then.
        OutputError: If the folder cannot be written, or exists without ``force``.
        UsageError: If options make no sense, or what a format needs is not installed.
    """
    chosen = from_keywords(CompressOptions, options)
    axes: dict[str, Any] = {name: options.pop(name) for name in ("dynamic", "static", "int8") if name in options}
    exporting = from_keywords(ExportOptions, axes)
    if calibration is not None:
        options["calibration"] = calibration
    what, proof = what_from_keywords("compress", None, {"budget": budget, **options})
    what = _checked(what, chosen, exporting)
    loaded = loaded_of(model, example_inputs)
    return _compressed(loaded, what, proof, (chosen, exporting), progress or silent)


def compress_target(
    target: TargetOptions,
    budget: Budget,
    proof: Proof,
    chosen: CompressOptions,
    exporting: ExportOptions,
    *,
    progress: Progress | None = None,
) -> Compressed:
    """The same for what can be typed."""
    what, say = _checked(what_of(PassOptions(), budget), chosen, exporting), progress or silent
    say("loading", None)
    return _compressed(loaded_of(open_target(target), None), what, proof, (chosen, exporting), say)


def _checked(budget: object, options: CompressOptions, exporting: ExportOptions) -> Budget:
    if not isinstance(budget, Budget):
        raise UsageError("there is no budget to compress to", expected="--budget latency=0.5, or budget=")
    if world() > 1:
        hint = "train with rewrite --recover under torchrun, then fuse and export what it saved"
        raise UsageError("compress is for one process", hint=hint)
    if budget.engine not in (None, "auto"):
        engine_named(str(budget.engine)).require()
    formats = [format_named(name) for name in _names(options)]
    if exporting.int8:
        formats += int8_formats(replace(exporting, calibration=budget.calibration), formats).values()
    for each in formats:
        each.require()
    for name in changed(exporting, Budget, CompressOptions) if not formats else ():
        raise UsageError(f"{flag_of(ExportOptions, name)} goes with --export")
    if options.out is not None:
        _check_place(options)
    elif options.export:
        raise UsageError("there is no place to export to", hint="--out DIR, or out=")
    return budget


def _names(options: CompressOptions) -> tuple[str, ...]:
    return (options.export,) if isinstance(options.export, str) else tuple(options.export)


def _check_place(options: CompressOptions) -> None:
    assert options.out is not None
    check_place(options.out, force=options.force, files=_FILES, marker=REPORT, schema=COMPRESS_SCHEMA)


@plain_modes()
def _compressed(
    given: LoadedModel, budget: Budget, proof: Proof, to: tuple[CompressOptions, ExportOptions], say: Progress
) -> Compressed:
    options, exporting = to
    formats = _names(options)
    # Plans of stages lead from the model that was given; in the end they are put behind what led to it.
    loaded = replace(given, plan=None, names={}, origin="", notes=())
    if given.model.training:
        loaded = replace(loaded, model=copy_of(given.model).eval())
    read = partial(_read, loaded=loaded)
    with Stages("compress", ("rewrite", "fuse", *(("export",) if formats else ()), "measure"), say) as stages:
        stages.progress("rewrite")("reading the calibration inputs", None)
        budget = opened(budget, loaded)
        if budget.calibration is not None:
            budget = replace(budget, calibration=stable(budget.calibration, 32))
        data = {name: getattr(budget, name) for name in DATA} if exporting.int8 else {}
        budget, stages.key = _prepared(budget, loaded, proof)
        rewritten, rewriting = stages.done(
            "rewrite",
            {},
            lambda at, say: _rewritten(loaded, budget, proof, at, say),
            read,
        )
        fused, fusing = stages.done(
            "fuse", {}, lambda at, say: fuse(rewritten, progress=say).save(at, force=True), read
        )
        exports: dict[str, Any] = {"formats": [], "notes": []}
        if formats:
            settings: dict[str, Any] = {name: getattr(exporting, name) for name in ("dynamic", "static", "int8")}
            kinds = [form for each in map(format_named, formats) for form in (each, each.int8) if form is not None]
            packages = {name: _version(name) for form in kinds for name in form.needs}
            exports = stages.done(
                "export",
                {"to": formats, **settings, "packages": packages},
                lambda at, say: _exported(fused, at, say, {"to": formats, **settings, **data}, budget.threads),
                _read_exports,
            )
        engine = str(rewriting["budget"].get("engine") or "").partition(" ")[0]  # the one that auto has chosen
        ran, seconds = stages.timed("measure", partial(_measured, loaded, fused, budget, engine))
        result = Compression(
            given.target or type(given.model).__name__,
            ran,
            rewriting["before"],
            fusing["after"],
            dict(zip(("before", "after"), seconds.pop(engine))),
            BudgetReport.from_dict(rewriting["budget"]),
            {"rewrite": rewriting["verification"], "fuse": fusing["verification"]},
            tuple(exports["formats"]),
            stages.seconds,
            seconds,
            tuple(
                dict.fromkeys((*given.notes, *rewriting["notes"], *fusing["notes"], *exports["notes"], *stages.notes))
            ),
            models=(_analysis(loaded), _analysis(fused)),
            done=done_to(rewriting["edits"], rewriting["skipped"]),
            frontier=Frontier.from_dict(rewriting["frontier"]) if "frontier" in rewriting else None,
        )
        plan = plan_from_original(given, fused.plan or Plan())
        if options.out is not None:
            text = plan_text(plan, join_names(given.names, fused.names))
            result = _written(result, text, compressed_readme(result, plan, options.out), stages.places, options)
    return Compressed(fused.model, plan, result)


def _rewritten(loaded: LoadedModel, budget: Budget, proof: Proof, place: Path, say: Progress) -> None:
    """Saves what comes of a budget, with what other budgets would lose."""
    result = rewrite(loaded, None, budget, proof=proof, progress=say)
    say("working out the frontier", None)
    replace(result, report=result.report.with_frontier()).save(place, force=True)


def _analysis(loaded: LoadedModel) -> Analysis:
    return analyze_capture(capture(loaded.model, loaded.example_inputs), target=loaded.target)


def _prepared(budget: Budget, loaded: LoadedModel, proof: Proof) -> tuple[Budget, str]:
    """The budget with its inputs opened, and a hash of all that a rewrite depends on."""
    if any(t.is_meta for t in (*loaded.model.parameters(), *loaded.model.buffers())):
        raise RefusedError("a model without weights cannot be compressed: they are on meta")
    captured = capture(loaded.model, loaded.example_inputs)
    budget = replace(budget, first=(FoldBatchNorm(),))
    inputs, data = drawn_inputs(loaded.example_inputs), ""
    tensors = [*tensors_of(inputs), *outputs_of(loaded.model, inputs)]
    if budget.calibration is not None:
        size, chunk = budget.calibration_size, samples_in_run(captured)
        batches = batches_of(budget.calibration, loaded.example_inputs, budget, size, chunk)
        budget, data, labels = replace(budget, calibration=batches), batches.fingerprint, batches.labels()
        tensors += [] if labels is None else [labels]
    threads = budget.threads or torch.get_num_threads()
    engines = [each.version for each in map(engine_named, ENGINE_NAMES) if budget.engine and not each.missing]
    facts = {name: value for name, value in vars(budget).items() if name not in _DATA}
    facts |= {"limits": [str(limit) for limit in budgets_of(budget.limits)], "metric": source_of(budget.metric)}
    facts["augment"] = budget.augment if isinstance(budget.augment, str) else source_of(budget.augment)
    facts |= {"proof": vars(proof), "versions": versions(), "on": [device_name(tensors[0].device), threads, engines]}
    facts["values"] = hash_tensors(tensors)
    return budget, content_key(captured, {}, data, {"facts": json.dumps(facts, default=str)})


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _read(place: Path, loaded: LoadedModel) -> tuple[LoadedModel, dict[str, Any]]:
    """The model that a stage has saved, and its report."""
    model = restore(place, loaded.model)
    return replace(loaded, model=model, plan=read_plan(place), names=read_names(place)), _data(place / REPORT)


def _exported(model: LoadedModel, place: Path, say: Progress, settings: Mapping[str, Any], threads: int | None) -> None:
    """Exports all formats, or none; raises `VerificationError` where one differs from the model."""
    with with_threads(threads):
        result = export(model, out=place, force=True, progress=say, **settings)
    if not result.passed:
        rmtree(place, ignore_errors=True)
        raise differing_error(result.formats)


def _read_exports(place: Path) -> dict[str, Any]:
    data = _data(place / EXPORT_REPORT)
    rows = [Exported(**{**row, "files": tuple(row["files"])}) for row in data["formats"]]
    if not data["passed"] or not all((place / file).is_file() for row in rows for file in row.files):
        raise OutputError("not every format is there", where=str(place))
    return {**data, "formats": rows}


def _data(file: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(read_text(file))
    return data


def _measured(
    before: LoadedModel, after: LoadedModel, budget: Budget, engine: str, say: Progress
) -> tuple[str, dict[str, tuple[float, float]]]:
    """What ran, and what both models take: there first, then in the other engines."""
    say("timing both models", None)
    models = [before.model, after.model]
    if not engine:
        with with_threads(budget.threads):
            first, then = latencies(models, before.example_inputs)
        threads = plural(budget.threads or torch.get_num_threads(), "thread")
        return f"torch {torch.__version__}, {threads}", {"": (first, then)}
    times = time_everywhere(models, *split_inputs(drawn_inputs(before.example_inputs)), threads=budget.threads)
    if engine not in times.times:
        raise RefusedError(f"the models cannot be measured in {engine}", got="; ".join(times.notes))
    return str(times.ran[engine]), {engine: times.seconds[engine], **times.seconds}


def _written(
    result: Compression, plan: str, text: str, places: Mapping[str, Path], options: CompressOptions
) -> Compression:
    """Puts the results of the stages into the folder; the report with its files."""
    assert options.out is not None
    with new_folder(options.out, _FILES) as folder:
        copyfile(places["fuse"] / WEIGHTS, folder / WEIGHTS)
        (folder / PLAN).write_text(plan, encoding="utf-8")
        if "export" in places:
            (folder / "export").mkdir()
        for file in places["export"].iterdir() if "export" in places else ():
            copyfile(file, folder / "export" / file.name)
        files = {file.relative_to(folder).as_posix(): file.stat().st_size for file in sorted(folder.rglob("*.*"))}
        result = replace(result, files=files)
        (folder / REPORT).write_text(result.to_json(), encoding="utf-8")
        (folder / README).write_text(text, encoding="utf-8")
        _check_place(options)  # what came there meanwhile is not ours to replace
    return result
