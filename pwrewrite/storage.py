"""Saving a rewritten model and loading it again, without pickles.

A folder holds ``model.safetensors`` (the weights), ``plan.json`` (what was done, with a map from old parameter names to new
ones), ``report.json`` and a ``README.md`` for people. Loading takes the *original* model from the caller, carries out the plan
without decomposing anything and fills in the saved weights. The target recorded in the plan is code: it is imported only when
the caller says that it is trusted.

The folder is written beside its place and then renamed, so that an interruption leaves what was there before.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .apply import carry_out
from .errors import OutputError, PlanError, TargetError, WeightsError
from .plan import Edit, Plan

WEIGHTS, PLAN, REPORT, README = "model.safetensors", "plan.json", "report.json", "README.md"
_ALIASES = "pwrewrite.aliases"


def save(
    folder: str | Path,
    model: nn.Module,
    plan: Plan,
    *,
    edits: Sequence[Edit] = (),
    report: Mapping[str, Any] | None = None,
    readme: str | None = None,
    force: bool = False,
) -> Path:
    """Writes a rewritten model into a folder.

    Args:
        folder: Where to; made here, together with missing parents.
        model: The rewritten model.
        plan: The plan from the original model to this one.
        edits: What was done, for the map of names.
        report: The report's JSON data.
        readme: Text of the folder's README.
        force: Whether an existing folder is replaced.

    Returns:
        The folder.

    Raises:
        OutputError: If the folder exists, or cannot be written.
    """
    target = Path(folder)
    check_place(target, force=force)
    names = {old: list(new) for edit in edits for old, new in edit.renamed.items()}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise _unwritable(target, error) from None
    try:
        _save_weights(model, scratch / WEIGHTS)
        data = {**plan.to_dict(), "names": names}
        _write(scratch / PLAN, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
        _write(scratch / REPORT, json.dumps(report or {}, indent=2, ensure_ascii=False) + "\n")
        if readme is not None:
            _write(scratch / README, readme)
        scratch.chmod(0o777 & ~_umask())
        _move_in(scratch, target)
    except OSError as error:
        raise _unwritable(target, error) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def check_place(folder: str | Path, *, force: bool = False) -> None:
    """Checks, before any work, that a folder can be written.

    Raises:
        OutputError: If it exists and ``force`` is off, is a file, or its parent cannot be written.
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise OutputError("the output folder is a file", where=str(target), hint="give another place")
    if target.exists() and any(target.iterdir()):
        if not force:
            raise OutputError("the output folder exists", where=str(target), hint="--force replaces it")
        if not (target / PLAN).exists():
            raise OutputError(
                "the output folder exists and was not written by pwrewrite, so it is not replaced",
                where=str(target),
                hint="give another place, or remove it yourself",
            )
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(
            "the output folder cannot be written", where=str(target), got=f"no write permission in {parent}"
        )


def is_saved(path: str | Path) -> bool:
    """Whether a path is a folder that `save` wrote."""
    return (Path(path) / PLAN).is_file()


def read_plan(folder: str | Path) -> Plan:
    """The plan of a saved folder.

    Raises:
        TargetError: If it is no such folder.
        PlanError: If the plan makes no sense.
    """
    if not is_saved(folder):
        raise TargetError(
            "not a folder that pwrewrite saved",
            where=str(folder),
            expected=f"a folder with {PLAN} and {WEIGHTS}",
        )
    return Plan.read(Path(folder) / PLAN)


def load(folder: str | Path, model: nn.Module | None = None, *, trust_target: bool = False) -> nn.Module:
    """A rewritten model from its folder.

    Args:
        folder: What `save` wrote.
        model: The original model, with any weights; stays as it is.
        trust_target: Whether, without ``model``, the target recorded in the plan may be imported. That runs its code.

    Returns:
        The rewritten model with the saved weights, in eval mode.

    Raises:
        TargetError: If neither a model nor trust was given.
        PlanError: If the plan does not fit the model.
        WeightsError: If the saved weights are damaged or do not fit.
    """
    plan = read_plan(folder)
    if model is None:
        model = _recorded(plan, folder, trust_target)
    applied = carry_out(model, plan, fill=False)
    if applied.skips:
        skip = applied.skips[0]
        raise PlanError(
            f"the plan cannot be carried out on this model: {skip.detail}", where=skip.path, got=str(skip.reason)
        )
    _load_weights(applied.model, Path(folder) / WEIGHTS)
    return applied.model.eval()


