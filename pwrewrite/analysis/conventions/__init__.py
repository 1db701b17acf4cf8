"""What other tools would say of the same model, and why: `count`, `explain`.

FLOPs are not one thing: tools differ in what they see and in whether a multiply-accumulate is one flop or two. Each
tool's total is reproduced from a `Capture` alone: nothing runs, and the tool need not be installed. A total is a sum of
`Row`s, each with what the same operations cost by our count, so the difference is explained to the last digit.

The conventions are those of torch 2.11 to 2.15 (``FlopCounterMode``, its FLOPs halved), fvcore 0.1.5.post20221221,
thop 0.1.1.post2209072238, ptflops 0.7.5 (its default, the ``pytorch`` backend) and torchinfo 1.8.0, each called on
the model in evaluation mode with the example inputs.

Not reproduced, because a graph does not hold it; `Count.caveats` says so where it matters:

- recurrent modules in thop and ptflops, multi-head attention modules in fvcore and ptflops, timm's ``Attention`` in
  ptflops;
- ptflops patches ``Tensor.add``, ``mul`` and ``matmul``, but not ``+``, ``*`` and ``@``: a method call is told by its
  name in the code of the class that makes it, so a class that uses both is counted wrong;
- a call of a module of one's own, without children, that is followed at once by a second call of the same module on
  the first one's output passes for one call (matters to torchinfo only).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...capturing import Capture, info
from ...core.errors import UsageError
from ...core.records import Shown
from .by_module import thop_shares, torchinfo_shares
from .by_operation import fvcore_shares, torch_shares
from .patched import ptflops_shares
from .units import Share, Unit, units

__all__ = ["TOOLS", "Count", "Row", "count", "explain"]


@dataclass(frozen=True, slots=True)
class Row:
    """Operations of one kind that a tool counts by one rule.

    Attributes:
        kind: What they are: ``conv2d``, ``batch norm``, ….
        rule: How the tool counts them where it differs from us: ``2 per element``; ``""`` where it does not.
        calls: How many there are.
        counted: What the tool counts for them.
        ours: Their MACs by our own count.
    """

    kind: str
    rule: str
    calls: int
    counted: int
    ours: int

    @property
    def difference(self) -> int:
        """How much more than us the tool counts."""
        return self.counted - self.ours

    def __str__(self) -> str:
        return f"{self.difference:+,} {self.kind}" + (f", {self.rule}" if self.rule else "")


@dataclass(frozen=True, slots=True, repr=False)
class Count(Shown):
    """A model's total under a tool's convention.

    Attributes:
        total: What the tool says.
        unit: What it calls that: ``MACs``, ``flops`` or ``mult-adds``; one multiply-accumulate is one of it in each.
        ours: Our own MACs.
        rows: What the total consists of, largest first, then what counts as 0.
        caveats: Why the total may differ from what the tool says; empty where it is exact.
    """

    tool: str
    total: int
    unit: str
    ours: int
    rows: tuple[Row, ...]
    caveats: tuple[str, ...] = ()

    @property
    def difference(self) -> int:
        """How much more than us the tool counts: the sum over `reasons`."""
        return self.total - self.ours

    @property
    def reasons(self) -> tuple[Row, ...]:
        """The rows that make up the difference, largest first."""
        return tuple(sorted((row for row in self.rows if row.difference), key=lambda row: -abs(row.difference)))


_TOOLS: dict[str, tuple[str, Callable[[Capture, Sequence[Unit]], tuple[list[Share], list[str]]]]] = {
    "torch": ("MACs", torch_shares),
    "fvcore": ("flops", fvcore_shares),
    "thop": ("MACs", thop_shares),
    "ptflops": ("MACs", ptflops_shares),
    "torchinfo": ("mult-adds", torchinfo_shares),
}

TOOLS = tuple(_TOOLS)


def count(capture: Capture, tool: str) -> Count:
    """The total of a model, captured in evaluation mode, as one of `TOOLS` would give it."""
    if tool not in _TOOLS:
        raise UsageError("unknown counting convention", expected=", ".join(TOOLS), got=repr(tool))
    return _count(capture, tool, units(capture))


def explain(capture: Capture) -> tuple[Count, ...]:
    """Every tool's total for a model captured in evaluation mode, in the order of `TOOLS`."""
    all_units = units(capture)
    return tuple(_count(capture, tool, all_units) for tool in TOOLS)


def _count(capture: Capture, tool: str, all_units: Sequence[Unit]) -> Count:
    unit, shares_of = _TOOLS[tool]
    shares, caveats = shares_of(capture, all_units)
    sums: dict[tuple[str, str], list[float]] = {}
    for share in shares:
        entry = sums.setdefault((share.kind, share.rule), [0, 0, 0])
        entry[0] += 1
        entry[1] += share.counted
        entry[2] += share.ours
    total = int(sum(counted for _, counted, _ in sums.values()))
    rows = [Row(kind, rule, int(n), int(counted), int(ours)) for (kind, rule), (n, counted, ours) in sums.items()]
    rows.append(Row("fractions", "", 0, total - sum(row.counted for row in rows), 0))
    rows = sorted((row for row in rows if row.counted or row.ours), key=lambda row: (-row.counted, -row.ours))
    ours = sum(info(node).cost.macs for node in capture.graph.nodes)
    return Count(tool, total, unit, ours, tuple(rows), tuple(dict.fromkeys(caveats)))
