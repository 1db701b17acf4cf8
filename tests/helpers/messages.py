"""What a command says on stderr, apart from its signs of life: a line that begins with ``…`` every ten seconds.

How many of these come depends on how busy the machine is, so no test may count on there being none.
"""

from __future__ import annotations

from typing import IO


def messages(text: str) -> str:
    """The text without the lines that only say that the work goes on."""
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("…"))


def next_message(stream: IO[str]) -> str:
    """The next line of a running command that says more than that the work goes on."""
    line = stream.readline()
    while line.startswith("…"):
        line = stream.readline()
    return line
