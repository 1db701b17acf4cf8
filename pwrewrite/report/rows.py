"""What the cells of every rendering say: which layers, in which order, and the words for each of their facts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..analysis.records import Analysis, LayerReport, OpTotal
from ..core.errors import UsageError
from ..core.numbers import count, dims, duration, exact, percent, plural, size

if TYPE_CHECKING:
    from ..analysis.conventions import Count

SORTS = ("macs", "params", "memory", "name", "order")

TOP = 15
"""Layers shown unless the user says otherwise."""

NO_CONVOLUTION = "This model has no convolution: there is nothing here for 1×1 rewriting."


@dataclass(frozen=True, slots=True)
class View:
    """What a reader wants to see.

    Attributes:
        top: At most so many layers; None for as many as suit the format.
        sort: Order of the layers, one of `SORTS`: largest first, by name, or in the order in which the model defines
            them.
        everything: All layers, pointwise and linear ones too, each with the reason why it stays as it is.
        depth: Show the module hierarchy down to this level in place of the layers.
        receptive_field: Show what part of the input a position of each layer's output sees.
    """

    top: int | None = None
    sort: str = "macs"
    everything: bool = False
    depth: int | None = None
    receptive_field: bool = False

    def __post_init__(self) -> None:
        if self.sort not in SORTS:
            raise UsageError("no such order of layers", expected=", ".join(SORTS), got=repr(self.sort))
        for name, value in (("top", self.top), ("depth", self.depth)):
            if value is not None and value < 0:
                raise UsageError(f"{name} is negative", expected="0 or more", got=str(value))

    def check(self, form: str) -> None:
        """Refuses what a format cannot show: a choice of layers in JSON, which holds every layer in one order, and the
        module hierarchy in CSV.
        """
        if form == "json" and (self.top is not None or self.sort != "macs"):
            raise UsageError("JSON always holds every layer, largest MACs first", hint="leave out --top and --sort")
        if form == "csv" and self.depth is not None:
            raise UsageError("CSV holds layers, not modules", hint="--format json has the modules too")

    @property
    def limit(self) -> int | None:
        """How many layers a page for people shows: `TOP` of the hotspots unless told otherwise, all of all layers."""
        return TOP if self.top is None and not self.everything else self.top


@dataclass(frozen=True, slots=True)
class Selection:
    """The layers shown, their running share of the MACs, and how many more hotspots or layers there are."""

    reports: tuple[LayerReport, ...]
    cumulative: tuple[float, ...]
    left_out: int
    hotspots: bool


def select(analysis: Analysis, view: View) -> Selection:
    """The layers on a page for people: the hotspots, or all layers where there are none or all are wanted."""
    hotspots = bool(analysis.hotspots) and not view.everything
    ordered = sort_layers(analysis, analysis.hotspots if hotspots else analysis.layers, view.sort)
    shown = tuple(ordered if view.limit is None else ordered[: view.limit])
    running, cumulative = 0.0, []
    for report in shown:
        running += report.share
        cumulative.append(min(running, 1.0))
    return Selection(shown, tuple(cumulative), len(ordered) - len(shown), hotspots)


def sort_layers(analysis: Analysis, reports: Sequence[LayerReport], sort: str) -> list[LayerReport]:
    """The layers of an analysis by one of `SORTS`; ties keep their order."""
    if sort == "order":
        positions = {node.path: i for i, (_, node) in enumerate(analysis.tree.walk())}
        parent = {r.layer.path: r.layer.path.rpartition(".")[0] for r in reports}
        return sorted(reports, key=lambda r: positions.get(r.layer.path, positions.get(parent[r.layer.path], -1)))
    if sort == "name":
        return sorted(reports, key=lambda r: natural(r.layer.path))
    amounts = {"params": lambda r: r.layer.params, "memory": lambda r: r.activation_bytes}
    return sorted(reports, key=amounts.get(sort, lambda r: r.layer.macs), reverse=True)


def natural(path: str) -> list[tuple[int, int, str]]:
    """A sort key under which ``layer2`` comes before ``layer10``."""
    key = []
    for part in path.split("."):
        stem = part.rstrip("0123456789")
        key.append((0 if stem else -1, 0, stem))
        key.append((0, int(part[len(stem) :] or -1), ""))
    return key


def path_text(report: LayerReport) -> str:
    """The layer's path; the root itself has none and is called ``(model)``. Several calls or names are told."""
    layer = report.layer
    text = layer.path or "(model)"
    return f"{text} ×{len(layer.calls)}" if len(layer.calls) > 1 else text


