"""Edits that no module swap can make: a call inside a module's own code becomes a call of a new module.

Only the submodule whose code makes the call is turned into a `torch.fx.GraphModule`, with every child left as it is
(all are leaves). Its unused parameters, buffers and children, its plain attributes, its hooks and its training flag are
carried over. It keeps its class's name but not its methods: an edit says so.

What its code does is for `code_trace` to say, and whether a graph can hold it.
"""

from __future__ import annotations

import copy
import operator
from typing import Any

from torch import Tensor, fx, nn

from ..capturing.code_trace import NotTraceable, trace
from ..core.convolution import ConvSpec
from ..forms.specs import linear_spec

_CONVOLUTIONS = frozenset(f"conv{kind}{dims}d" for kind in ("", "_transpose") for dims in (1, 2, 3))
_ORDER = ("stride", "padding", "dilation", "groups")
_TRANSPOSED_ORDER = ("stride", "padding", "output_padding", "groups", "dilation")
_REGISTRIES = frozenset(("_modules", "_parameters", "_buffers"))


class Regraphed(fx.GraphModule):
    """A module whose code became a graph; a copy of it holds all that it holds.

    Copies of a plain ``GraphModule`` lose hooks, second names of a child, and which buffers are not saved.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Regraphed:
        made = type(self).__new__(type(self))
        type(made).__name__ = type(self).__name__
        memo[id(self)] = made
        vars(made).update(copy.deepcopy(vars(self), memo))
        made.graph = made._graph
        return made


def to_graph(module: nn.Module) -> Regraphed:
    """A module's own code as a graph, with everything that it holds.

    Args:
        module: The module; its children are shared with the result.

    Raises:
        NotTraceable: See `code_trace.trace`.
    """
    graph = copy.deepcopy(module.graph) if isinstance(module, fx.GraphModule) else trace(module)
    made = Regraphed(module, graph, class_name=type(module).__name__)
    for name, value in vars(module).items():
        if name in _REGISTRIES:
            store = getattr(made, name)
            # A GraphModule has bare modules in the place of children whose parameters its graph reads.
            items = {**value, **{key: item for key, item in store.items() if key not in value}}
            store.clear()
            store.update(items)
        elif name not in ("_graph", "_code", "graph"):
            vars(made)[name] = value
    return made


class FunctionalCall:
    """The one functional convolution or linear map that reads a weight, in a module's graph.

    Attributes:
        spec: Its shape facts.
        bias_name: Name of the bias, relative to the module; None where it has none.
        bias: The bias.

    Args:
        made: From `to_graph`.
        weight: Name of the weight, relative to ``made``.

    Raises:
        NotTraceable: If there is not exactly one such call, or if it takes what only exists when it runs.
    """

    def __init__(self, made: Regraphed, weight: str) -> None:
        self.made, self.weight = made, weight
        calls = [node for node in made.graph.nodes if _reads(node, weight)]
        if len(calls) != 1:
            raise NotTraceable(f"{weight} is read by {len(calls)} functional calls in this code, expected one")
        self.node = calls[0]
        bias = argument(self.node, 2, "bias")
        self.bias_name: str | None = None
        self.bias: Tensor | None = None
        if isinstance(bias, fx.Node):
            if bias.op != "get_attr":
                raise NotTraceable(f"the bias beside {weight} is computed by the code")
            self.bias_name = str(bias.target)
            self.bias = operator.attrgetter(self.bias_name)(made)
        self.spec = self._spec(operator.attrgetter(weight)(made))

    def _spec(self, weight: Tensor) -> ConvSpec:
        name = _function(self.node)
        if name == "linear":
            return linear_spec(weight.shape[1], weight.shape[0], self.bias is not None)
        transposed = "transpose" in name
        settings = dict(zip(_TRANSPOSED_ORDER if transposed else _ORDER, self.node.args[3:]))
        settings |= {key: value for key, value in self.node.kwargs.items() if key not in ("input", "weight", "bias")}
        if any(isinstance(value, fx.Node) for value in settings.values()):
            raise NotTraceable(
                f"the stride, padding or dilation of the call with {self.weight} is computed by the code"
            )
        facts: Any = settings
        return ConvSpec.of_call(weight.shape, bias=self.bias is not None, transposed=transposed, **facts)

    def replace(self, name: str, new: nn.Module) -> str:
        """Puts a call of a module in its place, and drops the parameters that nothing reads any more.

        Args:
            name: Name to register the module under; changed where it is taken.
            new: The module.

        Returns:
            The name it was registered under.
        """
        made, node = self.made, self.node
        while hasattr(made, name):
            name += "_"
        made.add_submodule(name, new)
        with made.graph.inserting_before(node):
            call = made.graph.call_module(name, (argument(node, 0, "input"),))
            call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        made.graph.erase_node(node)
        for gone in (self.weight, self.bias_name):
            if gone is not None:
                self._drop(gone)
        made.graph.lint()
        made.recompile()
        return name

    def _drop(self, name: str) -> None:
        reads = [node for node in self.made.graph.nodes if node.op == "get_attr" and node.target == name]
        for read in reads:
            if not read.users:
                self.made.graph.erase_node(read)
        if any(read.users for read in reads):
            return
        owner, _, attribute = name.rpartition(".")
        if any(node.op == "call_module" and node.target == owner for node in self.made.graph.nodes):
            return
        holder = self.made.get_submodule(owner)
        if not owner:
            holder._parameters.pop(attribute, None)
            return
        holder._parameters[attribute] = None
        if not any(True for _ in holder.parameters()) and not any(True for _ in holder.children()):
            self.made.delete_submodule(owner)


def argument(node: fx.Node, position: int, name: str) -> Any:
    """An argument of a call, wherever it was given."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def _function(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", "")) if node.op == "call_function" else ""


def _reads(node: fx.Node, weight: str) -> bool:
    if _function(node) not in _CONVOLUTIONS and _function(node) != "linear":
        return False
    read = argument(node, 1, "weight")
    return isinstance(read, fx.Node) and read.op == "get_attr" and read.target == weight
