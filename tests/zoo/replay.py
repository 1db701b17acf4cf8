"""Runs a captured graph as a program: what it computes says whether its nodes, edges and constants are right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from pwrewrite.capturing import Capture, capture
from pwrewrite.core.nested import tensors_of


class Replay(fx.Interpreter):
    """Interprets a graph that was captured with ``items=True``, on a module that holds what it refers to."""

    def __init__(self, captured: Capture) -> None:
        self.captured = captured
        super().__init__(nn.Module(), graph=captured.graph)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.captured.model.get_submodule(target)(*args, **kwargs)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in self.captured.constants:
            return self.captured.constants[target].clone()
        owner, _, name = target.rpartition(".")
        return getattr(self.captured.model.get_submodule(owner), name)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        out = super().call_method(target, args, kwargs)
        return args[0] if target == "__setitem__" else out  # in a captured graph, a write is the tensor's new origin


def replay(model: nn.Module, inputs: tuple[Any, ...]) -> list[tuple[Tensor, Tensor]]:
    """Pairs of what a model returns and what its captured graph does, for real weights and inputs."""
    captured = capture(model, inputs, items=True)
    with torch.no_grad():
        want = tensors_of(model(*inputs))
        got = tensors_of(Replay(captured).run(*(t.clone() for t in tensors_of(inputs))))
    assert len(want) == len(got)
    return list(zip(want, got))
