"""Makes commands from records of options: `as_command` turns fields into typer's parameters and back.

A command is a function of records (`pwrewrite.core.options`). Its parameters are read off the records' fields: the
default is the field's, flags, help, panel and how a text is read are the field's metadata. A field that several records
have is one option, whose value each of them gets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import Field, dataclass
from enum import StrEnum
from inspect import Parameter, Signature
from typing import Annotated, Any, cast, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from ..core.declaring import T, Typed, default_of, read_typed, typed_fields
from ..core.names import EXPORT_NAMES
from .config import Place, options_of
from .running import handled, note_project


@dataclass(frozen=True, slots=True)
class Only:
    """As in ``Annotated[Proof, Only(("verify",))]``: the options of a record that a command has, by the names of their
    fields; with ``but``, those that it does not have.
    """

    names: tuple[str, ...]
    but: bool = False


_NEVER = ("help", "debug")
"""Options that are typed and not kept."""


class _Untyped:
    """Help in which a flag has no type: typer writes ``<bool>`` beside its own."""

    def get_params(self, ctx: Any) -> Any:
        """The parameters, flags without a type."""
        parameters = super().get_params(ctx)  # type: ignore[misc]
        for parameter in parameters:
            if getattr(parameter, "is_flag", False):
                parameter.metavar = ""
        return parameters


class Command(_Untyped, TyperCommand):
    """A command of the application; what is not typed comes from the project's options, see `config`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Reads what was typed over the project's options."""
        if not ctx.resilient_parsing and not {"-h", "--help"} & set(args):
            places = {p.opts[0].lstrip("-"): _place(p) for p in self.get_params(ctx) if p.name not in _NEVER}
            with handled(False):
                file, ctx.default_map = options_of(str(self.name), ctx.parent.command.commands, places)
            names = {place.name: name for name, place in places.items()}
            note_project(file, [names[name] for name in ctx.default_map])
            self.no_args_is_help = self.no_args_is_help and not ctx.default_map
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            if meant := self._export_meant(ctx, error):
                error.message += f" Did you mean {meant}?"
            raise

    def _export_meant(self, ctx: Any, error: typer.BadParameter) -> str | None:
        """The option that takes what was given as the form of a report and is a format of exports."""
        name = getattr(getattr(error, "param", None), "name", None)
        flags = [p.opts[0] for p in self.get_params(ctx) if p.opts[0] in ("--to", "--export")]
        given = [each for each in EXPORT_NAMES if name == "wanted" and f"'{each}'" in error.message]
        return f"{flags[0]} {given[0]}" if flags and given else None


def _place(parameter: Any) -> Place:
    flag, several = (bool(getattr(parameter, name, False)) for name in ("is_flag", "multiple"))
    return Place(parameter.name, flag, several)


class Commands(_Untyped, TyperGroup):
    """The application's commands."""


def as_command(function: Callable[..., None]) -> Callable[..., None]:
    """A function of what is typed, for typer, from a function of records."""
    annotations = get_type_hints(function, include_extras=True)
    records = {name: kind for name, kind in get_type_hints(function).items() if name != "return"}
    parameters: dict[str, Parameter] = {}
    for name, record in records.items():
        for each, typed in _fields(record, *getattr(annotations[name], "__metadata__", ())):
            parameters.setdefault(each.name, _parameter(each, typed))

    def called(**texts: object) -> None:
        with handled(bool(texts.get("debug"))):
            function(**{name: read_record(record, texts) for name, record in records.items()})

    called.__name__, called.__doc__ = function.__name__, function.__doc__
    vars(called)["__signature__"] = Signature(list(parameters.values()))
    called.__annotations__ = {}
    return called


def read_record(record: type[T], texts: dict[str, object]) -> T:
    """A record from what was typed for each of its fields: texts, numbers, or whether a flag was given."""
    values = {}
    for each, typed in typed_fields(record):
        text = texts.get(each.name)
        if isinstance(default_of(each), bool):
            values[each.name] = default_of(each) != bool(text)
        elif text is not None and text != []:
            text = str(text) if typed.choices else text
            values[each.name] = read_typed(typed, text, typed.flags[0] if typed.flags else "")
    return record(**values)


def _fields(record: type, only: Only | None = None) -> Iterator[tuple[Field[Any], Typed]]:
    for each, typed in typed_fields(record):
        if only is None or (each.name in only.names) != only.but:
            yield each, typed


def _parameter(each: Field[Any], typed: Typed) -> Parameter:
    """A field as one of typer's parameters."""
    if not typed.flags:
        argument = typer.Argument(help=typed.help, show_default=False)
        return Parameter(each.name, Parameter.KEYWORD_ONLY, annotation=Annotated[str, argument])
    default = default_of(each)
    kind: Any = str
    if isinstance(default, bool):
        kind, default = bool, False
    elif typed.gather is not None:
        kind, default = list[str] | None, None
    elif typed.choices and typed.least is None:
        known = cast(Any, StrEnum)("Choices", {choice: choice for choice in typed.choices})
        kind, default = known | None, None if default is None else known(default)
    else:
        kind, default = str | None, None if default is None or typed.least is None else str(default)
    info = typer.Option(*typed.flags, help=typed.help, metavar=typed.metavar, rich_help_panel=typed.panel)
    return Parameter(each.name, Parameter.KEYWORD_ONLY, annotation=Annotated[kind, info], default=default)
