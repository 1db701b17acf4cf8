"""From a target string to a model.

====================== ===============================================================================
``model.py``           the file's one obvious model (see ``obvious``)
``model.py:NAME``      a class, function or instance in the file; ``NAME`` may have dots
``package.module:NAME`` the same in a module that Python can import from the working directory
``torchvision:NAME``   a torchvision model with random weights
``timm:NAME``          a timm model with random weights
====================== ===============================================================================

Everything is built where torch's default device says, with empty weights on request. What fails with empty weights is
built for real, and only the real error is told; a user's file is then executed twice, where it made any weights.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch
from torch import nn

from ..capturing.lazy import has_lazy_modules
from ..core.errors import TargetError, TargetNotFound
from .checkpoints import SUFFIXES
from .empty import empty_weights
from .factories import as_model, construct, no_model
from .obvious import find_model
from .user_code import find_named, import_file, origin_of, suggest_files
from .zoo import build_timm, build_torchvision

_OF_WEIGHTS = "a graph of operations with its weights, without the modules that a rewrite changes"
_GRAPHS = {
    ".pt2": f"an exported program: {_OF_WEIGHTS}",
    ".onnx": f"an ONNX model: {_OF_WEIGHTS}",
    ".torchscript": "a TorchScript program: compiled code, without the modules that a rewrite changes",
}
_LIKE_A_FILE = re.compile(r".*([/\\]|\.(npy|npz|json|ya?ml|toml|txt|ipynb|zip|h5|pb|tflite|engine)$)")
_FORMS = "model.py, model.py:NAME, package.module:NAME, torchvision:NAME or timm:NAME"


@dataclass(frozen=True)
class TargetInfo:
    """Where a model came from, as far as later steps need it.

    Attributes:
        target: The target as the user gave it, in a form that is ``kind``.
        place: The file, dotted module or folder; empty for a zoo.
        name: The name after the colon; None when the file's obvious model is meant.
        args: The arguments that the model was made with.
        module: The imported user module, which may hold ``example_inputs``; None for a zoo.
        notes: What should be told about how the model was found.
    """

    target: str
    kind: Literal["file", "module", "torchvision", "timm", "folder"]
    place: str
    name: str | None
    args: Mapping[str, object] = field(default_factory=dict)
    module: ModuleType | None = None
    notes: tuple[str, ...] = ()


def parse_target(target: str) -> TargetInfo:
    """Takes a target string apart; imports nothing.

    A `TargetError` says that it has none of the forms above, `TargetNotFound` that there is no such file.
    """
    if not target.strip():
        raise TargetError("the target is empty", expected=_FORMS)
    zoo, _, model = target.partition(":")
    if target.startswith(("torchvision:", "timm:")):
        if not model:
            raise TargetError(f"{target} names no model", expected=f"{zoo}:NAME", hint=f"{zoo}:resnet50")
        return TargetInfo(target, "timm" if zoo == "timm" else "torchvision", "", model)
    if os.path.isdir(target):
        return TargetInfo(target, "folder", target, None)
    if os.path.exists(target) or target.endswith(".py"):
        return _file(target, target, None)
    head, colon, name = target.rpartition(":")
    if colon and (head.endswith(".py") or os.path.isfile(head)):
        return _file(target, head, _checked(name, target))
    if colon and all(part.isidentifier() for part in head.split(".")):
        return TargetInfo(target, "module", head, _checked(name, target))
    hint = suggest_files(Path(head or target), (".py",))
    if not _LIKE_A_FILE.match(target) and not target.endswith((*SUFFIXES, *_GRAPHS)):
        forms = [f"torchvision:{target}", f"timm:{target}", f"{target}:NAME" if "." in target else f"{target}.py"]
        near = suggest_files(Path(f"{target}.py"), (".py",), only_near=True)
        hint = " or ".join(forms) + (f"; {near}" if near else "")
    raise TargetNotFound(f"no such file: {target}", expected=_FORMS, hint=hint)


def _file(target: str, place: str, name: str | None) -> TargetInfo:
    """A target that is a file; one that is no Python is refused here, before anything reads it."""
    suffix = Path(place).suffix
    if suffix in SUFFIXES:
        hint = f"give the model's code as the target, and this as --weights {place}"
        raise TargetError(f"{place} is a checkpoint: it holds weights, not the model's code", hint=hint)
    if suffix in _GRAPHS:
        hint = "give the code of the model that it was made from"
        if suffix == ".pt2":
            hint += f", or a file with model = torch.export.load({place!r}).module(), which can be analysed"
        raise TargetError(f"{place} is {_GRAPHS[suffix]}", expected=_FORMS, hint=hint)
    if suffix != ".py":
        raise TargetError(f"{place} is not a Python file", expected=_FORMS)
    return TargetInfo(target, "file", place, name)


def _checked(name: str, target: str) -> str:
    """The name after the colon, if it can be one."""
    if not all(part.isidentifier() for part in name.split(".")):
        raise TargetError(f"{target!r} has no usable name after its last colon", expected=_FORMS, got=name or "nothing")
    return name


def resolve_model(
    target: str, args: Mapping[str, object] | None = None, *, empty: bool = False
) -> tuple[nn.Module, TargetInfo]:
    """Builds the model that a target means, in eval mode, and says where it came from.

    ``args`` are for whatever makes the model, as ``parse_arg`` gives them. Where ``empty``, it is built with empty
    weights (see `empty_weights`), and for real where its code fails with them. A `TargetError` says that the target
    does not lead to one model (`TargetNotFound`: no such file or module).
    """
    buildings: list[AbstractContextManager[object]] = [empty_weights()] if empty else []
    if empty and target.startswith(("torchvision:", "timm:")):  # some of these models run themselves when they are made
        buildings.append(torch.device("meta"))
    for building in buildings:
        emptied: object = None
        try:
            with building as emptied:
                resolved = _resolve(target, args or {})
            if not has_lazy_modules(resolved[0]):  # which cannot learn their shapes from weights without values
                return resolved
        except TargetError as error:
            if error.__cause__ is None:  # it was not the model's code that raised
                raise
            if callable(emptied) and not emptied():  # nor did it see an empty weight
                raise
    return _resolve(target, args or {})


def _resolve(target: str, args: Mapping[str, object]) -> tuple[nn.Module, TargetInfo]:
    info = parse_target(target)
    module: ModuleType | None = None
    notes: tuple[str, ...] = ()
    if info.kind == "folder":
        raise _folder_is_no_model(Path(info.place))
    if info.kind == "torchvision":
        value = build_torchvision(str(info.name), args)
    elif info.kind == "timm":
        value = build_timm(str(info.name), args)
    elif info.name is None:
        module = import_file(Path(info.place))
        value, notes = find_model(module, args, info.place)
    else:
        value, module, _ = find_named(f"{info.place}:{info.name}")
        value = _construct_named(value, module, args, info)
    model, unwrapped = as_model(value, target)
    return model, replace(info, args=args, module=module, notes=(*notes, *unwrapped))


def _construct_named(value: object, module: ModuleType, args: Mapping[str, object], info: TargetInfo) -> object:
    """What a NAME in a module makes: the instance it is, or what it returns when called."""
    what = f"{info.name} in {info.place}"
    if not callable(value) or (inspect.isclass(value) and not issubclass(value, nn.Module)):
        raise no_model(what, value)
    if not isinstance(value, nn.Module):
        what = f"class {what}" if inspect.isclass(value) else f"{info.name}() in {info.place}"
    return construct(value, args, what, origin_of(module))


def _folder_is_no_model(folder: Path) -> TargetError:
    """The error for a folder where a model's code is wanted."""
    if (folder / "plan.json").is_file():
        message = f"{folder} is a saved rewrite (it has a plan.json), and a model's code is wanted here"
        return TargetError(message, expected=_FORMS)
    files = sorted(str(path) for path in folder.glob("*.py") if not path.name.startswith("_"))
    expected = f"a folder that pwrewrite saved a rewritten model in, or one of {_FORMS}"
    hint = " or ".join(files[:3]) or None
    return TargetError(f"{folder} is a folder without a plan.json", expected=expected, hint=hint)
