"""The receptive field of every tensor: the part of the model's input that one of its positions sees.

One pass in execution order carries, for each spatial dim of the input, how tensor positions line up with input
positions (`pwrewrite.analysis.alignment`). Rules, by kind of operation:

- convolutions, local and adaptive pooling, transposed convolutions, interpolation, padding, slicing and pixel
shuffles move
  positions by their taps;
- element by element (activations, norms, arithmetic, dropout, casts) and concatenation of channels leave them; branches
  join in their hull;
- permutations and reshapes move the axes. Where dims are flattened together, positions run through all of them, as
  tokens do;
- what mixes all positions sees the whole input: linear maps over flattened positions, attention, matrix products and
  reductions over positions, softmax along them, adaptive pooling to one position;
- anything else is *unknown*, and a layer behind it has no receptive field here, rather than a wrong one.

The field is that of the architecture (Araujo, Norris & Sim 2019, *Computing receptive fields of convolutional neural
networks*, Distill), padding counted as input: a deep network's exceeds its input, and how much weight each position
has is another matter. The *whole* input, once seen, is reported as its size. Norms pass each position on: that the
statistics of group, instance or layer norm span all positions is not counted.

The input meant is the first that has as many spatial dims as the model's first convolution; others of the same
spatial size (stereo pairs) share its coordinates, the rest count as constants.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from ..capturing.records import Capture, NodeInfo, info
from .alignment import UNKNOWN, WHOLE, Field, Scan, Span, Steps, join_states
from .mixing_rules import MIXERS
from .position_rules import ALIGNED, CONSTANT, FIRST_ONLY, RULES, Call, axis_size, windowed

Shape = tuple[int, ...]


class ReceptiveFields:
    """What every tensor of a capture sees of the model's input.

    Args:
        capture: The captured model.

    Attributes:
        frame: Spatial size of the input meant; ``()`` where the model has no convolution or no input that fits it.
    """

    def __init__(self, capture: Capture) -> None:
        self._model = capture.model
        self._fields: dict[str, Field] = {}
        self._hulls: dict[tuple[int, int, Shape], tuple[Field, Field, Field]] = {}  # ids, and what they stand for
        self.frame = _frame(capture)
        if self.frame:
            self._follow(capture)

    def of(self, node: str) -> tuple[int, ...] | None:
        """Extent of the input that one position of a node's output sees, per spatial dim; None where unknown.

        Args:
            node: Name of the node.
        """
        field = self._fields.get(node)
        if field is None:
            return None
        extents = []
        for state, size in zip(field, self.frame, strict=True):
            if isinstance(state, Span | Scan):
                extents.append(state.extent)
            elif state is WHOLE:
                extents.append(size)
            else:
                return None
        return tuple(extents)

    def seen_from(self, node: str, position: Sequence[int]) -> tuple[tuple[int, int], ...] | None:
        """First and last input position, per spatial dim, that one position of a node's output sees.

        Args:
            node: Name of the node.
            position: Index of the position, one per axis of the tensor.

        Returns:
            Bounds that may lie outside the input (in the padding); None where unknown.
        """
        field = self._fields.get(node)
        if field is None:
            return None
        bounds = []
        for state, size in zip(field, self.frame, strict=True):
            if isinstance(state, Span):
                at = position[state.axis] if state.axis is not None else 0
                bounds.append((state.low(at), state.high(at)))
            elif state is WHOLE:
                bounds.append((0, size - 1))
            else:
                return None
        return tuple(bounds)

    def _follow(self, capture: Capture) -> None:
        fields, dims = self._fields, len(self.frame)
        line = Steps(1, (0,))
        start: Field = tuple(Span(axis, line, line) for axis in range(-dims, 0))
        for node in capture.graph.nodes:
            facts = info(node)
            if node.op == "placeholder":
                shape = facts.outputs[0].shape if facts.outputs else ()
                if len(shape) > dims and shape[-dims:] == self.frame:
                    fields[node.name] = start
                continue
            if node.op in ("get_attr", "output") or facts.op in CONSTANT:
                continue
            sources = [source for source in node.all_input_nodes if source.name in fields]
            if not sources:
                continue
            if facts.op in ALIGNED and len(sources) == 1 and _same_positions(facts):
                fields[node.name] = fields[sources[0].name]
                continue
            fields[node.name] = self._step(node, facts, sources)

    def _step(self, node: fx.Node, facts: NodeInfo, sources: list[fx.Node]) -> Field:
        fields = self._fields
        if facts.window is not None:
            return windowed(fields[sources[0].name], facts.window, facts) if len(sources) == 1 else self._lost(sources)
        mixer, rule = MIXERS.get(facts.op), RULES.get(facts.op)
        if mixer is not None:
            return mixer(Call(node, facts, self._model), fields)
        if rule is None:
            return self._joined(sources, facts) if facts.op in ALIGNED else self._lost(sources)
        call = Call(node, facts, self._model)
        field = self._joined(sources, facts, broadcast=False) if len(sources) > 1 else fields[sources[0].name]
        return tuple([state if state is WHOLE or state is UNKNOWN else rule(call, state) for state in field])

    def _lost(self, sources: list[fx.Node]) -> Field:
        """What is left where positions move in an unknown way: dims that were seen whole still are."""
        states = zip(*[self._fields[source.name] for source in sources], strict=True)
        return tuple([WHOLE if any(state is WHOLE for state in dim) else UNKNOWN for dim in states])

    def _joined(self, sources: list[fx.Node], facts: NodeInfo, *, broadcast: bool = True) -> Field:
        """The hull of several inputs, after broadcasting or (for cat and stack) as they are."""
        if facts.op in FIRST_ONLY:
            sources = sources[:1]
        shape = facts.outputs[0].shape if broadcast and facts.outputs else _shape(sources[0])
        result: Field | None = None
        for source in sources:
            field = self._fields[source.name]
            if broadcast:
                field = _broadcast(field, _shape(source), shape)
            if result is None:
                result = field
            elif field is not result:
                result = self._hull(result, field, shape)
        assert result is not None
        return result

    def _hull(self, a: Field, b: Field, shape: Shape) -> Field:
        """The hull of two fields, remembered: dense blocks join the same ones again and again."""
        key = (id(a), id(b), shape)
        known = self._hulls.get(key)
        if known is None:
            hull = tuple([join_states(s, t, axis_size(shape, s, t)) for s, t in zip(a, b, strict=True)])
            known = self._hulls[key] = (a, b, a if hull == a else b if hull == b else hull)
        return known[2]


def _frame(capture: Capture) -> Shape:
    """Spatial size of the input that receptive fields refer to."""
    dims = next((facts.spec.dims for facts in map(info, capture.graph.nodes) if facts.spec is not None), 0)
    for _, spec in capture.inputs:
        if dims and len(spec.shape) > dims and spec.dtype.is_floating_point:
            return spec.shape[-dims:]
    return ()


def _shape(node: fx.Node) -> Shape:
    outputs = info(node).outputs
    return outputs[0].shape if outputs else ()


def _same_positions(facts: NodeInfo) -> bool:
    """Whether an operation neither broadcasts nor returns several tensors."""
    outputs = facts.outputs
    return len(outputs) == 1 and any(spec.shape == outputs[0].shape for spec in facts.inputs)


def _broadcast(field: Field, shape: Shape, out: Shape) -> Field:
    """The field after an axis of one position was broadcast to many."""
    if shape == out:
        return field
    return tuple(
        [
            state.at(0)
            if isinstance(state, Span)
            and state.axis is not None
            and -state.axis <= min(len(shape), len(out))
            and shape[state.axis] == 1 != out[state.axis]
            else state
            for state in field
        ]
    )
