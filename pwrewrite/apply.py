"""The one place that changes a model: `apply` carries out a plan on a copy.

Where a layer is a module, a new module takes its place under every name it has, so the model's class, code and methods stay
(`swap`). Where it is a function call in a module's code, that one submodule becomes a graph (`graph_edit`). Weights come from
`decompose` when a plan is carried out for the first time and stay unset when saved ones will be loaded.

A rewrite that the model's own code does not survive (it reads ``conv.weight.dtype``, it tests ``isinstance(m, nn.Conv2d)``) is
found by running the result on shapes alone and taken back, op by op, into a skip.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .convolution import CONV_MODULES, ConvSpec
from .errors import PlanError, RefusedError, first_line
from .forms import check_widths, factorize, linear_spec, rank_limits, spec_from_dict
from .graph_edit import NotTraceable, functional_bias, replace_functional, to_graph
from .modules import Factorized, build
from .plan import Edit, Op, Plan, Skip, SkipReason
from .swap import Swap, held_elsewhere, names_of

Probe = Callable[[nn.Module], None]


@dataclass(frozen=True)
class Applied:
    """A plan carried out.

    Attributes:
        model: The changed copy.
        edits: What was done, in order.
        skips: Ops that were refused while carrying them out.
    """

    model: nn.Module
    edits: tuple[Edit, ...]
    skips: tuple[Skip, ...]


def apply(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of a model with a plan carried out and weights filled in.

    Args:
        model: The model the plan was made for; stays as it is.
        plan: What to do.

    Returns:
        The changed copy, in the same training mode.

    Raises:
        PlanError: If the plan does not fit the model.
        RefusedError: If an op cannot be carried out.
    """
    applied = carry_out(model, plan)
    if applied.skips:
        first = applied.skips[0]
        raise RefusedError(f"an op of the plan was refused: {first.detail}", where=first.path, got=str(first.reason))
    return applied.model


