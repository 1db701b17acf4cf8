"""What a pass is: something that looks at a capture and proposes, and never touches a model.

`LayerPass` is what the factorising passes share: which layers it looks at (patterns on paths, a callable, a least share
of the MACs), which may be replaced (`pwrewrite.capturing.eligibility`), how wide the result is (a width, a ratio, an
energy, EVBMF), and whether that pays. Every layer that a pass looks at and leaves is a `Skip` with a reason.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import ClassVar, SupportsIndex

from torch import Tensor, nn

from .. import decompose
from ..capturing.eligibility import Owners, eligible
from ..capturing.records import Capture, Layer, info
from ..core.convolution import ConvSpec
from ..core.errors import UsageError
from ..core.plan import Estimate, Op, Skip, SkipReason
from ..core.records import Json
from ..decompose import RankSpec
from ..forms.form import Axes, Form
from ..forms.specs import chain_macs, chain_params, linear_spec, spec_to_dict
from ..layers.factorized import ACTIVATIONS, NORMS, Factorized
from .patterns import Graph, tensor_of

Proposal = Op | Skip

DEFAULT_GAIN = 0.1
"""Least part of a layer's MACs that a rewrite saves where its width is computed."""

Rank = RankSpec | tuple[RankSpec, RankSpec]


class Pass(ABC):
    """Proposes operations on what a capture shows."""

    name: ClassVar[str]  # as on the command line
    summary: ClassVar[str]  # one line that says what it does
    exact: ClassVar[str] = "no"  # an approximation, else in which mode outputs stay equal: eval, train or both

    @abstractmethod
    def propose(self, capture: Capture) -> list[Proposal]:
        """Operations to carry out and layers skipped, in graph order, for a model as it is now.

        Raises:
            UsageError: If a setting does not fit the model, such as a pattern that matches nothing.
        """


