"""Builds models of torchvision and timm by name, without downloading anything.

Both packages are imported only when a target asks for one.
"""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Mapping
from types import ModuleType

from ..core.errors import TargetError
from ..core.text import did_you_mean
from .factories import construct, parameters_of

#: Arguments with which the zoos would fetch or read weights, and what is harmless to say about them.
_FETCHING = ("weights", "weights_backbone", "pretrained", "pretrained_backbone", "checkpoint_path")


def import_zoo(package: str) -> ModuleType:
    """Imports torchvision or timm; refuses one that is not installed, or does not import beside this torch."""
    try:
        return importlib.import_module(package)
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        message = f"{package} is installed but does not import: {error}"  # as with a torch that it was not built for
        hint = "torch, torchvision and timm must be of matching versions: pip install --upgrade torch torchvision timm"
        if isinstance(error, ModuleNotFoundError) and error.name in ("torchvision", "timm"):
            message, hint = f"{package} is not installed, and {package}:NAME needs it", "pip install pwrewrite[zoo]"
        raise TargetError(message, hint=hint) from error


def build_torchvision(name: str, args: Mapping[str, object]) -> object:
    """A torchvision model of any kind, by the name that ``torchvision.models.list_models()`` gives it."""
    import_zoo("torchvision")
    models = importlib.import_module("torchvision.models")
    known: list[str] = models.list_models()
    if name.lower() not in known:
        raise _unknown("torchvision", name, known)
    builder = models.get_model_builder(name)
    off = dict.fromkeys({"weights", "weights_backbone"} & parameters_of(builder).keys())
    given = {**off, **_without_weights(args)}
    with warnings.catch_warnings():
        # Inception and GoogLeNet warn that their default initialisation will change.
        warnings.simplefilter("ignore", FutureWarning)
        return construct(builder, given, f"torchvision:{name}", None, but=(*_FETCHING, "progress"))


def build_timm(name: str, args: Mapping[str, object]) -> object:
    """A timm model by its name; a weight tag behind it (``resnet50.a1_in1k``) only chooses the input size."""
    timm = import_zoo("timm")
    base, _, tag = name.partition(".")
    if ":" in name or "/" in name:
        hint = "timm:NAME with a name out of timm.list_models(), and --weights FILE for weights that you have"
        raise TargetError(f"timm:{name} names a model on a hub, and pwrewrite downloads nothing", hint=hint)
    if not timm.is_model(base):
        raise _unknown("timm", name, timm.list_models())

    def create_model(**kwargs: object) -> object:
        return timm.create_model(name, **kwargs)

    given = {"pretrained": False, **_without_weights(args)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a deprecated name is mapped on to the new one
        try:
            return construct(create_model, given, f"timm:{name}", None, but=_FETCHING)
        except TargetError as error:
            if not tag or "Invalid pretrained tag" not in str(error):
                raise
            tags = ", ".join(n.partition(".")[2] for n in timm.list_pretrained(f"{base}.*"))
            raise TargetError(f"timm:{base} has no tag {tag!r}", expected=tags or f"timm:{base}") from error


def _without_weights(args: Mapping[str, object]) -> dict[str, object]:
    """The arguments without those that would fetch weights; those must be off."""
    for name in _FETCHING:
        if args.get(name):
            message = f"--arg {name}={args[name]!r} would download or read weights"
            expected = "a model is built with random weights"
            hint = "leave it out, and give a checkpoint that you have with --weights FILE"
            raise TargetError(message, expected=expected, hint=hint)
    return {name: value for name, value in args.items() if name not in _FETCHING}


def _unknown(zoo: str, name: str, known: list[str]) -> TargetError:
    """The error for a name that a zoo does not have, which the other may have."""
    base = name.partition(".")[0]
    hint = did_you_mean(known, base, n=5) or f"see {zoo}'s list_models()"
    other, models = ("timm", "timm") if zoo == "torchvision" else ("torchvision", "torchvision.models")
    with contextlib.suppress(TargetError):
        if base in import_zoo(models).list_models():
            hint = f"{other}:{base}, or {hint}"
    return TargetError(f"{zoo} has no model {name!r}", hint=hint)
