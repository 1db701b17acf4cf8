"""Operations that sum over positions: linear maps, matrix products, attention and ``einsum``.

Summing over the axis that carries a dim of the input means to see that dim whole. Several operands then join in their
hull. A rule takes the fields of all nodes and returns that of the call.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from .alignment import UNKNOWN, WHOLE, Field, Scan, Span, State, join_states
from .position_rules import Call, Shape, axis_size


def _operands(call: Call, fields: dict[str, Field], count: int) -> list[Field | None]:
    """Fields of the first tensor arguments; None for those that see nothing of the input."""
    found = [a for a in (*call.node.args, *call.node.kwargs.values()) if isinstance(a, fx.Node)][:count]
    return [fields.get(node.name) for node in found]


def _contract(field: Field | None, axis: int) -> list[State] | None:
    """What is seen after summing over ``axis``."""
    if field is None:
        return None
    return [WHOLE if isinstance(state, Span | Scan) and state.axis == axis else state for state in field]


def _combine(parts: list[list[State] | None], out: Shape, lost: State) -> Field:
    """The hull of operands; dims that two of them carry along different axes become ``lost``."""
    fields = [part for part in parts if part is not None]
    result = fields[0]
    for field in fields[1:]:
        joined: list[State] = []
        for a, b in zip(result, field, strict=True):
            state = join_states(a, b, axis_size(out, a, b))
            apart = state is UNKNOWN and a is not UNKNOWN and b is not UNKNOWN
            joined.append(lost if apart else state)
        result = joined
    return tuple(result)


def _linear(call: Call, fields: dict[str, Field]) -> Field:
    parts = [_contract(field, -1) for field in _operands(call, fields, 1)]
    if parts[0] is None:
        return _all_unknown(fields)
    return tuple(parts[0])


def _all_unknown(fields: dict[str, Field]) -> Field:
    return (UNKNOWN,) * len(next(iter(fields.values())))


def _matmul(call: Call, fields: dict[str, Field]) -> Field:
    """``a @ b``: a pair of positions, one from each side, counts as seeing all."""
    skip = 1 if call.facts.op in ("baddbmm", "addmm", "addbmm", "addmv") else 0
    operands = _operands(call, fields, 2 + skip)[skip:]
    if len(operands) < 2:
        operands = operands * 2
    parts = [_contract(operands[0], -1), _contract(operands[1], -2)]
    if parts == [None, None]:
        return _all_unknown(fields)
    return _combine(parts, call.output, WHOLE)


def _attention(call: Call, fields: dict[str, Field]) -> Field:
    """Softmax(Q Kᵀ) V: every query sees all keys and values."""
    operands = _operands(call, fields, 3)
    if len(operands) < 3:
        operands = [operands[0]] * 3
    sequence = -2
    if getattr(call.node.target, "__name__", "") == "multi_head_attention_forward" and len(call.input) == 3:
        sequence = -3
    parts = [None if operands[0] is None else list(operands[0])]
    parts += [_contract(field, sequence) for field in operands[1:]]
    if all(part is None for part in parts):
        return _all_unknown(fields)
    return _combine(parts, call.output, UNKNOWN)


def _einsum(call: Call, fields: dict[str, Field]) -> Field:
    """A sum over the letters that the result leaves out."""
    equation, operands = call.node.args[0], list(call.node.args[1:])
    if operands and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        return _all_unknown(fields)
    left, out = equation.replace(" ", "").split("->")
    parts: list[list[State] | None] = []
    for letters, operand in zip(left.split(","), operands):
        field = fields.get(operand.name) if isinstance(operand, fx.Node) else None
        parts.append(None if field is None else [_lettered(state, letters, out) for state in field])
    return _combine(parts, call.output, WHOLE)


def _lettered(state: State, letters: str, out: str) -> State:
    if not isinstance(state, Span | Scan) or state.axis is None:
        return state
    letter = letters[state.axis]
    return state.moved(out.index(letter) - len(out)) if letter in out else WHOLE


MIXERS: dict[str, Callable[[Call, dict[str, Field]], Field]] = {
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "baddbmm", "addmm", "addmv"), _matmul),
    **dict.fromkeys(("attention", "native_multi_head_attention"), _attention),
    "einsum": _einsum,
}
"""Operations that sum over positions, by canonical name."""
