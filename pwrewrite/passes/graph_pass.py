"""A pass as torch's own pass infrastructure knows it: a callable from a `GraphModule` to a `PassResult`.

::

    from torch.fx.passes.infra.pass_manager import PassManager

    manager = PassManager(passes=[as_graph_pass(InsertBottleneck(rank=0.5), example_inputs), my_own_pass])
    result = manager(torch.fx.symbolic_trace(model))

The callable captures, proposes and carries out. Edits and skips are kept in ``graph_module.meta["pwrewrite"]``, because
the manager passes on nothing else. The graph module that it is given stays as it is.

Limit: nodes keep the ``meta`` that they had. Behind a pass that changes shapes inside the model, run a shape
propagation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.passes.shape_prop import TensorMetadata

from ..capturing import Inputs, capture
from ..core.errors import RefusedError, UsageError
from ..core.plan import Op, Plan, Skip
from ..edit.apply import carry_out
from ..edit.survival import probe_for
from .base import Pass

META = "pwrewrite"
"""Key of ``graph_module.meta`` under which edits and skips are kept."""


def as_graph_pass(pass_: Pass, example_inputs: Inputs | None = None) -> Callable[[fx.GraphModule], PassResult]:
    """A pass as a callable for `torch.fx.passes.infra.pass_manager.PassManager`.

    Args:
        pass_: The pass.
        example_inputs: As for `pwrewrite.capturing.capture`; by default of the shapes that the placeholders' ``meta``
            says.

    Returns:
        A callable that returns the changed copy, or the graph module itself where nothing was done. It raises
        `RefusedError` where the pass is exact in evaluation only and the graph module is in training mode.
    """

    def run(graph_module: fx.GraphModule) -> PassResult:
        if pass_.exact == "eval" and graph_module.training:
            message = f"{pass_.name} is exact in evaluation only, and the graph module is in training mode"
            raise RefusedError(message, hint="call eval() on it first")
        inputs = inputs_of(graph_module) if example_inputs is None else example_inputs
        captured = capture(graph_module, inputs)
        proposals = pass_.propose(captured)
        skips = tuple(p for p in proposals if isinstance(p, Skip))
        plan = Plan(tuple(p for p in proposals if isinstance(p, Op)), skips)
        applied = carry_out(graph_module, plan, probe=probe_for(plan, captured, inputs)) if plan.ops else None
        if applied is None or not applied.edits:
            return PassResult(graph_module, False)
        changed = applied.model
        assert isinstance(changed, fx.GraphModule)
        changed.graph.lint()
        changed.recompile()
        before = changed.meta.get(META, {"edits": (), "skips": ()})
        left = (*before["skips"], *skips, *applied.skips)
        changed.meta[META] = {"edits": (*before["edits"], *applied.edits), "skips": left}
        return PassResult(changed, True)

    run.__name__ = run.__qualname__ = pass_.name
    return run


def inputs_of(graph_module: fx.GraphModule) -> tuple[Tensor, ...]:
    """Inputs on meta of the shapes that the placeholders' ``meta`` says.

    Raises:
        UsageError: If a placeholder says nothing.
    """
    inputs = []
    for node in graph_module.graph.find_nodes(op="placeholder"):
        known = node.meta.get("val", node.meta.get("tensor_meta"))
        if not isinstance(known, (Tensor, TensorMetadata)):
            if node.args:  # it has a default
                break
            raise UsageError(
                f"the placeholder {node.name!r} says no shape",
                expected="meta['val'] or meta['tensor_meta'], as a shape propagation leaves them",
                hint="give as_graph_pass the example inputs",
            )
        shape = [size if isinstance(size, int) else int(size.node.hint) for size in known.shape]  # of its example
        inputs.append(torch.empty(shape, dtype=known.dtype, device="meta"))
    return tuple(inputs)
