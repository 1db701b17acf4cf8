"""A project's options: ``pwrewrite.toml``, or ``[tool.pwrewrite]`` in ``pyproject.toml``, in the current directory.

A table per command holds options by their names, and ``target``; what is typed wins over it, value by value::

    [check]
    target = "model.py"
    max-macs = "600M"
    max-increase = { macs = "2%" }
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import UsageError, first_line, shortened
from ..core.files import read_text
from ..core.text import did_you_mean

OWN, SHARED = "pwrewrite.toml", "pyproject.toml"


@dataclass(frozen=True)
class Place:
    """Where an option of a file goes: a parameter, and whether that is a flag or may be given several times."""

    name: str
    flag: bool = False
    several: bool = False


def options_of(command: str, commands: Iterable[str], places: Mapping[str, Place]) -> tuple[str, dict[str, object]]:
    """The project's file, and the options that it gives a command: parameter to a text, a list of texts, or a flag.

    ``places`` are its options as the file writes them. A `UsageError` names what is no command or option, and the
    nearest, or a value that an option does not take.
    """
    file, tables = _read()
    for name, table in tables.items():
        if name not in commands:
            raise _unknown("command", name, commands, file)
        if not isinstance(table, dict):
            raise UsageError(f"[{name}] is not a table", where=file, got=repr(table))
    options: dict[str, object] = {}
    mine = tables.get(command, {})
    assert isinstance(mine, dict)
    for name, value in mine.items():
        if name not in places:
            raise _unknown(f"option of {command}", name, places, file)
        options[places[name].name] = _typed(value, places[name], name, f"{file}, {command}.{name}")
    return file, options


def _read() -> tuple[str, dict[str, object]]:
    """The file there is, and its tables."""
    for file in (OWN, SHARED):
        try:
            data = tomllib.loads(read_text(Path(file)))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:  # no TOML, too deep, a number of thousands of digits
            if file == SHARED and isinstance(error, (OSError, UnicodeDecodeError)):
                continue
            raise UsageError(f"{file} cannot be read: {first_line(error)}", where=file) from None
        shared = data.get("tool")
        tables = data if file == OWN else shared.get("pwrewrite") if isinstance(shared, dict) else None
        if isinstance(tables, dict):
            return file, tables
        if tables is not None:
            raise UsageError("[tool.pwrewrite] is not a table", where=file, got=repr(tables))
    return OWN, {}


def _typed(value: object, place: Place, name: str, where: str) -> object:
    """A value as the command line has it: a text, a list of texts, or a flag."""
    if place.flag:
        if isinstance(value, bool):
            return value
        raise UsageError(f"{name} is on or off", where=where, expected="true or false", got=repr(value))
    single = isinstance(value, (str, int, float)) and not isinstance(value, bool)
    if single:
        return [str(value)] if place.several else str(value)
    if isinstance(value, list) and place.several:
        return [str(item) for item in value]
    if isinstance(value, dict) and place.several:
        return [f"{key}={item}" for key, item in value.items()]
    expected = "a text, a number, a list or a table" if place.several else "one text or number"
    got = shortened(repr(value), 80)
    raise UsageError(f"this is no value of an option: {name}", where=where, expected=expected, got=got)


def _unknown(what: str, name: str, known: Iterable[str], file: str) -> UsageError:
    expected = ", ".join(known)
    return UsageError(f"no such {what}: {name}", where=file, expected=expected, hint=did_you_mean(known, name))
