"""Saving a rewritten model and loading it again, without pickles.

A folder holds ``model.safetensors`` (the weights), ``plan.json`` (what was done, with a map from old parameter names to
new ones), ``report.json`` and a ``README.md`` for people. Loading takes the *original* model from the caller, carries
out the plan without decomposing anything and fills in the saved weights. The target recorded in the plan is code: it is
imported only when the caller says that it is trusted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from ..core.errors import OutputError, PlanError, TargetError, WeightsError, first_line, shortened
from ..core.files import check_room, new_folder, read_text, recover, refusing
from ..core.json_text import dumps, loads
from ..core.plan import SCHEMA, Edit, Plan
from ..core.subjects import check_folder, check_model
from .weights import load_state, without_values

WEIGHTS, PLAN, REPORT, README = "model.safetensors", "plan.json", "report.json", "README.md"
_FILES = (WEIGHTS, PLAN, REPORT, README)
_ALIASES = "pwrewrite.aliases"


def save(
    folder: str | Path,
    model: nn.Module,
    plan: Plan,
    *,
    edits: Sequence[Edit] = (),
    report: Mapping[str, object] | None = None,
    readme: str | None = None,
    force: bool = False,
) -> Path:
    """Writes a rewritten model into a folder, which is made together with missing parents.

    Args:
        folder: Where to.
        model: The rewritten model.
        plan: The plan from the original model to this one.
        edits: What was done, for the map of names.
        report: The report's JSON data.
        readme: Text of the README, if any.
        force: Whether a folder that was saved before is replaced.

    Raises:
        OutputError: If the folder exists, cannot be written, or the model keeps what cannot be saved.
    """
    check_folder(folder)
    check_model(model)
    check_place(folder, force=force)
    names = {old: new for edit in edits for old, new in edit.renamed.items()}
    with new_folder(folder, _FILES) as scratch:
        _save_weights(model, scratch / WEIGHTS)
        (scratch / PLAN).write_text(plan_text(plan, names), encoding="utf-8")
        (scratch / REPORT).write_text(json.dumps(report or {}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if readme is not None:
            (scratch / README).write_text(readme, encoding="utf-8")
        check_place(folder, force=force)  # what came there meanwhile is not ours to replace
    return Path(folder)


def plan_text(plan: Plan, names: Mapping[str, Sequence[str]]) -> str:
    """What ``plan.json`` says: the plan, and its map from old parameter names to new ones."""
    return dumps({**plan.to_dict(), "names": {old: list(new) for old, new in names.items()}})


def check_place(
    folder: str | Path,
    *,
    force: bool = False,
    files: Collection[str] = _FILES,
    marker: str = PLAN,
    schema: str = SCHEMA,
) -> None:
    """Checks, before any work, that a folder can be written, over an earlier one of these files with that marker.

    An `OutputError` says that it is a file, cannot be written, exists (without ``force``), or holds what is not ours.
    """
    target, where = Path(os.path.realpath(folder)), str(folder)
    recover(target)
    with refusing(folder, OSError, ValueError):
        if target.exists() and not target.is_dir():
            raise OutputError("the output folder is a file", where=where, hint="give another place")
        inner = {name.partition("/")[0] for name in files if "/" in name}
        entries = dict(_entries(target, inner)) if target.exists() else {}
    if entries and not force:
        raise OutputError("the output folder exists", where=where, hint="--force replaces what was saved there")
    strange = sorted(n for n, e in entries.items() if n not in files or not e.is_file(follow_symlinks=False))
    if entries and (strange or not _has_schema(target / marker, schema)):
        message, got = "the output folder holds what pwrewrite did not write, so it is not replaced", strange[:5]
        hint = "give another place, or remove it yourself"
        raise OutputError(message, where=where, got=", ".join(got) or f"no {marker} of pwrewrite", hint=hint)
    with refusing(folder, OSError):
        parent = next(p for p in target.parents if p.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            why = "no write permission in" if parent.is_dir() else "not a folder:"
            raise OutputError("the output folder cannot be written", where=where, got=f"{why} {parent}")
        for name in target.relative_to(parent).parts:
            with suppress(FileNotFoundError):
                os.lstat(parent / name)  # which says that a name is too long
        check_room(parent)


def _entries(folder: Path, inner: Collection[str]) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """What is in a folder, and in folders of these names in it."""
    for entry in os.scandir(folder):
        if entry.name in inner and entry.is_dir(follow_symlinks=False):
            yield from ((f"{entry.name}/{each.name}", each) for each in os.scandir(entry.path))
        else:
            yield entry.name, entry


def _has_schema(path: Path, schema: str) -> bool:
    """Whether a file is JSON of ours: a plan that was saved beside a model."""
    try:
        data = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(data, dict) and data.get("schema") == schema


def is_saved(path: str | Path) -> bool:
    """Whether a path is a folder that `save` wrote."""
    return (Path(path) / PLAN).is_file()


def read_plan(folder: str | Path) -> Plan:
    """The plan of a saved folder; `TargetError` if it is none, `PlanError` if the plan makes no sense."""
    check_folder(folder)
    if not is_saved(folder):
        expected = f"a folder with {PLAN} and {WEIGHTS}"
        raise TargetError("not a folder that pwrewrite saved", where=str(folder), expected=expected)
    return Plan.read(Path(folder) / PLAN)


def read_names(folder: str | Path) -> dict[str, tuple[str, ...]]:
    """From the original's parameter names to those that came in their place; `PlanError` if that makes no sense."""
    path = Path(folder) / PLAN
    names = loads(read_text(path), str(path)).get("names") or {}
    lists = list(names.values()) if isinstance(names, dict) else [None]
    if not all(isinstance(new, list) and all(isinstance(name, str) for name in new) for new in lists):
        expected, got = '"names": {"old": ["new", …]}', shortened(repr(names), 80)
        raise PlanError("the map of names makes no sense", where=str(path), expected=expected, got=got)
    return {old: tuple(new) for old, new in names.items()}


