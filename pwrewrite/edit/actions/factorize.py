"""``factorize``: a layer becomes a chain of smaller ones.

Settings: ``form`` and ``widths`` (see `pwrewrite.forms`), ``axes`` for the spatial form, ``init`` (``weights`` or
``fresh``) with ``norm`` and ``activation``, ``layer`` (the shape facts of the layer the op was made for); for a
functional call also ``weight`` (full name of the parameter) and ``scope`` (path of the module whose code makes the
call).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...capturing.code_trace import NotTraceable
from ...core.convolution import ConvSpec
from ...core.errors import PlanError, RefusedError
from ...core.plan import Edit, Op, Skip, SkipReason
from ...decompose import Factors
from ...forms import read_form
from ...forms.form import Axes, Form
from ...forms.specs import spec_from_dict
from ...layers.factorized import ACTIVATIONS, NORMS, Factorized, build
from ..graph_edit import FunctionalCall
from .bench import Bench, Refused, brief, make_like
from .evaluation import code_graph

INITS = ("weights", "fresh")


@dataclass(frozen=True)
class _Request:
    """The settings of an op, checked."""

    spec: ConvSpec
    form: Form
    widths: dict[str, int]
    axes: Axes
    fresh: bool
    norm: str | None
    activation: str | None


def factorize_layer(bench: Bench, op: Op) -> Edit:
    """Carries out a ``factorize`` op.

    Raises:
        PlanError: If the op makes no sense or was made for another layer.
        RefusedError: If the weight holds NaN or Inf.
        Refused: If the layer must stay as it is.
    """
    request = _read(op)
    if op.settings.get("weight") is not None:
        return _function(bench, op, request)
    old = bench.layer(op, op.path, request.spec)
    new, error = _make(bench, op, request, old.weight, old.bias)
    new.train(old.training)
    paths = bench.names_of(old)
    bench.replace(old, new)
    stem = f"{op.path}." if op.path else ""
    return Edit(
        **_common(op, request, new, error),
        kind="module",
        renamed=_renamed(stem, new, f"{stem}weight", f"{stem}bias" if request.spec.bias else None),
        aliases=tuple(path for path in paths if path != op.path),
    )


def _function(bench: Bench, op: Op, request: _Request) -> Edit:
    """The same for a functional call: the module whose code makes it becomes a graph."""
    scope, weight_name = op.settings.get("scope", ""), op.settings["weight"]
    for key, value in (("scope", scope), ("weight", weight_name)):
        if not isinstance(value, str):
            raise PlanError(f"{key} is no path", where=op.where(key), expected="a string", got=repr(value))
    module = bench.find(op, scope, "scope")
    prefix = f"{scope}." if scope else ""
    if not weight_name.startswith(prefix):
        detail = f"{weight_name} lies outside {scope}, whose code reads it"
        raise Refused(Skip(op.path, SkipReason.NOT_TRACED, detail))
    owner, _, attribute = weight_name.rpartition(".")
    weight = getattr(bench.find(op, owner, "weight"), attribute, None)
    if not isinstance(weight, Tensor):
        raise PlanError(
            "the model has no such weight", where=op.where("weight"), expected="a parameter", got=weight_name
        )
    bench.check_held(op.path, module)
    try:
        made = code_graph(module)
        call = FunctionalCall(made, weight_name.removeprefix(prefix))
    except NotTraceable as failure:
        raise Refused(Skip(op.path, SkipReason.NOT_TRACED, str(failure))) from failure
    if call.spec != request.spec:
        raise PlanError(
            "the plan was made for another call",
            where=op.where("layer"),
            expected=brief(call.spec),
            got=brief(request.spec),
            hint="make the plan anew for this model",
        )
    new, error = _make(bench, op, request, weight, call.bias)
    name = call.replace(f"{call.weight.replace('.', '_')}_{request.form.name}", new)
    new.train(module.training)
    bench.replace(module, made)
    bias_name = f"{prefix}{call.bias_name}" if call.bias_name else None
    return Edit(
        **_common(op, request, new, error),
        kind="graph",
        renamed=_renamed(f"{prefix}{name}.", new, weight_name, bias_name),
        graph_module=scope,
    )


def _read(op: Op) -> _Request:
    """The settings of an op.

    Raises:
        PlanError: If they make no sense.
    """
    settings = op.settings
    spec = spec_from_dict(settings.get("layer"), op.where("layer"))
    form, axes = read_form(spec, settings.get("form"), settings.get("axes"), op.where)
    widths = form.read_widths(spec, settings.get("widths"), axes, op.where)
    init, norm, activation = settings.get("init", "weights"), settings.get("norm"), settings.get("activation")
    for key, value, known in (
        ("init", init, INITS),
        ("norm", norm, (None, *NORMS)),
        ("activation", activation, (None, *ACTIVATIONS)),
    ):
        if value not in known:
            expected = f"one of {', '.join(name for name in known if name)}"
            raise PlanError(f"unknown {key}", where=op.where(key), expected=expected, got=repr(value))
    if init == "weights" and (norm or activation):
        key = "norm" if norm else "activation"
        raise PlanError(
            f"a chain with weights has no {key} inside", where=op.where(key), expected="init fresh, or none"
        )
    return _Request(spec, form, widths, axes, init == "fresh", norm, activation)


def _make(
    bench: Bench, op: Op, request: _Request, weight: Tensor, bias: Tensor | None
) -> tuple[Factorized, float | None]:
    """The new module, filled where it is to be, and the relative error of its weights."""

    def make(device: Any) -> nn.Module:
        return build(
            request.spec,
            request.form.name,
            request.widths,
            axes=request.axes,
            norm=request.norm,
            activation=request.activation,
            device=device,
            dtype=weight.dtype,
        )

    new = make_like(weight, op.path, make, initialised=request.fresh)
    assert isinstance(new, Factorized)
    error = None
    if bench.fill and not request.fresh and not weight.is_meta:
        try:
            factors = bench.once(op, lambda: _decompose(bench, op, request, weight))
            new.load_factors(factors, bias)
        except RefusedError as refused:
            raise RefusedError(
                refused.message, where=op.path, expected=refused.expected, got=refused.got, hint=refused.hint
            ) from None
        error = factors.relative_error
    for parameter in new.parameters():
        parameter.requires_grad_(weight.requires_grad)
    if bias is not None and new.bias is not None:
        new.bias.requires_grad_(bias.requires_grad)
    return new, error


def _decompose(bench: Bench, op: Op, request: _Request, weight: Tensor) -> Factors:
    given = bench.decomposer(op, weight) if bench.decomposer is not None else None
    if given is not None:
        return given
    return request.form.factorize(weight, request.spec, request.widths, request.axes)


def _common(op: Op, request: _Request, new: Factorized, error: float | None) -> dict[str, Any]:
    """What edits of both kinds say."""
    widths = list(request.widths.values())
    full = request.widths == request.form.limits(request.spec, request.axes)
    return {
        "op": op,
        "method": request.form.name,
        "rank_in": widths[0],
        "rank_out": widths[-1],
        "params_before": request.spec.params,
        "params_after": sum(parameter.numel() for parameter in new.parameters()),
        "relative_error": error,
        "exact": "both" if full and not request.fresh else None,
    }


def _renamed(prefix: str, new: Factorized, weight: str, bias: str | None) -> dict[str, tuple[str, ...]]:
    """Old parameter names to new ones; the bias is that of the last stage."""
    names = [name for name, _ in new.named_parameters()]
    last = f"{new.stage_names[-1]}.bias"
    renamed = {weight: tuple(f"{prefix}{name}" for name in names if name != last)}
    return renamed if bias is None else {**renamed, bias: (f"{prefix}{last}",)}
