"""What a model consists of, found in one walk: modules with all their paths, parameters, buffers, tensor attributes."""

from __future__ import annotations

from functools import cached_property

from torch import Tensor, nn

from ..core.nested import tensors_of
from .tensors import element_count, kind_of


class Inventory:
    """The parts of one model, by identity.

    Attributes:
        model: The model.
        modules: Every module once, in the order of ``named_modules``.
        names: ``id(module)`` to all its paths, the first first.
        paths: Every path to its module.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: list[nn.Module] = []
        self.names: dict[int, list[str]] = {}
        self.paths: dict[str, nn.Module] = {}
        self._walk(model, "", set())

    def _walk(self, module: nn.Module, path: str, above: set[int]) -> None:
        key = id(module)
        names = self.names.get(key)
        if names is None:
            self.names[key] = [path]
            self.modules.append(module)
        else:
            names.append(path)
        self.paths[path] = module
        children = module._modules
        if children and key not in above:
            above.add(key)
            prefix = f"{path}." if path else ""
            for name, child in children.items():
                if child is not None:
                    self._walk(child, prefix + name, above)
            above.discard(key)

    def path(self, module: nn.Module) -> str | None:
        """The first path of a module; None where it is not part of the model."""
        names = self.names.get(id(module))
        return names[0] if names is not None else None

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """Every parameter once."""
        found = {id(p): p for m in self.modules if m._parameters for p in m._parameters.values() if p is not None}
        return list(found.values())

    @cached_property
    def buffers(self) -> list[Tensor]:
        """Every buffer once."""
        found = {id(b): b for m in self.modules if m._buffers for b in m._buffers.values() if b is not None}
        return list(found.values())

    @cached_property
    def kinds(self) -> set[str]:
        """Kinds of its parameters and buffers that are no plain tensors."""
        alike = {(type(t), t.layout, t.dtype, t.is_nested): t for t in (*self.parameters, *self.buffers)}
        return set(map(kind_of, alike.values())) - {""}

    @cached_property
    def size(self) -> int:
        """Elements of all parameters, each tensor once."""
        return sum(map(element_count if "uninitialized" in self.kinds else Tensor.numel, self.parameters))

    @cached_property
    def strays(self) -> dict[int, str]:
        """Modules that a module holds in a plain list, tuple or dict, and theirs, by identity, with a name for each."""
        strays: dict[int, str] = {}
        for module in self.modules:
            path = self.names[id(module)][0]
            for name, value in module.__dict__.items():
                if name[:1] != "_" and isinstance(value, (list, tuple, dict)):
                    prefix = f"{path}.{name}" if path else name
                    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                        if isinstance(item, nn.Module):
                            for inner, part in item.named_modules(prefix=f"{prefix}.{key}"):
                                if id(part) not in self.names:
                                    strays.setdefault(id(part), inner)
        return strays

    @cached_property
    def owned(self) -> dict[int, tuple[str, Tensor]]:
        """Parameters, buffers and tensor attributes by identity, with their full names.

        Tensors in lists and dicts that modules hold have no name that a graph could use: theirs is empty.
        """
        owned: dict[int, tuple[str, Tensor]] = {}
        loose: list[Tensor] = []
        for module in self.modules:
            path = self.names[id(module)][0]
            prefix = f"{path}." if path else ""
            attributes = module.__dict__
            for store in (module._parameters, module._buffers, attributes):
                for name, value in store.items():
                    if isinstance(value, Tensor):
                        owned.setdefault(id(value), (prefix + name, value))
                    elif store is attributes and isinstance(value, (list, tuple, dict)) and name[:1] != "_":
                        loose += tensors_of(value)
        for t in loose:
            owned.setdefault(id(t), ("", t))
        return owned
