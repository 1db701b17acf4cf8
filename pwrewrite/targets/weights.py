"""Loads a checkpoint into a model: all of it or nothing.

Everything is checked before the first tensor is copied. Names, shapes and ties are compared here; what the model's own
loading hooks would rename, add or drop (old formats, weight norm, frozen batch norm) is asked of ``load_state_dict``
itself, in a rehearsal on meta tensors that puts nothing in the model. A model on the meta device gets the checkpoint's
tensors themselves (``assign=True``), cast to its own dtype, tied parameters staying tied.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..core.errors import WeightsError
from ..core.text import nearest
from .checkpoints import read_weights

#: What wrappers put before every key: data parallel, ``torch.compile``, and trainers that hold a ``self.model``.
_PREFIXES = ("module.", "_orig_mod.", "model.")
_MAJORITY = 0.9
_SHOWN = 10


@dataclass(frozen=True)
class Fit:
    """How a checkpoint fits a model: of whose ``total`` keys ``matched`` are filled.

    Attributes:
        missing: Keys of the model that the checkpoint lacks.
        unexpected: Keys of the checkpoint that the model lacks.
        mismatched: Keys with another shape: ``(key, shape in the checkpoint, shape in the model)``.
        lossy: Keys whose values the model's dtype cannot hold, with both dtypes.
        untied: Pairs of keys that are one tensor in the model and two different ones in the checkpoint.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    lossy: tuple[tuple[str, str], ...]
    untied: tuple[tuple[str, str], ...]
    matched: int
    total: int

    @property
    def wrong(self) -> dict[str, list[str]]:
        """What does not fit: a line with a count for each kind, and all of that kind."""
        shapes = [f"{k}: {_shape(a)} in the checkpoint, {_shape(b)} in the model" for k, a, b in self.mismatched]
        lists = {
            "missing": list(self.missing),
            "unexpected": list(self.unexpected),
            "of another shape": shapes,
            "that would lose values": [f"{key}: {dtypes}" for key, dtypes in self.lossy],
            "tied in the model but not in the checkpoint": [f"{a} and {b}" for a, b in self.untied],
        }
        return {f"{len(names)} {kind}": names for kind, names in lists.items() if names}

    @property
    def perfect(self) -> bool:
        """Whether everything has its place."""
        return not self.wrong


def load_weights(model: nn.Module, path: Path, lenient: bool = False) -> tuple[str, ...]:
    """Loads a checkpoint into a model, in place; returns notes on what was chosen and what does not fit.

    The model may be on the meta device. With ``lenient``, keys may be missing, unexpected or of another shape; those
    parts stay as they are.

    Raises:
        WeightsError: The checkpoint cannot be read, is not safe to read, or does not fit. The model is then untouched.
    """
    state, notes = read_weights(path)
    state, stripped = strip_prefixes(state, set(model.state_dict(keep_vars=True)))
    if stripped:
        notes += (f"left the prefix {stripped!r} off the checkpoint's keys",)
    return notes + load_state(model, state, str(path), lenient)


def load_state(
    model: nn.Module, state: dict[str, Tensor], where: str, lenient: bool = False, hint: str | None = None
) -> tuple[str, ...]:
    """The same for tensors by name that are from ``where``; ``hint`` is what to try if they do not fit."""
    notes: tuple[str, ...] = ()
    usable, fit = fit_weights(model, state, where)
    if not fit.perfect:
        if not lenient or not fit.matched:
            raise _misfit(fit, where, lenient, hint)
        notes = (f"{where} fits in part: " + "; ".join(fit.wrong),)
    on_meta = bool(without_values(model))
    try:
        _load(model, usable, assign=on_meta)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:  # the rehearsal went well: the model's own doing
        raise WeightsError(f"{type(model).__name__} refused {where} half way: {error}") from error
    if on_meta and usable and (left := without_values(model)):
        shown = ", ".join(left[:3])
        notes += (f"{len(left)} tensors have no values, the checkpoint having none for them: {shown}",)
    return notes


def without_values(model: nn.Module) -> list[str]:
    """The names of the parameters and buffers that are on the meta device."""
    return [name for name, tensor in chain(model.named_parameters(), model.named_buffers()) if tensor.is_meta]


