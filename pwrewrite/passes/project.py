"""`ProjectBranch`: a 1×1 behind a branch of a concatenation, as GoogLeNet's pool projection.

A concatenation is as wide as its branches together, and a pooling branch is as wide as what came in. A 1×1 behind the
branch narrows it; all that reads the concatenation then takes fewer channels (Szegedy et al. 2014, figure 2 b).

``init="fresh"`` is the architect's way: projection and affected weights start anew, all others stay. ``init="weights"``
keeps the function as well as the width allows, from one factorisation of all that the consumers do with the branch's
channels; that is only possible where nothing but linear operations lies between, see `channel_flow`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from math import prod

from torch import fx

from ..capturing.records import Capture, info
from ..core.errors import UsageError
from ..core.plan import Estimate, Op, Skip, SkipReason
from ..core.records import Json
from ..forms.specs import spec_to_dict
from ..layers.factorized import Factorized, Projected
from .base import Pass, Proposal, check_init, enclosing_rewrite, grows, growth, matching, near, spec_of
from .channel_flow import Flow, Segment, channel_axis, describe, follow, joined
from .patterns import Graph

_POOLS = ("max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool", "lp_pool")


@dataclass(eq=False)
class ProjectBranch(Pass):
    """Puts a 1×1 projection behind branches of concatenations and narrows what reads them.

    Args:
        include: Patterns on the paths of modules that feed a concatenation; every pooling module where empty.
        channels: Channels that leave the projection.
        init: ``weights`` from a joint factorisation, or ``fresh`` for training.
        exclude: Patterns on paths that are left as they are.
        allow_output_change: Whether an output of the model may become narrower, with ``init="fresh"``.
        allow_growth: Whether a result that costs more is proposed all the same.
        replan: Whether branches that a rewrite put in are looked at too.

    Raises:
        UsageError: If a setting makes no sense.
    """

    name = "project-branch"
    summary = "1×1 projection behind a branch of a concatenation, whose readers take fewer channels"

    include: Sequence[str] = ()
    channels: int = 32
    init: str = "weights"
    _: KW_ONLY
    exclude: Sequence[str] = ()
    allow_output_change: bool = False
    allow_growth: bool = False
    replan: bool = False

    def __post_init__(self) -> None:
        if type(self.channels) is not int or self.channels < 1:
            message, got = f"channels {self.channels!r} is no width", repr(self.channels)
            raise UsageError(message, expected="an integer from 1", got=got)
        check_init(self.init)

    def propose(self, capture: Capture) -> list[Proposal]:
        run = _Run(self, capture)
        proposals = [
            run.branch(path, cat, source) for cat, source in run.inputs if (path := run.chosen(source)) is not None
        ]
        return proposals + run.unmatched()


class _Run:
    """One call of `ProjectBranch.propose`; later branches see what earlier ones have ``narrowed`` and ``touched``.

    ``inputs`` are every concatenation along the channels with each of its inputs; ``matched`` are patterns.
    """

    def __init__(self, settings: ProjectBranch, capture: Capture) -> None:
        self.settings, self.graph = settings, Graph(capture)
        self.nodes = [node for node in self.graph.nodes if node.op != "output"]
        cats = [node for node in self.nodes if info(node).op == "cat" and channel_axis(node)]
        self.inputs = [(cat, source) for cat in cats for source in joined(cat)]
        self.pools = {info(node).path for node in self.nodes if info(node).op.startswith(_POOLS)}
        paths: dict[int, str] = {}
        self.names: dict[str, list[str]] = {}
        for name, module in self.graph.modules.items():
            self.names.setdefault(paths.setdefault(id(module), name), []).append(name)
        self.matched: set[str] = set()
        self.narrowed: dict[str, list[tuple[int, int]]] = {}  # path to first channel and count of what is gone
        self.touched: set[fx.Node] = set()

    def _ending_in(self, source: fx.Node) -> list[str]:
        """Paths of the modules whose call may end in a node, outermost first."""
        parts = info(source).path.split(".")
        paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
        return [path for path in paths if path in self.names and source.op != "placeholder"]

    def chosen(self, source: fx.Node) -> str | None:
        """The outermost module that is included and ends in ``source``; notes the patterns that it matches."""
        outermost = None
        for path in self._ending_in(source):
            wanted = matching(self.names[path], *self.settings.include)
            left_out = matching(self.names[path], *self.settings.exclude)
            self.matched |= wanted | left_out
            pool = path in self.pools and not list(self.graph.modules[path].children())
            if outermost is None and (wanted or (pool and not self.settings.include)) and not left_out:
                outermost = path
        return outermost

    def unmatched(self) -> list[Skip]:
        """A skip for every module that is named and is no branch; an error for a pattern that matches nothing."""
        skips = []
        for pattern in (p for p in (*self.settings.include, *self.settings.exclude) if p not in self.matched):
            named = next((path for path, names in self.names.items() if path and pattern in names), None)
            if named is None:
                innermost = (path for _, source in self.inputs for path in self._ending_in(source)[-1:])
                branches = near(list(dict.fromkeys(innermost)), pattern)
                hint = f"branches are {branches}" if branches else "no module feeds a concatenation along channels"
                expected = "the path of a module whose output is concatenated, or a pattern on such paths"
                message = f"the pattern {pattern!r} matches no branch of a concatenation"
                raise UsageError(message, expected=expected, hint=hint)
            detail = "its output does not go into a concatenation along the channels"
            skips.append(Skip(named, SkipReason.WRONG_FORM, detail))
        return skips

    def _misfit(self, path: str, cat: fx.Node, source: fx.Node) -> str:
        """Why a module is no branch of its own; ``""`` where it is called once and feeds the concatenation only."""
        inside = [n for n in self.nodes if _is_in(info(n).path, path)]
        if cat in inside:
            return "the concatenation is made inside it"
        if joined(cat).count(source) > 1:
            return "its output is concatenated more than once"
        members = set(inside)
        for node in inside:
            strangers = [user for user in node.users if user not in members]
            if node is not source and strangers:
                return f"{describe(strangers[0])} also reads from inside it; it may be called several times"
            if node is source and any(user is not cat for user in node.users):
                return "its output is also used elsewhere"
        kinds = [(n.op, n.target) for n in inside if n.op != "get_attr"]
        return "it may be called several times" if all(kinds.count(kind) > 1 for kind in kinds) else ""

    def branch(self, path: str, cat: fx.Node, source: fx.Node) -> Proposal:
        settings, width = self.settings, info(source).outputs[0].shape[1]
        part_of = None if settings.replan else enclosing_rewrite(self.graph.modules, path, (Factorized, Projected))
        if part_of:
            return Skip(path, SkipReason.ALREADY_BOTTLENECK, f"part of what a rewrite put at {part_of}")
        if why := self._misfit(path, cat, source):
            return Skip(path, SkipReason.WRONG_FORM, why)
        if width < settings.channels or (width == settings.channels and not settings.allow_growth):
            detail = f"the branch has {width} channels, so a projection to {settings.channels} narrows nothing"
            return Skip(path, SkipReason.NO_GAIN, detail)
        flow = follow(self.graph, source, cat)
        if refusal := self._refusal(path, source, flow):
            return refusal
        op, estimate = self._op(path, source, flow)
        if grows(estimate) and settings.init == "weights" and not settings.allow_growth:
            return Skip(path, SkipReason.NO_GAIN, growth(f"with {settings.channels} channels", estimate))
        reached = [(layer.path, segment) for layer, segment in flow.consumers]
        for reader, segment in [*reached, *((path, segment) for path, _, segment in flow.norms)]:
            gone = (width - settings.channels) * segment.repeat
            self.narrowed.setdefault(reader, []).append((segment.offset, gone))
        self.touched |= set(flow.nodes)
        return op

    def _refusal(self, path: str, source: fx.Node, flow: Flow) -> Skip | None:
        settings, why = self.settings, ""
        specs = [(spec_of(layer), segment) for layer, segment in flow.consumers]
        rows = sum(spec.out_channels * prod(spec.kernel_size) * segment.repeat for spec, segment in specs)
        if flow.blocked:
            why = f"its channels reach what cannot be narrowed: {flow.blocked}"
        elif settings.init == "weights" and flow.nonlinear:
            why = (
                f"its channels pass {flow.nonlinear}, which does not commute with a 1×1, so the readers' weights "
                "cannot be factorised with the projection; init='fresh' starts them anew"
            )
        elif settings.init == "weights" and flow.outputs:
            why = (
                "its channels are an output of the model, which no reader's weights can make up for; "
                "init='fresh' with allow_output_change narrows the output"
            )
        elif flow.outputs and not settings.allow_output_change:
            i, width, segment = flow.outputs[0]
            less = width - (segment.channels - settings.channels) * segment.repeat
            change = f"would have {less} channels instead of {width}"
            why = f"output {i} of the model {change}; allow_output_change permits it"
        elif settings.init == "weights" and 0 < rows < settings.channels:
            detail = f"its readers make {rows} values of its channels, so {settings.channels} channels are too many"
            return Skip(path, SkipReason.NO_GAIN, detail)
        elif not flow.consumers and not flow.outputs:
            why = "nothing reads its channels"
        elif self.touched & {source, *flow.nodes} and any(_is_in(info(n).path, path) for n in self.touched):
            why = "what goes into it is narrowed by another projection of this run; run the pass once more"
        return Skip(path, SkipReason.NOT_LINEAR, why) if why else None

    def _op(self, path: str, source: fx.Node, flow: Flow) -> tuple[Op, Estimate]:
        spec, (_, c, *space), r = info(source).outputs[0], info(source).outputs[0].shape, self.settings.channels
        before, after = [0, 0], [c * r, prod(spec.shape) * r]  # parameters and MACs of what changes
        consumers, norms = [], []
        for layer, segment in flow.consumers:
            whole, per_channel = spec_of(layer), layer.macs // layer.in_channels
            now = replace(whole, in_channels=whole.in_channels - self._gone(layer.path))
            then = replace(now, in_channels=now.in_channels - (c - r) * segment.repeat)
            for costs, facts in ((before, now), (after, then)):
                costs[:] = costs[0] + facts.params, costs[1] + per_channel * facts.in_channels
            offset = self._offset(layer.path, segment)
            entry = {"path": layer.path, "offset": offset, "repeat": segment.repeat, "layer": spec_to_dict(now)}
            consumers.append(entry)
        for norm_path, norm, segment in flow.norms:
            width = norm.num_features - self._gone(norm_path)
            norms.append({"path": norm_path, "channels": width, "offset": self._offset(norm_path, segment)})
            per_channel = sum(p.numel() for p in norm.parameters(recurse=False)) // norm.num_features
            before[0] += width * per_channel
            after[0] += (width - (c - r)) * per_channel
        settings: dict[str, Json] = {
            "channels": r,
            "init": self.settings.init,
            "branch_channels": c,
            "dims": len(space),
            "dtype": str(spec.dtype).removeprefix("torch."),
            "consumers": consumers,
            "norms": norms,
        }
        if flow.outputs:
            settings["outputs"] = [
                {"output": i, "before": width, "after": width - (segment.channels - r) * segment.repeat}
                for i, width, segment in flow.outputs
            ]
        if self.settings.init == "weights":
            settings["exact"] = "eval" if flow.dropout else "both"
        estimate = Estimate(before[0], after[0], before[1], after[1])
        return Op("project", path, self.settings.name, settings, estimate), estimate

    def _gone(self, path: str, before: float = float("inf")) -> int:
        """Inputs that earlier branches have taken from a layer or norm, in front of a channel."""
        return sum(gone for start, gone in self.narrowed.get(path, ()) if start < before)

    def _offset(self, path: str, segment: Segment) -> int:
        return segment.offset - self._gone(path, segment.offset)


def _is_in(path: str, scope: str) -> bool:
    return path == scope or path.startswith(f"{scope}.")
