"""The receptive field of every tensor: how much of the model's input one of its positions sees.

Along one spatial dim of the input, position ``o`` of a tensor sees the input positions ``low(o) … high(o)``. Behind a
convolution or pooling with kernel k, stride s, padding p and dilation d (Araujo, Norris & Sim 2019, *Computing
receptive fields of convolutional neural networks*, Distill, equations 1 to 3)::

    low'(o) = low(s o - p)        high'(o) = high(s o - p + d (k - 1))

Both advance by the same jump from one position to the next, behind an upsampling once per period of positions, which
`Reach` holds one by one. Branches that are added or concatenated join in their hull. Where attention, a product, a
pool or a reshape mixes positions, and behind it, all of the input counts as seen; what moves positions in another way
(rolls, sampling grids) leaves the field *unknown*.

Limits: padding counts as input, so a deep network's field exceeds its input. The hull of a dilated field counts its
holes. Statistics of norms are not counted. The input meant is the first with as many spatial dims as the first
convolution; others of the same size share its coordinates, the rest are constants.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from functools import lru_cache
from math import ceil, floor, gcd, lcm, prod

from torch import fx, nn

from ..capturing.functions import words
from ..capturing.records import Capture, NodeInfo, info
from ..core.operations import OPERATIONS

Shape = tuple[int, ...]
Span = tuple[int, int]
Taps = tuple[int, tuple[tuple[int, ...], ...]]
"""How far an operation advances in its input per period, and the positions that each output position of it reads."""

_LONGEST = 4096  # periods beyond are not followed


class Lost(Enum):
    """Positions that see all of the input, or of which it is not known what they see."""

    WHOLE = 1
    UNKNOWN = 2


WHOLE, UNKNOWN = Lost


@dataclass(frozen=True, slots=True)
class Reach:
    """What the positions along one axis of a tensor see of one dim of the input.

    Attributes:
        axis: The axis, counted from the end (-1 is the last).
        rise: Input positions from one period to the next.
        spans: First and last input position that each position of a period sees; None where it sees nothing (a gap of a
            transposed convolution).
    """

    axis: int
    rise: int
    spans: tuple[Span | None, ...]

    @property
    def extent(self) -> int:
        """Most input positions that one position sees, from the first to the last."""
        return max([high - low + 1 for low, high in filter(None, self.spans)], default=0)

    def at(self, position: int) -> Span | None:
        """First and last input position that a position sees."""
        turns, phase = divmod(position, len(self.spans))
        span = self.spans[phase]
        return None if span is None else (span[0] + turns * self.rise, span[1] + turns * self.rise)

    def through(self, taps: Taps) -> State:
        """The reach of an operation's output."""
        advance, phases = taps
        period, span = len(self.spans), self.spans[0]
        if period == len(phases) == 1 and span is not None:
            (positions,), rise = phases, self.rise
            low, high = span[0] + rise * positions[0], span[1] + rise * positions[-1]
            return Reach(self.axis, rise * advance, ((low, high),))
        repeats = period // gcd(advance, period)
        if repeats * len(phases) > _LONGEST:
            return UNKNOWN
        spans = [_hull([self.at(advance * i + tap) for tap in phase]) for i in range(repeats) for phase in phases]
        return Reach(self.axis, self.rise * advance * repeats // period, tuple(spans))

    def join(self, other: Reach, size: int) -> State:
        """The hull of two branches along a common axis of ``size`` positions."""
        if self == other:
            return self
        if self.rise == other.rise and len(self.spans) == len(other.spans) and self.axis == other.axis:
            return Reach(self.axis, self.rise, tuple(map(_hull, zip(self.spans, other.spans, strict=True))))
        period = lcm(len(self.spans), len(other.spans))
        rise = self.rise * period // len(self.spans)
        if rise != other.rise * period // len(other.spans):  # unequal jumps: position by position
            period = max(size, 1)
            rise = self.rise * period // len(self.spans)
        if self.axis != other.axis or period > _LONGEST:
            return UNKNOWN
        return Reach(self.axis, rise, tuple([_hull([self.at(o), other.at(o)]) for o in range(period)]))


State = Reach | Lost
Field = tuple[State, ...]  # one for each spatial dim of the input
Hulls = dict[tuple[int, int], tuple[Field, Field, Field]]


def _hull(spans: Iterable[Span | None]) -> Span | None:
    seen = list(filter(None, spans))
    return (min(low for low, _ in seen), max(high for _, high in seen)) if seen else None


@lru_cache(maxsize=1024)
def window_taps(kernel: int, stride: int, padding: int, dilation: int, transposed: bool = False) -> Taps:
    """Taps of a convolution or a local pooling along one dim; ``padding`` is that before the first position."""
    if not transposed:
        return stride, (tuple(dilation * t - padding for t in range(kernel)),)
    reached = ([phase + padding - dilation * t for t in range(kernel)] for phase in range(stride))
    return 1, tuple(tuple(sorted({r // stride for r in row if r % stride == 0})) for row in reached)


def adaptive_taps(size: int, out: int) -> Taps:
    """Taps of adaptive pooling from ``size`` to ``out`` positions: ``floor(i n/m) … ceil((i + 1) n/m) - 1``."""
    rise, period = size // gcd(size, out), out // gcd(size, out)
    return rise, tuple(tuple(range(i * rise // period, -(-(i + 1) * rise // period))) for i in range(period))


def resize_taps(ratio: Fraction, mode: str, corners: bool) -> Taps:
    """Taps of nearest and linear interpolation away from the border, ``ratio`` input positions per output position."""
    shift = Fraction(0) if corners or mode == "nearest" else (ratio - 1) / 2
    sources = [o * ratio + shift for o in range(ratio.denominator)]
    if mode == "nearest-exact":
        return ratio.numerator, tuple((floor(source + Fraction(1, 2)),) for source in sources)
    return ratio.numerator, tuple((floor(s),) if mode == "nearest" else (floor(s), ceil(s)) for s in sources)


_CONSTANT = words(
    """zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros new_ones new_empty new_full
    new_tensor zero fill size dim numel unknown"""
)
"""Operations whose result does not depend on the values of their inputs."""

_FIRST_ONLY = words("expand_as view_as reshape_as resize_as type_as to")
"""Operations that take only the shape, the dtype or the device of their further operands."""

_ELEMENTWISE = (
    *(name for row in OPERATIONS if row.pointwise for name in row.names),
    *words("channel_shuffle native_channel_shuffle expand expand_as broadcast_to repeat"),
)
"""Operations that keep positions, with broadcasting."""


@dataclass(slots=True)
class _Call:
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
        return self.node.args[position] if len(self.node.args) > position else self.node.kwargs.get(name, default)

    def axes(self, dims: object) -> set[int]:
        """Axes of the input counted from the end; all of them for None."""
        rank = len(self.input)
        dims = range(rank) if dims is None or isinstance(dims, bool) else dims
        return {
            d % rank - rank for d in (dims if isinstance(dims, (tuple, list, range)) else (dims,)) if isinstance(d, int)
        }


def _windowed(call: _Call, reach: Reach) -> State:
    window = call.facts.window
    assert window is not None
    i = reach.axis + len(window.kernel)
    if i < -1 or (i == -1 and call.facts.spec is None):  # beside the window; pooling keeps channels apart
        return reach
    if i == -1 or call.facts.op.startswith("deform"):
        return UNKNOWN
    return reach.through(
        window_taps(window.kernel[i], window.stride[i], window.padding[i][0], window.dilation[i], window.transposed)
    )


def _broadcast(call: _Call, reach: Reach) -> State:
    if -reach.axis > len(call.output) or call.input[reach.axis] == call.output[reach.axis]:
        return reach
    return Reach(reach.axis, 0, (reach.at(0),)) if call.input[reach.axis] == 1 else UNKNOWN


def _reshape(call: _Call, reach: Reach) -> State:
    """In the order of elements, an axis of the same size and step carries the positions on."""
    size, stride, step = call.input[reach.axis], prod(call.input[len(call.input) + reach.axis + 1 :]), 1
    for axis in range(-1, -len(call.output) - 1, -1):
        if (step, call.output[axis]) == (stride, size):
            return Reach(axis, reach.rise, reach.spans)
        if step <= stride and stride * size <= step * call.output[axis]:
            return WHOLE  # positions run through a longer axis, as tokens
        step *= call.output[axis]
    return UNKNOWN


def _permute(call: _Call, reach: Reach) -> State:
    rank = len(call.input)
    order = list(range(rank))
    if call.facts.op == "permute":
        dims = call.argument(1, "dims")
        order = [d % rank for d in (dims if isinstance(dims, (tuple, list)) else call.node.args[1:]) if type(d) is int]
    else:
        pair = (-2, -1) if call.facts.op in ("t", "adjoint") else (call.argument(1, "dim0"), call.argument(2, "dim1"))
        if rank < 2 or not isinstance(pair[0], int) or not isinstance(pair[1], int):
            return UNKNOWN
        order[pair[0]], order[pair[1]] = order[pair[1]], order[pair[0]]
    return Reach(order.index(reach.axis % rank) - rank, reach.rise, reach.spans)


def _along_dims(call: _Call, reach: Reach) -> State:
    """Through what takes all positions along some dims (mean, softmax, linear maps over the last), or cuts them up."""
    op = call.facts.op
    dims = -1 if op == "linear" else call.argument(_DIMS[op][0], "dim", _DIMS[op][1])
    if isinstance(dims, fx.Node):  # torch.max(a, b): element by element
        return reach
    gone = call.axes(dims)
    if reach.axis in gone:
        return UNKNOWN if op in _CUTS else WHOLE
    lost = len(call.input) - len(call.output)
    return Reach(reach.axis + sum(d > reach.axis for d in gone), reach.rise, reach.spans) if lost > 0 else reach


_CUTS = ("chunk", "split", "split_with_sizes", "tensor_split", "unbind")
_DIMS: dict[str, tuple[int, int | None]] = {
    **dict.fromkeys(words("mean sum amax amin max min prod std var logsumexp all any argmax argmin"), (1, None)),
    **dict.fromkeys(("softmax", "log_softmax", "linear"), (1, -1)),
    **dict.fromkeys(_CUTS, (2, 0)),
    "norm": (2, None),
    "normalize": (2, 1),
    "unbind": (1, 0),
}
"""Position of the argument ``dim``, and what it is where left out."""


def _multiplied(call: _Call, reach: Reach) -> State:
    """Through a matrix product with a constant on the right; in attention, and between two parts, all is seen."""
    left = call.node.args[0] if call.facts.op != "attention" else None
    on_the_left = isinstance(left, fx.Node) and info(left).outputs[0].shape == call.input
    return reach if on_the_left and reach.axis != -1 else WHOLE


def _cat(call: _Call, reach: Reach) -> State:
    dim = call.argument(1, "dim", 0)
    axis = dim % len(call.output) - len(call.output) if isinstance(dim, int) else 0
    if call.facts.op != "stack":
        return UNKNOWN if axis == reach.axis else reach
    return reach if reach.axis > axis else Reach(reach.axis - 1, reach.rise, reach.spans)


def _resize(call: _Call, reach: Reach) -> State:
    """Through adaptive pooling and interpolation."""
    size, out, mode = call.input[reach.axis], call.output[reach.axis], str(call.argument(3, "mode", "nearest"))
    pool = call.facts.op.startswith("adaptive")
    if size == out or reach.axis < (-int(call.facts.op[-2]) if pool else 2 - len(call.input)):
        return reach
    if pool or mode == "area":
        return WHOLE if out == 1 else reach.through(adaptive_taps(size, out))
    if mode == "bicubic" or call.argument(6, "antialias"):
        return UNKNOWN
    corners = bool(call.argument(4, "align_corners")) and out > 1
    return reach.through(resize_taps(Fraction(size - corners, out - corners), mode, corners))


def _pad(call: _Call, reach: Reach) -> State:
    pads, i = call.argument(1, "pad"), (-reach.axis - 1) * 2
    before = pads[i] if isinstance(pads, (tuple, list)) and i < len(pads) else 0
    return reach.through((1, ((-before,),))) if isinstance(before, int) else UNKNOWN


def _shuffle(call: _Call, reach: Reach) -> State:
    inverse = "un" in call.facts.op
    factor = call.argument(1, "downscale_factor" if inverse else "upscale_factor")
    if reach.axis <= -3 or not isinstance(factor, int):
        return reach if reach.axis < -3 else UNKNOWN
    return reach.through((factor, (tuple(range(factor)),)) if inverse else (1, ((0,),) * factor))


def _getitem(call: _Call, reach: Reach) -> State:
    """Through ``x[index]`` with slices, integers, None and an ellipsis."""
    index = call.node.args[1]
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(p, bool) or not (p is None or p is Ellipsis or isinstance(p, (int, slice))) for p in parts):
        return UNKNOWN
    at = next((i for i, p in enumerate(parts) if p is Ellipsis), len(parts))
    parts[at : at + 1] = [slice(None)] * (len(call.input) - sum(p is not None and p is not Ellipsis for p in parts))
    where = [i for i, p in enumerate(parts) if p is not None][reach.axis]
    part, axis = parts[where], -sum(not isinstance(p, int) for p in parts[where:])
    if not isinstance(part, slice):
        return UNKNOWN
    first, _, step = part.indices(call.input[reach.axis])
    return Reach(axis, reach.rise, reach.spans).through((step, ((first,),)))


_RULES = {
    **dict.fromkeys(_ELEMENTWISE, _broadcast),
    **dict.fromkeys(words("view reshape flatten unflatten squeeze unsqueeze view_as reshape_as resize_as"), _reshape),
    **dict.fromkeys(words("permute transpose swapaxes swapdims t adjoint"), _permute),
    **dict.fromkeys(_DIMS, _along_dims),
    **dict.fromkeys(words("matmul mm bmm attention"), _multiplied),
    **dict.fromkeys(words("cat concat concatenate stack"), _cat),
    **{f"adaptive_{kind}_pool{d}d": _resize for kind in ("avg", "max") for d in (1, 2, 3)},
    **dict.fromkeys(words("interpolate upsample"), _resize),
    **dict.fromkeys(words("pixel_shuffle pixel_unshuffle"), _shuffle),
    "pad": _pad,
    "getitem": _getitem,
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
    start = tuple(Reach(axis, 1, ((0, 0),)) for axis in range(-len(frame), 0))
    fields: dict[str, tuple[Shape | None, Field]] = {}
    hulls: Hulls = {}
    for node in capture.graph.nodes if frame else ():
        facts = info(node)
        shape = facts.outputs[0].shape if facts.outputs else None
        if node.op == "placeholder":
            if shape is not None and shape[-dims:] == frame:
                fields[node.name] = shape, start
        elif facts.op not in _CONSTANT and node.op != "output":
            operands: Sequence[object] = node.all_input_nodes
            if facts.op in _FIRST_ONLY or facts.op == "copy":  # of which what is written counts, not what was there
                operands = node.args[1:2] if facts.op == "copy" else node.args[:1]
            seen = [fields[a.name] for a in operands if isinstance(a, fx.Node) and a.name in fields]
            sources = [(shape, field) for shape, field in seen if shape is not None]
            if sources:
                fields[node.name] = shape, _step(node, facts, capture.model, sources, hulls)
                base = facts.alias_of or ""
                written = base in fields and (facts.op == "copy" or len(sources) > 1)
                if written and str(node.target).endswith("_") and base not in map(str, node.args[:1]):
                    fields[base] = fields[base][0], (UNKNOWN,) * dims  # later readers see what was written there
    extents: dict[int, tuple[tuple[int, ...], bool]] = {}
    for _, field in fields.values():  # few are different ones
        if id(field) not in extents and not any(s is UNKNOWN for s in field):
            extent = tuple([s.extent if isinstance(s, Reach) else n for s, n in zip(field, frame)])
            extents[id(field)] = extent, all(s is WHOLE for s in field)
    return {name: extents[id(field)] for name, (_, field) in fields.items() if id(field) in extents}


def _step(node: fx.Node, facts: NodeInfo, model: nn.Module, sources: list[tuple[Shape, Field]], hulls: Hulls) -> Field:
    """What is seen behind an operation: each operand through its rule, then their hull."""
    rule = _windowed if facts.window is not None else _RULES.get(facts.op)
    output = facts.outputs[0].shape if facts.outputs else ()
    if rule is _broadcast and len(sources) == 1 and sources[0][0] == output:
        return sources[0][1]
    if rule is _cat:  # joined first, as dense blocks join the same fields again and again
        shape, field = sources[0]
        for _, other in sources[1:]:
            key = id(field), id(other)
            if key not in hulls:  # keeps all three, so that no other field gets one of these ids
                hulls[key] = (field, other, _joined(field, other, shape))
            field = hulls[key][2]
        sources = [(shape, field)]
    result: Field = (WHOLE,) * len(sources[0][1]) if rule is _multiplied and len(sources) > 1 else ()
    for shape, field in sources:
        call = _Call(node, facts, model, shape, output)
        through = tuple([s if isinstance(s, Lost) else rule(call, s) if rule is not None else UNKNOWN for s in field])
        result = _joined(result, through, output) if result else through
    return result


def _joined(a: Field, b: Field, shape: Shape) -> Field:
    """The hull of two operands; what one of them sees whole is seen whole."""
    whole = [WHOLE if WHOLE in pair else UNKNOWN for pair in zip(a, b, strict=True)]
    both = zip(a, b, whole, strict=True)
    return tuple([x.join(y, shape[x.axis]) if isinstance(x, Reach) and isinstance(y, Reach) else w for x, y, w in both])
