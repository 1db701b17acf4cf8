"""What keeps oneDNN's graph interface from its reference kernels, which take up to 300 times as long as eager torch.

In a partition (oneDNN 3.x, behind torch 2.11 to 2.15) such a kernel is taken for

- a product of matrices of which neither the rows nor the columns lie together, as behind attention's talking heads, or
  that a partition's convolution leaves in a layout of its own;
- a sum, product or quotient, element by element, where a tensor lies in memory with gaps, as the halves of a gated unit
  do, be it behind operations of one tensor, or in another order than the other tensor, as the heads of attention do, or
  where it is expanded, as the norm is that ``F.normalize`` divides by;
- the same where it joins a layer norm, or an operation of one tensor, such as ``gelu(x) * y``, that no convolution or
  product takes in.

A product whose second operand is of one image, with a stride on that axis that is less than the image's extent, gives
other values, and so do all later ones of its sizes in the process; it reads a view with another stride.

The first two read copies, which eager torch makes by itself or has loops in place of; the last are kept apart by a
view, which no partition reaches across.
"""

from __future__ import annotations

from math import prod
from typing import Any

from torch._C import Graph, Node, TensorType, Value

ELEMENTWISE = frozenset({"aten::add", "aten::mul", "aten::div"})
_PRODUCTS = frozenset({"aten::matmul", "aten::bmm", "aten::linear"})
CONVOLUTIONS = frozenset({"aten::_convolution", "aten::conv2d"})
_COPIES = frozenset({"aten::alias", "aten::clone"})
_CONTIGUOUS, _AS_IT_LIES = 0, None
"""Memory formats of a copy; the latter leaves gaps out and keeps the order of axes of images."""

Layout = list[tuple[int, int, int]]
"""Number, size and stride of each axis that is longer than one."""


def keep_kernels(graph: Any) -> None:
    """Puts copies and views in a traced graph where partitions would run reference kernels."""
    for node in list(graph.nodes()):
        values = list(node.inputs())[:2]
        if node.kind() in _PRODUCTS:
            for i, value in enumerate(values):
                if _crossed(layout(value)):
                    _copy(graph, node, i, _CONTIGUOUS)
                elif (strides := _plain_strides(value)) is not None:
                    _restride(graph, node, i, strides)
                elif value.node().kind() in CONVOLUTIONS:
                    detach(graph, node, i)
        elif node.kind() in ELEMENTWISE:
            orders = [_order(layout(value)) for value in values]
            for i, value in enumerate(values):
                expanded = any(not stride for *_, stride in layout(value))
                if expanded or (_permuted(layout(value)) and orders[0] != orders[1]):
                    _copy(graph, node, i, _CONTIGUOUS)
                else:
                    _copy_gaps(graph, node, i)
                if _stands_alone(list(node.inputs())[i]):
                    detach(graph, node, i)


def layout(value: Value) -> Layout:
    """How a traced tensor lies in memory; nothing for what is none."""
    kind = value.type()
    sizes, strides = (kind.sizes(), kind.strides()) if isinstance(kind, TensorType) else (None, None)
    axes = enumerate(zip(sizes or (), strides or ()))
    return [(axis, size, stride) for axis, (size, stride) in axes if size > 1]


def only_operand(node: Node) -> int | None:
    """Which input an operation of one tensor reads it from; None for any other operation."""
    tensors = [i for i, value in enumerate(node.inputs()) if isinstance(value.type(), TensorType)]
    return tensors[0] if node.kind().startswith("aten::") and len(tensors) == 1 else None


def _copy_gaps(graph: Any, node: Node, operand: int) -> None:
    """Copies an operand with gaps, or what it comes from by way of operations of one tensor."""
    i: int | None = operand
    while i is not None:
        value = list(node.inputs())[i]
        if _has_gaps(layout(value)):
            return _copy(graph, node, i, _AS_IT_LIES)
        node = value.node()
        i = only_operand(node) if len(value.uses()) == 1 else None
    return None


def _stands_alone(value: Value) -> bool:
    """Whether a tensor comes from a norm of layers, or an operation of one tensor that no other takes in."""
    node = value.node()
    i = only_operand(node)
    if i is None or node.kind() in _COPIES:
        return node.kind() == "aten::layer_norm"
    source = list(node.inputs())[i]
    maker = source.node().kind()
    takes = maker in CONVOLUTIONS or (maker in _PRODUCTS and node.kind() != "aten::silu")
    return not takes or len(source.uses()) > 1


def detach(graph: Graph, node: Node, i: int) -> None:
    """Puts a view of an operand in its place, which keeps a node apart from what makes it."""
    value = list(node.inputs())[i]
    view = graph.create("aten::alias", [value], 1)
    view.insertBefore(node)
    view.output().setType(value.type())
    node.replaceInput(i, view.output())


def _restride(graph: Any, node: Node, i: int, strides: list[int]) -> None:
    """Puts a view of an operand with other strides in its place."""
    value = list(node.inputs())[i]
    kind: Any = value.type()
    graph.setInsertPoint(node)
    constants = [graph.insertConstant(each) for each in (kind.sizes(), strides, None)]
    view = graph.create("aten::as_strided", [value, *constants], 1)
    view.insertBefore(node)
    view.output().setType(kind)
    node.replaceInput(i, view.output())


def _copy(graph: Any, node: Node, i: int, memory_format: int | None) -> None:
    value = list(node.inputs())[i]
    graph.setInsertPoint(node)
    copy = graph.create("aten::clone", [value, graph.insertConstant(memory_format)], 1)
    copy.insertBefore(node)
    kind: Any = value.type()
    copy.output().setType(kind if memory_format is None else kind.contiguous())
    node.replaceInput(i, copy.output())


def _crossed(axes: Layout) -> bool:
    return len(axes) > 1 and 1 not in (stride for *_, stride in axes[-2:])


def _plain_strides(value: Value) -> list[int] | None:
    """The strides of a tensor with those of outer axes of one element as if there were more; None for what has them."""
    kind = value.type()
    sizes, strides = (kind.sizes(), kind.strides()) if isinstance(kind, TensorType) else (None, None)
    if sizes is None or strides is None:
        return None
    reach = sum((size - 1) * stride for size, stride in zip(sizes, strides)) + 1
    plain = [max(stride, reach) if size == 1 else stride for size, stride in zip(sizes[:-2], strides[:-2])]
    return None if plain == strides[:-2] else [*plain, *strides[-2:]]


def _has_gaps(axes: Layout) -> bool:
    return sum((size - 1) * stride for _, size, stride in axes) + 1 > prod(size for _, size, _ in axes)


def _order(axes: Layout) -> list[int]:
    """The axes by their strides, the longest first."""
    return [axis for axis, *_ in sorted(axes, key=lambda axis: -axis[-1])]


def _permuted(axes: Layout) -> bool:
    """Whether axes are in an order that is neither the common one nor that of images with their channels last."""
    order = _order(axes)
    channels_last = sorted(order, key=lambda axis: (axis != 0, axis == 1, axis))
    return order != sorted(order) and (max(order) < 3 or order != channels_last)
