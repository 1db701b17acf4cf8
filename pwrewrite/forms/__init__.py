"""The forms that a layer can be factorised into: one file per form, each with one object `Form` called ``FORM``.

To add a form, write such a file and put its name into `pwrewrite.core.names`. The passes, the planner, the
modules, plans, ``--set``, ``--forms`` and the help texts all ask the object.
"""

from __future__ import annotations

from importlib import import_module

from ..core.names import FORM_NAMES
from .form import Form

FORMS: dict[str, Form] = {name: import_module(f".{name}", __package__).FORM for name in FORM_NAMES}
"""Every form by its name, in the order of `FORM_NAMES`."""
