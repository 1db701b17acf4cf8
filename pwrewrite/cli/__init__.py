"""The command ``pwrewrite``: it parses, calls the library, prints and exits.

What it says is decided in `pwrewrite.report`. Starting is fast: nothing here imports torch, networkx or numpy before a
command needs them.
"""

from __future__ import annotations

from typing import NoReturn


def main() -> NoReturn:
    """The entry point of the command; ends the process with its exit code."""
    code: object = 0
    from .encoding import fit_streams

    fit_streams()
    try:
        from .app import app

        app()
    except SystemExit as leaving:
        code = leaving.code
        if isinstance(leaving.__context__, BrokenPipeError):  # typer and rich leave with 1 where help is cut short
            code = 141
    except KeyboardInterrupt:  # outside of a command
        code = 130
    except OSError as error:  # the help cannot be printed
        from .running import stdout_failed

        code = stdout_failed(error)
    from .running import leave

    leave(code if isinstance(code, int) else int(code is not None))
