"""The receptive field of every tensor: how much of the model's input one of its positions sees.

Behind a window with kernel k, stride s and dilation d, a position sees ``extent + (k - 1) d jump`` positions of the
input along a dim, and the next one sees what lies ``s jump`` further (Araujo, Norris & Sim 2019, *Computing receptive
fields of convolutional neural networks*, Distill). Of branches that are added or concatenated the larger extent counts.
Where attention, a product, a pool or a reshape mixes positions, and behind it, all of the input is seen; what moves
positions in another way (rolls, sampling grids) leaves the field unknown.

Limits: padding counts as input, so a deep network's field exceeds its input. A dilated field counts its holes. Where
branches look is not followed, only how far each looks. Behind an upsampling the extent is off by less than a jump
before it. Statistics of norms are not counted. The input meant is the first with as many spatial dims as the first
convolution; others of the same size share its coordinates, the rest are constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, fx, nn

from ..capturing.functions import argument, words
from ..capturing.records import Capture, NodeInfo, info, shape_of
from ..core.operations import OPERATIONS

Shape = tuple[int, ...]


class Reach(NamedTuple):
    """What a position along one axis (counted from the end) sees of a dim of the input, and the step to the next."""

    axis: int
    extent: float
    jump: float

    def through(self, kernel: int, stride: float, dilation: int = 1) -> Reach:
        """Behind a window."""
        return Reach(self.axis, self.extent + (kernel - 1) * dilation * self.jump, self.jump * stride)


State = Reach | Literal["whole"] | None
"""What is seen along one dim of the input; None where that is not known."""
WHOLE: State = "whole"
Field = tuple[State, ...]
"""One for each spatial dim of the input."""

_CONSTANT = words(
    """zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros new_ones new_empty new_full
    new_tensor zero fill size dim numel unknown"""
)
"""Operations whose result does not depend on the values of their inputs."""

_FIRST_ONLY = words("expand_as view_as reshape_as resize_as type_as to")
"""Operations that take only the shape, the dtype or the device of their further operands."""


class _Call(NamedTuple):
    """One node with the shape of the operand that is followed, and that of its first output."""

    node: fx.Node
    facts: NodeInfo
    model: nn.Module
    input: Shape
    output: Shape

    def argument(self, position: int, name: str, default: object = None) -> object:
        """By position and name; of a module, its attribute."""
        if self.node.op == "call_module":
            return getattr(self.model.get_submodule(str(self.node.target)), name, default)
        return argument(self.node, position, name, default)


def _windowed(call: _Call, reach: Reach) -> State:
    window = call.facts.window
    assert window is not None
    i = reach.axis + len(window.kernel)
    if i < -1 or (i == -1 and call.facts.spec is None):  # beside the window; pooling keeps channels apart
        return reach
    if i == -1 or call.facts.op.startswith("deform"):
        return None
    kernel, stride, dilation = window.kernel[i], window.stride[i], window.dilation[i]
    if window.transposed:  # its window over the input is as many times shorter as its output is longer
        return reach.through(ceil((dilation * (kernel - 1) + 1) / stride), 1 / stride)
    return reach.through(kernel, stride, dilation)


def _broadcast(call: _Call, reach: Reach) -> State:
    if len(call.input) > len(call.output):  # places, not values: `torch.where` of one operand
        return None
    if call.input[reach.axis] == call.output[reach.axis]:
        return reach
    return reach._replace(jump=0.0) if call.input[reach.axis] == 1 else None


def _view(call: _Call, reach: Reach) -> State:
    """Through what shows the same elements otherwise: strides tell where the positions then lie."""
    node, shape, reshaped = call.node, list(call.input), call.facts.op in _RESHAPES
    if not reshaped:
        shape[reach.axis] = max(shape[reach.axis], 2)  # so that a single position has a stride, too
    probe = torch.empty(shape, device="meta")
    function: Any = getattr(Tensor, node.target, None) if isinstance(node.target, str) else node.target
    try:
        seen = probe.reshape(call.output) if reshaped else function(probe, *node.args[1:], **node.kwargs)
    except Exception:  # indices that are tensors, pieces that do not fit
        return None
    seen = seen if isinstance(seen, Tensor) else seen[0]
    size, step = shape[reach.axis], probe.stride(reach.axis)
    places = enumerate(zip(seen.shape, seen.stride()), -seen.dim())
    kept = [(axis, n, s // step) for axis, (n, s) in places if n > 1 and s % step == 0 and s < step * size]
    if seen.untyped_storage()._cdata != probe.untyped_storage()._cdata or len(kept) > 1:
        return None
    if not kept or kept[0][1] > size:  # positions run through a longer axis, as tokens, or are left out
        return WHOLE if reshaped else None
    ((axis, _, stride),) = kept
    return Reach(axis, reach.extent, reach.jump * stride)


def _along_dims(call: _Call, reach: Reach) -> State:
    """Through what takes all positions along some dims: mean, softmax, linear maps over the last."""
    op, rank = call.facts.op, len(call.input)
    dims = -1 if op == "linear" else call.argument(_DIMS[op][0], "dim", _DIMS[op][1])
    if isinstance(dims, fx.Node):  # torch.max(a, b): element by element
        return reach
    dims = range(rank) if dims is None or isinstance(dims, bool) else dims
    gone = {d % rank - rank for d in (dims if isinstance(dims, (tuple, list, range)) else (dims,)) if type(d) is int}
    if reach.axis in gone:
        return WHOLE
    return reach._replace(axis=reach.axis + sum(d > reach.axis for d in gone)) if rank > len(call.output) else reach


def _multiplied(call: _Call, reach: Reach) -> State:
    """Through a matrix product with a constant on the right; in attention, and between two parts, all is seen."""
    left = call.node.args[0] if call.facts.op != "attention" else None
    on_the_left = shape_of(left) == call.input
    return reach if on_the_left and reach.axis != -1 else WHOLE


def _cat(call: _Call, reach: Reach) -> State:
    dim = call.argument(1, "dim", 0)
    axis = dim % len(call.output) - len(call.output) if isinstance(dim, int) else 0
    if call.facts.op != "stack":
        return None if axis == reach.axis else reach
    return reach if reach.axis > axis else reach._replace(axis=reach.axis - 1)


def _resize(call: _Call, reach: Reach) -> State:
    """Through adaptive pooling, interpolation and pixel shuffling."""
    size, out, mode = call.input[reach.axis], call.output[reach.axis], str(call.argument(3, "mode", "nearest"))
    pool = call.facts.op.startswith("adaptive")
    if size == out or reach.axis < (-int(call.facts.op[-2]) if pool else 2 - len(call.input)):
        return reach
    if pool or mode == "area" or call.facts.op == "pixel_unshuffle":
        return WHOLE if out == 1 else reach.through(ceil(size / out) + bool(size % out), size / out)
    if mode == "bicubic" or call.argument(6, "antialias"):
        return None
    return reach.through(1 if mode.startswith("nearest") else 2, size / out)


_RESHAPES = words("view reshape flatten unflatten squeeze unsqueeze view_as reshape_as resize_as")
_VIEWS = words(
    "permute transpose swapaxes swapdims movedim t adjoint getitem narrow chunk split split_with_sizes unbind"
)
_DIMS: dict[str, tuple[int, int | None]] = {
    **dict.fromkeys(words("mean sum amax amin max min prod std var logsumexp all any argmax argmin"), (1, None)),
    **dict.fromkeys(("softmax", "log_softmax", "linear"), (1, -1)),
    "norm": (2, None),
    "normalize": (2, 1),
}
"""Position of the argument ``dim``, and what it is where left out."""

_RULES = {
    **dict.fromkeys([name for row in OPERATIONS if row.pointwise for name in row.names], _broadcast),
    **dict.fromkeys(words("channel_shuffle native_channel_shuffle expand expand_as broadcast_to repeat"), _broadcast),
    **dict.fromkeys((*_RESHAPES, *_VIEWS), _view),
    **dict.fromkeys(_DIMS, _along_dims),
    **dict.fromkeys(words("matmul mm bmm attention"), _multiplied),
    **dict.fromkeys(words("cat concat concatenate stack"), _cat),
    **dict.fromkeys([f"adaptive_{kind}_pool{d}d" for kind in ("avg", "max") for d in (1, 2, 3)], _resize),
    **dict.fromkeys(words("interpolate upsample pixel_shuffle pixel_unshuffle"), _resize),
    "pad": lambda call, reach: reach,
}
"""What becomes of the positions along one dim, by canonical name of the operation."""


def receptive_fields(capture: Capture) -> dict[str, tuple[tuple[int, ...], bool]]:
    """What one position of every tensor sees of the model's input.

    Returns:
        Name of a node to the extent of the input, per spatial dim, that a position of its output sees, and whether it
        is global: every dim counts as seen whole. Nodes of which it is unknown are left out.
    """
    dims = next((facts.spec.dims for facts in map(info, capture.graph.nodes) if facts.spec is not None), 0)
    inputs = (spec for _, spec in capture.inputs if len(spec.shape) > dims and spec.dtype.is_floating_point)
    frame = next((spec.shape[-dims:] for spec in inputs), ()) if dims else ()
    fields: dict[str, tuple[Shape | None, Field]] = {}
    for node in capture.graph.nodes if frame else ():
        facts = info(node)
        shape = facts.outputs[0].shape if facts.outputs else None
        if node.op == "placeholder":
            if shape is not None and shape[-dims:] == frame:
                fields[node.name] = shape, tuple(Reach(axis, 1, 1) for axis in range(-dims, 0))
        elif facts.op not in _CONSTANT and node.op != "output":
            operands: Sequence[object] = node.all_input_nodes
            if facts.op in _FIRST_ONLY or facts.op == "copy":  # of which what is written counts, not what was there
                operands = node.args[1:2] if facts.op == "copy" else node.args[:1]
            seen = [fields[a.name] for a in operands if isinstance(a, fx.Node) and a.name in fields]
            sources = [(shape, field) for shape, field in seen if shape is not None]
            if sources:
                fields[node.name] = shape, _step(node, facts, capture.model, sources)
                base = facts.alias_of or ""
                written = base in fields and (facts.op == "copy" or len(sources) > 1)
                if written and str(node.target).endswith("_") and base not in map(str, node.args[:1]):
                    fields[base] = fields[base][0], (None,) * dims  # later readers see what was written there
    extents: dict[int, tuple[tuple[int, ...], bool]] = {}
    for _, field in fields.values():  # few are different ones
        if id(field) not in extents and None not in field:
            extent = tuple([ceil(s.extent - 1e-6) if isinstance(s, Reach) else n for s, n in zip(field, frame)])
            extents[id(field)] = extent, all(s == WHOLE for s in field)
    return {name: extents[id(field)] for name, (_, field) in fields.items() if id(field) in extents}


def _step(node: fx.Node, facts: NodeInfo, model: nn.Module, sources: list[tuple[Shape, Field]]) -> Field:
    """What is seen behind an operation: each operand through its rule, then the larger of them."""
    rule = _windowed if facts.window is not None else _RULES.get(facts.op)
    output = facts.outputs[0].shape if facts.outputs else ()
    if rule is _broadcast and len(sources) == 1 and sources[0][0] == output:
        return sources[0][1]
    if rule is _cat:  # joined first, as dense blocks have many
        sources = [(sources[0][0], _joined([field for _, field in sources]))]
    through = []
    for shape, field in sources:
        call = _Call(node, facts, model, shape, output)
        through.append(
            tuple([s if not isinstance(s, Reach) else rule(call, s) if rule is not None else None for s in field])
        )
    return (WHOLE,) * len(through[0]) if rule is _multiplied and len(sources) > 1 else _joined(through)


def _joined(fields: Sequence[Field]) -> Field:
    """What is seen of several operands: the larger extent; all where one of them sees all."""
    return fields[0] if len(fields) == 1 else tuple(map(_largest, zip(*fields, strict=True)))


def _largest(states: Field) -> State:
    if WHOLE in states:
        return WHOLE
    reaches = [state for state in states if state.__class__ is Reach]
    together = len(reaches) == len(states) and len({reach[0] for reach in reaches}) == 1
    return max(reaches) if together else None
