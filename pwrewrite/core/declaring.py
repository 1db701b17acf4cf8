"""How options are declared: as fields of frozen records, with their help and how they are typed as metadata.

The Python calls take the records of `pwrewrite.core.options`, or their fields as keywords. The command line is made
from them (`pwrewrite.cli.bridge`), so that a new option is one field.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import UsageError
from .text import did_you_mean

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
AnyField = Field[Any]


@dataclass(frozen=True, slots=True)
class Typed:
    """How an option is typed on the command line.

    Attributes:
        flags: Its spellings, the usual one first; none for an argument without a flag.
        panel: The part of the help that shows it.
        read: Makes the value of a text and the flag's name, which an error mentions; None to take the text.
        least: Smallest value of a whole number; None where it is no number.
        gather: Makes one value of all that are given, where there may be several, of which one text holds several with
            commas between if ``split``.
    """

    help: str
    flags: tuple[str, ...] = ()
    panel: str | None = None
    metavar: str | None = None
    read: Callable[[str, str], object] | None = None
    choices: tuple[str, ...] = ()
    least: int | None = None
    gather: Callable[..., object] | None = None
    split: bool = False


def path(text: str, what: str) -> Path:
    """Reads a path."""
    return Path(text)


def option(default: object, help: str, *flags: str, **typed: Any) -> Any:
    """A field of a record that is also an option of the command.

    ``default`` is `dataclasses.MISSING` where it must be given; what stands for the value in the help follows the last
    of the flags, as in ``"--rank R"``; `Typed` tells of all others.
    """
    if isinstance(default, tuple):
        typed.setdefault("gather", tuple)
    *_, metavar = ("", *flags)[-1].partition(" ")
    metadata = {"typed": Typed(help, tuple(flag.partition(" ")[0] for flag in flags), metavar=metavar or None, **typed)}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


def documented(record: type[T]) -> type[T]:
    """Adds what the help of the command says of a record's options to its docstring."""
    entries = [(f"{each.name} ({', '.join(typed.flags)})", typed.help) for each, typed in typed_fields(record)]
    listed = "".join("\n    " + re.sub(r"\[/?(?:bold|dim)?\]|\\", "", f"{name}: {text}") for name, text in entries)
    record.__doc__ = f"{inspect.cleandoc(record.__doc__ or '')}\n\nAs on the command line:{listed}\n"
    return record


def typed_fields(record: type[DataclassInstance]) -> Iterator[tuple[AnyField, Typed]]:
    """The fields of a record that can be typed, in order."""
    for each in fields(record):
        if "typed" in each.metadata:
            yield each, each.metadata["typed"]


def default_of(each: AnyField) -> Any:
    """The default of a field."""
    return each.default if each.default_factory is MISSING else each.default_factory()


def flag_of(record: type[DataclassInstance], name: str) -> str:
    """The usual spelling of an option."""
    return next((t.flags[0] for each, t in typed_fields(record) if each.name == name and t.flags), name)


def changed(record: DataclassInstance, *others: type[DataclassInstance]) -> list[str]:
    """Names of the options of a record that differ from their defaults, without those that other records have too."""
    shared = {each.name for other in others for each in fields(other)}
    names = []
    for each in fields(record):
        value, default = getattr(record, each.name), default_of(each)
        value = tuple(value) if isinstance(value, list) else value
        if each.name not in shared and (type(value) is not type(default) or bool(value != default)):
            names.append(each.name)
    return names


def from_keywords(record: type[T], options: dict[str, object]) -> T:
    """A record of those keywords that it has, taken out of ``options``; texts are read as on the command line."""
    values = {each.name: options.pop(each.name) for each in fields(record) if each.name in options}
    for each, typed in typed_fields(record):
        text = values.get(each.name)
        if isinstance(text, str) and (typed.gather is not None or typed.read is not None or typed.least is not None):
            texts = (text,) if typed.gather is not None else text
            values[each.name] = read_typed(typed, texts, each.name)
    return record(**values)


def read_typed(typed: Typed, text: Any, what: str) -> Any:
    """The value of what was typed for the option ``what``: a text, or several where it may be given several times."""
    if typed.least is not None:
        if not re.fullmatch("[0-9]+", str(text).strip()) or not typed.least <= int(text) < 2**63:
            raise UsageError(f"{what} makes no sense", expected=f"a whole number from {typed.least}", got=repr(text))
        return int(text)
    if typed.gather is None:
        return typed.read(text, what) if typed.read is not None else text
    texts = [part.strip() for each in text for part in each.split(",")] if typed.split else text
    return typed.gather(typed.read(each, what) if typed.read is not None else each for each in texts)


def refuse_unknown(function: str, options: Mapping[str, object], *records: type[DataclassInstance]) -> None:
    """Raises `UsageError` for keywords that are no option; it names what is near."""
    known = [each.name for record in records for each in fields(record)]
    for name in options:
        expected = ", ".join(dict.fromkeys(known))
        raise UsageError(f"{function}() has no option {name!r}", expected=expected, hint=did_you_mean(known, name))
