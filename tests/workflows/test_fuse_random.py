"""Properties of `fuse` on random networks.

In float64 no fused kernel runs, and folds and merges sum fewer than 10⁴ products in another order: 1e-9, as for
rewrites. In float32, where the kernels run, the original in float64 is the truth, and what is fused may be at most
twice as far from it as the original in float32, plus four units in the last place of the whole (networks of one layer
have an error that is smaller than that by chance).
"""

from __future__ import annotations

import copy

import torch
from fusible_networks import fusibles
from hypothesis import HealthCheck, given, settings, strategies as st
from random_networks import Network, fingerprint, flat, networks
from torch import Tensor, nn

from pwrewrite.capturing import capture
from pwrewrite.core.plan import Plan
from pwrewrite.layers import PointwiseActivation
from pwrewrite.passes import Pass
from pwrewrite.workflows.fuse import DEFAULT, fuse

TOLERANCE = 1e-9
quick = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return flat(model(x.clone()))


def distance(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest relative distance of a tensor."""
    worst = 0.0
    for a, b in zip(found, exact, strict=True):
        assert a.shape == b.shape
        worst = max(worst, float((a.double() - b).norm() / b.norm().clamp(min=1e-3)))
    return worst


def every(network: Network) -> list[Pass]:
    """All passes."""
    return [kind() for kind in DEFAULT]


def check(network: Network, passes: list[Pass]) -> None:
    before = fingerprint(network.model)
    done = fuse(network.model, network.x, passes, verify=False)
    assert fingerprint(network.model) == before
    exact = run(network.model, network.x)
    assert distance(run(done.model, network.x), exact) <= TOLERANCE
    # In float32, where the kernels run; the second time on packed weights, then at another batch size.
    small = copy.deepcopy(network.model).float()
    fused = fuse(small, network.x.float(), passes, verify=False).model
    own = distance(run(small, network.x.float()), exact)
    for _ in range(2):
        assert distance(run(fused, network.x.float()), exact) <= 2 * own + 4 * torch.finfo(torch.float32).eps
    x = torch.cat([network.x, network.x.flip(-1)])
    wide = run(network.model, x)
    own = distance(run(small, x.float()), wide)
    assert distance(run(fused, x.float()), wide) <= 2 * own + 4 * torch.finfo(torch.float32).eps
    # A layer with an activation of its own is called once.
    found = capture(fused, network.x.float())
    for layer in found.layers:
        module = fused.get_submodule(layer.path) if not layer.functional else None
        if isinstance(module, PointwiseActivation) and module.activation != "none":
            assert len(layer.calls) <= 1
    # What the plan says is what was done.
    again = Plan.from_json(done.plan.to_json())
    assert again.ops == done.plan.ops


@quick
@given(fusibles())
def test_fusing_changes_nothing(network: Network) -> None:
    check(network, every(network))


@quick
@given(networks(dims=(1, 2)))
def test_networks_of_the_rewrite_tests(network: Network) -> None:
    check(network, every(network))


@quick
@given(fusibles(max_steps=2), st.sampled_from(DEFAULT))
def test_each_pass_alone(network: Network, kind: type[Pass]) -> None:
    check(network, [one for one in every(network) if isinstance(one, kind)])


@quick
@given(fusibles(max_steps=2))
def test_a_second_run_finds_nothing(network: Network) -> None:
    once = fuse(network.model, network.x, every(network), verify=False)
    again = fuse(once.model, network.x, every(network), verify=False)
    # ``short += out`` that writes into the input is an addition like others once its code is a graph.
    assert not [edit.op for edit in again.edits if edit.method != "add"]