def strip_prefixes(state: dict[str, Tensor], wanted: set[str]) -> tuple[dict[str, Tensor], str]:
    """Takes a wrapper's prefix off the keys of a checkpoint, and says what was taken off.

    A prefix goes only when at least nine tenths of the keys carry it and more of the ``wanted`` keys match without it.
    ``n_averaged``, which ``torch.optim.swa_utils.AveragedModel`` keeps beside its ``module.``, goes with that prefix.
    """
    best, best_prefix = state, ""
    current, prefix = state, ""
    while carried := [p for p in _PREFIXES if sum(k.startswith(p) for k in current) >= _MAJORITY * len(current)]:
        if carried[0] == "module." and "n_averaged" not in wanted:
            current = {k: v for k, v in current.items() if k != "n_averaged"}
        shorter = {k.removeprefix(carried[0]): v for k, v in current.items()}
        if len(shorter) < len(current):  # two keys would become one
            break
        current, prefix = shorter, prefix + carried[0]
        if len(wanted & current.keys()) > len(wanted & best.keys()):
            best, best_prefix = current, prefix
    return best, best_prefix


def fit_weights(model: nn.Module, state: dict[str, Tensor], where: str) -> tuple[dict[str, Tensor], Fit]:
    """What ``load_state_dict(strict=False)`` can take of a checkpoint, tied keys filled in, and how well that fits.

    Neither changes. A `WeightsError` says that the model's own loading code cannot make sense of it.
    """
    keys = model.state_dict(keep_vars=True)
    own = {k: v for k, v in keys.items() if isinstance(v, Tensor)}
    mismatched, lossy = [], []
    for key, tensor in state.items():
        mine = own.get(key)
        if mine is None or is_lazy(mine):
            continue
        scalar = mine.dim() == 0 and tensor.numel() == 1 and tensor.dim() == 1  # as in files from before scalars
        if mine.shape != tensor.shape and not scalar:
            mismatched.append((key, tuple(tensor.shape), tuple(mine.shape)))
        elif _loses(tensor, mine.dtype):
            lossy.append((key, f"{tensor.dtype} in the checkpoint, {mine.dtype} in the model".replace("torch.", "")))
    wrong = {key for key, *_ in (*mismatched, *lossy)}
    usable = {key: tensor for key, tensor in state.items() if key not in wrong}
    untied = _fill_ties(own, usable)
    if without_values(model):
        _cast(own, usable)
    missing, unexpected = _rehearse(model, usable, where)
    missing = [k for k in missing if k not in wrong and not _is_counter(k)]
    norms = {k.removesuffix("running_mean") for k in own if k.endswith("running_mean")}
    odd = [k for k in unexpected if not (_is_counter(k) and k.removesuffix("num_batches_tracked") in norms)]
    for key in unexpected:
        usable.pop(key, None)
    total = sum(not _is_counter(k) for k in keys)
    matched = total - len(missing) - len(wrong)
    return usable, Fit(tuple(missing), tuple(odd), tuple(mismatched), tuple(lossy), tuple(untied), matched, total)


