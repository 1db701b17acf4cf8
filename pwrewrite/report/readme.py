"""The README of a saved folder: how to load it, what changed, what is proven."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from ..analysis.records import versions
from ..core.plan import Plan
from ..core.text import plain
from . import compressed, rewrite, rewrite_rows as rows
from .records import Compression, Report
from .to_markdown import code, markdown, sentence


def readme(report: Report, plan: Plan, folder: str | Path) -> str:
    """The text for a ``folder``; its paths are relative, so that it says nothing of the machine it was written on."""
    target = _relative(report.target, None)
    blocks = [f"# {code(target)}, rewritten", sentence(rows.headline(report))]
    if not report.passed:
        what = "FAILED VERIFICATION" if report.verification is not None else "WAS NOT VERIFIED"
        blocks.append(
            f"> **Warning: this model {what}.** It was saved on purpose all the same. "
            "Nothing says that it still does what the original does; see the proof below."
        )
    blocks += [_loading(plan, folder), markdown(rewrite.body(report)).rstrip(), _footer()]
    return "\n\n".join(blocks) + "\n"


def compressed_readme(result: Compression, plan: Plan, folder: str | Path) -> str:
    """The same for what was compressed."""
    blocks = [f"# {code(_relative(result.target, None))}, compressed", sentence(compressed.headline(result))]
    return "\n\n".join([*blocks, _loading(plan, folder), markdown(compressed.body(result)).rstrip(), _footer()]) + "\n"


def _loading(plan: Plan, folder: str | Path) -> str:
    recorded, args = plan.model.get("target"), plan.model.get("args") or {}
    target = _relative(str(recorded), folder) if recorded else ""
    arguments = f", args={args!r}" if args else ""
    original = (
        f"pwrewrite.load_target({target!r}{arguments}).model" if target else "...  # the model that was rewritten"
    )
    lines = [
        "## Loading",
        "This folder holds weights and a plan, no code. Loading takes the original model, with any weights; "
        f"its class is {code(str(plan.model.get('class')))}. Paths are those from inside this folder: go there first, "
        "or put its path before them.",
        f"```python\nimport pwrewrite\n\noriginal = {original}\nmodel = pwrewrite.load('.', original)\n```",
    ]
    if target:
        lines.append(
            "On the command line, the folder is a target like any other:\n\n"
            f"```sh\npwrewrite analyze . --model {shlex.quote(plain(target))}\n```"
        )
    return "\n\n".join(lines)


def _relative(target: str, folder: str | Path | None) -> str:
    """A target whose file is given by its path from a folder, or by its name alone; other targets as they are."""
    head, colon, name = target.rpartition(":")
    file, suffix = (head, colon + name) if colon and head.endswith(".py") else (target, "")
    if not file.endswith(".py") and not os.path.isabs(file):
        return target
    try:
        path = os.path.basename(file) if folder is None else os.path.relpath(file, os.path.realpath(folder))
    except ValueError:  # on another drive
        path = os.path.basename(file)
    return path.replace(os.sep, "/") + suffix


def _footer() -> str:
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"Made with {packages}. The full report is in `report.json`, what was done in `plan.json`."
