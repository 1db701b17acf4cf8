"""What a sweep checks of a model; run in the worker processes of `harness.sweep`."""

from __future__ import annotations

import time
from typing import Any

import torch

from pwrewrite.capturing import capture, info

from .counting import independent_macs, independent_params
from .harness import REAL_LIMIT, Built, build
from .replay import replay


def check_capture(built: Built) -> dict[str, Any]:
    """Captures a model and compares its figures with an independent count."""
    model = built.model
    before = [(vars(m), dict(vars(m))) for m in model.modules()]
    start = time.perf_counter()
    captured = capture(model, built.inputs)
    seconds = time.perf_counter() - start
    untouched = all(a.keys() == b.keys() and all(a[k] is b[k] for k in b) for a, b in before)
    row: dict[str, Any] = {
        "capture": captured.coverage.capture,
        "values": captured.coverage.values,
        "capture_s": round(seconds, 4),
        "nodes": len(captured.graph.nodes),
        "convolutions": captured.coverage.convolutions,
        "in_graph": captured.coverage.in_graph,
        "unpriced": [list(u) for u in captured.coverage.unpriced],
        "untouched": untouched,
        "notes": list(captured.notes),
        "params": captured.params,
        "node_params": sum(info(n).cost.params for n in captured.graph.nodes),
        "macs": sum(info(n).cost.macs for n in captured.graph.nodes),
        "params_independent": independent_params(model),
    }
    # Where the capture needed values, the independent count needs the same ones.
    needs_real = captured.coverage.values == "real"
    if not (needs_real and built.meta):
        try:
            row["macs_independent"] = independent_macs(model, built.inputs)
            return row
        except Exception as error:
            if not built.meta:
                raise
            row["independent_on_meta"] = f"{type(error).__name__}: {error}"[:200]
    if captured.params > REAL_LIMIT:
        row["independent_on_meta"] = "needs values and is too large for real weights"
        return row
    del captured, model
    real = build(built.candidate, real=True)
    if needs_real:
        again = capture(real.model, real.inputs)
        row["macs"] = sum(info(n).cost.macs for n in again.graph.nodes)
        row["unpriced"] = [list(u) for u in again.coverage.unpriced]
    row["macs_independent"] = independent_macs(real.model, real.inputs)
    return row


def check_replay(built: Built) -> dict[str, Any]:
    """Executes the captured graph on real values and compares with the model itself."""
    model: Any = built.model
    if sum(p.numel() for p in model.parameters()) > 120_000_000:
        return {"replay": "skipped: large"}
    if built.meta:
        built = build(built.candidate, real=True)
    pairs = replay(built.model, built.inputs)
    equal = all(a.shape == b.shape and torch.allclose(a, b, atol=1e-4, equal_nan=True) for a, b in pairs)
    return {"replay": "equal" if equal else "different"}


def summary(rows: dict[str, dict[str, Any]]) -> str:
    """The figures of a capture sweep as a table, then every model that falls short with its cause."""
    groups = {lib: [r for k, r in rows.items() if k.startswith(f"{lib}:")] for lib in ("torchvision", "timm")}
    groups["all"] = list(rows.values())
    lines = [
        f"{'':14}{'models':>8}{'analyse':>9}{'whole':>8}{'on meta':>9}{'params =':>10}{'macs =':>8}{'untouched':>11}"
    ]
    for name, group in groups.items():
        good = [r for r in group if "error" not in r]
        counts = (
            len(good),
            sum(r["capture"] == "whole" for r in good),
            sum(r["values"] == "meta" for r in good),
            sum(r["params"] == r["params_independent"] for r in good),
            sum(r["macs"] == r.get("macs_independent") for r in good),
            sum(r["untouched"] for r in good),
        )
        widths = (9, 8, 9, 10, 8, 11)
        lines.append(f"{name:14}{len(group):>8}" + "".join(f"{c:>{w}}" for c, w in zip(counts, widths)))
    lines.append("")
    unpriced: dict[str, int] = {}
    for key, r in sorted(rows.items()):
        fault = shortfall(r)
        if fault:
            lines.append(f"{key}: {fault}")
        for op, calls in r.get("unpriced", ()):
            unpriced[op] = unpriced.get(op, 0) + calls
    lines += [f"unpriced: {op} ({calls} calls)" for op, calls in sorted(unpriced.items())]
    return "\n".join(lines)


def shortfall(row: dict[str, Any]) -> str:
    """What a result falls short in; empty where it does not."""
    if "error" in row:
        return str(row["error"]).splitlines()[0][:200]
    faults = []
    if row["capture"] != "whole":
        faults.append(row["capture"])
    if row["params"] != row["params_independent"]:
        faults.append(f"params {row['params']} against {row['params_independent']}")
    if "macs_independent" not in row:
        faults.append(f"no independent count: {row.get('independent_on_meta')}")
    elif row["macs"] != row["macs_independent"]:
        faults.append(f"macs {row['macs']} against {row['macs_independent']}")
    if not row["untouched"]:
        faults.append("the model was changed")
    return "; ".join(faults)
