"""What the scripts of an HTML report draw: a model, a rewrite and a frontier as small JSON data.

A page of a large model should stay small, so that modules name their parent by position, steps their module, and the
steps that they read by distance, and texts that recur stand once; ``assets/base.js`` reads this and names every column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..analysis.records import Analysis, LayerReport, TreeNode
from ..core.numbers import count, dims
from ..core.records import Json
from ..core.text import plain
from . import rewrite_rows, rows
from .records import Frontier, Point, Report

_BOUNDS = ("", "compute", "memory")
_DIGITS = 4
"""Significant digits of what is no integer."""


def model_data(analysis: Analysis, name: str = "", notes: Mapping[str, str] | None = None) -> Json:
    """A model: totals, modules, steps and layers; ``notes`` says of a layer by its path what was done to it."""
    nodes = [node for _, node in analysis.tree.walk()]
    position = {node.path: i for i, node in enumerate(nodes)}
    params = [node.params - sum(child.params for child in node.children) for node in nodes]
    texts = _Texts()
    steps = []
    for i, step in enumerate(analysis.steps):
        op, shape, cost, seconds = texts[step.op], texts[dims(step.shape)], step.cost, round(step.seconds * 1e9)
        facts = [op, _module(step.path, position), int(step.leaf), shape, cost.macs, cost.params, cost.write_bytes]
        steps.append([*facts, seconds, step.live, *(i - source for source in step.inputs)])
    peak, roof = analysis.peak, analysis.roofline
    return {
        "name": name,
        "inputs": [plain(text) for text in rows.input_texts(analysis)],
        "totals": {
            "params": analysis.params,
            "macs": analysis.macs,
            "weights": analysis.weight_bytes,
            "memory": analysis.activation_bytes,
            "peak": peak.nbytes,
            "time": _rounded(roof.seconds),
        },
        "roof": {"device": roof.device, "macs": roof.macs_per_s, "bytes": roof.bytes_per_s},
        "peak": [[plain(t.path or t.node), dims(t.shape), t.nbytes] for t in peak.tensors],
        "modules": [[*_named(node, position), texts[node.kind], own] for node, own in zip(nodes, params)],
        "steps": steps,
        "layers": [_layer(report, position, notes, texts) for report in analysis.layers],
        "texts": list(texts),
    }


class _Texts(dict[str, int]):
    """Texts that recur, and their positions."""

    def __missing__(self, text: str) -> int:
        return self.setdefault(plain(text), len(self))


def _named(node: TreeNode, position: Mapping[str, int]) -> list[Json]:
    """A module's own name and the position of its parent."""
    if not node.path:
        return ["", -1]
    return [plain(node.name), position[node.path.rpartition(".")[0]]]


def _module(path: str, position: Mapping[str, int]) -> int:
    """The module of a path, or the nearest around it."""
    while path not in position:
        path = path.rpartition(".")[0]
    return position[path]


def _layer(
    report: LayerReport, position: Mapping[str, int], notes: Mapping[str, str] | None, texts: _Texts
) -> list[Json]:
    layer = report.layer
    saving = "" if notes is not None else rows.saving_text(report)
    note = notes.get(layer.path, "") if notes is not None else report.skip.detail if report.skip else ""
    return [
        _module(layer.path, position),
        "" if layer.path in position else plain(layer.path),
        texts[rows.kernel_text(report)],
        layer.in_channels,
        layer.out_channels,
        texts[rows.output_text(report)],
        len(layer.calls),
        layer.params,
        layer.macs,
        report.activation_bytes,
        _BOUNDS.index(report.bound),
        _rounded(report.intensity),
        _rounded(report.seconds),
        int(report.hotspot),
        texts[saving],
        texts[note],
    ]


def rewrite_data(report: Report, *, planned: bool = False) -> dict[str, Json]:
    """A rewrite: the model before, with what was done to each layer, and after."""
    done = done_to([row.to_dict() for row in report.edits], [skip.to_dict() for skip in report.skips])
    return pair_data(report.target, rewrite_rows.headline(report, planned=planned), report.models, done)


def pair_data(
    target: str, subtitle: str, models: tuple[Analysis, Analysis] | None, done: Mapping[str, str]
) -> dict[str, Json]:
    """A model before, with what was done to each layer, and after."""
    pairs = zip(models or (), ("before", "after"), (done, {}))
    data = [model_data(model, name, notes) for model, name, notes in pairs]
    return {"target": plain(target), "subtitle": subtitle, "models": data}


def done_to(edits: Sequence[Mapping[str, Json]], skips: Sequence[Mapping[str, Json]]) -> dict[str, str]:
    """What became of layers, by path, from the edits and skips in the JSON of a report."""
    done = {skip["path"]: f"{skip['reason']}: {skip['detail']}" for skip in skips}
    for edit in edits:
        widths = "→".join(dict.fromkeys(str(edit[key]) for key in ("rank_in", "rank_out") if edit[key] is not None))
        text = f"{edit['method']} {widths}".strip()
        text += f": MACs {count(edit['macs_before'])} → {count(edit['macs_after'])}"
        if edit["relative_error"] is not None:
            text += f", weight error {rewrite_rows.error_text(edit['relative_error'])}"
        done[edit["path"]] = text
    return done


def frontier_data(frontier: Frontier) -> Json:
    """A frontier: each point's share of what is limited, its cost, its loss and how many layers it rewrites."""

    def data(point: Point) -> list[Json]:
        return [
            _rounded(frontier.share(point, frontier.kind)),
            point.costs[frontier.kind],
            _rounded(point.loss),
            point.layers,
        ]

    chosen = None if frontier.chosen is None else data(frontier.chosen)
    return {"cost": frontier.kind, "points": [data(point) for point in frontier.points], "chosen": chosen}


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
