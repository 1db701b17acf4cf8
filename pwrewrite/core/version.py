"""The version of the installed distribution: `version`."""

from __future__ import annotations

from functools import cache
from importlib import metadata


@cache
def version() -> str:
    """Version of pwrewrite, ``0+unknown`` in a checkout that is not installed."""
    try:
        return metadata.version("pwrewrite")
    except metadata.PackageNotFoundError:
        return "0+unknown"
