"""From a target string to a model.

====================== ===============================================================================
``model.py``           the file's one obvious model (see ``obvious``)
``model.py:NAME``      a class, function or instance in the file; ``NAME`` may have dots
``package.module:NAME`` the same in a module that Python can import from the working directory
``torchvision:NAME``   a torchvision model with random weights
``timm:NAME``          a timm model with random weights
====================== ===============================================================================

Everything is built where torch's default device says. Wrap the call in ``with torch.device("meta")`` to build without
memory, or in ``empty_weights()``, which more constructors bear. A folder is the place of a saved rewrite (``plan.json``
with weights); ``resolve_folder`` is where that will go.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Literal, NoReturn

import torch
from torch import nn

from ..core.errors import TargetError, TargetNotFound
from .empty import empty_weights
from .factories import as_model, construct, kind_of
from .obvious import find_model, instance_takes_no_args, name_not_found
from .user_code import import_file, import_module, suggest_files
from .zoo import build_timm, build_torchvision

Kind = Literal["file", "module", "torchvision", "timm", "folder"]

_CHECKPOINT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar")
_FORMS = "model.py, model.py:NAME, package.module:NAME, torchvision:NAME or timm:NAME"


@dataclass(frozen=True)
class TargetInfo:
    """Where a model came from, as far as later steps need it.

    Attributes:
        target: The target as the user gave it.
        kind: Which of the forms it has.
        place: The file, dotted module or folder; empty for a zoo.
        name: The name after the colon; None when the file's obvious model is meant.
        args: The arguments that the model was made with.
        module: The imported user module, which may hold ``example_inputs``; None for a zoo.
        notes: What should be told about how the model was found.
    """

    target: str
    kind: Kind
    place: str
    name: str | None
    args: Mapping[str, object] = field(default_factory=dict)
    module: ModuleType | None = None
    notes: tuple[str, ...] = ()


def parse_target(target: str) -> TargetInfo:
    """Takes a target string apart; imports nothing.

    Args:
        target: One of the forms above.

    Returns:
        Its kind, place and name.

    Raises:
        TargetError: It has none of the forms.
        TargetNotFound: It reads like a file, and there is none.
    """
    head, colon, name = target.rpartition(":")
    if head in ("torchvision", "timm") or target.startswith(("torchvision:", "timm:")):
        zoo, _, name = target.partition(":")
        if not name:
            raise TargetError(f"{target} names no model", expected=f"{zoo}:NAME", hint=f"{zoo}:resnet50")
        return TargetInfo(target, "torchvision" if zoo == "torchvision" else "timm", "", name)
    if not target.strip():
        raise TargetError("the target is empty", expected=_FORMS)
    path = Path(target)
    if path.is_dir():
        return TargetInfo(target, "folder", target, None)
    if path.is_file() or target.endswith(".py"):
        return _file(target, target, None)
    if colon and (head.endswith(".py") or Path(head).is_file()):
        return _file(target, head, _checked(name, target))
    if colon and all(part.isidentifier() for part in head.split(".")):
        return TargetInfo(target, "module", head, _checked(name, target))
    if "/" in target or "\\" in target:
        raise TargetNotFound(
            f"no such file: {target}", expected=_FORMS, hint=suggest_files(Path(head or target), (".py",))
        )
    raise _bare_word(target)


def _file(target: str, place: str, name: str | None) -> TargetInfo:
    """A target that is a file; one that is no Python is refused here, before anything reads it."""
    if Path(place).suffix in _CHECKPOINT_SUFFIXES:
        raise TargetError(
            f"{place} is a checkpoint: it holds weights, not the model's code",
            hint=f"give the model's code as the target, and this as --weights {place}",
        )
    if Path(place).suffix != ".py":
        raise TargetError(f"{place} is not a Python file", expected=_FORMS)
    return TargetInfo(target, "file", place, name)


def _checked(name: str, target: str) -> str:
    """The name after the colon, if it can be one."""
    if not all(part.isidentifier() for part in name.split(".")):
        raise TargetError(f"{target!r} has no usable name after its last colon", expected=_FORMS, got=name or "nothing")
    return name


def _bare_word(target: str) -> TargetNotFound:
    """The error for a word that is neither a file nor has a colon: say what it could have been."""
    hints = [f"torchvision:{target}", f"timm:{target}", f"{target}:NAME" if "." in target else f"{target}.py"]
    near = suggest_files(Path(f"{target}.py"), (".py",), only_near=True)
    return TargetNotFound(
        f"no such file: {target}",
        expected=_FORMS,
        hint=" or ".join(hints) if not near else f"{' or '.join(hints)}; {near}",
    )


def resolve_model(
    target: str, args: Mapping[str, object] | None = None, *, empty: bool = False
) -> tuple[nn.Module, TargetInfo]:
    """Builds the model that a target means, and puts it in eval mode.

    Args:
        target: One of the forms above.
        args: Arguments for whatever makes the model, as ``parse_arg`` gives them.
        empty: Build with empty weights (see `empty_weights`); where that fails, all on meta, and then for real.

    Returns:
        The model, and where it came from.

    Raises:
        TargetError: The target does not lead to one model; the message says why and what to try.
        TargetNotFound: The file or module does not exist.
    """
    for building in (empty_weights(), torch.device("meta")) if empty else ():
        try:
            with building:
                return _resolve(target, args or {})
        except TargetError as error:
            if not isinstance(error.__cause__, RuntimeError):  # torch's complaints about meta are of this kind
                raise
    return _resolve(target, args or {})


def _resolve(target: str, args: Mapping[str, object]) -> tuple[nn.Module, TargetInfo]:
    info = parse_target(target)
    module: ModuleType | None = None
    notes: tuple[str, ...] = ()
    value: object
    if info.kind == "folder":
        resolve_folder(Path(info.place))
    if info.kind == "torchvision":
        value = build_torchvision(str(info.name), args)
    elif info.kind == "timm":
        value = build_timm(str(info.name), args)
    else:
        module = import_file(Path(info.place)) if info.kind == "file" else import_module(info.place)
        if info.name is None:
            value, notes = find_model(module, args, info.place)
        else:
            value = _named(module, info.name, args, info.place)
    model, told = as_model(value, info.target)
    return model, TargetInfo(info.target, info.kind, info.place, info.name, args, module, (*notes, *told))


def _named(module: ModuleType, name: str, args: Mapping[str, object], place: str) -> object:
    """What a NAME in a module makes: the instance it is, or what it returns when called."""
    value: object = module
    for part in name.split("."):
        if not hasattr(value, part):
            raise name_not_found(module, name, place)
        value = getattr(value, part)
    if isinstance(value, nn.Module):
        if args:
            raise instance_takes_no_args(f"{name} in {place}", args)
        return value
    is_class = inspect.isclass(value)
    if not callable(value) or (inspect.isclass(value) and not issubclass(value, nn.Module)):
        raise TargetError(
            f"{name} in {place} is not a model",
            expected="an nn.Module instance, an nn.Module subclass, or a function that returns one",
            got=kind_of(value),
        )
    origin = Path(module.__file__) if module.__file__ else None
    made = construct(value, args, f"class {name} in {place}" if is_class else f"{name}() in {place}", origin)
    if not isinstance(made, nn.Module):
        raise TargetError(
            f"{name}() in {place} returned something that is not a model",
            expected="a torch.nn.Module",
            got=kind_of(made),
        )
    return made


def resolve_folder(folder: Path) -> NoReturn:
    """Refuses a folder as a target; the place where saved rewrites will be loaded.

    Args:
        folder: A folder that exists.

    Raises:
        TargetError: Always, for now.
    """
    if (folder / "plan.json").is_file():
        raise TargetError(
            f"{folder} is a saved rewrite (it has a plan.json), which this version cannot take as a target",
            hint="give the model's code as the target",
        )
    files = sorted(p.name for p in folder.glob("*.py") if not p.name.startswith("_"))
    raise TargetError(
        f"{folder} is a folder without a plan.json",
        expected=f"a folder that pwrewrite saved a rewritten model in, or one of {_FORMS}",
        hint=" or ".join(str(folder / name) for name in files[:3]) or None,
    )
