"""The module hierarchy: cumulative cost, first owners, any depth."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pwrewrite.analysis.by_op import by_op
from pwrewrite.analysis.records import TreeNode
from pwrewrite.analysis.tree import module_tree
from pwrewrite.capturing import capture, info
from pwrewrite.capturing.records import NodeInfo
from pwrewrite.core.cost import Cost


def tree_of(model: nn.Module, x: Tensor):
    return module_tree(model, [info(n) for n in capture(model, x).graph.nodes])


class Block(nn.Module):
    """A module call, a functional call and a module that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(4, 4, 1, 1))
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.unused = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.conv(x), self.kernel)


class Net(nn.Module):
    """Two blocks, one of them under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()
        self.again = self.first
        self.second.kernel = self.first.kernel

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.second(self.first(x)))


def test_costs_add_up_from_the_leaves() -> None:
    tree = tree_of(Net(), torch.zeros(1, 4, 8, 8))
    rows = {node.path: node for _, node in tree.walk()}
    conv, kernel = 64 * 4 * 4 * 9, 64 * 4 * 4
    assert list(rows) == ["", "first", "first.conv", "first.unused", "second", "second.conv", "second.unused"]
    assert rows["first"].macs == 2 * (conv + kernel)  # called twice, the second time under another name
    assert rows["second"].macs == conv + kernel
    assert rows["first.conv"].macs == 2 * conv
    assert tree.macs == 3 * (conv + kernel)
    assert rows["first.unused"].macs == 0


def test_a_parameter_counts_where_it_is_first_met() -> None:
    tree = tree_of(Net(), torch.zeros(1, 4, 8, 8))
    rows = {node.path: node for _, node in tree.walk()}
    assert rows["first"].params == 16 + 144 + 9
    assert rows["second"].params == 144 + 9  # its kernel is that of the first
    assert tree.params == sum(p.numel() for p in Net().parameters())


def test_kinds_names_and_depths() -> None:
    tree = tree_of(Net(), torch.zeros(1, 4, 8, 8))
    assert [(depth, node.name, node.kind) for depth, node in tree.walk()][:3] == [
        (0, "", "Net"),
        (1, "first", "Block"),
        (2, "conv", "Conv2d"),
    ]


def test_a_path_that_is_no_module_counts_for_the_module_around_it() -> None:
    tree = module_tree(Net(), [NodeInfo("matmul", "first.nowhere.deep", (), (), Cost(macs=7))])
    assert {node.path: node.macs for _, node in tree.walk() if node.macs} == {"": 7, "first": 7}


def test_walking_does_not_recurse() -> None:
    node = TreeNode("leaf", "Conv2d", 1, 1)
    for i in range(5_000):
        node = TreeNode(f"n{i}", "Sequential", 1, 1, (node,))
    walked = list(node.walk())
    assert len(walked) == 5_001
    assert walked[-1][0] == 5_000
    assert walked[-1][1].path == "leaf"
    while node.children:  # so that Python need not unwind it recursively either
        (node,) = node.children


def test_totals_by_kind_of_operation(torchvision_capture) -> None:
    made = torchvision_capture("resnet50")
    rows = by_op([info(n) for n in made.graph.nodes])
    totals = {row.op: row for row in rows}
    assert rows[0].op == "conv2d"
    assert (totals["conv2d"].calls, totals["conv2d"].macs) == (53, 4_087_136_256)
    assert totals["linear"].macs == 2_048_000
    assert totals["batch_norm"].calls == 53
    assert sum(row.params for row in rows) == made.params
    assert not {"input", "output", "get_attr"} & set(totals)
    free = [row for row in rows if not row.macs]
    moved = [row.read_bytes + row.write_bytes for row in free]
    assert moved == sorted(moved, reverse=True)