@dataclass(eq=False)
class LayerPass(Pass):
    """A pass that replaces single layers by one form: a convolution, or a linear map where ``linear``.

    Args:
        rank: Width between, per group: an integer, or a ratio (``0.5``, ``"50%"``) of the most the form can use on that
            side. A pair gives two different ones to a form with two.
        include: Patterns (``layer3.*``) on paths; all where empty. A layer's aliases count.
        exclude: Patterns on paths that are left as they are.
        select: A callable on a `Layer` that says whether to look at it.
        min_share: Least part of the model's MACs, 0 to 1.
        min_gain: Least part of the layer's MACs that must be saved, 0 to 1; `DEFAULT_GAIN` where None and a width is
            computed (from a ratio, an energy or EVBMF), nothing where all are given as integers.
        energy: Instead of ``rank``: the part of ``‖W‖²`` to keep.
        vbmf: Instead of ``rank``: choose by empirical variational Bayes (Nakajima et al. 2013, as in Kim et al. 2016).
        multiple: What computed widths are rounded to; by default 8 where the channels are 64 or more, else 1.
        allow_growth: Whether a result that costs more than the layer is proposed all the same.
        replan: Whether parts of what an earlier rewrite put in are looked at too.
        init: ``weights`` from the decomposition, or ``fresh`` for training.
        norm: With ``fresh``: a norm after every stage but the last.
        activation: With ``fresh``: an activation after every stage but the last.

    Raises:
        UsageError: If a setting makes no sense.
    """

    form: ClassVar[Form]
    default_rank: ClassVar[RankSpec] = 0.5
    linear: ClassVar[bool] = False

    rank: Rank | None = None
    _: KW_ONLY
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    select: Callable[[Layer], bool] | None = None
    min_share: float = 0.0
    min_gain: float | None = None
    energy: float | None = None
    vbmf: bool = False
    multiple: int | None = None
    allow_growth: bool = False
    replan: bool = False
    init: str = "weights"
    norm: str | None = None
    activation: str | None = None

    def __post_init__(self) -> None:
        ways = {"rank": self.rank is not None, "energy": self.energy is not None, "vbmf": self.vbmf}
        if sum(ways.values()) > 1:
            both = " and ".join(name for name, way in ways.items() if way)
            raise UsageError(f"{both} exclude each other", hint="give one way to choose the widths")
        check_init(self.init)
        if self.init == "weights" and (self.norm or self.activation):
            message = "a norm or an activation between the stages changes the function that the weights stand for"
            raise UsageError(message, hint="they go with init='fresh'")
        if self.init == "fresh" and (self.energy is not None or self.vbmf):
            raise UsageError("energy and vbmf read the weights that init='fresh' throws away", hint="give a rank")
        for table, name, what in ((NORMS, self.norm, "norm"), (ACTIVATIONS, self.activation, "activation")):
            if name is not None and name not in table:
                raise UsageError(f"unknown {what} {name!r}", expected=f"one of {', '.join(table)}")
        for name, share in (("min_share", self.min_share), ("min_gain", self.min_gain)):
            if share is not None and not 0 <= share <= 1:
                raise UsageError(f"{name} {share!r} is no share", expected="a number from 0 to 1")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(f"energy {self.energy!r} is no share", expected="a number above 0 and up to 1")
        self.ranks = self._spread(self.default_rank if self.rank is None else self.rank)
        computed = self.energy is not None or self.vbmf or not all(map(_is_width, self.ranks.values()))
        self.least_gain = self.min_gain if self.min_gain is not None else DEFAULT_GAIN if computed else 0.0

    def _spread(self, rank: Rank) -> dict[str, RankSpec]:
        names = self.form.widths
        ranks = rank if isinstance(rank, tuple) else (rank,) * len(names)
        if len(ranks) != len(names):
            raise UsageError(f"{self.name} takes {len(names)} width(s): {', '.join(names)}", got=repr(rank))
        for name, value in zip(names, ranks):
            if isinstance(value, (int, float)) and (isinstance(value, bool) or not value > 0):
                expected = "an integer from 1, or a ratio above 0 and up to 1"
                raise UsageError(f"{name} {value!r} is neither a width nor a ratio", expected=expected)
            decompose.resolve_rank(value, 1 << 30, name=name)
        return dict(zip(names, ranks))

    def propose(self, capture: Capture) -> list[Proposal]:
        wanted = chosen(capture, self.include, self.exclude)
        graph = Graph(capture)
        total = sum(layer.macs for layer in capture.layers) or 1
        proposals: list[Proposal] = []
        too_wide: list[UsageError] = []
        for layer in filter(self.concerns, capture.layers):
            if id(layer) not in wanted or (self.select is not None and not self.select(layer)):
                proposals.append(Skip(layer.path, SkipReason.EXCLUDED, "left out by include, exclude or select"))
                continue
            try:
                proposals.append(self._propose_layer(graph, layer, total))
            except UsageError as error:
                too_wide.append(error)
                detail = f"{error.message}; there, give {error.expected}"
                proposals.append(Skip(layer.path, SkipReason.TOO_SMALL, detail))
        if too_wide and not any(isinstance(proposal, Op) for proposal in proposals):
            raise too_wide[0]
        return proposals

    def _propose_layer(self, graph: Graph, layer: Layer, total: int) -> Proposal:
        refusal = self.refusal(graph, layer) or below_share(layer.path, layer.macs / total, self.min_share)
        if refusal is not None:
            return refusal
        spec = spec_of(layer)
        axes = self.form.splits(spec)[0]
        widths = self._widths(layer, spec, graph.owners, axes)
        if isinstance(widths, Skip):
            return widths
        return self.op(layer, spec, widths, axes=axes, scope=scope_of(graph.capture, layer))

    def refusal(self, graph: Graph, layer: Layer) -> Skip | None:
        """Why a layer may not be replaced by this form; None where it may."""
        unfit = None if self.linear else self.form.unfit(spec_of(layer))
        if unfit is not None:
            return Skip(layer.path, *unfit)
        place = None if self.replan else enclosing_rewrite(graph.modules, layer.path, Factorized)
        if place is not None:
            detail = f"part of what a rewrite put at {place or 'the root'}"
            return Skip(layer.path, SkipReason.ALREADY_BOTTLENECK, detail)
        return eligible(graph.capture, layer, graph.owners) or self._overwritten(graph, layer)

    def _overwritten(self, graph: Graph, layer: Layer) -> Skip | None:
        """Whether the first factor would keep what is overwritten for its backward pass; the layer keeps a copy."""
        spec, form, widths = spec_of(layer), self.form, dict.fromkeys(self.form.widths, 1)
        if not spec.pads_copy or all(form.stages(spec, widths, axes)[0][1].pads_copy for axes in form.splits(spec)):
            return None
        if (writer := graph.overwriter(layer)) is None:
            return None
        detail = (
            f"its input is overwritten by {writer.name} after it ran; the layer keeps a padded copy for its backward "
            "pass, its first factor would keep the input itself; write that step out of place"
        )
        return Skip(layer.path, SkipReason.WRITTEN, detail)

    def op(
        self, layer: Layer, spec: ConvSpec, widths: Mapping[str, int], *, axes: Axes = None, scope: str = ""
    ) -> Proposal:
        """The op for given widths, or a skip where it would not pay and growth is not allowed."""
        estimate = estimate_chain(layer, spec, self.form, widths, axes)
        if not self.allow_growth and self.init == "weights":
            shown = ", ".join(f"{name.replace('_', '-')} {width}" for name, width in widths.items())
            if grows(estimate):
                return Skip(layer.path, SkipReason.NO_GAIN, growth(f"at {shown}", estimate))
            gain = 1 - estimate.macs_after / estimate.macs_before
            if gain < self.least_gain:
                less = f"save {gain:.1%} of its MACs, less than {self.least_gain:.1%} (--min-gain)"
                detail = f"at {shown} it would {less}; give a smaller width, or a smaller least gain"
                return Skip(layer.path, SkipReason.NO_GAIN, detail)
        settings: dict[str, Json] = {"form": self.form.name, "widths": dict(widths), "init": self.init}
        settings["layer"] = spec_to_dict(spec)
        if axes is not None:
            settings["axes"] = list(axes)
        settings |= {key: name for key, name in (("norm", self.norm), ("activation", self.activation)) if name}
        if layer.functional:
            settings |= {"weight": layer.weight, "scope": scope}
        return Op("factorize", layer.path, self.name, settings, estimate)

    @classmethod
    def concerns(cls, layer: Layer) -> bool:
        """Whether a layer is of the kind that this pass is about at all."""
        return layer.op == "linear" if cls.linear else layer.spec is not None

    def _widths(self, layer: Layer, spec: ConvSpec, owners: Owners, axes: Axes) -> dict[str, int] | Skip:
        limits = self.form.limits(spec, axes)
        if self.energy is None and not self.vbmf:
            return {name: self._width(layer, name, limit) for name, limit in limits.items()}
        weight = weight_of(layer, owners)
        if weight is None or weight.is_meta:
            return Skip(layer.path, SkipReason.WRONG_FORM, "the weights are on meta, so no rank can be read off them")
        kernel = decompose.to_forward_layout(weight.detach(), spec.groups, spec.transposed)
        widths = {}
        for name, spectrum in self.form.spectra(kernel, spec, axes).items():
            if self.energy is not None:
                rank = decompose.energy_rank(spectrum, self.energy)
            else:  # of the first group, where grouped
                rank = decompose.evbmf_rank(spectrum.energies[0].sqrt(), spectrum.matrix.shape[1:])
            widths[name] = decompose.round_rank(max(1, rank), limits[name], self.multiple)
        return widths

    def _width(self, layer: Layer, name: str, limit: int) -> int:
        """A width or ratio as a width of one layer; raises `UsageError` where it is beyond the layer's channels."""
        try:
            return decompose.resolve_rank(self.ranks[name], limit, self.multiple, name)
        except UsageError as error:
            error.where = layer.path
            raise


