"""What a model consists of, found in one walk: modules with all their paths, parameters, buffers, tensor attributes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from operator import attrgetter

from torch import Tensor, nn

from ..core.nested import Tree, tensors_of
from .tensors import all_plain, byte_count, element_count, kind_of

_ATOMS = frozenset((bool, int, float, str, type(None)))


class Inventory:
    """The parts of one model, by identity.

    Attributes:
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

    @cached_property
    def _named_parameters(self) -> list[tuple[nn.Module, str, nn.Parameter]]:
        """Parameters with holder and name, taken before the model runs: ``functional_call`` swaps them for a while."""
        return [(m, name, p) for m in self.modules for name, p in m._parameters.items() if p is not None]

    @cached_property
    def _named_buffers(self) -> list[tuple[nn.Module, str, Tensor]]:
        return [(m, name, b) for m in self.modules for name, b in m._buffers.items() if b is not None]

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """Every parameter once."""
        return list({id(p): p for _, _, p in self._named_parameters}.values())

    @cached_property
    def buffers(self) -> list[Tensor]:
        """Every buffer once."""
        return list({id(b): b for _, _, b in self._named_buffers}.values())

    @cached_property
    def kinds(self) -> set[str]:
        """Kinds of its parameters and buffers that are no plain tensors."""
        tensors = (*self.parameters, *self.buffers)
        if all_plain(tensors):
            return set()
        return set(map(kind_of, tensors)) - {""}

    @cached_property
    def size(self) -> int:
        """Elements of all parameters, each tensor once."""
        return sum(map(element_count if "uninitialized" in self.kinds else Tensor.numel, self.parameters))

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all parameters and buffers, each tensor once."""
        return sum(map(byte_count if self.kinds else attrgetter("nbytes"), (*self.parameters, *self.buffers)))

    @cached_property
    def strays(self) -> dict[str, nn.Module]:
        """Modules that a module holds in a plain list, tuple or dict, and theirs, once, by a name for each."""
        strays: dict[int, tuple[str, nn.Module]] = {}
        for module in self.modules:
            if type(module).__module__.startswith("torch.nn."):
                continue  # what torch's own modules hold are sizes
            path = self.names[id(module)][0]
            for name, value in module.__dict__.items():
                if type(value) in _ATOMS or name[:1] == "_" or not isinstance(value, (list, tuple, dict)):
                    continue
                items = value.values() if isinstance(value, dict) else value
                if any(type(item) not in _ATOMS for item in items):  # most are sizes: strides, paddings
                    for inner, part in _modules_in(value, f"{path}.{name}" if path else name):
                        if id(part) not in self.names:
                            strays.setdefault(id(part), (inner, part))
        return dict(strays.values())

    def stray_name(self, module: nn.Module) -> str | None:
        """The name of one of them; None where it is none."""
        return next((name for name, stray in self.strays.items() if stray is module), None)

    @cached_property
    def owned(self) -> dict[int, tuple[str, Tensor]]:
        """Parameters, buffers and tensor attributes by identity, with full names; ``""`` in lists and dicts."""
        owned: dict[int, tuple[str, Tensor]] = {}
        loose: list[Tensor] = []
        attributes = [(m, name, value) for m in self.modules for name, value in m.__dict__.items()]
        for module, name, value in (*self._named_parameters, *self._named_buffers, *attributes):
            if isinstance(value, Tensor):
                path = self.names[id(module)][0]
                owned.setdefault(id(value), (f"{path}.{name}" if path else name, value))
            elif isinstance(value, (list, tuple, dict)) and name[:1] != "_":
                loose += tensors_of(value)
        for t in loose:
            owned.setdefault(id(t), ("", t))
        return owned


def _modules_in(value: Tree, path: str, depth: int = 3) -> Iterator[tuple[str, nn.Module]]:
    """Modules in plain containers and theirs, each with a path."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(item, nn.Module):
            yield from item.named_modules(prefix=f"{path}.{key}")
        elif depth and isinstance(item, (list, tuple, dict)):
            yield from _modules_in(item, f"{path}.{key}", depth - 1)
