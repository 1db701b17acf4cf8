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
from pathlib import Path

from ..core.errors import UsageError, first_line
from ..core.files import read_text
from ..core.text import did_you_mean

OWN, SHARED = "pwrewrite.toml", "pyproject.toml"


def options_of(command: str, commands: Iterable[str], flags: Mapping[str, str]) -> dict[str, object]:
    """The options that the project gives a command: parameter to a text, a list of texts, or whether a flag is given.

    ``flags`` are its options as the file writes them, to the parameters that they fill. A `UsageError` names what is no
    command or option, and the nearest.
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
        if name not in flags:
            raise _unknown(f"option of {command}", name, flags, file)
        options[flags[name]] = _typed(value, f"{file}, {command}.{name}")
    return options


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


def _typed(value: object, where: str) -> object:
    """A value as the command line has it: texts, lists of texts, and flags."""
    match value:
        case bool():
            return value
        case str() | int() | float():
            return str(value)
        case list():
            return [str(item) for item in value]
        case dict():
            return [f"{key}={item}" for key, item in value.items()]
    raise UsageError("this is no value of an option", where=where, expected="a text, a number, true, a list or a table")


def _unknown(what: str, name: str, known: Iterable[str], file: str) -> UsageError:
    expected = ", ".join(known)
    return UsageError(f"no such {what}: {name}", where=file, expected=expected, hint=did_you_mean(known, name))
