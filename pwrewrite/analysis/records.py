"""What an analysis says, as plain records: totals, rows by kind of operation, hotspots, memory, paths.

Integers are stored and scaled only where they are rendered. ``Analysis.to_dict()`` is the JSON of schema
``pwrewrite.analysis/1``; names in it are stable.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..capture.records import Coverage, Layer
from ..plan import Skip


@dataclass(frozen=True, slots=True)
class BreakEven:
    """Ranks at which a bottleneck costs as much as the layer it replaces, at equal ratio on both sides.

    A bottleneck gains below these ranks. They differ between MACs and parameters where there is a stride: the reduction
    runs at the input's resolution, core and expansion at the output's.

    Attributes:
        macs_rank_in: Largest width after the reduction that does not raise the MACs.
        macs_rank_out: Largest width before the expansion that does not raise the MACs.
        params_rank_in: The same for parameters.
        params_rank_out: The same for parameters.
        half_macs: MACs of a bottleneck at half width on both sides, all calls.
        half_params: Parameters of a bottleneck at half width on both sides.
    """

    macs_rank_in: int
    macs_rank_out: int
    params_rank_in: int
    params_rank_out: int
    half_macs: int
    half_params: int


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One layer of the table: the layer, its share and what could be done with it.

    Attributes:
        layer: The layer.
        share: Its part of the model's MACs, 0 to 1.
        hotspot: Whether it is dense, k×k and at or above the hotspot share.
        break_even: Ranks below which a bottleneck gains; None where none may be inserted.
        skip: Why no bottleneck may be inserted; None where one may.
        receptive_field: Extent of the model's input that one output position of its first call sees, per spatial dim;
            None where unknown (global operations count as the whole input).
        bound: ``compute`` or ``memory``: its roofline class on the stated device.
        intensity: MACs per byte moved.
        activation_bytes: Bytes of the outputs of all its calls.
    """

    layer: Layer
    share: float
    hotspot: bool
    break_even: BreakEven | None
    skip: Skip | None
    receptive_field: tuple[int, ...] | None
    bound: str
    intensity: float
    activation_bytes: int


@dataclass(frozen=True, slots=True)
class OpTotal:
    """Totals of one kind of operation."""

    op: str
    calls: int
    params: int
    macs: int
    read_bytes: int
    write_bytes: int


@dataclass(frozen=True, slots=True)
class LiveTensor:
    """A tensor alive at the moment of peak memory."""

    node: str
    path: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Peak:
    """The moment of peak activation memory.

    Attributes:
        nbytes: Bytes of activations (inputs included, weights not) alive then.
        node: Name of the node that ran then.
        path: Its module path.
        tensors: What was alive, largest first.
    """

    nbytes: int
    node: str
    path: str
    tensors: tuple[LiveTensor, ...]


@dataclass(frozen=True, slots=True)
class CriticalPath:
    """The chain of dependent operations with the most MACs.

    Attributes:
        macs: MACs along it.
        nodes: Names of its nodes that have MACs.
        off_path_share: Part of the model's MACs that lies off it, 0 to 1: what parallel branches could overlap.
    """

    macs: int
    nodes: tuple[str, ...]
    off_path_share: float


@dataclass(frozen=True, slots=True)
class TreeNode:
    """A module of the hierarchy with the cost of all that runs inside it."""

    path: str
    kind: str
    params: int
    macs: int
    children: tuple[TreeNode, ...] = ()


@dataclass(frozen=True)
class Analysis:
    """Where a model's work goes.

    Attributes:
        target: What was analysed, as the user named it, or the class name.
        model_class: Qualified class name.
        inputs: ``{"name", "shape", "dtype"}`` per input tensor.
        params: Parameter elements, each tensor once.
        macs: MACs of one forward pass.
        weight_bytes: Bytes of parameters and buffers, each once.
        activation_bytes: Bytes of all tensors written in one forward pass, views excluded.
        peak: Peak activation memory.
        critical_path: The longest dependent chain.
        layers: Every convolution and linear map, largest MACs first.
        by_op: Totals by kind of operation, largest MACs first and then most bytes.
        tree: The module hierarchy.
        coverage: What the graph holds of the model.
        device: Name of the device profile behind the roofline classes.
        notes: What a reader should be told.
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
    layers: tuple[LayerReport, ...]
    by_op: tuple[OpTotal, ...]
    tree: TreeNode
    coverage: Coverage
    device: str
    notes: tuple[str, ...] = field(default=())

    @property
    def flops(self) -> int:
        """2 × MACs."""
        return 2 * self.macs

    @property
    def hotspots(self) -> tuple[LayerReport, ...]:
        """The layers worth squeezing, largest first."""
        return tuple(report for report in self.layers if report.hotspot)
