"""Edits of a TorchScript graph in which oneDNN's fuser would fail, or would give other values.

Each changes the graph in place, and not what it computes. What the fuser is known to do wrong is that of torch 2.11 to
2.15; `pwrewrite.layers.tracing` compares what comes of it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import Graph, ListType, Node, TensorType, Value

from .strides import CONVOLUTIONS, ELEMENTWISE, detach, only_operand

_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "aten::add": operator.add,
    "aten::sub": operator.sub,
    "aten::mul": operator.mul,
    "aten::floor_divide": operator.floordiv,
    "aten::remainder": operator.mod,
}
"""What code does to sizes."""
_BINARY = frozenset({"aten::add", "aten::sub", "aten::mul", "aten::div", "aten::maximum", "aten::minimum"})


def work_out_sizes(graph: Any) -> None:
    """Puts numbers in the place of what code works out from sizes, which are always the same here.

    Torch traces whole numbers as tensors, and fails on those that change in place, as in ``n = x.shape[0]; n *= 4``.
    """
    known, worked_out = dict[str, int](), list[Any]()
    for node in list(graph.nodes()):
        if node.outputsSize() != 1:
            continue
        output, inputs = node.output(), [known.get(value.debugName()) for value in node.inputs()]
        number = _number(node, inputs)
        if number is None:
            continue
        known[output.debugName()] = number
        if node.kind() != "prim::Constant":
            worked_out.append(node)
            if not isinstance(output.type(), TensorType):
                graph.setInsertPoint(node)
                constant = graph.insertConstant(number)
                known[constant.debugName()] = number
                output.replaceAllUsesWith(constant)
    for node in reversed(worked_out):
        if not node.output().uses():
            node.destroy()


def _number(node: Any, inputs: Sequence[int | None]) -> int | None:
    """The whole number that a node gives, of those that it is given; None for anything else."""
    kind = node.kind()
    if kind == "prim::Constant":
        value = node.output().toIValue()
        if isinstance(value, Tensor) and not value.dim() and value.dtype is torch.int64:
            value = int(value)
        return value if type(value) is int else None
    if kind == "aten::size" and len(inputs) == 2 and inputs[1] is not None:
        sizes = sizes_of(next(node.inputs()))
        return None if sizes is None else sizes[inputs[1]]
    if kind in ("prim::NumToTensor", "aten::Int"):
        return inputs[0]
    function = _ARITHMETIC.get(kind.removesuffix("_"))
    if function is None or inputs[0] is None or inputs[1] is None or any(each != 1 for each in inputs[2:]):
        return None
    return function(inputs[0], inputs[1])


def write_out(graph: Any) -> None:
    """Gives operations what they go without and the fuser fails on: a pool's stride, which is its kernel's size then,
    the bias of a layer norm that has a weight, and weight and bias of a batch norm.
    """
    for node in graph.nodes():
        if node.kind() in ("aten::max_pool2d", "aten::avg_pool2d"):
            _, kernel, stride, *_ = node.inputs()
            listed = stride.node().kind() == "prim::ListConstruct"
            if not (list(stride.node().inputs()) if listed else stride.toIValue()):
                node.replaceInput(2, kernel)
        elif node.kind() == "aten::layer_norm":
            _, _, weight, bias, *_ = node.inputs()
            if isinstance(weight.type(), TensorType) and bias.node().mustBeNone() and (sizes := sizes_of(weight)):
                graph.setInsertPoint(node)
                node.replaceInput(3, graph.insertConstant(torch.zeros(sizes, device="cpu")))
        elif node.kind() == "aten::batch_norm":
            _, weight, bias, mean, *_ = node.inputs()
            sizes = sizes_of(mean) or sizes_of(weight)
            for i, value, number in ((1, weight, 1.0), (2, bias, 0.0)):
                if sizes and value.node().mustBeNone():
                    graph.setInsertPoint(node)
                    node.replaceInput(i, graph.insertConstant(torch.full(sizes, number, device="cpu")))


def separate(graph: Graph, *, every: bool) -> None:
    """Puts a view, which no partition reaches across, in front of operations of two tensors that the fuser does wrong.

    Those are: two that follow each other, which behind a convolution crash the process (in torch 2.15: ``conv(x) + a +
    x``, where ``x`` is read elsewhere too) or give wrong values; one with an operand that is read elsewhere, or
    whose memory is read again later, since the fuser writes the sum into it. With ``every`` all are kept apart.

    And a depthwise convolution behind a 1×1 one, which the fuser joins; it fails on them where the latter has groups.
    """
    nodes = list(graph.nodes())
    for node in nodes:
        if _is_depthwise(node) and _behind_grouped(next(node.inputs())):
            detach(graph, node, 0)
    roots = _roots(nodes)
    last_read: dict[str, Node] = {}
    for node in (*nodes, graph.return_node()):
        for value in node.inputs():
            last_read[roots.get(value.debugName(), value.debugName())] = node
    constants = {value.debugName() for node in nodes if node.kind() == "prim::Constant" for value in node.outputs()}
    for node in nodes:
        if not _joins(node):
            if node.kind() in _BINARY and len(next(node.inputs()).uses()) > 1:
                detach(graph, node, 0)
            continue
        values = list(node.inputs())[:2]
        names = [roots.get(value.debugName(), value.debugName()) for value in values]
        # A constant is read again by the next call; memory of another size cannot hold the sum.
        free = [
            sizes_of(value) != sizes_of(node.output()) or (name not in constants and not last_read[name].isAfter(node))
            for value, name in zip(values, names)
        ]
        chained = [_behind_another(value) for value in values]
        for i, value in enumerate(values):
            if value.node().kind() == "prim::Constant":
                continue  # a view of a number that is a constant crashes the fuser
            if every or len(value.uses()) > 1 or chained[i] or not free[1 - i]:
                detach(graph, node, i)


def _is_depthwise(node: Node) -> bool:
    """Whether a node is a 2-D convolution with one input channel in each group."""
    image, weight = _shapes(node)
    return weight[1:2] == [1] and image[1:2] == weight[:1] != [1]


def _behind_grouped(value: Value) -> bool:
    """Whether a value is that of a 1×1 convolution with groups, or of operations of one tensor behind it."""
    node = value.node()
    while (i := only_operand(node)) is not None:
        node = list(node.inputs())[i].node()
    image, weight = _shapes(node)
    return weight[2:] == [1, 1] and image[1:2] != weight[1:2]


def _shapes(node: Node) -> tuple[list[int], list[int]]:
    """Sizes of the image and of the weight of a traced 2-D convolution; empty for any other node."""
    image, weight = (
        [sizes_of(value) or [] for value in list(node.inputs())[:2]] if node.kind() in CONVOLUTIONS else 2 * [[]]
    )
    return (image, weight) if len(image) == len(weight) == 4 else ([], [])


def prepare_numbers(graph: Any) -> None:
    """Gives sums, products and quotients operands of the result's dtype that have an axis, and results their own axes.

    The fuser makes a tensor of every number, with one axis and the dtype of the first operand: ``z.mean() * 0.5`` gets
    an axis, and whole numbers are multiplied by 0. It fails on tensors without axes.
    """
    for node in list(graph.nodes()):
        kind = node.output().type() if node.kind() in ELEMENTWISE else None
        if not isinstance(kind, TensorType):
            continue
        graph.setInsertPoint(node)
        lifted = False
        for i, value in enumerate(list(node.inputs())[:2]):
            of = value.type()
            if value.node().kind() == "prim::Constant":
                continue  # a number in the code, which torch knows
            if isinstance(of, TensorType) and None not in (of.dtype(), kind.dtype()) and of.dtype() is not kind.dtype():
                _before(graph, node, i, "aten::to", kind.dtype(), False, False, None)
            if sizes_of(value) == []:
                _before(graph, node, i, "aten::unsqueeze", 0)
                lifted = True
        if lifted and kind.sizes() == []:
            squeezed = graph.create("aten::squeeze", [node.output()], 1)
            squeezed.insertAfter(node)
            squeezed.output().setType(kind)
            node.output().replaceAllUsesAfterNodeWith(squeezed, squeezed.output())
            node.output().setType(kind.with_sizes([1]))


def spare(graph: Any) -> None:
    """Puts what the fuser does not take, and that keeps NaN, in place of ReLU, clamps and max-pools.

    It works in place where it reads what another operation made and nobody else reads.
    """
    for node in list(graph.nodes()):
        kind = node.kind()
        if kind not in ("aten::relu", "aten::relu6", "aten::hardtanh", "aten::clamp", "aten::max_pool2d"):
            continue
        value, *numbers = node.inputs()
        graph.setInsertPoint(node)
        if kind == "aten::max_pool2d":
            other = graph.create("aten::max_pool2d_with_indices", [value, *numbers], 2)
        else:
            own = len(value.uses()) == 1 and value.node().kind().startswith("aten::") and not _may_be_view(value.node())
            name = "threshold" if kind == "aten::relu" else "clamp"
            if kind in ("aten::relu", "aten::relu6"):
                numbers = [graph.insertConstant(bound) for bound in (0, 0 if name == "threshold" else 6)]
            other = graph.create(f"aten::{name}{'_' if own else ''}", [value, *numbers], 1)
        other.insertBefore(node)
        result = next(other.outputs())
        result.setType(node.output().type())
        node.output().replaceAllUsesWith(result)


def gather_outputs(graph: Any) -> None:
    """Makes one output of several: a list where all are tensors, since the fuser fails on tuples behind branches."""
    outputs = list(graph.outputs())
    leaves = [leaf for value in outputs for leaf in _parts(value)]
    if not all(isinstance(leaf.type(), TensorType) for leaf in leaves):
        graph.makeMultiOutputIntoTuple()
        return
    gathered = graph.create("prim::ListConstruct", leaves, 1)
    gathered.output().setType(ListType(TensorType.get()))
    graph.appendNode(gathered)
    for i in reversed(range(len(outputs))):
        graph.eraseOutput(i)
    graph.registerOutput(gathered.output())


def _before(graph: Any, node: Node, i: int, kind: str, *arguments: Any) -> None:
    """Puts an operation in front of an operand."""
    constants = [graph.insertConstant(argument) for argument in arguments]
    made = graph.create(kind, [list(node.inputs())[i], *constants], 1)
    made.insertBefore(node)
    node.replaceInput(i, made.output())


def _roots(nodes: Sequence[Node]) -> dict[str, str]:
    """For each value that may be a view: the name of the value whose memory it is in."""
    roots: dict[str, str] = {}
    for node in nodes:
        tensors = [value for value in node.inputs() if value.type().kind() in ("TensorType", "ListType")]
        if tensors and _may_be_view(node):
            name = tensors[0].debugName()
            roots |= {value.debugName(): roots.get(name, name) for value in node.outputs()}
    return roots


def sizes_of(value: Value) -> list[int] | None:
    """The shape of a traced tensor; None where it is none, or it was not traced."""
    kind = value.type()
    return kind.sizes() if isinstance(kind, TensorType) else None


def _may_be_view(node: Node) -> bool:
    """Whether a traced operation may return memory that it was given."""
    kind: str = node.kind()
    if kind.startswith("prim::"):
        return kind != "prim::Constant"
    return "(a" in str(node.schema()) or "dropout" in kind


def _joins(node: Node) -> bool:
    """Whether a traced operation is one of two tensors, element by element."""
    kinds = [value.type().kind() for value in list(node.inputs())[:2]]
    return node.kind() in _BINARY and kinds == ["TensorType"] * 2


def _behind_another(value: Value) -> bool:
    """Whether a tensor comes from an operation of two tensors, by way of any of one, and is read nowhere else."""
    while len(value.uses()) == 1:
        node = value.node()
        if _joins(node):
            return True
        i = only_operand(node)
        if i is None or node.kind() == "aten::alias":
            return False
        value = list(node.inputs())[i]
        if node.kind() == "aten::silu" and len(value.uses()) > 1:
            return True  # to the fuser it is a sigmoid and a product, of two tensors where others read the first
    return False


def _parts(value: Any) -> list[Any]:
    """The values that a tuple or list is made of where it is made, else the value."""
    made = value.node().kind() in ("prim::TupleConstruct", "prim::ListConstruct")
    return [part for each in value.node().inputs() for part in _parts(each)] if made else [value]
