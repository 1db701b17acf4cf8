"""The commands and what they have in common, as one typer application."""

from __future__ import annotations

from typing import Annotated

import typer

from .analyze import analyze
from .bridge import Command, Commands, as_command
from .check import check, diff
from .compress import compress
from .export import export
from .fuse import fuse
from .passes import passes
from .plan import plan
from .rewrite import rewrite
from .verify import verify

app = typer.Typer(
    name="pwrewrite",
    cls=Commands,
    help="Says where the work of a convolutional PyTorch model goes, and makes the model smaller and faster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for function in (analyze, compress, rewrite, plan, verify, fuse, export, check, diff, passes):
    app.command(function.__name__, cls=Command, no_args_is_help=function is not passes)(as_command(function))


def _version(wanted: bool) -> None:
    if wanted:
        from ..core.version import version

        typer.echo(f"pwrewrite {version()}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Says where the work of a convolutional PyTorch model goes, and makes the model smaller and faster."""