def check_init(init: str) -> None:
    """Refuses what says neither to start from the weights nor anew."""
    if init not in ("weights", "fresh"):
        raise UsageError(f"unknown init {init!r}", expected="weights or fresh")


def enclosing_rewrite(
    modules: Mapping[str, nn.Module], path: str, kinds: type[nn.Module] | tuple[type[nn.Module], ...]
) -> str | None:
    """The path of the innermost module of some kinds that holds a module, or is it; None where there is none."""
    parts = path.split(".")
    places = (".".join(parts[:i]) for i in range(len(parts), -1, -1))
    return next((place for place in places if isinstance(modules.get(place), kinds)), None)


def grows(estimate: Estimate) -> bool:
    """Whether an op saves no MACs or no parameters."""
    return estimate.macs_after >= estimate.macs_before or estimate.params_after >= estimate.params_before


def growth(what: str, estimate: Estimate) -> str:
    """Why an op that `grows` is skipped."""
    return (
        f"{what} it would take {estimate.macs_after:,} MACs and {estimate.params_after:,} parameters "
        f"against {estimate.macs_before:,} and {estimate.params_before:,}; ask for less, or allow growth"
    )


def _is_width(value: RankSpec) -> bool:
    """Whether a rank is a width as such, not a share of the channels."""
    return value.strip().isdigit() if isinstance(value, str) else isinstance(value, SupportsIndex)


