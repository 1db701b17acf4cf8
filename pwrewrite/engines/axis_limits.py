"""Which sizes of the axes that vary a program of `torch.export` holds for: `axis_limits`.

Code that asks for a size (``if h % 8: pad``) is followed the way that the example goes, and torch keeps as guards which
sizes go that way. PT2 asks these guards at every call; other formats know nothing of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import SymInt

_NEAR = range(-16, 17)
_FAR = (2, 4, 16, 64)


def axis_limits(axes: Mapping[str, tuple[object, int]]) -> Iterator[str]:
    """What holds of the axes of a program beside their being any number, such as ``h in multiples of 8``.

    Args:
        axes: By label, an axis of an input as the program has it, and its size in the example.
    """
    sizes: dict[str, Any] = {label: axis.node for label, (axis, _) in axes.items() if isinstance(axis, SymInt)}
    example = {node.expr: axes[label][1] for label, node in sizes.items() if node.expr.is_Symbol}
    first = dict[Any, str]()
    for label, node in sizes.items():
        symbol = node.expr
        factor, rest = symbol.as_coeff_Mul()
        if symbol in first:
            yield f"{label} equal to {first[symbol]}"
        elif not symbol.is_Symbol:
            yield f"{label} in multiples of {factor}" if rest.is_Symbol else f"{label} as {symbol}"
        else:
            first[symbol] = label
            guards = [guard.expr for guard in node.shape_env.guards if symbol in guard.expr.free_symbols]
            yield from _limits(label, axes[label][1], _test(guards, symbol, example))


def _test(guards: list[Any], symbol: Any, example: Mapping[Any, int]) -> Callable[[int], bool]:
    """Whether a size passes the guards, the other axes being as in the example."""
    known = [guard for guard in guards if guard.free_symbols <= example.keys()]
    return lambda size: not any(guard.subs({**example, symbol: size}) == False for guard in known)  # noqa: E712 - SymPy's


def _limits(label: str, size: int, holds: Callable[[int], bool]) -> Iterator[str]:
    """The limits of one axis: a step, a largest and a smallest size, or the sizes that will do."""
    near = [size + n for n in _NEAR if size + n >= 2]
    good = [n for n in near if holds(n)]
    if size not in good:  # guards that are not what was understood
        return
    above = [n - size for n in good if n > size]
    step = above[0] if above else 0
    if step > 1 and size % step == 0 and all(n % step == 0 for n in good):
        yield f"{label} in multiples of {step}"
    elif step != 1:
        yield f"{label} only " + (f"{', '.join(map(str, good))}, …" if above else str(size))
        return
    far = [n * size for n in _FAR]
    if (bad := next((n for n in far if not holds(n)), None)) is not None:
        low, high = size // step, bad // step
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if holds(middle * step) else (low, middle)
        yield f"{label} at most {low * step}"
    below = [n for n in near if n < size and n % step == 0]
    if missing := [n for n in below if n > size // 2 and n not in good]:
        yield f"{label} at least {max(missing) + step}"
