"""How each kind of operation moves positions: the rules that `pwrewrite.analysis.receptive_field` follows.

A rule takes the arguments of a call and the state of one frame dim before it, and returns the state behind it; one that
cannot tell says `UNKNOWN`. Matrix products, linear maps and attention, which bring several operands together, are in
`pwrewrite.analysis.mixing_rules`.

Rules go by the canonical name of the operation, so that a module, a function and a tensor method agree.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

from torch import fx, nn

from ..capturing.records import NodeInfo, Window
from ..core.operations import OPERATIONS
from .alignment import (
    UNKNOWN,
    WHOLE,
    Field,
    Scan,
    Span,
    State,
    Taps,
    adaptive_taps,
    resize_taps,
    shuffle_taps,
    slice_taps,
    window_taps,
)

Shape = tuple[int, ...]


def axis_size(shape: Shape, *states: State) -> int:
    """Size of the axis along which one of the states lies; 1 where none does."""
    for state in states:
        if isinstance(state, Span) and state.axis is not None and -state.axis <= len(shape):
            return shape[state.axis]
    return 1


def windowed(field: Field, window: Window, facts: NodeInfo) -> Field:
    """Through a convolution or local pooling over the last axes."""
    dims = len(window.kernel)
    result: list[State] = []
    for state in field:
        axis = getattr(state, "axis", None)
        if axis is None or axis < -dims - 1:
            result.append(state)
        elif axis == -dims - 1:  # the channels, which a convolution mixes and pooling keeps
            result.append(state if facts.spec is None else WHOLE if isinstance(state, Scan) else UNKNOWN)
        elif isinstance(state, Span):
            result.append(state.pull(_taps(window, axis + dims)))
        else:
            still = window.kernel[axis + dims] == window.stride[axis + dims] == 1
            result.append(state if still else UNKNOWN)
    return tuple(result)


def _taps(window: Window, dim: int) -> Taps:
    return window_taps(
        window.kernel[dim], window.stride[dim], window.padding[dim][0], window.dilation[dim], window.transposed
    )


class Call:
    """The arguments of a node, whether it called a function, a method or a module."""

    def __init__(self, node: fx.Node, facts: NodeInfo, model: nn.Module) -> None:
        self.node, self.facts, self._model = node, facts, model

    @property
    def input(self) -> Shape:
        """Shape of the first activation that goes in."""
        return self.facts.inputs[0].shape if self.facts.inputs else ()

    @property
    def output(self) -> Shape:
        """Shape of the first tensor that comes out."""
        return self.facts.outputs[0].shape if self.facts.outputs else ()

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position and name; of a module, its attribute."""
        if self.node.op == "call_module":
            return getattr(self._model.get_submodule(str(self.node.target)), name, default)
        if len(self.node.args) > position:
            return self.node.args[position]
        return self.node.kwargs.get(name, default)

    def rest(self, position: int, name: str) -> Any:
        """An argument that may come as one sequence or spread out, as in ``x.permute(0, 2, 1)``."""
        value = self.argument(position, name)
        if isinstance(value, int) and self.node.op != "call_module":
            return tuple(a for a in self.node.args[position:] if isinstance(a, int))
        return value

    def axes(self, dims: Any) -> set[int]:
        """Axes of the input counted from the end; all of them for None."""
        rank = len(self.input)
        if dims is None:
            return set(range(-rank, 0))
        values = dims if isinstance(dims, (tuple, list)) else (dims,)
        return {d - rank if d >= 0 else d for d in values if isinstance(d, int)}


