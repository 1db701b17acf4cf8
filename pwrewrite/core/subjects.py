"""What is given as a model or as a folder, checked before anything asks it for more."""

from __future__ import annotations

import os

from torch import nn

from .errors import InputError, TargetError, shortened


def check_model(model: object, what: str = "this") -> None:
    """Raises `InputError` for what is no model, called ``what``."""
    if isinstance(model, nn.Module):
        return
    hints = {str: "pwrewrite.load_target opens what a text names", type: "make one of it: it is a class"}
    hint = hints.get(type(model))
    if isinstance(getattr(model, "model", None), nn.Module):  # what rewrite, fuse and their like return
        hint = "its .model is one"
    elif hint is None and callable(getattr(model, "module", None)):  # an exported program
        hint = "its .module() is one"
    raise InputError(f"{what} is not a model", expected="a torch.nn.Module", got=type(model).__name__, hint=hint)


def check_folder(folder: object) -> None:
    """Raises `TargetError` for what cannot name a folder."""
    if not isinstance(folder, (str, os.PathLike)):
        got = f"{type(folder).__name__} {shortened(repr(folder), 60)}"
        raise TargetError("this names no folder", expected="the path of a folder that pwrewrite saved", got=got)
