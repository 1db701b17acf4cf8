"""``factorize``: a layer becomes a chain of smaller ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

from torch import Tensor

from ...capturing.code_trace import NotTraceable
from ...core.convolution import ConvSpec
from ...core.errors import RefusedError
from ...core.plan import Edit, Op
from ...decompose import Factors
from ...forms import FORMS
from ...layers.factorized import ACTIVATIONS, NORMS, Factorized, build
from ..graph_edit import FunctionalCall
from ..swap import stem
from .bench import Bench, check_spec, make_like, not_traced, param_count
from .settings import one_of, wrong


@dataclass(frozen=True)
class FactorizeSettings:
    """Settings of ``factorize``."""

    layer: ConvSpec  # shape facts of the layer that the op was made for
    form: Annotated[str, one_of(*FORMS)]
    widths: Mapping[str, int]  # per group
    axes: tuple[int, ...] | None = None  # for the spatial form: those of the first stage
    init: Annotated[str, one_of("weights", "fresh")] = "weights"  # the factors of the layer's own, or new ones
    norm: Annotated[str | None, one_of(*NORMS)] = None  # behind each inner stage of a fresh chain
    activation: Annotated[str | None, one_of(*ACTIVATIONS)] = None  # likewise
    weight: str | None = None  # for a functional call: full name of the parameter that it reads
    scope: str = ""  # for a functional call: path of the module whose code makes it, which becomes a graph


def factorize_layer(bench: Bench, op: Op, settings: FactorizeSettings) -> Edit:
    """Carries out a ``factorize`` op; a `RefusedError` says that the weight holds NaN or Inf."""
    settings = _checked(op, settings)
    if settings.weight is not None:
        return _functional_call(bench, op, settings, settings.weight)
    old = bench.layer(op, op.path, settings.layer)
    new, edit = _chain(bench, op, settings, old.weight, old.bias)
    new.train(old.training)
    inner = stem(op.path)
    renamed = renamed_parameters(inner, new, f"{inner}weight", f"{inner}bias" if settings.layer.bias else None)
    return replace(edit, renamed=renamed, aliases=bench.replace(old, new, op.path))


def _functional_call(bench: Bench, op: Op, settings: FactorizeSettings, weight_name: str) -> Edit:
    """The same for a functional call: the module whose code makes it becomes a graph."""
    scope, prefix = settings.scope, stem(settings.scope)
    module = bench.find(op, scope, "scope")
    if not weight_name.startswith(prefix):
        raise not_traced(op, f"{weight_name} lies outside {scope}, whose code reads it")
    weight = bench.tensor(op, weight_name, "weight")
    graph = bench.graph(op, module)
    try:
        call = FunctionalCall(graph, weight_name.removeprefix(prefix))
    except NotTraceable as error:
        raise not_traced(op, error) from error
    check_spec(op, call.spec, settings.layer, weight_name)
    new, edit = _chain(bench, op, settings, weight, call.bias)
    name = call.replace(f"{call.weight.replace('.', '_')}_{settings.form}", new)
    new.train(module.training)
    bench.replace(module, graph)
    renamed = renamed_parameters(
        f"{prefix}{name}.", new, weight_name, f"{prefix}{call.bias_name}" if call.bias_name else None
    )
    return replace(edit, kind="graph", renamed=renamed, graph_module=scope)


def _checked(op: Op, settings: FactorizeSettings) -> FactorizeSettings:
    """The settings of an op with its form's widths and axes, checked against the layer."""
    form = FORMS[settings.form]
    axes = form.read_axes(settings.layer, settings.axes, op.where)
    widths = form.read_widths(settings.layer, settings.widths, axes, op.where)
    inside = "norm" if settings.norm else "activation" if settings.activation else None
    if settings.init == "weights" and inside:
        raise wrong(op, inside, f"a chain with weights has no {inside} inside", "init fresh, or none")
    return replace(settings, axes=axes, widths=widths)


def _chain(
    bench: Bench, op: Op, settings: FactorizeSettings, weight: Tensor, bias: Tensor | None
) -> tuple[Factorized, Edit]:
    """The new module, filled where it is to be, and what edits of modules and of calls both say."""
    spec, form, widths, axes = settings.layer, FORMS[settings.form], settings.widths, settings.axes
    facts = {"axes": axes, "norm": settings.norm, "activation": settings.activation, "dtype": weight.dtype}
    fresh, make = settings.init == "fresh", partial(build, spec, form.name, widths, **facts)
    new = make_like(weight, op.path, make, initialised=fresh)
    error = None
    if bench.fill and not fresh and not weight.is_meta:

        def factorize() -> Factors:
            factors = bench.decomposer(op, weight) if bench.decomposer is not None else None
            return form.factorize(weight, spec, widths, axes) if factors is None else factors

        try:
            factors = bench.once(op, factorize)
            new.load_factors(factors, bias)
        except RefusedError as refused:
            refused.where = op.path
            raise
        error = factors.relative_error
    new.requires_grad_(weight.requires_grad)
    if bias is not None and new.bias is not None:
        new.bias.requires_grad_(bias.requires_grad)
    exact = "both" if widths == form.limits(spec, axes) and not fresh else None
    ranks = list(widths.values())
    return new, Edit(op, "module", form.name, ranks[0], ranks[-1], spec.params, param_count(new), error, exact)


def renamed_parameters(prefix: str, new: Factorized, weight: str, bias: str | None) -> dict[str, tuple[str, ...]]:
    """Old parameter names to new ones; the bias is that of the last stage."""
    names = [name for name, _ in new.named_parameters()]
    last = f"{new.stage_names[-1]}.bias"
    renamed = {weight: tuple(f"{prefix}{name}" for name in names if name != last)}
    return renamed if bias is None else {**renamed, bias: (f"{prefix}{last}",)}
