"""Edits that no module swap can make: a call inside a module's own code becomes a call of a new module.

Only the submodule whose code makes the call is turned into a `torch.fx.GraphModule`, with every child left as it is
(all are leaves), its unused parameters, buffers and children carried over, and its training flag kept. It keeps its class's
name but not its methods: an edit says so.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx, nn

from .capture.rules import CONV_FUNCTIONS


class ShallowTracer(fx.Tracer):
    """Traces one module's own code; its children are leaves whatever they are."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Every child is a leaf."""
        return True


class NotTraceable(RuntimeError):
    """The module's own code cannot be turned into a graph."""


def to_graph(module: nn.Module) -> fx.GraphModule:
    """A module's own code as a graph, with everything that it holds.

    Raises:
        NotTraceable: If the code depends on values or shapes in a way that a graph cannot hold.
    """
    try:
        graph = ShallowTracer().trace(module)
    except Exception as error:
        raise NotTraceable(f"{type(module).__name__}.forward does not trace: {str(error).splitlines()[0]}") from error
    made = fx.GraphModule(module, graph, class_name=type(module).__name__)
    for store in ("_parameters", "_buffers", "_modules"):
        for name, value in getattr(module, store).items():
            getattr(made, store).setdefault(name, value)
    made._non_persistent_buffers_set |= module._non_persistent_buffers_set
    made.train(module.training)
    for name, child in module.named_modules():
        if name:
            made.get_submodule(name).training = child.training
    return made


def replace_functional(made: fx.GraphModule, weight: str, name: str, new: nn.Module) -> str:
    """Replaces the one functional convolution or linear map that reads ``weight`` by a call of ``new``.

    Args:
        made: From `to_graph`.
        weight: Name of the weight, relative to ``made``.
        name: Name to register ``new`` under.
        new: The module.

    Returns:
        The name it was registered under.

    Raises:
        NotTraceable: If there is not exactly one such call, or it takes more than an input, a weight and a bias as tensors.
    """
    calls = [
        node
        for node in made.graph.nodes
        if node.op == "call_function"
        and getattr(node.target, "__name__", "") in CONV_FUNCTIONS | {"linear"}
        and _argument(node, 1, "weight") is not None
        and _argument(node, 1, "weight").op == "get_attr"
        and _argument(node, 1, "weight").target == weight
    ]
    if len(calls) != 1:
        raise NotTraceable(f"{weight} is read by {len(calls)} functional calls there, expected one")
    node = calls[0]
    while hasattr(made, name):
        name += "_"
    made.add_submodule(name, new)
    with made.graph.inserting_before(node):
        call = made.graph.call_module(name, (_argument(node, 0, "input"),))
    node.replace_all_uses_with(call)
    made.graph.erase_node(node)
    owner, _, attribute = weight.rpartition(".")
    bias = _argument(node, 2, "bias")
    gone = [weight] + ([str(bias.target)] if isinstance(bias, fx.Node) and bias.op == "get_attr" else [])
    for target in gone:
        for read in [n for n in made.graph.nodes if n.op == "get_attr" and n.target == target]:
            if not read.users:
                made.graph.erase_node(read)
        if not any(n.op == "get_attr" and n.target == target for n in made.graph.nodes):
            owner, _, attribute = target.rpartition(".")
            made.get_submodule(owner)._parameters.pop(attribute, None)
    made.graph.lint()
    made.recompile()
    return name


def functional_bias(module: nn.Module, weight: str) -> tuple[str | None, Tensor | None]:
    """Name and value of the bias that goes with a functional call's weight, found in the module's own code."""
    made = ShallowTracer().trace(module)
    for node in made.nodes:
        if node.op == "call_function" and getattr(node.target, "__name__", "") in CONV_FUNCTIONS | {"linear"}:
            found = _argument(node, 1, "weight")
            if isinstance(found, fx.Node) and found.target == weight:
                bias = _argument(node, 2, "bias")
                if isinstance(bias, fx.Node) and bias.op == "get_attr":
                    value: Any = operator.attrgetter(str(bias.target))(module)
                    return str(bias.target), value
    return None, None


def _argument(node: fx.Node, position: int, name: str) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)