def _recorded(plan: Plan, folder: str | Path, trust_target: bool) -> nn.Module:
    target = plan.model.get("target")
    if not trust_target:
        raise TargetError(
            "a saved folder holds weights and a plan, not the model's code",
            where=str(folder),
            expected="the original model, as load(folder, model) or --model TARGET",
            hint=f"its target was {target!r}; --trust-target (trust_target=True) imports that, which runs its code",
        )
    if not isinstance(target, str):
        raise TargetError("the plan records no target", where=str(folder), hint="give the model: load(folder, model)")
    from .loading import load_target

    return load_target(target, args=dict(plan.model.get("args") or {}), need_inputs=False).model


# ------------------------------------------------------------------------------------------------- weights


def _save_weights(model: nn.Module, path: Path) -> None:
    from safetensors.torch import save_file

    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise OutputError(
                "the model keeps state that is not a tensor, which safetensors cannot hold",
                where=name,
                got=type(value).__name__,
            )
        tensor = value.detach()
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, str(tensor.device))
        if tensor.numel() and key in seen:
            aliases[name] = seen[key]
            continue
        seen[key] = name
        kept[name] = tensor.to("cpu").contiguous()
    storages: dict[int, str] = {}
    for name, tensor in kept.items():
        pointer = tensor.untyped_storage().data_ptr()
        if (
            pointer and pointer in storages
        ) or tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
            kept[name] = tensor.clone()
        storages[pointer] = name
    save_file(kept, str(path), metadata={"format": "pt", _ALIASES: json.dumps(aliases)})


def _load_weights(model: nn.Module, path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    state: dict[str, Tensor] = {}
    try:
        with safe_open(str(path), framework="pt") as file:
            aliases: dict[str, str] = json.loads((file.metadata() or {}).get(_ALIASES, "{}"))
            for name in file.keys():  # noqa: SIM118
                state[name] = file.get_tensor(name)
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"the saved weights cannot be read: {error}", where=str(path)) from None
    for name, original in aliases.items():
        if original in state:
            state[name] = state[original]
    wanted = model.state_dict()
    missing, extra = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    misfits = [n for n in wanted if n in state and wanted[n].shape != state[n].shape]
    if missing or extra or misfits:
        raise WeightsError(
            "the saved weights do not fit the model",
            where=str(path),
            expected=f"{len(wanted)} tensors" + (f"; missing {', '.join(missing[:5])}" if missing else ""),
            got=f"{len(state)} tensors"
            + (f"; unexpected {', '.join(extra[:5])}" if extra else "")
            + (f"; of another shape {', '.join(misfits[:5])}" if misfits else ""),
            hint="give the model that the rewrite started from",
        )
    on_meta = any(t.is_meta for t in wanted.values())
    model.load_state_dict(state, assign=on_meta)
    if on_meta:
        left = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
        if left:
            raise WeightsError(
                "some tensors of the model are neither saved nor made", where=str(path), got=", ".join(left[:5]),
                hint="build the model on a real device, not on meta",
            )  # fmt: skip


# --------------------------------------------------------------------------------------------------- files


def _write(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: str | Path, text: str) -> None:
    """Writes a text file beside its place and renames it.

    Raises:
        OutputError: If it cannot be written.
    """
    target = Path(path)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.absolute().parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, target)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise _unwritable(target, error) from None


def _move_in(scratch: Path, target: Path) -> None:
    """Renames a finished folder into place; an old one goes only once the new one is there."""
    if not target.exists():
        os.rename(scratch, target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    os.rename(target, old / target.name)
    try:
        os.rename(scratch, target)
    except BaseException:
        os.rename(old / target.name, target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _unwritable(target: Path, error: OSError) -> OutputError:
    return OutputError(
        f"cannot write: {error.strerror or error}", where=str(target), hint="give another place, or make room"
    )


def with_model(plan: Plan, **facts: Any) -> Plan:
    """A plan that records facts about the model it was made for; those that are None are left out."""
    return replace(plan, model={**plan.model, **{k: v for k, v in facts.items() if v is not None}})