def _loses(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor's values are gone in another dtype: imaginary parts, fractions, numbers beyond its range."""
    if tensor.dtype == dtype or tensor.is_quantized or tensor.layout != torch.strided:
        return False
    if tensor.is_complex() or tensor.is_meta or dtype.is_complex:
        return tensor.is_complex() and not dtype.is_complex
    floating = dtype.is_floating_point
    if floating and tensor.is_floating_point() and torch.finfo(dtype).max >= torch.finfo(tensor.dtype).max:
        return False
    before, after = tensor.double(), tensor.to(dtype).double()
    return bool((before.isfinite() & ~after.isfinite()).any()) if floating else not torch.equal(before, after)


def _is_counter(key: str) -> bool:
    """Whether a key is a batch norm's step counter, which eval never reads and older files lack."""
    return key.rpartition(".")[2] == "num_batches_tracked"


def _fill_ties(own: dict[str, Tensor], usable: dict[str, Tensor]) -> list[tuple[str, str]]:
    """Gives every name of one tensor the same value, and returns pairs of names to which the checkpoint gives two."""
    groups: dict[object, list[str]] = {}
    for key, tensor in own.items():
        groups.setdefault(_identity(tensor), []).append(key)
    untied = []
    for names in groups.values():
        present = [n for n in names if n in usable]
        if len(names) > 1 and present:
            first = usable[present[0]]
            others = [n for n in present[1:] if usable[n] is not first]
            untied += [(present[0], n) for n in others if not torch.equal(first, usable[n].to(first.dtype))]
            usable.update(dict.fromkeys(names, first))
    return untied


def _identity(tensor: Tensor) -> object:
    """What two names of one tensor have in common: the object, or the same stretch of memory seen the same way."""
    if not (tensor.is_meta or is_lazy(tensor) or tensor.layout != torch.strided or not tensor.numel()):
        with contextlib.suppress(RuntimeError, NotImplementedError):
            return (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
    return id(tensor)


def _cast(own: dict[str, Tensor], usable: dict[str, Tensor]) -> None:
    """For a model on meta: makes the checkpoint's tensors what the model's are, one object for each tied tensor."""
    cast: dict[tuple[int, type], Tensor] = {}
    for key in own.keys() & usable.keys():
        mine, source = own[key], usable[key]
        kind = (id(source), type(mine))
        if kind not in cast:
            value = source.to(mine.dtype)
            cast[kind] = nn.Parameter(value, mine.requires_grad) if isinstance(mine, nn.Parameter) else value
        usable[key] = cast[kind]


def _rehearse(model: nn.Module, state: dict[str, Tensor], where: str) -> tuple[list[str], list[str]]:
    """What ``load_state_dict`` would find missing and unexpected; meanwhile every tensor gives way to one on meta."""
    stores = [cast("dict[str, Tensor | None]", s) for m in model.modules() for s in (m._parameters, m._buffers)]
    saved = [dict(store) for store in stores]
    empty: dict[int, Tensor] = {}
    for tensor in chain(*(tensors.values() for tensors in saved)):
        if tensor is None or id(tensor) in empty:
            continue
        if is_lazy(tensor):
            bare = cast("Callable[..., Tensor]", type(tensor))(device="meta")
        else:
            bare = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            bare = nn.Parameter(bare, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else bare
        empty[id(tensor)] = bare
    try:
        for store, tensors in zip(stores, saved):
            store.update({name: empty[id(tensor)] for name, tensor in tensors.items() if tensor is not None})
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # copying into meta tensors does nothing, which is the point
            missing, unexpected = _load(model, dict(state))
    except Exception as error:  # hooks are the model's own code
        raise WeightsError(f"{type(model).__name__} does not take {where}: {error}") from error
    finally:
        for store, tensors in zip(stores, saved):
            store.clear()
            store.update(tensors)
    return missing, unexpected


def _load(model: nn.Module, state: dict[str, Tensor], *, assign: bool = False) -> tuple[list[str], list[str]]:
    """Loads a state and says what it lacks and what it has beside: torch's way where an override does not say that.

    A module may ask for its version, which files of tensors do not hold (torchvision's MNASNet); it is today's then.
    """
    try:
        return _loaded(model, state, assign)
    except ValueError:
        versioned = model.state_dict()  # which holds the versions of modules beside its items
        versioned.clear()
        versioned.update(state)
        return _loaded(model, versioned, assign)


def _loaded(model: nn.Module, state: dict[str, Tensor], assign: bool) -> tuple[list[str], list[str]]:
    try:
        keys = model.load_state_dict(state, strict=False, **({"assign": True} if assign else {}))
    except TypeError:  # of an override that takes other arguments
        keys = None
    if not hasattr(keys, "missing_keys"):
        keys = nn.Module.load_state_dict(model, state, strict=False, assign=assign)
    return keys.missing_keys, keys.unexpected_keys


def _misfit(fit: Fit, where: str, lenient: bool, hint: str | None) -> WeightsError:
    """The error for a checkpoint that does not fit, with everything that is wrong and what to try."""
    lines = [f"{where} does not fit the model: {fit.matched} of its {fit.total} tensors match"]
    for line, names in fit.wrong.items():
        lines += [f"  {line}:", *(f"    {name}" for name in names[:_SHOWN])]
        if len(names) > _SHOWN:
            lines.append(f"    … and {len(names) - _SHOWN} more")
    partly = "; --weights-lenient loads what fits" if fit.matched and not lenient else ""
    return WeightsError("\n".join(lines), hint=hint or _hint(fit) + partly)


def _hint(fit: Fit) -> str:
    classes = {(got[:1], want[:1]) for _, got, want in fit.mismatched}
    heads = all(got[1:] == want[1:] and got and want for _, got, want in fit.mismatched)
    if heads and len(classes) == 1 and len(fit.mismatched) <= 6 and not fit.missing and not fit.unexpected:
        (((theirs,), (ours,)),) = classes
        return f"the checkpoint has {theirs} classes and the model {ours}: --arg num_classes={theirs}"
    if 2 * fit.matched < fit.total:
        return "the checkpoint looks like it is of another model"
    if fit.missing and (near := nearest(fit.missing[0], fit.unexpected)):
        return f"part of the model has other names in the checkpoint ({near[0]} for {fit.missing[0]}?)"
    return "check that the target and its --arg are those that the checkpoint was saved from"


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"
