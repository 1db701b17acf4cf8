"""What results are made of: records that turn into JSON data, and print as their report.

A `Shown` result is written by whatever `show_with` names (the package: ``pwrewrite.report.display``, imported when a
result is first shown), since records stand below the reports that show them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from types import ModuleType
from typing import Any, ClassVar

Json = Any
"""JSON data: texts, numbers, None, lists, and dicts with texts as keys."""

_PLAIN = frozenset({str, int, float, bool, type(None)})


def as_data(value: object) -> Json:
    """Plain JSON data: records become objects, tuples lists, and members of an enum their value."""
    if type(value) in _PLAIN:  # most of what there is
        return value
    if isinstance(value, Record):
        return value.to_dict()
    if is_dataclass(value) and not isinstance(value, type):
        return {f.metadata.get("key", f.name): as_data(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): as_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_data(item) for item in value]
    return value.value if isinstance(value, Enum) else value


def named(record: object, names: str) -> dict[str, Json]:
    """Some of a record's attributes, by names between blanks, as plain JSON data."""
    return {name: as_data(getattr(record, name)) for name in names.split()}


def key(name: str) -> dict[str, str]:
    """Metadata for a field that has another name in JSON."""
    return {"key": name}


class Record:
    """A dataclass with ``to_dict``; ``also`` names properties that JSON holds, too."""

    __slots__ = ()
    also: ClassVar[tuple[str, ...]] = ()

    def to_dict(self) -> dict[str, Json]:
        """The same as plain JSON data."""
        names = {f.name: f.metadata.get("key", f.name) for f in vars(type(self))["__dataclass_fields__"].values()}
        return {names.get(n, n): as_data(getattr(self, n)) for n in (*self.also, *names)}

    def to_json(self, *, indent: int | None = 2) -> str:
        """`to_dict` as JSON text, with ``indent`` spaces per level; None for one line."""
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False, allow_nan=False) + "\n"


_display: list[Callable[[], ModuleType]] = []


def show_with(load: Callable[[], ModuleType]) -> None:
    """Names what shows results, loaded when one is shown: ``text``, ``html``, a ``file`` of HTML and a ``summary`` in
    one line.
    """
    _display[:] = [load]


class Shown:
    """A result that prints as its report, and shows it in a notebook."""

    __slots__ = ()

    def __str__(self) -> str:
        return str(_display[0]().text(self))

    def __repr__(self) -> str:
        return str(_display[0]().summary(self))

    def _repr_html_(self) -> str:
        return str(_display[0]().html(self))

    def to_html(self) -> str:
        """The report as the text of one HTML file, with pictures where there is a model; no request leaves it."""
        return str(_display[0]().file(self))
