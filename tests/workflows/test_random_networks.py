"""Properties of every rewrite, on random networks.

The tolerance at full rank: a factorised layer sums fewer than 10⁴ products more than the original, each with a
relative error of 1.1e-16, so its own relative error is below 1e-12 in the worst case. Networks have at most some 15
layers between which nothing amplifies by more than 10 (weights and statistics are settled so); 1e-9 is far above what
this adds up to, and far below what a wrong stride, padding or permutation makes (of order 1).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from random_networks import Network, fingerprint, flat, networks

from pwrewrite import passes
from pwrewrite.capturing import Capture, capture, info
from pwrewrite.capturing.eligibility import Owners
from pwrewrite.core.plan import Op, Plan, Skip
from pwrewrite.decompose import to_forward_layout, tucker2
from pwrewrite.edit.apply import Applied, carry_out
from pwrewrite.edit.survival import survives
from pwrewrite.forms import FORMS
from pwrewrite.passes.base import weight_of

TOLERANCE = 1e-9
FORMING = (
    passes.InsertBottleneck,
    passes.InsertReduction,
    passes.InsertExpansion,
    passes.FactorizeSpatial,
    passes.SeparateDepthwise,
    passes.FactorizePointwise,
    passes.FactorizeLinear,
)

quick = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


def planned(found: list[Op | Skip]) -> Plan:
    return Plan(tuple(p for p in found if isinstance(p, Op)), tuple(p for p in found if isinstance(p, Skip)))


def rewritten(network: Network, captured: Capture, one: passes.Pass) -> Applied:
    plan = planned(one.propose(captured))
    applied = carry_out(network.model, plan, probe=survives(captured, network.x))
    assert len(applied.edits) + len(applied.skips) == len(plan.ops)
    return applied


def macs(captured: Capture) -> int:
    return sum(info(node).cost.macs for node in captured.graph.nodes)


def check_counts(before: Capture, after: Capture, applied: Applied) -> None:
    estimates = [edit.op.estimate for edit in applied.edits]
    assert after.params - before.params == sum(e.params_after - e.params_before for e in estimates if e)
    assert macs(after) - macs(before) == sum(e.macs_after - e.macs_before for e in estimates if e)
    for edit in applied.edits:
        assert edit.op.estimate is not None
        assert (edit.params_before, edit.params_after) == (
            edit.op.estimate.params_before,
            edit.op.estimate.params_after,
        )


@quick
@given(networks(), st.sampled_from(FORMING))
def test_full_rank_is_the_same_model(network: Network, kind: type[passes.LayerPass]) -> None:
    before = fingerprint(network.model)
    captured = capture(network.model, network.x)
    one = kind(1.0 if kind is not passes.SeparateDepthwise else "100%", allow_growth=True)
    applied = rewritten(network, captured, one)
    after = capture(applied.model, network.x)
    assert fingerprint(network.model) == before
    check_counts(captured, after, applied)
    with torch.no_grad():
        old, new = flat(network.run()), flat(network.run(applied.model))
    for a, b in zip(old, new, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert (a - b).norm() <= TOLERANCE * (1 + a.norm())
    assert all(edit.exact == "both" for edit in applied.edits)
    # Nothing was left out without a reason, and doing it again does nothing.
    skips = (*planned(one.propose(captured)).skips, *applied.skips)
    told = {edit.path for edit in applied.edits} | {skip.path for skip in skips}
    assert told >= {layer.path for layer in captured.layers if one.concerns(layer)}
    assert not carry_out(applied.model, planned(one.propose(after))).edits


@quick
@given(networks(), st.sampled_from(FORMING), st.floats(0.1, 0.9))
def test_any_rank_runs_and_counts(network: Network, kind: type[passes.LayerPass], ratio: float) -> None:
    before = fingerprint(network.model)
    captured = capture(network.model, network.x)
    one = kind(ratio, allow_growth=True, multiple=1)
    applied = rewritten(network, captured, one)
    assert fingerprint(network.model) == before
    after = capture(applied.model, network.x)
    check_counts(captured, after, applied)
    assert [t.shape for t in flat(network.run(applied.model))] == [t.shape for t in flat(network.run())]
    assert not carry_out(applied.model, planned(one.propose(after))).edits
    for edit in applied.edits:
        assert edit.relative_error is not None
        assert 0 <= edit.relative_error <= 1
        names = dict(applied.model.named_parameters(remove_duplicate=False))
        assert all(name in names for new in edit.renamed.values() for name in new)
    applied.model.load_state_dict(applied.model.state_dict())


@quick
@given(networks(max_steps=3), st.sampled_from(sorted(FORMS)))
def test_error_falls_with_the_rank(network: Network, form: str) -> None:
    """HOSVD and truncated SVDs: a wider one spans all that a narrower one does."""
    captured = capture(network.model, network.x)
    owners = Owners(captured)
    for layer in captured.layers:
        spec = layer.spec
        if spec is None or (form == "pair") != spec.is_pointwise or spec.is_depthwise:
            continue
        weight = weight_of(layer, owners)
        assert weight is not None
        limits = FORMS[form].limits(spec)
        if form == "spatial" and sum(k > 1 for k in spec.kernel_size) < 2:
            continue
        found = []
        for i in range(5):
            widths = {name: max(1, limit * i // 4) for name, limit in limits.items()}
            if form == "bottleneck":
                kernel = to_forward_layout(weight.detach(), spec.groups, spec.transposed)
                factors = tucker2(kernel, **widths, groups=spec.groups, method="hosvd")
            else:
                factors = FORMS[form].factorize(weight, spec, widths)
            found.append(factors.relative_error)
        assert all(narrow >= wide - 1e-12 for narrow, wide in pairwise(found)), found
        assert found[-1] < 1e-12


@quick
@given(networks(dims=(2,)), st.sampled_from(("weights", "fresh")), st.integers(1, 4))
def test_projections_keep_the_network_whole(network: Network, init: str, channels: int) -> None:
    before = fingerprint(network.model)
    captured = capture(network.model, network.x)
    one = passes.ProjectBranch((), channels, init, allow_output_change=True, allow_growth=True)
    applied = rewritten(network, captured, one)
    assert fingerprint(network.model) == before
    assert not applied.skips
    after = capture(applied.model, network.x)
    check_counts(captured, after, applied)
    network.run(applied.model)
    if init == "weights":
        old, new = flat(network.run()), flat(network.run(applied.model))
        for a, b in zip(old, new, strict=True):
            assert a.shape == b.shape
            if all(edit.exact for edit in applied.edits):
                assert (a - b).norm() <= TOLERANCE * (1 + a.norm())


@quick
@given(networks(dims=(2,)))
def test_passes_compose(network: Network) -> None:
    """Each on what the ones before left, and the whole plan once more from the start."""
    model, captured, whole = network.model, capture(network.model, network.x), Plan()
    for one in (
        passes.InsertBottleneck("50%", allow_growth=True, multiple=1),
        passes.ProjectBranch((), 2, "fresh", allow_output_change=True),
        passes.FactorizePointwise("50%", allow_growth=True, multiple=1, replan=True),
        passes.FactorizeLinear("50%", allow_growth=True),
    ):
        plan = planned(one.propose(captured))
        applied = carry_out(model, plan)
        kept = {edit.path for edit in applied.edits}
        whole = whole + Plan(tuple(op for op in plan.ops if op.path in kept), plan.skips)
        model = applied.model
        captured = capture(model, network.x)
    again = carry_out(network.model, Plan.from_json(whole.to_json()))
    assert not again.skips
    assert [n for n, _ in again.model.named_modules()] == [n for n, _ in model.named_modules()]
    for a, b in zip(flat(network.run(again.model)), flat(network.run(model)), strict=True):
        assert torch.equal(a, b)
