"""`check_pass`: before, after, edits and skips of one pass, as LibCST's ``assertCodemod`` has them for code."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from random_networks import fingerprint
from torch import Tensor, nn

from pwrewrite.capturing import capture, info
from pwrewrite.core.nested import tensors_of
from pwrewrite.core.plan import Op, Plan, Skip, SkipReason
from pwrewrite.edit.apply import Applied, carry_out
from pwrewrite.edit.survival import probe_for
from pwrewrite.passes.base import Pass

Expected = SkipReason | tuple[SkipReason, *tuple[str, ...]]
"""The reason of a skip, and parts of its detail."""


def plan_of(each: Pass, model: nn.Module, x: Tensor) -> Plan:
    """What a pass proposes for a model, which stays as it is."""
    proposals = each.propose(capture(model, x))
    return Plan(tuple(p for p in proposals if isinstance(p, Op)), tuple(p for p in proposals if isinstance(p, Skip)))


def check_pass(
    each: Pass,
    model: nn.Module,
    x: Tensor,
    *,
    edits: Mapping[str, str] | None = None,
    skips: Mapping[str, Expected] | None = None,
    within: float | None = None,
) -> Applied:
    """Captures a model, has a pass propose, carries it out on a copy, and compares.

    Compared are the edits and skips with what is expected, the predictions with a recount, and the outputs. A plan is
    the same through JSON, and the model stays as it was.

    Args:
        each: The pass.
        model: What it is for, in the mode in which its outputs are compared.
        x: Its input.
        edits: Path to method; not compared where left out.
        skips: Path to reason, or to reason and parts of the detail; not compared where left out.
        within: How far outputs may be off, relative to their norm. Where left out they are equal up to rounding if all
            edits are exact in this mode, and of the same shapes at any rate but for projections of outputs.

    Returns:
        The copy, with its edits.
    """
    before = fingerprint(model)
    captured, plan = capture(model, x), plan_of(each, model, x)
    applied = carry_out(model, plan, probe=probe_for(plan, captured, x))
    left = (*plan.skips, *applied.skips)
    assert fingerprint(model) == before, "the pass changed the model"
    assert Plan.from_json(plan.to_json()).ops == plan.ops
    assert all(skip.detail for skip in left)
    if edits is not None:
        assert {edit.path: edit.method for edit in applied.edits} == dict(edits)
    if skips is not None:
        asked = {path: reason if isinstance(reason, tuple) else (reason,) for path, reason in skips.items()}
        assert {skip.path: skip.reason for skip in left} == {path: reason for path, (reason, *_) in asked.items()}
        for skip in left:
            assert all(part in skip.detail for part in asked[skip.path][1:]), skip.detail
    estimates = [edit.op.estimate for edit in applied.edits]
    if estimates and all(estimates):
        after = capture(applied.model, x)
        macs = [sum(info(node).cost.macs for node in c.graph.nodes) for c in (captured, after)]
        assert after.params - captured.params == sum(e.params_after - e.params_before for e in estimates if e)
        assert macs[1] - macs[0] == sum(e.macs_after - e.macs_before for e in estimates if e)
    exact = all(edit.exact in ("both", "train" if model.training else "eval") for edit in applied.edits)
    # Rounding: some ten layers of sums of some hundred products, in another order.
    limit = within if within is not None else 1e-4 if x.dtype.itemsize <= 4 else 1e-11
    for value in (x, -1.5 * x.flip(0)) if exact or within is not None else ():
        with torch.no_grad():
            expected, got = tensors_of(model(value.clone())), tensors_of(applied.model(value.clone()))
        for first, second in zip(expected, got, strict=True):
            assert second.shape == first.shape
            assert float((second - first).norm()) <= limit * float(first.norm())
    return applied