def kernel_text(report: LayerReport) -> str:
    """Kernel, stride, dilation and groups: ``3×3 /2 d2 g32``; a transposed one starts with ``T``; or ``linear``."""
    spec = report.layer.spec
    if spec is None:
        return report.layer.op
    kernel = dims(spec.kernel_size) if spec.dims > 1 else f"k{spec.kernel_size[0]}"
    parts = [f"T{kernel}" if spec.transposed else kernel]
    for mark, values in (("/", spec.stride), ("d", spec.dilation)):
        if any(n != 1 for n in values):
            parts.append(mark + (str(values[0]) if len(set(values)) == 1 else dims(values)))
    if spec.is_depthwise:
        parts.append("dw")
    elif spec.groups > 1:
        parts.append(f"g{spec.groups}")
    return " ".join(parts)


def output_text(report: LayerReport) -> str:
    """Spatial size of the first call's output (of a linear map, the sizes before its features); ``–`` if not called."""
    layer = report.layer
    if not layer.calls:
        return "–"
    shape = layer.calls[0].output_shape
    spatial = shape[-layer.spec.dims :] if layer.spec is not None else shape[:-1]
    return dims(spatial) if spatial else "–"


def ranks_text(report: LayerReport, of: str) -> str:
    """Break-even ranks in ``macs`` or ``params``: ``341``, ``170→341`` where the two sides differ, or ``–``."""
    if report.break_even is None:
        return "–"
    rank_in, rank_out = (getattr(report.break_even, f"{of}_rank_{side}") for side in ("in", "out"))
    return str(rank_in) if rank_in == rank_out else f"{rank_in}→{rank_out}"


def field_text(report: LayerReport) -> str:
    """The receptive field: ``31×31``, ``global`` where all positions are mixed, ``–`` where it is not known."""
    if report.sees_whole_input:
        return "global"
    return dims(report.receptive_field) if report.receptive_field else "–"


def saving_text(report: LayerReport) -> str:
    """What a half-width bottleneck does to the layer's MACs (``-60%``), or the reason why none may be inserted."""
    ranks, macs = report.break_even, report.layer.macs
    if ranks is not None and macs:
        change = round(100 * (ranks.half_macs - macs) / macs)
        return f"{change:+d}%" if change else "0%"
    return str(report.skip.reason) if report.skip else "–"


def input_texts(analysis: Analysis) -> list[str]:
    """Each input: ``x 1×3×224×224 float32``."""
    texts = []
    for entry in analysis.inputs:
        shape = entry["shape"]
        assert isinstance(shape, list | tuple)
        texts.append(f"{entry['name']} {dims(shape)} {entry['dtype']}")
    return texts


def totals_text(analysis: Analysis, counted: Count | None = None, *, digits: bool = True) -> str:
    """Parameters, MACs, FLOPs and weight bytes in a line; the total in ``counted`` takes the place of ours."""

    def total(value: int) -> str:
        return f"{count(value)} ({exact(value)})" if digits and value >= 1000 else count(value)

    macs = f"MACs {total(analysis.macs)} · FLOPs {count(analysis.flops)}"
    if counted is not None:
        macs = f"{counted.unit} {total(counted.total)} as {counted.tool} counts"
    return f"params {total(analysis.params)} · {macs} · weights {size(analysis.weight_bytes)}"


