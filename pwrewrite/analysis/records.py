"""What an analysis says, as plain records; ``Analysis.to_dict()`` is the JSON of schema ``pwrewrite.analysis/1``."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from ..capturing.records import Call, Coverage, Layer
from ..core.plan import Skip
from ..core.records import Record, Shown, as_data, key, named
from ..core.version import version
from .steps import Recording, Step

SCHEMA = "pwrewrite.analysis/1"
"""Name and version of the JSON: keys may be added under one version, never renamed or removed."""


@dataclass(frozen=True, slots=True)
class BreakEven(Record):
    """Largest ranks at which a bottleneck does not cost more than the layer it replaces, at equal ratio on both sides.

    MACs and parameters differ where there is a stride: the reduction runs at the input's resolution, core and expansion
    at the output's. Ranks are totals over the groups; 0 where even rank 1 per group costs more than the layer.
    ``half_macs`` (all calls) and ``half_params`` (bias included) are a bottleneck's at half width on both sides.
    """

    macs_rank_in: int
    macs_rank_out: int
    params_rank_in: int
    params_rank_out: int
    half_macs: int
    half_params: int


@dataclass(frozen=True, slots=True)
class LayerReport(Record):
    """One layer of the table: the layer, its share and what could be done with it.

    Attributes:
        share: Its part of the model's MACs, 0 to 1; ``cumulative`` with all layers above it in ``Analysis.layers``.
        hotspot: Whether it is dense, k×k and at or above the hotspot share.
        break_even: Ranks below which a bottleneck gains; None where none may be inserted, and ``skip`` says why.
        receptive_field: Extent of the model's input that one output position of its first call sees, per spatial dim;
            None where unknown (a dim that is seen whole has the input's size).
        bound: ``compute`` or ``memory``: its roofline class on the stated device; ``""`` where it is not called.
        intensity: MACs per byte moved, all calls; 0 where it is not called.
        seconds: Lower bound of the time of all its calls on the stated device.
        activation_bytes: Bytes of the outputs of all its calls.
        sees_whole_input: Whether its receptive field is global: something before it mixes all positions.
    """

    layer: Layer
    share: float
    cumulative: float
    hotspot: bool
    break_even: BreakEven | None
    skip: Skip | None
    receptive_field: tuple[int, ...] | None
    bound: str
    intensity: float
    seconds: float
    activation_bytes: int
    sees_whole_input: bool = False

    def to_dict(self) -> dict[str, object]:
        """The same as plain JSON data."""
        layer, skip = self.layer, self.skip
        names = ("kernel_size", "stride", "padding", "dilation", "groups")
        window = {name: as_data(getattr(layer.spec, name, None)) for name in names}
        return {
            **named(layer, "path aliases op"),
            "kernel": window.pop("kernel_size"),
            **window,
            **named(layer, "in_channels out_channels functional params macs"),
            "flops": 2 * layer.macs,
            "share": self.share,
            "cumulative_share": self.cumulative,
            "hotspot": self.hotspot,
            "weight_bytes": layer.weight_bytes,
            **named(self, "activation_bytes intensity bound seconds receptive_field sees_whole_input"),
            "calls": [_call(call) for call in layer.calls],
            "break_even": as_data(self.break_even),
            "skip": {"reason": str(skip.reason), "detail": skip.detail} if skip else None,
        }


def _call(call: Call) -> dict[str, object]:
    shapes = {"input_shape": list(call.input_shape), "output_shape": list(call.output_shape)}
    return {"node": call.node, **shapes, "macs": call.cost.macs, "island": call.island}


@dataclass(frozen=True, slots=True)
class OpTotal(Record):
    """Totals of one kind of operation, without inputs, outputs and constants."""

    op: str
    calls: int
    params: int
    macs: int
    read_bytes: int
    write_bytes: int

    def to_dict(self) -> dict[str, object]:
        """The same as plain JSON data."""
        counts = {**named(self, "op calls params macs"), "flops": 2 * self.macs}
        return {**counts, **named(self, "read_bytes write_bytes")}


@dataclass(frozen=True, slots=True)
class LiveTensor:
    """A tensor alive at the moment of peak memory."""

    node: str
    path: str
    shape: tuple[int, ...]
    nbytes: int = field(metadata=key("bytes"))


@dataclass(frozen=True, slots=True)
class Peak(Record):
    """The moment of peak activation memory.

    Attributes:
        nbytes: Bytes of activations (inputs included, weights not) alive then.
        node: Name of the node that ran then.
        tensors: What was alive, largest first.
    """

    nbytes: int = field(metadata=key("bytes"))
    node: str
    path: str
    tensors: tuple[LiveTensor, ...]


@dataclass(frozen=True, slots=True)
class CriticalPath(Record):
    """The chain of dependent operations with the most MACs.

    Attributes:
        nodes: Names of its nodes that have MACs.
        off_path_share: Part of the model's MACs that lies off it, 0 to 1: what parallel branches could overlap.
    """

    macs: int
    nodes: tuple[str, ...]
    off_path_share: float


@dataclass(frozen=True, slots=True)
class Roofline(Record):
    """A device, and what it makes of the model at best.

    Attributes:
        macs_per_s: Its peak MACs per second in the model's main dtype.
        ridge: MACs per byte above which an operation is compute-bound.
        seconds: Lower bound of one forward pass, node after node: the larger of compute time and transfer time of each.
        memory_bound_share: Part of ``seconds`` spent in memory-bound nodes, 0 to 1.
    """

    device: str
    macs_per_s: float
    bytes_per_s: float
    ridge: float
    seconds: float
    memory_bound_share: float


@dataclass(frozen=True, slots=True, repr=False)
class TreeNode(Shown):
    """A module of the hierarchy with the cost of all that runs inside it.

    Attributes:
        path: Its absolute path; ``""`` for the model.
        kind: Class name.
        params: Parameter elements of it and its children; a tensor counts where it is first met, once.
        children: Its children, in module order; a module under several paths is at the first.
    """

    path: str
    kind: str
    params: int
    macs: int
    children: tuple[TreeNode, ...] = ()

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.rpartition(".")[2]

    def walk(self) -> Iterator[tuple[int, TreeNode]]:
        """Yields ``(depth, node)`` from this node down, parents first, without recursion."""
        stack = [(0, self)]
        while stack:
            depth, node = stack.pop()
            yield depth, node
            stack.extend((depth + 1, child) for child in reversed(node.children))


@dataclass(frozen=True, repr=False)
class Analysis(Shown, Record):
    """Where a model's work goes.

    Attributes:
        target: What was analysed, as the user named it, or the class name.
        inputs: ``{"name": str, "shape": [int], "dtype": str}`` per input tensor.
        params: Parameter elements, each tensor once; ``weight_bytes`` of parameters and buffers.
        macs: MACs of one forward pass.
        activation_bytes: Bytes of all tensors written in one forward pass, views excluded.
        layers: Every convolution and linear map, largest MACs first.
        by_op: Totals by kind of operation, largest MACs first and then most bytes.
    """

    target: str
    model_class: str
    inputs: tuple[dict[str, object], ...]
    params: int
    macs: int
    weight_bytes: int
    activation_bytes: int
    peak: Peak
    critical_path: CriticalPath
    roofline: Roofline
    layers: tuple[LayerReport, ...]
    by_op: tuple[OpTotal, ...]
    tree: TreeNode
    coverage: Coverage
    notes: tuple[str, ...] = field(default=())
    recording: Recording | None = field(default=None, compare=False)

    @property
    def steps(self) -> tuple[Step, ...]:
        """Every operation in the order of the run, inputs and outputs included; not part of the JSON."""
        return self.recording.steps if self.recording else ()

    @property
    def flops(self) -> int:
        """2 × MACs."""
        return 2 * self.macs

    @property
    def hotspots(self) -> tuple[LayerReport, ...]:
        """The layers worth squeezing, largest first."""
        return tuple(report for report in self.layers if report.hotspot)

    @property
    def device(self) -> str:
        """Name of the device profile behind the roofline classes."""
        return self.roofline.device

    def to_dict(self) -> dict[str, object]:
        """The analysis as plain JSON data of schema ``pwrewrite.analysis/1``: integers unscaled, names stable."""
        unpriced = [{"op": op, "calls": calls} for op, calls in self.coverage.unpriced]
        return {
            "schema": SCHEMA,
            "versions": versions(),
            "model": {"target": self.target, "class": self.model_class, "inputs": as_data(self.inputs)},
            "totals": {
                **named(self, "params macs flops weight_bytes activation_bytes"),
                "peak_activation_bytes": self.peak.nbytes,
                "critical_path_macs": self.critical_path.macs,
            },
            **named(self, "layers by_op peak critical_path roofline"),
            "modules": [
                {"path": node.path, "kind": node.kind, "depth": depth, "params": node.params, "macs": node.macs}
                for depth, node in self.tree.walk()
            ],
            "coverage": as_data(self.coverage) | {"unpriced": unpriced},
            "notes": list(self.notes),
        }

    def to_json(self, *, indent: int | None = 2) -> str:
        """`to_dict` as JSON text, on one line where ``indent`` is None."""
        return super().to_json(indent=indent).rstrip("\n")


def versions() -> dict[str, str]:
    """Versions of what made an analysis."""
    return {"pwrewrite": version(), "torch": str(torch.__version__), "python": platform.python_version()}
