"""The heaviest chain: by hand on small graphs, and against every path of random ones."""

import random

import networkx as nx
import pytest
import torch
from torch import Tensor, nn

from pwrewrite.analysis.critical_path import critical_path as critical_path_of
from pwrewrite.analysis.records import CriticalPath
from pwrewrite.capturing import capture
from pwrewrite.capturing.network import graph


def weighted(macs: dict[str, int], *edges: tuple[str, str]) -> nx.DiGraph:
    """A graph with MACs on its nodes, in the order given."""
    g = nx.DiGraph()
    g.add_nodes_from((name, {"macs": n}) for name, n in macs.items())
    g.add_edges_from(edges)
    return g


def critical_path(g: nx.DiGraph) -> CriticalPath:
    return critical_path_of(dict(g.nodes(data="macs")), g.pred)


def test_the_heavier_branch_counts() -> None:
    g = weighted({"x": 0, "a": 5, "b": 7, "c": 1, "y": 2}, ("x", "a"), ("x", "b"), ("a", "c"), ("b", "y"), ("c", "y"))
    found = critical_path(g)
    assert (found.macs, found.nodes) == (9, ("b", "y"))
    assert found.off_path_share == pytest.approx(6 / 15)


def test_nothing_to_do() -> None:
    assert critical_path(nx.DiGraph()).nodes == ()
    assert critical_path(weighted({"x": 0, "y": 0}, ("x", "y"))).off_path_share == 0.0


def test_unconnected_parts_overlap() -> None:
    found = critical_path(weighted({"a": 3, "b": 4}))
    assert (found.macs, found.nodes) == (4, ("b",))


@pytest.mark.parametrize("seed", range(30))
def test_equals_the_best_of_all_paths(seed: int) -> None:
    rng = random.Random(seed)
    names = [f"n{i}" for i in range(9)]
    macs = {name: rng.choice([0, 0, 1, 2, 5, 9]) for name in names}
    edges = [(u, v) for i, u in enumerate(names) for v in names[i + 1 :] if rng.random() < 0.35]
    g = weighted(macs, *edges)
    heaviest = max(
        sum(macs[node] for node in path)
        for u in names
        for v in names
        for path in ([[u]] if u == v else nx.all_simple_paths(g, u, v))
    )
    found = critical_path(g)
    assert found.macs == heaviest
    assert sum(macs[node] for node in found.nodes) == heaviest
    assert all(nx.has_path(g, u, v) for u, v in zip(found.nodes, found.nodes[1:]))


def test_a_model_with_two_branches() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.light, self.heavy = nn.Conv2d(2, 4, 1), nn.Conv2d(2, 4, 3, padding=1)
            self.last = nn.Conv2d(4, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.light(x) + self.heavy(x))

    found = critical_path(graph(capture(Branches(), torch.zeros(1, 2, 8, 8))))
    assert found.nodes == ("heavy", "last")
    assert found.macs == 64 * (8 * 9 + 4)
    assert found.off_path_share == pytest.approx(64 * 8 / (64 * (8 + 72 + 4)))


def test_an_inception_network_has_work_off_the_path(torchvision_capture) -> None:
    made = torchvision_capture("googlenet")
    found = critical_path(graph(made))
    assert found.nodes[0] == "conv1_conv"
    assert 0.15 < found.off_path_share < 0.25
    chain = critical_path(graph(torchvision_capture("vgg16")))
    assert chain.off_path_share == 0.0
