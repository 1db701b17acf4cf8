"""What a model returns on shapes alone, without a graph: `dry_runs`, in a fraction of a capture's time.

The model runs on ``meta`` tensors as under the recorder, by the same rules for modules and functions, but nothing is
written down. Whatever is unusual ends the run without an answer, and a capture has to decide: code that reads values, a
write of shapes into a tensor with values, a function transform, a higher-order operator, and every exception.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.overrides import TorchFunctionMode

from ..core.collector import no_collection
from ..core.convolution import ConvSpec
from ..core.nested import Args, Kwargs, Tree, map_tensors, tensors_of, to_meta
from . import functions
from .evaluate import redirect
from .inventory import Inventory
from .leaves import Leaf, leaf_rule
from .shapes import FUNCTION_RULES, convolve
from .state import replaced, untouched
from .threads import one_at_a_time
from .transforms import transforming, uncompiled

Arguments = tuple[Args, Kwargs]

_original_call = nn.Module.__call__


class Unusual(RuntimeError):
    """What happens in a run has to be recorded to know what comes of it."""


@contextmanager
def dry_runs(model: nn.Module, *, training: bool = False) -> Iterator[Callable[[Arguments], Tree | None]]:
    """A function that gives what the model returns for arguments on ``meta``; None where it cannot tell.

    The model is put back as it was on leaving; between two runs it is left as a run leaves it.
    """
    inventory = Inventory(model)
    mode = _Mode(inventory)
    with one_at_a_time, no_collection(), untouched(inventory, values=False):
        for module in inventory.modules:
            if module.training != training:
                module.__dict__["training"] = training

        def returned(inputs: Arguments) -> Tree | None:
            torch.default_generator.manual_seed(0)
            args, kwargs = inputs
            try:
                with replaced(nn.Module, "__call__", mode.call), uncompiled(), torch.no_grad(), mode:
                    return model(*args, **kwargs)
            except Exception:
                return None

        yield returned


class _Mode(TorchFunctionMode):
    """Answers torch functions and calls of modules by rule where there is one."""

    def __init__(self, inventory: Inventory) -> None:
        super().__init__()
        first = next(iter(inventory.parameters), None)
        self._device = torch.device("cpu") if first is None or first.is_meta else first.device
        self._specs: dict[int, ConvSpec] = {}
        self._inventory = inventory
        mode, thread = self, threading.get_ident()

        def call(module: nn.Module, *args: object, **kwargs: object) -> object:
            if threading.get_ident() != thread:  # another thread's model, which this run has nothing to do with
                return _original_call(module, *args, **kwargs)
            return mode._call_module(module, args, kwargs)

        self.call = call

    def _call_module(self, module: nn.Module, args: Args, kwargs: Kwargs) -> object:
        kind: type = type(module)
        rule = leaf_rule(kind) if id(module) in self._inventory.names and transforming() is None else None
        if rule is not None:
            attributes = module.__dict__
            plain = "forward" not in attributes and not (
                attributes["_forward_hooks"] or attributes["_forward_pre_hooks"]
            )
            if plain and len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
                with torch._C.DisableTorchFunction():
                    out = self._by_rule(module, rule, args[0])
                if out is not NotImplemented:
                    return out
        return _original_call(module, *args, **kwargs)

    def _by_rule(self, module: Any, rule: Leaf, x: Tensor) -> Tensor:
        x = to_meta(x)
        if not rule.convolution:
            return rule.output(module, x)
        spec = self._specs.get(id(module))
        if spec is None:
            spec = self._specs[id(module)] = ConvSpec.of_module(module)
        return convolve(spec, x, module._parameters.get("weight"))

    def __torch_function__(self, func: Any, types: object, args: Args = (), kwargs: Kwargs | None = None) -> object:
        """Sees every torch function and tensor method outside of what a rule answered."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            attribute = func.__self__.__name__
            if attribute in functions.DEVICE_ATTRIBUTES:  # as the model would see them where it is
                return self._device if attribute == "device" else attribute == f"is_{self._device.type}"
            return func(*args)
        if name in functions.SILENT:
            return func(*args, **kwargs)
        if name == "__set__" or isinstance(func, HigherOrderOperator) or transforming() is not None:
            raise Unusual(name)
        tensors = tensors_of((args, kwargs))
        on_meta = sum([t.is_meta for t in tensors])
        if on_meta and name in functions.VALUE_READS:
            raise Unusual(name)
        if on_meta < len(tensors) and _writes(name, args, kwargs) and (on_meta or self._is_owned(tensors[0])):
            raise Unusual(name)
        if on_meta:
            if on_meta < len(tensors):
                args, kwargs = map_tensors(args, to_meta), map_tensors(kwargs, to_meta)
            if name in functions.CASTS or "device" in kwargs:
                func, args, kwargs = redirect(func, name, args, kwargs, "meta")
            rule = FUNCTION_RULES.get(name)
            if rule is not None:
                out = rule(*args, **kwargs)
                if out is not NotImplemented:
                    return out
        return func(*args, **kwargs)

    def _is_owned(self, t: Tensor) -> bool:
        """Whether a tensor shares its memory with one of the model's."""
        return _memory(t) in self._owned

    @cached_property
    def _owned(self) -> set[int]:
        return {_memory(t) for _, t in self._inventory.owned.values()}


def _memory(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _writes(name: str, args: Args, kwargs: Kwargs) -> bool:
    return not name or "out" in kwargs or functions.writes(name, args, kwargs)