def carry_out(
    model: nn.Module,
    plan: Plan,
    *,
    fill: bool = True,
    probe: Probe | None = None,
    progress: Callable[[str], None] | None = None,
) -> Applied:
    """Carries out a plan on a copy of a model.

    Args:
        model: The model; stays as it is.
        plan: What to do.
        fill: Whether to fill in weights; without it the new parameters are unset, for saved ones.
        probe: Runs the changed model in some way and raises if it does not survive; ops that break it become skips.
        progress: Called with the path of each layer before it is worked on.

    Raises:
        PlanError: If the plan does not fit the model.
        RefusedError: If the model cannot be copied, or a weight holds NaN or Inf.
    """
    changed = copy_of(model)
    done: list[_Done] = []
    skips: list[Skip] = []
    targets = [_find(changed, op.path) for op in plan.ops if op.action == "factorize" and not op.settings.get("weight")]
    held = held_elsewhere(changed, targets) if targets else {}
    del targets
    for i, op in enumerate(plan.ops):
        if progress is not None:
            progress(op.path)
        try:
            done.append(_ACTIONS[_known(op, i)](changed, op, i, fill, held))
        except NotTraceable as error:
            skips.append(Skip(op.path, SkipReason.NOT_TRACED, str(error)))
        except _Held as error:
            skips.append(Skip(op.path, SkipReason.HELD_ELSEWHERE, str(error)))
    for entry in done:
        if entry.swap.old is changed:
            changed = entry.swap.new
    if probe is not None and done:
        for entry, error in _breaking(done, lambda: probe(changed)):
            done.remove(entry)
            detail = f"the model's own code does not survive it: {first_line(error)}"
            skips.append(Skip(entry.edit.path, SkipReason.BROKE_MODEL, detail))
    return Applied(changed, tuple(entry.edit for entry in done), tuple(skips))


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy.

    Raises:
        RefusedError: If the model cannot be copied.
    """
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise RefusedError(
            f"the model cannot be copied, and it is never changed in place: {first_line(error)}",
            where=type(model).__name__,
            hint="tensors that carry a gradient history are the usual cause; detach them",
        ) from error


@dataclass(frozen=True)
class _Done:
    """An edit with the way back."""

    edit: Edit
    swap: Swap


class _Held(RuntimeError):
    """A module that something else refers to."""


def _breaking(done: Sequence[_Done], probe: Callable[[], None]) -> list[tuple[_Done, Exception]]:
    """The edits that the probe does not survive, by halves; the rest is in place afterwards."""
    for entry in done:
        entry.swap.redo()
    try:
        probe()
        return []
    except Exception as error:
        failure = error
    for entry in reversed(done):
        entry.swap.undo()
    if len(done) == 1:
        return [(done[0], failure)]
    middle = len(done) // 2
    found = _breaking(done[:middle], probe)
    bad = {id(entry) for entry, _ in found}
    good = [entry for entry in done[:middle] if id(entry) not in bad]
    rest = _breaking_after(good, done[middle:], probe)
    return found + rest


def _breaking_after(
    good: Sequence[_Done], rest: Sequence[_Done], probe: Callable[[], None]
) -> list[tuple[_Done, Exception]]:
    """The edits of ``rest`` that the probe does not survive while those of ``good`` are in place."""
    for entry in good:
        entry.swap.redo()
    return _breaking(rest, probe)


def _known(op: Op, index: int) -> str:
    if op.action not in _ACTIONS:
        raise PlanError(
            f"unknown action {op.action!r}", where=f"ops[{index}] ({op.path})", expected=" or ".join(_ACTIONS)
        )
    return op.action


def _find(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise PlanError(
            f"the model has no module {path!r}",
            where=path,
            expected="a path of this model",
            hint="the plan was made for another model, or for this one before another rewrite",
        ) from None


# ------------------------------------------------------------------------------------------------- factorize


def _factorize(model: nn.Module, op: Op, index: int, fill: bool, held: dict[int, str]) -> _Done:
    where = f"ops[{index}] ({op.path})"
    settings = op.settings
    spec = spec_from_dict(settings.get("layer"), f"{where}.settings.layer")
    form = str(settings.get("form"))
    widths = check_widths(spec, form, settings.get("widths") or {}, f"{where}.settings.widths")
    init = settings.get("init", "weights")
    if init not in ("weights", "fresh"):
        raise PlanError("unknown init", where=where, expected="weights or fresh", got=repr(init))
    weight_name = settings.get("weight")
    if weight_name:
        return _factorize_function(model, op, spec, form, widths, fill, where)
    old = _find(model, op.path)
    _fits(old, spec, where)
    if id(old) in held:
        raise _Held(f"also held by {held[id(old)]}, which would keep calling the old one")
    weight: Tensor = old.weight  # type: ignore[assignment]
    bias: Tensor | None = old.bias  # type: ignore[assignment]
    new, error = _made(op, spec, form, widths, weight, bias, fill)
    paths = names_of(model, old)
    swap = Swap(model, old, new)
    return _Done(_edit(op, "module", spec, form, widths, new, error, paths), swap)


def _made(
    op: Op, spec: ConvSpec, form: str, widths: dict[str, int], weight: Tensor, bias: Tensor | None, fill: bool
) -> tuple[Factorized, float | None]:
    """The new module, with weights where they are to be filled in, and the relative error of its weights."""
    fresh = op.settings.get("init") == "fresh"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        new = build(
            spec,
            form,
            widths,
            axes=op.settings.get("axes"),
            norm=op.settings.get("norm"),
            activation=op.settings.get("activation"),
            device=weight.device,
            dtype=weight.dtype,
        )
    error = None
    if fill and not fresh and not weight.is_meta:
        try:
            factors = factorize(weight, spec, form, widths, axes=op.settings.get("axes"))
        except RefusedError as refused:
            raise RefusedError(refused.message, where=op.path, got=refused.got, hint=refused.hint) from None
        new.load_factors(factors, bias)
        error = factors.relative_error
    for parameter in new.parameters():
        parameter.requires_grad_(weight.requires_grad)
    return new, error


def _edit(
    op: Op,
    kind: str,
    spec: ConvSpec,
    form: str,
    widths: dict[str, int],
    new: Factorized,
    error: float | None,
    paths: tuple[str, ...],
    graph_module: str | None = None,
    old_names: tuple[str, ...] = ("weight", "bias"),
    new_path: str | None = None,
) -> Edit:
    used = list(widths.values())
    full = all(widths[name] == limit for name, limit in rank_limits(spec, form).items())
    prefix = op.path if new_path is None else new_path
    inner = [f"{prefix}.{name}" if prefix else name for name, _ in new.named_parameters()]
    last = new.stage_names[-1]
    weight_names = tuple(n for n in inner if not n.endswith(f"{last}.bias"))
    bias_names = tuple(n for n in inner if n.endswith(f"{last}.bias"))
    stem = f"{op.path}." if op.path and kind == "module" else ""
    renamed = {stem + old_names[0]: weight_names}
    if spec.bias and len(old_names) > 1:
        renamed[stem + old_names[1]] = bias_names
    return Edit(
        op,
        kind,
        form,
        used[0],
        used[-1],
        spec.params,
        sum(p.numel() for p in new.parameters()),
        error,
        "both" if full and error is not None else None,
        renamed,
        tuple(p for p in paths if p != op.path),
        graph_module,
    )


def _fits(module: Any, spec: ConvSpec, where: str) -> None:
    """Checks that a module is the layer that an op was made for."""
    if isinstance(module, nn.Linear):
        found = linear_spec(module.in_features, module.out_features, module.bias is not None)
    elif isinstance(module, CONV_MODULES):
        found = ConvSpec.of_module(module)
    else:
        raise PlanError(
            "the plan replaces a layer that is none here",
            where=where,
            expected="a convolution or linear module",
            got=type(module).__name__,
            hint="the plan was made for another model, or was applied already",
        )
    if found != spec:
        raise PlanError(
            "the plan was made for another layer",
            where=where,
            expected=_brief(spec),
            got=_brief(found),
            hint="make the plan anew for this model",
        )


def _brief(spec: ConvSpec) -> str:
    kernel = "×".join(map(str, spec.kernel_size)) or "linear"
    return f"{spec.in_channels}→{spec.out_channels} {kernel}, stride {spec.stride}, groups {spec.groups}"


def _factorize_function(
    model: nn.Module, op: Op, spec: ConvSpec, form: str, widths: dict[str, int], fill: bool, where: str
) -> _Done:
    scope, weight_name = str(op.settings.get("scope", "")), str(op.settings["weight"])
    module = _find(model, scope)
    inside = weight_name[len(scope) + 1 :] if scope else weight_name
    if scope and not weight_name.startswith(f"{scope}."):
        raise NotTraceable(f"{weight_name} lies outside {scope}, whose code reads it")
    owner, _, attribute = weight_name.rpartition(".")
    weight = getattr(_find(model, owner), attribute, None)
    if not isinstance(weight, Tensor) or tuple(weight.shape) not in (spec.weight_shape, spec.weight_shape[:2]):
        raise PlanError(
            "the plan was made for another weight", where=where, expected=_brief(spec), got=str(weight_name)
        )
    made = to_graph(module)
    bias_name, bias = functional_bias(module, inside)
    new, error = _made(op, spec, form, widths, weight, bias, fill)
    registered = replace_functional(made, inside, f"{inside.replace('.', '_')}_{form}", new)
    names = (weight_name, f"{scope}.{bias_name}" if scope and bias_name else bias_name or "")
    path = f"{scope}.{registered}" if scope else registered
    if module is model:
        swap = _RootSwap(model, made)
    else:
        swap = Swap(model, module, made)
    edit = _edit(op, "graph", spec, form, widths, new, error, (), scope, names, path)
    return _Done(edit, swap)


class _RootSwap(Swap):
    """The replacement of the model itself, which no parent registers."""

    def __init__(self, old: nn.Module, new: nn.Module) -> None:
        self.old, self.new, self._places = old, new, []


_ACTIONS: dict[str, Callable[[nn.Module, Op, int, bool, dict[str, int | Any]], _Done]] = {"factorize": _factorize}
