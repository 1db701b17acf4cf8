"""Edits that no module swap can make: a call inside a module's own code becomes a call of a new module.

Only the submodule whose code makes the call becomes a `torch.fx.GraphModule`, with every child left as it is. All that
it holds is carried over; it keeps its class's name but not its methods: an edit says so. `code_trace` says what its
code does, and whether a graph can hold it.
"""

from __future__ import annotations

import copy
import operator
from typing import cast

from torch import Tensor, fx, nn
from torch.fx.graph import PythonCode

from ..capturing.code_trace import NotTraceable, trace
from ..capturing.functions import argument
from ..core.fx_names import keywords_spelt_out
from ..core.operations import convolution_call
from ..forms.specs import linear_spec
from ..layers.known import is_identity
from .swap import REGISTRIES

_FUNCTIONS = frozenset(("linear", *(f"conv{kind}{dims}d" for kind in ("", "_transpose") for dims in (1, 2, 3))))
_TENSORS = ("input", "weight", "bias")


class Regraphed(fx.GraphModule):
    """A module whose code became a graph; a copy of it holds all that it holds.

    Copies of a plain ``GraphModule`` lose hooks, second names of a child, and which buffers are not saved. And a
    plain one prints a traceback before it raises, where to try a size that does not fit is no error.
    """

    def recompile(self) -> PythonCode:
        """As of a plain one, but for calls, which are those of any module."""
        with keywords_spelt_out():
            code = super().recompile()
        if "__call__" in vars(type(self)):
            del type(self).__call__
        return code

    def __deepcopy__(self, memo: dict[int, object]) -> Regraphed:
        made = type(self).__new__(type(self))
        type(made).__name__ = type(self).__name__
        memo[id(self)] = made
        vars(made).update(copy.deepcopy(vars(self), memo))
        made.graph = made._graph
        return made


_KEPT = ("train", "eval", "requires_grad_", "get_extra_state", "set_extra_state")
"""What a class may have made its own, and a graph would do in the common way, unseen."""


def to_graph(module: nn.Module) -> Regraphed:
    """A module's own code as a graph, with everything that it holds; its children are shared with the result.

    Raises:
        NotTraceable: See `code_trace.trace`; and where its class freezes layers in training, or saves more state.
    """
    own = [name for name in _KEPT if getattr(type(module), name) is not getattr(nn.Module, name)]
    if own:
        raise NotTraceable(f"{type(module).__name__} has {', '.join(own)} of its own, which a graph would not")
    graph = copy.deepcopy(module.graph) if isinstance(module, fx.GraphModule) else trace(module)
    made = Regraphed(module, graph, class_name=type(module).__name__)
    for name, value in vars(module).items():
        if name in REGISTRIES:
            store = getattr(made, name)
            # A GraphModule has bare modules in the place of children whose parameters its graph reads.
            items = {**value, **{key: item for key, item in store.items() if key not in value}}
            store.clear()
            store.update(items)
        elif name not in ("_graph", "_code", "graph"):
            vars(made)[name] = value
    return made


def finish(graph_module: Regraphed) -> None:
    """Checks an edited graph and makes its code anew."""
    graph_module.graph.lint()
    graph_module.recompile()


def drop_node(node: fx.Node, source: fx.Node) -> None:
    """Takes a call out of its graph; who read it reads another node."""
    node.replace_all_uses_with(source)
    node.graph.erase_node(node)


def drop_reads(graph_module: Regraphed, *names: str) -> list[str]:
    """Takes the unused reads of some tensors out of a graph; those of the names that it reads no more."""
    for node in [node for node in graph_module.graph.nodes if _read(node) in names and not node.users]:
        graph_module.graph.erase_node(node)
    left = {_read(node) for node in graph_module.graph.nodes}
    return [name for name in names if name not in left]


def drop_identities(graph_module: Regraphed) -> None:
    """Takes the calls of modules that return what they are given out of a graph."""
    for node in list(graph_module.graph.nodes):
        source = argument(node, 0, "input")
        if calls_identity(graph_module, node) and isinstance(source, fx.Node):
            drop_node(node, source)


def calls_identity(graph_module: Regraphed, node: fx.Node) -> bool:
    """Whether a node calls a module that returns what it is given."""
    return node.op == "call_module" and is_identity(graph_module.get_submodule(str(node.target)))


def stored(graph_module: Regraphed, value: object) -> object:
    """The tensor of the module that a node reads; any other value as it is."""
    name = _read(value)
    return value if name is None else operator.attrgetter(name)(graph_module)


class FunctionalCall:
    """The one functional convolution or linear map that reads a weight, in the graph of a module (`to_graph`).

    Raises:
        NotTraceable: If there is not exactly one such call, or if it takes what only exists when it runs.
    """

    def __init__(self, made: Regraphed, weight: str) -> None:
        self.made, self.weight = made, weight
        calls = [node for node in made.graph.nodes if _function(node) and _read(argument(node, 1, "weight")) == weight]
        if len(calls) != 1:
            raise NotTraceable(f"{weight} is read by {len(calls)} functional calls in this code, expected one")
        self.node: fx.Node = calls[0]
        self.bias_name = _read(argument(self.node, 2, "bias"))
        bias = stored(made, argument(self.node, 2, "bias"))
        if isinstance(bias, fx.Node):
            raise NotTraceable(f"the bias beside {weight} is computed by the code")
        self.bias = cast("Tensor | None", bias)
        name, tensor = _function(self.node), operator.attrgetter(weight)(made)
        if name == "linear":
            self.spec = linear_spec(tensor.shape[1], tensor.shape[0], self.bias is not None)
            return
        settings = (self.node.args[3:], {k: v for k, v in self.node.kwargs.items() if k not in _TENSORS})
        if any(isinstance(value, fx.Node) for value in (*settings[0], *settings[1].values())):
            raise NotTraceable(f"the stride, padding or dilation of the call with {weight} is computed by the code")
        self.spec, _, _ = convolution_call(name, (None, tensor, self.bias, *settings[0]), settings[1])

    def replace(self, name: str, new: nn.Module) -> str:
        """Puts a call of a module in its place, under a free name like ``name``, which it returns.

        Parameters that nothing reads any more go.
        """
        made, node = self.made, self.node
        while hasattr(made, name):
            name += "_"
        made.add_submodule(name, new)
        with made.graph.inserting_before(node):
            call = made.graph.call_module(name, (argument(node, 0, "input"),))
            call.meta = dict(node.meta)
        drop_node(node, call)
        called = {node.target for node in made.graph.nodes if node.op == "call_module"}
        for gone in drop_reads(made, *filter(None, (self.weight, self.bias_name))):
            owner, _, attribute = gone.rpartition(".")
            holder = made.get_submodule(owner)
            if not owner:
                holder._parameters.pop(attribute, None)
            elif owner not in called:
                holder._parameters[attribute] = None
                if not [*holder.parameters(), *holder.children()]:
                    made.delete_submodule(owner)
        finish(made)
        return name


def _function(node: fx.Node) -> str:
    """Name of the functional convolution or linear map that a node calls; empty for anything else."""
    name = str(getattr(node.target, "__name__", "")) if node.op == "call_function" else ""
    return name if name in _FUNCTIONS else ""


def _read(value: object) -> str | None:
    """Name of the tensor that a node reads."""
    return str(value.target) if isinstance(value, fx.Node) and value.op == "get_attr" else None
