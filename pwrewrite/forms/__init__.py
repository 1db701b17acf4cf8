"""The forms that a layer can be factorised into: one file per form, each with one object `Form` called ``FORM``.

To add a form, write such a file and put its name into `pwrewrite.core.form_names`. The passes, the planner, the
modules, plans, ``--set``, ``--forms`` and the help texts all ask the object.
"""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module

from ..core.convolution import ConvSpec
from ..core.errors import PlanError, UsageError
from ..core.form_names import FORM_NAMES
from .form import Axes, Form, Where

FORMS: dict[str, Form] = {name: import_module(f".{name}", __package__).FORM for name in FORM_NAMES}
"""Every form by its name, in the order of `FORM_NAMES`."""


def form_named(name: str) -> Form:
    """The form of a name.

    Raises:
        UsageError: If there is none.
    """
    if name in FORMS:
        return FORMS[name]
    near = get_close_matches(str(name), FORMS, n=1)
    hint = f"did you mean {near[0]}?" if near else None
    raise UsageError(f"there is no form {name!r}", expected=f"one of {', '.join(FORMS)}", got=repr(name), hint=hint)


def read_form(spec: ConvSpec, name: object, axes: object, where: Where) -> tuple[Form, Axes]:
    """The form that a plan names and the axes of its first stage, checked against a layer.

    Args:
        spec: The layer.
        name: Name of the form.
        axes: The axes as the plan has them; None for the form's default.
        where: From the name of a setting to where it is found, for the error.

    Raises:
        PlanError: If there is no such form, or the axes do not fit it.
    """
    if not isinstance(name, str) or name not in FORMS:
        raise PlanError(
            f"unknown form {name!r}", where=where("form"), expected=f"one of {', '.join(FORMS)}", got=repr(name)
        )
    form = FORMS[name]
    return form, form.read_axes(spec, axes, where)