def headline(analysis: Analysis, selection: Selection) -> str:
    """What the table of layers holds, in a sentence."""
    layers = analysis.layers
    if not selection.hotspots:
        why = "" if analysis.hotspots else "no k×k convolution is a hotspot; "
        if len(layers) < 2:
            return f"{why}the only layer" if layers else "no convolutions and no linear maps"
        return f"{why}{'the largest of' if selection.left_out else 'all'} {plural(len(layers), 'layer')}"
    share = sum(report.share for report in analysis.hotspots)
    hot = len(analysis.hotspots)
    does = "does" if hot == 1 else "do"
    return f"{hot} of {plural(len(layers), 'layer')} {does} {percent(min(share, 1.0))} of the MACs"


def peak_text(analysis: Analysis) -> str:
    """How much activation memory a forward pass takes at most and where, with the largest tensors alive then."""
    peak = analysis.peak
    place = peak.path or peak.node
    text = size(peak.nbytes) + (f" at {place}" if place else "")
    text += f" ({size(analysis.activation_bytes)} written in all)"
    texts = [f"{t.path or t.node} {dims(t.shape)} {size(t.nbytes)}" for t in peak.tensors[:3]]
    if rest := peak.tensors[3:]:
        texts.append(f"{len(rest)} more {size(sum(t.nbytes for t in rest))}")
    return f"{text}: {' + '.join(texts)}" if texts else text


def critical_path_text(analysis: Analysis) -> str:
    """How much work lies on the longest dependent chain."""
    critical = analysis.critical_path
    if not analysis.macs:
        return "no MACs"
    text = f"{count(critical.macs)} MACs in {plural(len(critical.nodes), 'step')}"
    if critical.off_path_share > 0:
        return f"{text}; {percent(critical.off_path_share)} of the MACs lie off it, in parallel branches"
    return f"{text}; all MACs lie on it"


def roofline_text(analysis: Analysis) -> str:
    """How long the stated device takes at best, and how much of the layers' work memory bounds."""
    roofline = analysis.roofline
    called = [report for report in analysis.layers if report.layer.called]
    bound = [report for report in called if report.bound == "memory"]
    share = share_of(sum(report.layer.macs for report in bound), analysis.macs)
    return (
        f"≥ {duration(roofline.seconds)} on {roofline.device} · memory bounds "
        f"{percent(roofline.memory_bound_share)} of that time, {exact(len(bound))} of {plural(len(called), 'layer')}, "
        f"{percent(share)} of the MACs"
    )


def coverage_text(analysis: Analysis) -> str:
    """How much of the model the graph holds: ``whole · 53/53 convolutions · all priced``."""
    coverage = analysis.coverage
    parts = [
        {"eager": "eager (no layer in a graph)"}.get(coverage.capture, coverage.capture),
        f"{coverage.in_graph}/{plural(coverage.convolutions, 'convolution')}",
        f"unpriced: {unpriced_text(analysis)}" if coverage.unpriced else "all priced",
    ]
    if coverage.values == "real":
        parts.append("one seeded real run")
    return " · ".join(parts)


def unpriced_text(analysis: Analysis) -> str:
    """The operations without a formula, each with how often it ran."""
    return ", ".join(f"{op} ×{calls}" for op, calls in analysis.coverage.unpriced)


def notes_of(analysis: Analysis) -> list[str]:
    """The notes, led by the one that matters most where there is no convolution."""
    notes = list(analysis.notes)
    return notes if analysis.coverage.convolutions else [NO_CONVOLUTION, *notes]


def op_rows(analysis: Analysis, most: int | None) -> tuple[list[OpTotal], list[OpTotal]]:
    """Totals by kind of operation: those to show, of which ``most`` without MACs and parameters, and the rest."""
    counted = [total for total in analysis.by_op if total.macs or total.params]
    free = [total for total in analysis.by_op if not (total.macs or total.params)]
    free.sort(key=lambda total: -(total.read_bytes + total.write_bytes))
    cut = len(free) if most is None or len(free) == most + 1 else most  # "1 more" takes the room of the one
    return counted + free[:cut], free[cut:]


def share_of(part: int, whole: int) -> float:
    """``part / whole``, 0 of nothing."""
    return part / whole if whole else 0.0