def restore(folder: str | Path, model: nn.Module) -> nn.Module:
    """A rewritten model, with its saved weights and in eval mode, from its folder and the original, which is kept.

    Raises `TargetError`, `PlanError` and `WeightsError` as `pwrewrite.load` does.
    """
    from ..edit.apply import carry_out  # a tenth of a second, and most targets are no saved folders

    applied = carry_out(model, read_plan(folder), fill=False)
    if applied.skips:
        skip = applied.skips[0]
        message = f"the plan cannot be carried out on this model: {skip.detail}"
        raise PlanError(message, where=skip.path, got=str(skip.reason))
    _load_weights(applied.model, Path(folder) / WEIGHTS)
    return applied.model.eval()


def _save_weights(model: nn.Module, path: Path) -> None:
    """Writes the state_dict; a tensor with several names is written once."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    state, aliases = dict[str, Tensor](), dict[str, str]()
    seen: dict[object, str] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            message = "the model keeps state that is not a tensor, which safetensors cannot hold"
            hint = "override get_extra_state to return a tensor, or save the state yourself"
            raise OutputError(message, where=name, expected="tensors only", got=type(value).__name__, hint=hint)
        if value.is_meta:
            raise OutputError("the model has no weights to save: they are on meta", where=name)
        tensor = value.detach()
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, str(tensor.device))
        if tensor.numel() and key in seen:
            aliases[name] = seen[key]
            continue
        seen[key] = name
        # A copy: safetensors refuses tensors that share memory, and writes all of a storage that a view is part of.
        state[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor)
    try:
        save_file(state, str(path), metadata={"format": "pt", _ALIASES: json.dumps(aliases)})
    except (SafetensorError, ValueError, KeyError) as error:
        raise OutputError(f"cannot write the weights: {first_line(error)}", where=str(path.name)) from error
    _order_facts(path)


def _order_facts(path: Path) -> None:
    """Sorts what a file says of itself, whose order safetensors leaves to chance: the same model is the same file."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


def _load_weights(model: nn.Module, path: Path) -> None:
    """Fills a model with saved weights, in the dtypes that they were saved in."""
    state = _read_weights(path)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in state and state[name].dtype != tensor.dtype:  # which loading would otherwise convert
            tensor.data = tensor.data.to(state[name].dtype)
    load_state(model, state, str(path), hint="give the model that the rewrite started from")
    if left := without_values(model):
        message, hint = "some tensors of the model are neither saved nor made", "build it on a real device, not on meta"
        raise WeightsError(message, where=str(path), got=", ".join(left[:5]), hint=hint)


def _read_weights(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        if path.exists() and not path.is_file():
            raise OSError("it is not a regular file")
        with safe_open(str(path), framework="pt") as file:
            aliases = json.loads((file.metadata() or {}).get(_ALIASES, "{}"))
            state: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if not isinstance(aliases, dict) or not all(isinstance(name, str) for name in aliases.values()):
            raise ValueError("the other names of tensors are not a map from name to name")
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        message = f"the saved weights cannot be read: {first_line(error)}"
        hint = "the file is missing or was cut off; save the rewrite again"
        raise WeightsError(message, where=str(path), hint=hint) from error
    return state | {name: state[original] for name, original in aliases.items() if original in state}
