"""The networkx graph of a capture: nodes, edges, bytes, order, and the small questions that it answers."""

import json
import time
from functools import cache

import networkx as nx
import pytest
import torch
from torch import Tensor, nn

from pwrewrite.analysis import analyze_capture
from pwrewrite.capturing import Capture, capture
from pwrewrite.capturing.network import graph
from pwrewrite.capturing.tensors import dtype_name


@cache
def torchvision_capture(name: str) -> Capture:
    """A torchvision model at 224 × 224, captured on meta."""
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        model = models.get_model(name, weights=None, **({"init_weights": False} if name == "googlenet" else {}))
    return capture(model, torch.empty(1, 3, 224, 224, device="meta"))


class Branches(nn.Module):
    """Two branches and a residual: 2 → 4 channels on 8 × 8."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(2, 4, 3, padding=1)
        self.right = nn.Conv2d(2, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.left(x) + self.right(x))


class Pieces(nn.Module):
    """Splits its channels unevenly and uses the pieces apart."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        small, large = torch.split(x, [1, 2], dim=1)
        return self.conv(large) + small


def test_nodes_say_what_ran_where_and_what_it_costs() -> None:
    g = graph(capture(Branches(), torch.zeros(1, 2, 8, 8)))
    assert isinstance(g, nx.DiGraph)
    assert g.graph["name"] == "Branches"
    assert [op for _, op in g.nodes(data="op")] == ["input", "conv2d", "conv2d", "add", "relu", "output"]
    left = g.nodes["left"]
    assert left == {
        "op": "conv2d",
        "path": "left",
        "layer": "left",
        "shape": (1, 4, 8, 8),
        "shapes": ((1, 4, 8, 8),),
        "dtype": "float32",
        "params": 4 * 2 * 9 + 4,
        "macs": 64 * 4 * 2 * 9,
        "read_bytes": 4 * (2 * 64 + 4 * 2 * 9 + 4),
        "write_bytes": 4 * 4 * 64,
        "alias_of": None,
    }
    assert g.nodes["add"]["layer"] is None


def test_edges_carry_the_bytes_that_flow() -> None:
    g = graph(capture(Branches(), torch.zeros(1, 2, 8, 8)))
    flows = {(u, v): (data["bytes"], data["shape"]) for u, v, data in g.edges(data=True)}
    assert flows["x", "left"] == flows["x", "right"] == (4 * 2 * 64, (1, 2, 8, 8))
    assert flows["left", "add"] == (4 * 4 * 64, (1, 4, 8, 8))
    assert set(g.pred["add"]) == {"left", "right"}


def test_of_several_tensors_an_edge_carries_those_that_are_read() -> None:
    g = graph(capture(Pieces(), torch.zeros(1, 3, 4, 4)))
    assert g.nodes["split"]["shapes"] == ((1, 1, 4, 4), (1, 2, 4, 4))
    assert g.edges["split", "conv"] == {"bytes": 4 * 2 * 16, "shape": (1, 2, 4, 4)}
    assert g.edges["split", "add"] == {"bytes": 4 * 16, "shape": (1, 1, 4, 4)}


def test_weights_are_not_nodes() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 2, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.conv2d(x, self.weight)

    g = graph(capture(Functional(), torch.zeros(1, 2, 8, 8)))
    assert sorted(op for _, op in g.nodes(data="op")) == ["conv2d", "input", "output"]
    assert sum(params for _, params in g.nodes(data="params")) == 72


def test_order_of_insertion_is_topological() -> None:
    for name in ("resnet50", "googlenet"):
        g = graph(torchvision_capture(name))
        assert nx.is_directed_acyclic_graph(g)
        position = {node: i for i, node in enumerate(g)}
        assert all(position[u] < position[v] for u, v in g.edges)


def test_totals_are_those_of_the_model() -> None:
    g = graph(torchvision_capture("resnet50"))
    assert sum(macs for _, macs in g.nodes(data="macs")) == 4_089_184_256
    assert sum(params for _, params in g.nodes(data="params")) == 25_557_032


def test_it_is_plain_data() -> None:
    g = graph(capture(Branches(), torch.zeros(1, 2, 8, 8)))
    data = json.loads(json.dumps(nx.node_link_data(g, edges="edges")))
    assert len(data["nodes"]) == len(g)
    assert dtype_name(torch.bfloat16) == "bfloat16"


def test_each_call_makes_a_new_graph() -> None:
    made = capture(Branches(), torch.zeros(1, 2, 8, 8))
    first = graph(made)
    first.remove_node("left")
    assert "left" in graph(made)


@pytest.fixture(scope="module")
def chains():
    """Captures of chains of 1,000 and 10,000 convolutions."""

    def chain(n: int) -> nn.Module:
        with torch.device("meta"):
            return nn.Sequential(*[nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(n)])

    return [capture(chain(n), torch.empty(1, 4, 8, 8, device="meta")) for n in (1_000, 10_000)]


def test_a_chain_of_ten_thousand_convolutions(chains) -> None:
    short, long = chains
    analysis = analyze_capture(long)
    assert analysis.macs == 10_000 * 64 * 16 * 9
    assert analysis.critical_path.macs == analysis.macs
    assert len(analysis.critical_path.nodes) == 10_000
    assert analysis.layers[-1].receptive_field == (20_001, 20_001)
    assert analyze_capture(short).layers[-1].receptive_field == (2_001, 2_001)


def test_cost_grows_with_the_number_of_nodes_and_not_with_its_square(chains) -> None:
    # Linear is 10 times; quadratic would be 100. The bound leaves room for a noisy machine and for a colder cache.
    def seconds(made) -> float:
        best = float("inf")
        for _ in range(2):
            start = time.process_time()
            analyze_capture(made)
            best = min(best, time.process_time() - start)
        return best

    short, long = map(seconds, chains)
    assert long < 25 * short
