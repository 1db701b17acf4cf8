"""A graph as tools with module hooks see it: calls of modules, and functions that larger modules call themselves.

A hook fires once per call, so the functions that one call of a childless module makes are put together again here:
neighbours in the graph, under the same module, connected by data (the two calls of a norm that is applied to query
and key are not).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
from torch import fx, nn

from ...capturing import Capture, NodeInfo, TensorSpec, info
from ...capturing.records import shape_of


@dataclass(frozen=True, slots=True)
class Share:
    """What a tool counts for one operation by one rule; named as in `Row`.

    ``counted`` is a fraction only where ptflops makes one; ``ours`` is 0 where another share of the operation has them.
    """

    kind: str
    rule: str
    counted: float
    ours: int = 0


@dataclass(frozen=True, slots=True)
class Unit:
    """One call of a childless module, or one function that a larger module calls.

    Attributes:
        module: The module called; for a function, the module whose code calls it.
        whole: Whether ``module`` is what is called here, so that a hook on it fires.
        ours: Its MACs by our count.
        main: The node whose input and output a hook sees, where hooks on the module or a weight that is computed make
            others around it; None for all nodes together.
    """

    kind: str
    module: Any
    whole: bool
    nodes: tuple[fx.Node, ...]
    ours: int
    main: fx.Node | None = None

    @property
    def input(self) -> TensorSpec:
        """The first activation that goes in."""
        first = info(self.main or self.nodes[0])
        return first.inputs[0] if first.inputs else first.outputs[0]

    @property
    def output(self) -> TensorSpec:
        """The first tensor that comes out."""
        facts = info(self.main or self.nodes[-1])
        return facts.outputs[0] if facts.outputs else facts.inputs[0]


PIECE = "tuple_getitem"
"""What a graph calls it when one of several outputs is taken: nothing that runs."""


def childless(module: nn.Module) -> bool:
    """Whether a module has no children (an empty ``Sequential`` among them is none, as in torchinfo)."""
    return not any(module.children())


def units(capture: Capture) -> list[Unit]:
    """Everything a captured model does, in graph order: each node that runs something in exactly one unit."""
    modules = dict(capture.model.named_modules(remove_duplicate=False))
    result: list[Unit] = []
    run: list[fx.Node] = []
    owner = ""
    for node in capture.graph.nodes:
        if node.op not in ("call_module", "call_function", "call_method"):
            continue
        facts = info(node)
        if facts.op == PIECE:
            run += [node] * bool(run and facts.path == owner)
            continue
        own = node.op != "call_module" and childless(modules[facts.path])
        if run and (not own or facts.path != owner):
            result += _calls(run, modules[owner])
            run = []
        if own:
            run.append(node)
            owner = facts.path
        elif node.op == "call_module":
            result.append(_unit(modules[str(node.target)], True, (node,)))
        else:
            result.append(_unit(modules[facts.path], False, (node,)))
    if run:
        result += _calls(run, modules[owner])
    return result


def _is_call_of(module: nn.Module, facts: NodeInfo) -> bool:
    """Whether an operation is the one that calling this stock module runs."""
    if not type(module).__module__.startswith(("torch.nn.modules", "torchvision.ops")):
        return False
    if isinstance(module, nn.modules.conv._ConvNd):
        return facts.spec is not None
    return facts.op == {"Linear": "linear", "DeformConv2d": "deform_conv2d"}.get(type(module).__name__)


def _unit(module: nn.Module, whole: bool, nodes: tuple[fx.Node, ...], main: fx.Node | None = None) -> Unit:
    facts = [info(node) for node in nodes]
    costly = max(facts, key=lambda f: f.cost.macs) if main is None else info(main)
    return Unit(words(costly.op), module, whole, nodes, sum(f.cost.macs for f in facts), main)


def _calls(run: Sequence[fx.Node], module: nn.Module) -> Iterator[Unit]:
    """The calls of a childless module that consecutive nodes of it make up."""
    real = [node for node in run if info(node).op != PIECE]
    mains = [i for i, node in enumerate(real) if _is_call_of(module, info(node))]
    if mains:  # what a pre-hook or an old-style norm makes of its weight is no call of its own
        for start, main, end in zip([0, *(i + 1 for i in mains)], mains, [i + 1 for i in mains[:-1]] + [len(real)]):
            yield _unit(module, True, tuple(real[start:end]), real[main])
        return
    if type(module).__module__.startswith("torch.nn.modules") and len({(n.op, n.target) for n in real}) == 1:
        for node in real:
            yield _unit(module, True, (node,))
        return
    own = set(run)
    links = nx.Graph([(source, node) for node in run for source in node.all_input_nodes if source in own])
    links.add_nodes_from(run)
    for part in nx.connected_components(links):
        if nodes := tuple(node for node in real if node in part):
            yield _unit(module, True, nodes)


def words(op: str) -> str:
    """An operation's name as a person writes it."""
    return op.replace("_", " ") if op.endswith(("norm", "pool1d", "pool2d", "pool3d")) else op


def visits(root: nn.Module, stop: Callable[[nn.Module], bool] | None = None) -> Counter[nn.Module]:
    """How often a walk over ``children()`` comes by each module: more than once where modules share it.

    It does not enter modules for which ``stop`` holds, but the root's children in any case.
    """
    counts: Counter[nn.Module] = Counter({root: 1})
    stack = [root]
    while stack:
        for child in stack.pop().children():
            counts[child] += 1
            if stop is None or not stop(child):
                stack.append(child)
    return counts


def operand_shapes(node: fx.Node) -> list[tuple[int, ...]]:
    """Shapes of the tensors that a call takes, positional ones first."""
    values = (*node.args, *node.kwargs.values())
    return [shape for value in values if (shape := shape_of(value)) is not None]
