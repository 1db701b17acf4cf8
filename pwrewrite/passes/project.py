"""`ProjectBranch`: a 1×1 behind a branch of a concatenation, as GoogLeNet's pool projection.

A concatenation is as wide as its branches together, and a pooling branch is as wide as what came in. A 1×1 behind the
branch narrows it; all that reads the concatenation then takes fewer channels (Szegedy et al. 2014, figure 2 b).

``init="fresh"`` is the architect's way: projection and affected weights start anew, all others stay. ``init="weights"``
keeps the function as well as the width allows, from one factorisation of all that the consumers do with the branch's
channels; that is only possible where nothing but linear operations lies between, see `channel_flow`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from math import prod
from typing import Any

from torch import fx

from ..capturing.eligibility import Owners
from ..capturing.records import Capture, Layer, info
from ..core.convolution import ConvSpec
from ..core.errors import UsageError
from ..core.plan import Estimate, Op, Skip, SkipReason
from ..forms.specs import spec_to_dict
from ..layers.factorized import Factorized, Projected
from .base import Pass, Proposal, enclosing_rewrite, grows, growth, spec_of
from .channel_flow import Flow, Segment, channel_axis, describe, follow, joined

_POOLS = ("max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool", "lp_pool")


class ProjectBranch(Pass):
    """Puts a 1×1 projection behind branches of concatenations and narrows what reads them.

    Args:
        include: Patterns on the paths of modules that feed a concatenation; every pooling module where empty.
        exclude: Patterns on paths that are left as they are.
        channels: Channels that leave the projection.
        init: ``weights`` from a joint factorisation, or ``fresh`` for training.
        allow_output_change: Whether an output of the model may become narrower, with ``init="fresh"``.
        allow_growth: Whether a result that costs more is proposed all the same.
        replan: Whether branches that a rewrite put in are looked at too.

    Raises:
        UsageError: If a setting makes no sense.
    """

    name = "project-branch"
    summary = "1×1 projection behind a branch of a concatenation, whose readers take fewer channels"

    def __init__(
        self,
        include: Sequence[str] = (),
        channels: int = 32,
        init: str = "weights",
        *,
        exclude: Sequence[str] = (),
        allow_output_change: bool = False,
        allow_growth: bool = False,
        replan: bool = False,
    ) -> None:
        if type(channels) is not int or channels < 1:
            raise UsageError(f"channels {channels!r} is no width", expected="an integer from 1", got=repr(channels))
        if init not in ("weights", "fresh"):
            raise UsageError(f"unknown init {init!r}", expected="weights or fresh")
        self.include, self.exclude = tuple(include), tuple(exclude)
        self.channels, self.init = channels, init
        self.allow_output_change, self.allow_growth, self.replan = allow_output_change, allow_growth, replan

    def propose(self, capture: Capture) -> list[Proposal]:
        """See `Pass.propose`."""
        owners = Owners(capture)
        finder = _Branches(capture, owners)
        run = _Run(self, capture, owners, finder)
        matched: set[str] = set()
        proposals: list[Proposal] = []
        for cat, position, source in finder.candidates():
            path = self._chosen(finder, source, matched)
            if path is not None:
                proposals.append(run.branch(path, cat, position, source))
        return proposals + self._unmatched(finder, matched)

    def _chosen(self, finder: _Branches, source: fx.Node, matched: set[str]) -> str | None:
        """The outermost module that is included and ends in ``source``; notes the patterns that it matches."""
        chosen = None
        for path in finder.ending_in(source):
            names = finder.names[path]
            included = {p for p in self.include if any(fnmatchcase(name, p) for name in names)}
            left_out = {p for p in self.exclude if any(fnmatchcase(name, p) for name in names)}
            matched |= included | left_out
            pooling = not self.include and finder.is_pool(path)
            if (included or pooling) and not left_out and chosen is None:
                chosen = path
        return chosen

    def _unmatched(self, finder: _Branches, matched: set[str]) -> list[Proposal]:
        """A skip for every module that is named and is no branch; an error for a pattern that matches nothing."""
        skips: list[Proposal] = []
        for pattern in (*self.include, *self.exclude):
            if pattern in matched:
                continue
            named = next((path for path, names in finder.names.items() if path and pattern in names), None)
            if named is None:
                near = get_close_matches(pattern, finder.branches(), n=3, cutoff=0.4) or finder.branches()[:5]
                raise UsageError(
                    f"the pattern {pattern!r} matches no branch of a concatenation",
                    expected="the path of a module whose output is concatenated, or a pattern on such paths",
                    hint=f"branches are {', '.join(near)}"
                    if near
                    else "no module feeds a concatenation along channels",
                )
            detail = "its output does not go into a concatenation along the channels"
            skips.append(Skip(named, SkipReason.WRONG_FORM, detail))
        return skips


class _Branches:
    """The concatenations of a graph, and the modules that feed them."""

    def __init__(self, capture: Capture, owners: Owners) -> None:
        self.capture, self.modules = capture, owners.modules
        paths: dict[int, str] = {}
        self.names: dict[str, list[str]] = {}
        for name, module in owners.modules.items():
            self.names.setdefault(paths.setdefault(id(module), name), []).append(name)
        self.pools = {info(n).path for n in capture.graph.nodes if info(n).op.startswith(_POOLS)}

    def candidates(self) -> Iterator[tuple[fx.Node, int, fx.Node]]:
        """Every concatenation along the channels, with each of its inputs and their positions."""
        for node in self.capture.graph.nodes:
            if node.op != "output" and info(node).op == "cat" and channel_axis(node):
                for position, source in enumerate(joined(node)):
                    yield node, position, source

    def ending_in(self, source: fx.Node) -> list[str]:
        """Paths of the modules whose call may end in a node, outermost first."""
        parts = info(source).path.split(".")
        paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
        return [path for path in paths if path in self.names and source.op != "placeholder"]

    def is_pool(self, path: str) -> bool:
        """Whether a module is one pooling operation."""
        return path in self.pools and not any(True for _ in self.modules[path].children())

    def branches(self) -> list[str]:
        """Innermost module of every branch."""
        innermost = (self.ending_in(source)[-1:] for _, _, source in self.candidates())
        return list(dict.fromkeys(path for paths in innermost for path in paths))

    def misfit(self, path: str, cat: fx.Node, source: fx.Node) -> str:
        """Why a module is no branch of its own; ``""`` where it is called once and feeds the concatenation only."""
        inside = [n for n in self.capture.graph.nodes if n.op != "output" and _is_in(info(n).path, path)]
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
        if all(kinds.count(kind) > 1 for kind in kinds):
            return "it may be called several times"
        return ""


class _Run:
    """One call of `ProjectBranch.propose`; later branches see what earlier ones have narrowed."""

    def __init__(self, settings: ProjectBranch, capture: Capture, owners: Owners, finder: _Branches) -> None:
        self.settings, self.capture, self.owners, self.finder = settings, capture, owners, finder
        self.narrowed: dict[str, list[tuple[int, int]]] = {}
        self.touched: set[fx.Node] = set()

    def branch(self, path: str, cat: fx.Node, position: int, source: fx.Node) -> Proposal:
        """The op for one branch, or why there is none."""
        settings, width = self.settings, _width(source)
        part_of = None if settings.replan else enclosing_rewrite(self.finder.modules, path, (Factorized, Projected))
        if part_of:
            return Skip(path, SkipReason.ALREADY_BOTTLENECK, f"part of what a rewrite put at {part_of}")
        why = self.finder.misfit(path, cat, source)
        if why:
            return Skip(path, SkipReason.WRONG_FORM, why)
        if width < settings.channels or (width == settings.channels and not settings.allow_growth):
            detail = f"the branch has {width} channels, so a projection to {settings.channels} narrows nothing"
            return Skip(path, SkipReason.NO_GAIN, detail)
        flow = follow(self.capture, self.owners, source, cat)
        refusal = self._refusal(path, source, flow)
        if refusal is not None:
            return refusal
        op = self._op(path, source, flow)
        estimate = op.estimate
        assert estimate is not None
        if grows(estimate) and settings.init == "weights" and not settings.allow_growth:
            return Skip(path, SkipReason.NO_GAIN, growth(f"with {settings.channels} channels", estimate))
        self._note(flow, width)
        return op

    def _refusal(self, path: str, source: fx.Node, flow: Flow) -> Skip | None:
        settings, why = self.settings, ""
        rows = sum(_rows(layer, segment) for layer, segment in flow.consumers)
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
            why = (
                f"output {i} of the model would have {less} channels instead of {width}; allow_output_change permits it"
            )
        elif settings.init == "weights" and 0 < rows < settings.channels:
            detail = f"its readers make {rows} values of its channels, so {settings.channels} channels are too many"
            return Skip(path, SkipReason.NO_GAIN, detail)
        elif not flow.consumers and not flow.outputs:
            why = "nothing reads its channels"
        elif self.touched & ({source} | set(flow.nodes)) and any(_is_in(info(n).path, path) for n in self.touched):
            why = "what goes into it is narrowed by another projection of this run; run the pass once more"
        return Skip(path, SkipReason.NOT_LINEAR, why) if why else None

    def _op(self, path: str, source: fx.Node, flow: Flow) -> Op:
        shape = info(source).outputs[0].shape
        c, r = shape[1], self.settings.channels
        params = macs = 0  # before, of what changes
        params_gone = macs_gone = 0
        consumers, norms = [], []
        for layer, segment in flow.consumers:
            spec, offset = self._now(layer, segment)
            gone = (c - r) * segment.repeat
            per_input = (spec.params - (spec.out_channels if spec.bias else 0)) // spec.in_channels
            layer_macs = layer.macs // layer.in_channels
            params, params_gone = params + spec.params, params_gone + gone * per_input
            macs, macs_gone = macs + layer_macs * spec.in_channels, macs_gone + gone * layer_macs
            entry = {"path": layer.path, "offset": offset, "repeat": segment.repeat, "layer": spec_to_dict(spec)}
            consumers.append(entry)
        for norm_path, norm, segment in flow.norms:
            before = norm.num_features - self._less(norm_path)
            norms.append({"path": norm_path, "channels": before, "offset": self._offset(norm_path, segment)})
            per_channel = sum(p.numel() for p in norm.parameters(recurse=False)) // norm.num_features
            params, params_gone = params + before * per_channel, params_gone + (c - r) * per_channel
        settings: dict[str, Any] = {
            "channels": r,
            "init": self.settings.init,
            "branch_channels": c,
            "dims": len(shape) - 2,
            "dtype": str(info(source).outputs[0].dtype).removeprefix("torch."),
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
        projection = prod(shape) * r
        estimate = Estimate(params, params - params_gone + c * r, macs, macs - macs_gone + projection)
        return Op("project", path, self.settings.name, settings, estimate)

    def _now(self, layer: Layer, segment: Segment) -> tuple[ConvSpec, int]:
        """A consumer's shape facts and the branch's first input, behind what earlier ops have narrowed."""
        spec = spec_of(layer)
        spec = replace(spec, in_channels=spec.in_channels - self._less(layer.path))
        return spec, self._offset(layer.path, segment)

    def _less(self, path: str) -> int:
        return sum(gone for _, gone in self.narrowed.get(path, ()))

    def _offset(self, path: str, segment: Segment) -> int:
        return segment.offset - sum(gone for start, gone in self.narrowed.get(path, ()) if start < segment.offset)

    def _note(self, flow: Flow, width: int) -> None:
        gone = width - self.settings.channels
        for path, segment in (
            *((layer.path, segment) for layer, segment in flow.consumers),
            *((path, segment) for path, _, segment in flow.norms),
        ):
            self.narrowed.setdefault(path, []).append((segment.offset, gone * segment.repeat))
        self.touched |= set(flow.nodes)


def _rows(layer: Layer, segment: Segment) -> int:
    """How many combinations of a branch's channels a reader makes."""
    spec = spec_of(layer)
    return spec.out_channels * prod(spec.kernel_size) * segment.repeat


def _width(source: fx.Node) -> int:
    """Channels of a branch's output."""
    return info(source).outputs[0].shape[1]


def _is_in(path: str, scope: str) -> bool:
    return path == scope or path.startswith(f"{scope}.")