def chosen(capture: Capture, include: Sequence[str], exclude: Sequence[str]) -> set[int]:
    """Identities of the layers that some path patterns include (all where there are none) and others do not exclude.

    Raises:
        UsageError: If a pattern matches nothing.
    """
    names = {id(layer): (layer.path, *layer.aliases) for layer in capture.layers}
    rewritten = [n for n, m in capture.model.named_modules(remove_duplicate=False) if isinstance(m, Factorized)]
    known = [name for each in names.values() for name in each]
    for pattern in (*include, *exclude):  # an earlier pass may have replaced the layer of this name
        if not matching((*rewritten, *known), pattern):
            expected, hint = "a path, or a pattern such as 'layer3.*'", f"layers are called {near(known, pattern)}"
            raise UsageError(f"the pattern {pattern!r} matches no layer", expected=expected, hint=hint)
    wanted = {key for key, each in names.items() if not include or matching(each, *include)}
    return wanted - {key for key, each in names.items() if matching(each, *exclude)}


def matching(paths: Iterable[str], *patterns: str) -> set[str]:
    """Those of some patterns that one of some paths matches."""
    return {pattern for pattern in patterns if any(fnmatchcase(path, pattern) for path in paths)}


def near(paths: Sequence[str], pattern: str) -> str:
    """The paths most like a pattern, for a hint."""
    return ", ".join(get_close_matches(pattern, paths, n=3, cutoff=0.4) or paths[:5])


def spec_of(layer: Layer) -> ConvSpec:
    """A layer's shape facts; a linear map is a convolution without spatial axes."""
    if layer.spec is not None:
        return layer.spec
    return linear_spec(layer.in_channels, layer.out_channels, layer.params > layer.in_channels * layer.out_channels)


def below_share(path: str, share: float, least: float) -> Skip | None:
    """The skip of what does less than a least part of the model's MACs; None where it does enough."""
    if share >= least:
        return None
    return Skip(path, SkipReason.BELOW_SHARE, f"{share:.2%} of the MACs, below --min-share {least:.2%}")


def weight_of(layer: Layer, owners: Owners) -> Tensor | None:
    """A layer's weight."""
    return tensor_of(owners, layer.weight)


def estimate_chain(layer: Layer, spec: ConvSpec, form: Form, widths: Mapping[str, int], axes: Axes = None) -> Estimate:
    """What replacing a layer by a form changes, over all its calls."""
    chain = form.stages(spec, widths, axes)
    macs = sum(chain_macs(chain, call.input_shape, call.output_shape) for call in layer.calls)
    return Estimate(layer.params, chain_params(chain), layer.macs, macs)


def scope_of(capture: Capture, layer: Layer) -> str:
    """The module whose code makes the one call of a functional layer; ``""`` for a module."""
    if not layer.functional:
        return ""
    return next(info(node).path for node in capture.graph.nodes if node.name == layer.calls[0].node)
