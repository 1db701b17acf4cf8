"""``share-reduction``: one 1×1 takes what several layers read, and each of them reads that instead.

The code that hands the map to the layers becomes a graph, which runs the reduction once. The layers stay and take
smaller weights: the factors of their kernels together (`pwrewrite.forms.shared`), in the norm of calibration inputs
where there are any. Where a layer has a ``width``, a narrower core and a 1×1 to its outputs take its place. What
outputs then lack on average goes to their bias, or to the running mean of the batch norm behind them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from math import prod

import torch
from torch import Tensor, fx, nn

from ...core.convolution import ConvSpec
from ...core.plan import Edit, Op
from ...forms.expand import FORM as EXPAND
from ...forms.shared import SharedCuts, SharedFactors
from ...forms.specs import pointwise_spec
from ...forms.weighted import WeightedLayer
from ...layers.factorized import Factorized, build
from ..graph_edit import Regraphed, finish
from ..swap import names_of, stem
from .bench import Bench, WeightedModule, layer_like, make_like, not_traced, param_count, train_like
from .factorize import renamed_parameters
from .narrow import Reading
from .settings import Count, wrong


@dataclass(frozen=True)
class Sharing(Reading):
    """A layer that reads the reduction; ``width``: channels between its core and a 1×1 behind that, if there is one."""

    width: Count | None = None

    @property
    def rows(self) -> int:
        """Rows of its kernel, unfolded."""
        return self.layer.out_channels * prod(self.layer.kernel_size)


@dataclass(frozen=True)
class ShareSettings:
    """Settings of ``share-reduction``.

    Attributes:
        scope: Path of the module whose code hands the map to the layers.
        calls: What this code calls with it, by path from there: the layers, or modules around them.
        reduction: What the reduction is called there.
        rank: Its width.
        readers: The layers.
    """

    scope: str
    calls: tuple[str, ...]
    reduction: str
    rank: Count
    readers: tuple[Sharing, ...]

    @property
    def reduce_spec(self) -> ConvSpec:
        """The reduction."""
        first = self.readers[0].layer
        return pointwise_spec(first.dims, first.in_channels, self.rank)

    @property
    def full(self) -> int:
        """The width at which nothing is lost."""
        return min(self.readers[0].layer.in_channels, sum(each.rows for each in self.readers))


def share_reduction(bench: Bench, op: Op, settings: ShareSettings) -> Edit:
    """Carries out a ``share-reduction`` op; a `RefusedError` says that a weight holds NaN or Inf."""
    _check(op, settings)
    layers = [bench.layer(op, each.path, each.layer, "readers") for each in settings.readers]
    scope, path = bench.find(op, settings.scope, "scope"), stem(settings.scope) + settings.reduction
    graph_module = bench.graph(op, scope)
    if hasattr(scope, settings.reduction) or not settings.reduction.isidentifier():
        expected = f"a name that is free in {settings.scope or 'the model'}"
        raise wrong(op, "reduction", "the reduction cannot have this name", expected, settings.reduction)
    calls = _calls(op, settings, graph_module)
    paths = {each.path for each in settings.readers}
    aliases = tuple(name for layer in layers for name in names_of(bench.model, layer) if name not in paths)
    known = bench.fill and not any(layer.weight.is_meta for layer in layers)
    factors = bench.once(op, lambda: _factors(bench, op, settings, layers)) if known else None
    reduction = layer_like(layers[0].weight, path, settings.reduce_spec, initialised=not known)
    train_like(reduction.weight, *(layer.weight for layer in layers))
    if factors is not None:
        with torch.no_grad():
            reduction.weight.copy_(factors.first.reshape(reduction.weight.shape))
    before = param_count(*layers)
    _hand_on(graph_module, calls, settings.reduction, reduction.train(scope.training))
    bench.replace(scope, graph_module)
    renamed, params = dict[str, tuple[str, ...]](), param_count(reduction)
    for i, (each, layer) in enumerate(zip(settings.readers, layers)):
        kernel, name = None if factors is None else factors.cores()[i], f"{each.path}.weight"
        core = _core(each, layer, settings.rank, kernel)
        if isinstance(core, Factorized):
            bias = None if layer.bias is None else f"{each.path}.bias"
            renamed |= renamed_parameters(f"{each.path}.", core, name, bias)
            bench.replace(layer, core)
        renamed[name] = (*renamed.get(name, (name,)), f"{path}.weight")
        params += param_count(core)
        if factors is not None:
            _shift(bench, each, core, factors.shifts[i])
    whole = settings.rank == settings.full and all(each.width is None for each in settings.readers)
    return Edit(
        op,
        "graph",
        "share-reduction",
        settings.rank,
        settings.rank,
        before,
        params,
        None if factors is None else factors.relative_error,
        "both" if whole else None,
        renamed,
        aliases=aliases,
        adapted=(*(each.path for each in settings.readers if each.path != op.path), path),
        graph_module=settings.scope,
    )


def _core(each: Sharing, layer: WeightedModule, rank: int, kernel: Tensor | None) -> WeightedModule | Factorized:
    """What a layer becomes: itself with fewer inputs, or a narrower core and a 1×1."""
    spec, old = replace(each.layer, in_channels=rank), layer.weight
    if each.width is None:
        smaller = layer_like(old, each.path, spec, initialised=kernel is None).weight
        layer.weight = nn.Parameter(smaller.detach(), requires_grad=old.requires_grad)
        vars(layer).update(in_channels=rank)
        if kernel is not None:
            with torch.no_grad():
                layer.weight.copy_(kernel)
        return layer
    widths = {EXPAND.widths[0]: each.width}
    new = make_like(
        old, each.path, partial(build, spec, EXPAND.name, widths, dtype=old.dtype), initialised=kernel is None
    )
    if kernel is not None:
        new.load_factors(EXPAND.factorize(kernel, spec, widths), layer.bias)
    for parameter in new.parameters():
        parameter.requires_grad_(old.requires_grad)
    if layer.bias is not None and new.bias is not None:
        new.bias.requires_grad_(layer.bias.requires_grad)
    return new.train(layer.training)


def _check(op: Op, settings: ShareSettings) -> None:
    readers = settings.readers
    if len(readers) < 2 or not settings.calls or op.path not in {each.path for each in readers}:
        raise wrong(op, "readers", "several layers share a reduction", "two at least, and the layer of the op")
    inside = {
        each.path: {c for c in settings.calls if f"{each.path}.".startswith(f"{stem(settings.scope)}{c}.")}
        for each in readers
    }
    if not all(inside.values()) or set().union(*inside.values()) != set(settings.calls):
        raise wrong(op, "calls", "the calls that are handed the map do not lead to its readers", "one or more for each")
    channels = readers[0].layer.in_channels
    for each in readers:
        spec = each.layer
        if not spec.dims or spec.groups > 1 or spec.transposed or spec.in_channels != channels or each.repeat > 1:
            expected = f"plain convolutions of {channels} channels"
            raise wrong(op, "readers", f"{each.path} cannot share a reduction", expected, str(spec))
        most = min(spec.out_channels, settings.rank * prod(spec.kernel_size))
        if each.width is not None and each.width > most:
            message = f"the 1×1 behind the core of {each.path} reads more than it can use"
            raise wrong(op, "width", message, f"up to {most}", str(each.width))
    if settings.rank > settings.full:
        raise wrong(op, "rank", "the reduction is wider than it can be", f"up to {settings.full}", str(settings.rank))


def _calls(op: Op, settings: ShareSettings, graph_module: Regraphed) -> list[fx.Node]:
    """The calls that are handed the map, in order."""
    nodes = [n for n in graph_module.graph.nodes if n.op == "call_module" and n.target in settings.calls]
    values = {node.args[0] for node in nodes if node.args}
    plain = all(len(node.args) == 1 and not node.kwargs for node in nodes)
    if sorted(str(node.target) for node in nodes) != sorted(settings.calls) or len(values) != 1 or not plain:
        raise not_traced(op, f"the code of {settings.scope or 'the model'} hands no one value to all the layers")
    return nodes


def _factors(bench: Bench, op: Op, settings: ShareSettings, layers: list[WeightedModule]) -> SharedFactors:
    """The factors of the readers' kernels together."""
    found = bench.decomposer(op, layers[0].weight.detach()) if bench.decomposer is not None else None
    if isinstance(found, SharedFactors):
        return found
    plain = [WeightedLayer(y.weight, each.layer, None, None) for each, y in zip(settings.readers, layers)]
    return SharedCuts(plain).factors(settings.rank, [each.width for each in settings.readers])


def _hand_on(graph_module: Regraphed, calls: list[fx.Node], name: str, reduction: nn.Module) -> None:
    """Runs the reduction before the first of some calls and hands its output to all of them."""
    graph_module.add_submodule(name, reduction)
    with graph_module.graph.inserting_before(calls[0]):
        reduced = graph_module.graph.call_module(name, calls[0].args)
    for node in calls:
        node.args = (reduced,)
    finish(graph_module)


@torch.no_grad()
def _shift(bench: Bench, each: Reading, core: WeightedModule | Factorized, shift: Tensor | None) -> None:
    """Makes up for what a reader's outputs lack on average."""
    if shift is not None and core.bias is not None:
        core.bias.add_(shift.to(core.bias))
    elif shift is not None and each.norm:
        mean = bench.model.get_submodule(each.norm).running_mean
        assert isinstance(mean, Tensor)
        mean.sub_(shift.to(mean))