def _reshape(call: Call, state: State) -> State:
    """Through view, reshape, flatten, squeeze: a dim keeps an axis, runs together with others, or comes apart again.

    In the order of elements, a dim of ``size`` positions advances by ``stride``. An axis of the output with the same
    two carries it alone; one whose elements enclose it carries it among others, as long as everything divides.
    """
    assert isinstance(state, Span | Scan)
    if state.axis is None:
        return state
    before, after = call.input, call.output
    size, stride = before[state.axis], 1
    for n in before[len(before) + state.axis + 1 :]:
        stride *= n
    if size == 1 and isinstance(state, Span):
        return _single(state, stride, after)
    if isinstance(state, Scan):
        if not state.inner:  # an order that is lost allows no more than moving the axis
            axis = _same_axis(size, stride, after)
            return UNKNOWN if axis is None else state.moved(axis)
        size, stride = state.size, stride * state.inner
    step = 1  # of the axis of the output
    for axis in range(-1, -len(after) - 1, -1):
        n = after[axis]
        if (step, n) == (stride, size) and n > 1:
            return Span(axis, state.low, state.high)
        if step <= stride and stride * size <= step * n:
            divides = stride % step == 0 and (step * n) % (stride * size) == 0
            return Scan(axis, state.low, state.high, size, stride // step) if divides else UNKNOWN
        step *= n
    return UNKNOWN


def _same_axis(size: int, stride: int, shape: Shape) -> int | None:
    """The axis of ``shape`` that has this size and stride."""
    step = 1
    for axis in range(-1, -len(shape) - 1, -1):
        if (step, shape[axis]) == (stride, size):
            return axis
        step *= shape[axis]
    return None


def _single(state: Span, stride: int, shape: Shape) -> State:
    """A span along an axis of one position: along such an axis again, or along none."""
    axis = _same_axis(1, stride, shape)
    return state.at(0) if axis is None else state.moved(axis)


def _moved(state: State, axis: int) -> State:
    assert isinstance(state, Span | Scan)
    return state.moved(axis)


def _axis(state: State) -> int | None:
    assert isinstance(state, Span | Scan)
    return state.axis


def _permute(call: Call, state: State) -> State:
    axis, rank = _axis(state), len(call.input)
    if axis is None:
        return state
    if call.facts.op in ("t", "adjoint"):
        return _moved(state, -3 - axis) if axis >= -2 else state
    if call.facts.op == "permute":
        order = [d % rank for d in call.rest(1, "dims")]
        return _moved(state, order.index(axis % rank) - rank)
    first, second = call.argument(1, "dim0"), call.argument(2, "dim1")
    if not isinstance(first, int) or not isinstance(second, int):
        return UNKNOWN
    swap = {first % rank: second % rank, second % rank: first % rank}
    return _moved(state, swap.get(axis % rank, axis % rank) - rank)


def _reduce(call: Call, state: State) -> State:
    """Through mean, sum, max and their kin: a reduced dim is seen whole."""
    axis = _axis(state)
    dims = call.argument(2 if call.facts.op == "norm" else 1, "dim")
    if isinstance(dims, fx.Node):  # torch.max(a, b): element by element
        return state
    gone = call.axes(None if isinstance(dims, bool) else dims)
    if axis is None:
        return state
    if axis in gone:
        return WHOLE
    if len(call.output) == len(call.input):
        return state
    return _moved(state, axis + sum(d > axis for d in gone))


def _along(call: Call, state: State) -> State:
    """Through what moves or mixes positions along some dims in its own way: roll, flip, sort, cumsum, topk."""
    axis, op = _axis(state), call.facts.op
    if op == "flip":
        dims = call.rest(1, "dims")
    else:
        dims = call.argument(2, "dims") if op == "roll" else call.argument(2 if op == "topk" else 1, "dim", -1)
    return UNKNOWN if axis is not None and axis in call.axes(dims) else state


def _softmax(call: Call, state: State) -> State:
    axis = _axis(state)
    return WHOLE if axis is not None and axis in call.axes(call.argument(1, "dim", -1)) else state


def _split(call: Call, state: State) -> State:
    """Through chunk, split and unbind, whose pieces share one node."""
    axis = _axis(state)
    first = call.facts.op == "unbind"
    gone = call.axes(call.argument(1 if first else 2, "dim", 0))
    if axis is None:
        return state
    if axis in gone:
        return UNKNOWN
    return _moved(state, axis + sum(d > axis for d in gone)) if first else state


def _cat(call: Call, state: State) -> State:
    """Through cat: channels beside channels; tokens before tokens remain tokens."""
    axis = _axis(state)
    rank = len(call.output)
    dim = call.argument(1, "dim", 0)
    if axis is None or dim % rank - rank != axis:
        return state
    return state.loose() if isinstance(state, Scan) else UNKNOWN


def _stack(call: Call, state: State) -> State:
    axis = _axis(state)
    rank = len(call.output)
    dim = call.argument(1, "dim", 0) % rank - rank
    return state if axis is None or axis > dim else _moved(state, axis - 1)


def _expand(call: Call, state: State) -> State:
    axis = _axis(state)
    if axis is None or -axis > len(call.output) or call.input[axis] == call.output[axis]:
        return state
    return state.at(0) if isinstance(state, Span) and call.input[axis] == 1 else UNKNOWN


def _tapped(call: Call, state: State, taps: Taps) -> State:
    return state.pull(taps) if isinstance(state, Span) else UNKNOWN


def _adaptive(call: Call, state: State) -> State:
    axis, dims = _axis(state), int(call.facts.op[-2])
    if axis is None or axis < -dims:
        return state
    size, out = call.input[axis], call.output[axis]
    if out == 1:
        return WHOLE
    return state if size == out else _tapped(call, state, adaptive_taps(size, out))


def _resize(call: Call, state: State) -> State:
    axis, dims = _axis(state), len(call.input) - 2
    if axis is None or axis < -dims:
        return state
    size, out = call.input[axis], call.output[axis]
    if size == 1:
        return state.at(0).moved(axis) if isinstance(state, Span) else UNKNOWN
    mode = call.argument(3, "mode", "nearest")
    if mode == "area":
        return WHOLE if out == 1 else _tapped(call, state, adaptive_taps(size, out))
    corners = bool(call.argument(4, "align_corners")) and out > 1
    ratio = Fraction(size - 1, out - 1) if corners else Fraction(size, out)
    scale = call.argument(2, "scale_factor")
    if scale is not None and not corners and not call.argument(5, "recompute_scale_factor"):
        value = scale[axis + dims] if isinstance(scale, (tuple, list)) else scale
        ratio = 1 / Fraction(value).limit_denominator(1000)
    if ratio == 1:
        return state
    return _tapped(call, state, resize_taps(ratio, mode, corners, bool(call.argument(6, "antialias"))))


def _pad(call: Call, state: State) -> State:
    axis, pads = _axis(state), call.argument(1, "pad")
    if axis is None or not isinstance(pads, (tuple, list)) or -axis * 2 > len(pads):
        return state
    before = pads[(-axis - 1) * 2]
    if isinstance(state, Scan):
        return state if before == pads[(-axis - 1) * 2 + 1] == 0 else state.loose()
    return state if before == 0 else _tapped(call, state, slice_taps(-int(before)))


def _shuffle(call: Call, state: State) -> State:
    axis = _axis(state)
    if axis is None or axis < -3:
        return state
    inverse = "un" in call.facts.op
    factor = call.argument(1, "downscale_factor" if inverse else "upscale_factor")
    if axis == -3 or not isinstance(factor, int):
        return UNKNOWN
    return _tapped(call, state, shuffle_taps(factor, inverse))


def _narrow(call: Call, state: State) -> State:
    axis, dims = _axis(state), call.axes(call.argument(1, "dim"))
    start = call.argument(2, "start") if call.facts.op == "narrow" else call.argument(2, "index")
    if axis is None:
        return state
    if not isinstance(start, int):
        return UNKNOWN
    start %= max(call.input[min(dims)], 1)
    if call.facts.op == "narrow":
        if axis not in dims:
            return state
        return state.loose() if isinstance(state, Scan) else _tapped(call, state, slice_taps(start))
    if axis in dims:
        return state.at(start) if isinstance(state, Span) else UNKNOWN
    return _moved(state, axis + sum(d > axis for d in dims))


def _getitem(call: Call, state: State) -> State:
    """Through ``x[index]`` with integers, slices, None and an ellipsis."""
    index = call.node.args[1]
    parts: list[Any] = list(index) if isinstance(index, tuple) else [index]
    if not all(p is None or p is Ellipsis or isinstance(p, (int, slice)) for p in parts) or any(
        isinstance(p, bool) for p in parts
    ):
        return UNKNOWN
    axis, rank = _axis(state), len(call.input)
    if axis is None:
        return state
    taken = sum(p is not None and p is not Ellipsis for p in parts)
    if Ellipsis not in parts:
        parts.append(Ellipsis)
    dim = 0
    out: list[int | None] = []  # per axis of the output: the input axis it comes from, or None
    for part in parts:
        if part is None:
            out.append(None)
        elif part is Ellipsis:
            out += range(dim, dim + rank - taken)
            dim += rank - taken
        elif isinstance(part, int):
            if dim == axis + rank:
                return state.at(part % call.input[axis]) if isinstance(state, Span) else UNKNOWN
            dim += 1
        else:
            if dim == axis + rank and isinstance(state, Span | Scan):
                state = _sliced(state, part, call.input[axis])
            out.append(dim)
            dim += 1
    return _moved(state, out.index(axis + rank) - len(out)) if isinstance(state, Span | Scan) else state


def _sliced(state: Span | Scan, part: slice, size: int) -> State:
    start, stop, step = part.indices(size)
    if (start, stop, step) == (0, size, 1):
        return state
    return state.loose() if isinstance(state, Scan) else state.pull(slice_taps(start, step))


def _names(text: str) -> list[str]:
    return text.split()


CONSTANT = frozenset(
    _names(
        """zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones new_empty new_full arange
        linspace zeros ones empty full size dim unknown"""
    )
)
"""Operations whose result does not depend on the values of their inputs."""

ALIGNED = frozenset(
    (
        *(name for row in OPERATIONS if row.pointwise for name in row.names),
        *("channel_shuffle", "native_channel_shuffle"),
    )
)
"""Operations that keep positions, with broadcasting."""

FIRST_ONLY = frozenset(_names("expand_as view_as reshape_as type_as"))
"""Operations that take only the shape or dtype of their further inputs."""

Rule = Callable[[Call, State], State]

RULES: dict[str, Rule] = {
    **dict.fromkeys(
        _names("view reshape flatten unflatten squeeze unsqueeze unsafe_view view_as reshape_as"), _reshape
    ),
    **dict.fromkeys(_names("permute transpose swapaxes swapdims t adjoint"), _permute),
    **dict.fromkeys(_names("mean sum amax amin max min prod std var norm logsumexp all any argmax argmin"), _reduce),
    **dict.fromkeys(_names("roll flip sort cumsum cumprod topk argsort"), _along),
    **dict.fromkeys(_names("chunk split split_with_sizes tensor_split unbind"), _split),
    **dict.fromkeys(_names("cat concat concatenate"), _cat),
    **dict.fromkeys(_names("expand expand_as broadcast_to repeat tile"), _expand),
    **{f"adaptive_{kind}_pool{d}d": _adaptive for kind in ("avg", "max") for d in (1, 2, 3)},
    **dict.fromkeys(("softmax", "log_softmax"), _softmax),
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle"), _shuffle),
    **dict.fromkeys(("narrow", "select"), _narrow),
    "stack": _stack,
    "interpolate": _resize,
    "upsample": _resize,
    "pad": _pad,
    "getitem": _getitem,
}
"""Operations that move positions."""
