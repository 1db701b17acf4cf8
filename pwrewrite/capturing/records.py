"""What a capture consists of: records about tensors, nodes, layers and calls, and the live `Capture` that holds them.

A *layer* is one weight under one or more paths; a *call* is one use of it in the graph. Parameters belong to layers,
MACs to calls. Every node of ``Capture.graph`` carries a `NodeInfo`, which `info` returns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import torch
from torch import fx, nn

from ..core.convolution import ConvSpec
from ..core.cost import Cost
from ..core.records import Shown


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of a dense tensor of this shape and dtype."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Window:
    """What a convolution or pooling sees of its input: one entry per spatial dim."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    transposed: bool = False

    @classmethod
    def of(cls, spec: ConvSpec) -> Window:
        """The window of a convolution."""
        return cls(spec.kernel_size, spec.stride, spec.padding, spec.dilation, spec.transposed)


@dataclass(slots=True)
class NodeInfo:
    """The facts of one node of the captured graph.

    Attributes:
        op: Canonical name of the operation: ``conv2d``, ``linear``, ``batch_norm``, ``attention``, ``input``, ….
        path: Path of the module that ran it (the leaf itself for a module call, the enclosing module for a function).
        inputs: Activations read, in order, without repetition. Weights are not among them.
        cost: Parameters used here (0 from the second call of a layer on), MACs, bytes; a view moves no bytes.
        alias_of: Name of the node whose storage the output shares: views and in-place operations.
        window: For convolutions and local pooling; ``spec`` for convolutions.
        unpriced: Operations inside that have no cost formula, one entry per occurrence.
        callers: Paths of the modules whose code was running, outermost first; the last one's code made the call.
        returned: Paths of the modules whose code returned it, whether or not anything reads it there.
    """

    op: str
    path: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    cost: Cost
    alias_of: str | None = None
    window: Window | None = None
    spec: ConvSpec | None = None
    unpriced: tuple[str, ...] = ()
    callers: tuple[str, ...] = ()
    returned: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MemoryEvent:
    """A change of live activation memory: ``node`` made a storage (``nbytes`` > 0) or a storage of it died (< 0)."""

    node: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Call:
    """One use of a layer.

    Attributes:
        node: Name of the graph node.
        cost: MACs and bytes of this call; ``params`` is 0, they belong to the layer.
        island: Name of the connected part of the graph that the call is in; ``""`` where there is one.
    """

    layer: str
    node: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    cost: Cost
    island: str = ""


@dataclass(frozen=True, slots=True)
class Layer:
    """One convolution or linear map.

    Attributes:
        path: First path of the module, or of the parameter that serves as weight where no module does.
        op: ``conv1d`` … ``conv_transpose3d`` or ``linear``.
        params: Elements of weight and bias.
        spec: The convolution's shape facts; None for a linear map.
        functional: Whether it is called as a function (``F.conv2d(x, self.weight)``) and not as a module.
        weight: Full name of the weight parameter, or ``""`` where the weight is computed in the graph.
    """

    path: str
    aliases: tuple[str, ...]
    op: str
    in_channels: int
    out_channels: int
    params: int
    weight_bytes: int
    spec: ConvSpec | None
    functional: bool
    weight: str
    calls: tuple[Call, ...] = ()

    @property
    def called(self) -> bool:
        """Whether the graph reaches it."""
        return bool(self.calls)

    @property
    def macs(self) -> int:
        """MACs of all its calls."""
        return sum(call.cost.macs for call in self.calls)


@dataclass(frozen=True, slots=True)
class Coverage:
    """How much of the model the graph holds.

    Attributes:
        capture: ``whole`` (one graph), ``islands`` (parts that torch functions cannot connect) or ``eager`` (no layer).
        convolutions: Distinct convolution layers the model has; ``in_graph`` how many of them the graph calls.
        unpriced: ``(operation, calls)`` without a formula.
        values: ``meta`` where shapes sufficed, ``real`` where the model needed one seeded real run.
    """

    capture: str
    convolutions: int
    in_graph: int
    unpriced: tuple[tuple[str, int], ...]
    values: str


@dataclass(frozen=True, repr=False)
class Capture(Shown):
    """A model as a graph: live, holds the model itself, untouched.

    Attributes:
        inputs: ``(name, spec)`` of every input tensor, nested ones flattened.
        graph: One `torch.fx.Graph`; sizes in it are those of the example inputs. `info` has the facts of a node.
        layers: Every convolution and linear map, reached or not, in graph order and then in module order.
        memory: Births and deaths of activation storages, in the order in which running the model makes them.
        params: Elements of all parameters, each tensor once; ``weight_bytes`` those of parameters and buffers.
        notes: What a reader should be told.
    """

    model: nn.Module
    inputs: tuple[tuple[str, TensorSpec], ...]
    graph: fx.Graph
    layers: tuple[Layer, ...]
    coverage: Coverage
    memory: tuple[MemoryEvent, ...]
    params: int
    weight_bytes: int
    notes: tuple[str, ...] = ()
    constants: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def calls(self) -> tuple[Call, ...]:
        """Every call of every layer, layer by layer."""
        return tuple(call for layer in self.layers for call in layer.calls)

    def layer(self, path: str) -> Layer:
        """The layer under ``path`` or one of its aliases; raises `KeyError` if there is none."""
        for layer in self.layers:
            if path == layer.path or path in layer.aliases:
                return layer
        raise KeyError(path)


_KEY = "info"


def info(node: fx.Node) -> NodeInfo:
    """The facts of a captured node."""
    facts: NodeInfo = node.meta[_KEY]
    return facts


def shape_of(value: object) -> tuple[int, ...] | None:
    """The shape of the first tensor that an argument in a graph is, or assigns items to; None where it is no tensor."""
    while isinstance(value, fx.Node) and info(value).op == "setitem":  # it returns nothing
        value = value.args[0]
    outputs = info(value).outputs if isinstance(value, fx.Node) else ()
    return outputs[0].shape if outputs else None


def set_info(node: fx.Node, facts: NodeInfo) -> None:
    """Gives a node its facts."""
    node.meta[_KEY] = facts
