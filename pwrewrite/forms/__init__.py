"""The forms that a layer can be factorised into: one file per form, each with one object `Form` called ``FORM``.

To add a form, write such a file and put its name into `pwrewrite.core.names`. The passes, the planner, the
modules, plans, ``--set``, ``--forms`` and the help texts all ask the object.
"""

from __future__ import annotations

from importlib import import_module

from ..core.convolution import ConvSpec
from ..core.errors import PlanError, UsageError
from ..core.names import FORM_NAMES
from ..core.text import did_you_mean
from .form import Axes, Form, Where

FORMS: dict[str, Form] = {name: import_module(f".{name}", __package__).FORM for name in FORM_NAMES}
"""Every form by its name, in the order of `FORM_NAMES`."""


def form_named(name: str) -> Form:
    """The form of a name; raises `UsageError` if there is none."""
    if name in FORMS:
        return FORMS[name]
    hint = did_you_mean(FORMS, str(name))
    raise UsageError(f"there is no form {name!r}", expected=f"one of {', '.join(FORMS)}", got=repr(name), hint=hint)


def read_form(spec: ConvSpec, name: object, axes: object, where: Where) -> tuple[Form, Axes]:
    """The form that a plan names and the axes of its first stage, checked against a layer; raises `PlanError`.

    ``axes`` is None for the form's default; ``where`` says where a setting stands, for the error.
    """
    if not isinstance(name, str) or name not in FORMS:
        expected = f"one of {', '.join(FORMS)}"
        raise PlanError(f"unknown form {name!r}", where=where("form"), expected=expected, got=repr(name))
    return FORMS[name], FORMS[name].read_axes(spec, axes, where)
