"""Gates that a build can hang on, and how two models differ: `check`, `diff` and what the commands call.

A gate compares costs that shapes alone decide, so that the same model gives the same verdict on every machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from numbers import Real
from pathlib import Path

from torch import nn

from ..analysis.costs import Costs, Difference, compare
from ..analysis.gates import GateResult, judge
from ..analysis.records import Analysis
from ..capturing import Inputs
from ..core import files
from ..core.declaring import from_keywords, refuse_unknown
from ..core.errors import InputError, UsageError
from ..core.numbers import parse_increase
from ..core.options import GateOptions, TargetOptions
from ..targets.storage import is_saved, read_plan
from .analyze import analyze, analyze_target
from .pass_names import as_list


def check(
    model: nn.Module, example_inputs: Inputs, *, target: str = "", gate: GateOptions | None = None, **limits: object
) -> GateResult:
    """Holds a model against limits, from shapes alone.

    Args:
        model: Any module; it is not changed.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword ones, real or on ``meta``.
        target: What to call the model; its class name by default.
        gate: The limits.
        **limits: The same as keywords, as fields of `pwrewrite.core.options.GateOptions`: ``max_macs="600M"``,
            ``baseline=analysis``.

    Raises:
        PwrewriteError: If the model does not run on these inputs, or the limits make no sense.

    >>> import torch
    >>> small = check(nn.Conv2d(3, 8, 3), torch.empty(1, 3, 8, 8, device="meta"), max_macs="10k", max_params=100)
    >>> small.passed, [(finding.name, finding.value, finding.severity) for finding in small.findings]
    (False, [('parameters', 224, 'failed'), ('MACs', 7776, 'passed')])
    """
    if gate is None:
        gate = from_keywords(GateOptions, limits)
    refuse_unknown("check", limits, GateOptions)
    gate = _read(gate)
    _require_limits(gate)
    baseline = None if gate.baseline is None else costs_of(gate.baseline)
    return judge(analyze(model, example_inputs, target=target), gate, baseline)


def check_target(target: TargetOptions, gate: GateOptions) -> GateResult:
    """The same for what can be typed."""
    _require_limits(gate)
    baseline = None if gate.baseline is None else costs_of(gate.baseline, target)
    return judge(analyze_target(target), gate, baseline)


def _read(gate: GateOptions) -> GateOptions:
    """Limits as Python calls give them, with their numbers checked."""
    for name in ("max_params", "max_macs", "max_weights", "max_peak_memory", "warn_at"):
        limit = getattr(gate, name)
        if limit is not None and not (isinstance(limit, Real) and float(limit) >= 0):
            raise UsageError(f"{name} makes no sense", expected="a number from 0", got=repr(limit))
    increase: object = gate.max_increase
    given = [f"{k}={v}" for k, v in increase.items()] if isinstance(increase, Mapping) else as_list(increase)
    return replace(gate, max_increase=dict(parse_increase(str(each), "max_increase") for each in given))


def _require_limits(gate: GateOptions) -> None:
    if gate.max_increase and gate.baseline is None:
        raise UsageError("--max-increase needs a --baseline to increase from")
    limits = (gate.max_params, gate.max_macs, gate.max_weights, gate.max_peak_memory, gate.baseline)
    if all(limit is None for limit in limits) and not gate.strict:
        raise UsageError("there is no limit to check", hint="--max-params 5M, --max-macs 600M or --baseline FILE")


def costs_of(target: str | Path | Analysis, opened: TargetOptions | None = None) -> Costs:
    """What a target costs, or an analysis, also one in a ``.json`` file, which is read and never run.

    ``opened`` says how a target is opened; weights, which do not change costs, are left out.
    """
    if isinstance(target, Analysis):
        return Costs.of(target)
    if not isinstance(target, (str, Path)):
        raise InputError(
            "this is no analysis",
            expected="an Analysis, or the name of a JSON file with one, of a saved folder or of a model",
            got=type(target).__name__,
            hint="pwrewrite.analyze(model, example_inputs) gives one" if isinstance(target, nn.Module) else None,
        )
    target = str(target)
    if Path(target).suffix == ".json":
        try:
            text = files.read_text(target)
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"cannot read the analysis: {reason}", where=target) from None
        return Costs.from_json(text, target)
    opened = opened or TargetOptions(target)
    base = opened.base
    if not is_saved(target):
        return Costs.of(analyze_target(replace(opened, target=target, weights=None, base=None)))
    if base is None and not is_saved(opened.target) and Path(opened.target).suffix != ".json":
        base, opened = opened.target, replace(opened, args=opened.args or read_plan(target).model.get("args") or {})
    return Costs.of(analyze_target(replace(opened, target=target, weights=None, base=base)))


def diff(
    before: str | Path | Analysis, after: str | Path | Analysis, opened: TargetOptions | None = None
) -> Difference:
    """How the costs of two models differ, layer by layer.

    Each is an `Analysis`, an analysis that was written as JSON, a saved folder or any other target, opened as
    ``opened`` says. Raises `PwrewriteError` if one does not lead to a model, or is no analysis.
    """
    return compare(costs_of(before, opened), costs_of(after, opened))
