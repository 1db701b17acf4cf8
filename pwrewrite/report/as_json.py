"""The JSON of schema ``pwrewrite.analysis/1``: ``Analysis.to_dict()`` as text, with a line break at the end."""

from __future__ import annotations

from ..analysis.records import Analysis


def render(analysis: Analysis) -> str:
    """The whole analysis, every layer included."""
    return analysis.to_json() + "\n"
