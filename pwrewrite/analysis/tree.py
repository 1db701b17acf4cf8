"""The module hierarchy with the cost of all that runs inside each module.

MACs belong to the module whose code runs them: a leaf's to the leaf, a function call's to the module that makes it.
Parameters belong to the first module that holds them, each tensor once.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..capturing.records import NodeInfo
from ..capturing.tensors import element_count
from .records import TreeNode


def module_tree(model: nn.Module, infos: Iterable[NodeInfo]) -> TreeNode:
    """The hierarchy of a model, from the facts of all nodes of its graph."""
    modules = dict(model.named_modules())
    macs = dict.fromkeys(modules, 0)
    for facts in infos:
        if facts.cost.macs:
            path = facts.path
            while path not in macs:
                path = path.rpartition(".")[0]
            macs[path] += facts.cost.macs
    params = dict.fromkeys(modules, 0)
    seen: set[int] = set()
    for path, module in modules.items():
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                params[path] += element_count(parameter)
    children: dict[str, list[TreeNode]] = {path: [] for path in modules}
    for path in reversed(modules):  # children come after their parents, so from the end they are complete first
        node = TreeNode(path, type(modules[path]).__name__, params[path], macs[path], tuple(reversed(children[path])))
        if not path:
            return node
        parent = path.rpartition(".")[0]
        children[parent].append(node)
        params[parent] += node.params
        macs[parent] += node.macs
    raise AssertionError("named_modules yields the root")
