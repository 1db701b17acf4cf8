"""The README of a saved folder: how to load it, what changed, what is proven."""

from __future__ import annotations

from ..analysis.records import versions
from ..core.plan import Plan
from . import rewrite
from . import rewrite_rows as rows
from .records import Report
from .to_markdown import code, markdown, sentence


def readme(report: Report, plan: Plan, folder: str) -> str:
    """The text.

    Args:
        report: The report of the rewrite.
        plan: The plan from the original model.
        folder: Name of the folder, for the example.
    """
    blocks = [f"# {code(report.target)}, rewritten", sentence(rows.headline(report))]
    if not report.passed:
        what = "FAILED VERIFICATION" if report.verification is not None else "WAS NOT VERIFIED"
        blocks.append(
            f"> **Warning: this model {what}.** It was saved on purpose all the same. "
            "Nothing says that it still does what the original does; see the proof below."
        )
    blocks += [_loading(plan, folder), markdown(rewrite.body(report)).rstrip(), _footer()]
    return "\n\n".join(blocks) + "\n"


def _loading(plan: Plan, folder: str) -> str:
    target, args = plan.model.get("target"), plan.model.get("args") or {}
    given = f", args={args!r}" if args else ""
    made = f"pwrewrite.load_target({target!r}{given}).model" if target else "...  # the model that was rewritten"
    described = f"its class is {code(str(plan.model.get('class')))}"
    lines = [
        "## Loading",
        "This folder holds weights and a plan, no code. Loading takes the original model, with any weights; "
        f"{described}.",
        f"```python\nimport pwrewrite\n\noriginal = {made}\nmodel = pwrewrite.load({folder!r}, original)\n```",
    ]
    if target:
        lines.append(
            "On the command line, the folder is a target like any other:\n\n"
            f"```sh\npwrewrite analyze {_quoted(folder)} --model {_quoted(str(target))}\n```"
        )
    return "\n\n".join(lines)


def _quoted(text: str) -> str:
    import shlex

    return shlex.quote(text)


def _footer() -> str:
    made = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"Made with {made}. The full report is in `report.json`, what was done in `plan.json`."
