"""Whether a rewritten model can be saved and loaded: its state_dict holds all that it needs, and nothing else does.

The state is written by `torch.save`, read with ``weights_only=True`` and loaded into a copy in which
everything that the state should bring is zero: parameters and persistent buffers, and tensors that are plain
attributes of the rewritten model but not of the original (a weight kept outside the state_dict is lost by
saving). Both formats take plain dense tensors by dtype, whatever their size, so a few elements of one tensor of each
kind are written, and whatever is no plain dense tensor as a whole; shared tensors are written once, as safetensors
requires.
"""

from __future__ import annotations

import copy
import io
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from typing import TypeGuard

import torch
from torch import Tensor, nn

from ..core.errors import first_line
from ..core.nested import deep_copy
from .context import Context, Results
from .values import unlike


def check_reloading(context: Context) -> Results:
    """Saves the rewritten model, reloads it, and compares what it then returns."""
    context.say("saving and reloading")
    again, problems, notes = reloaded(context.rewritten, context.original)
    results = Results(notes=notes)
    if again is not None:
        trial = context.trial
        inputs = context.draws.draw() if trial is None else trial.inputs
        before = context.run(context.rewritten, inputs) if trial is None else trial.after
        if before.ran:
            problems += unlike(context, before, context.run(again, inputs))
    results.check("state_dict", problems, "saves, reloads and gives the same outputs")
    return results


def reloaded(rewritten: nn.Module, original: nn.Module) -> tuple[nn.Module | None, list[str], list[str]]:
    """An emptied copy with the saved state loaded, or None; what is wrong, and what a reader should know."""
    state, before = rewritten.state_dict(), frozenset(original.state_dict())
    left_out = {name for name, _ in original.named_parameters(remove_duplicate=False)} - before
    names = [name for name, _ in rewritten.named_parameters(remove_duplicate=False)]
    tensor_problems, tensor_notes = _safetensors(state, before)
    problems = [f"the state_dict lacks {name}" for name in names if name not in state and name not in left_out]
    notes = [f"the state_dict leaves out {len(left_out)} parameters, as before"] if left_out else []
    problems, notes = problems + tensor_problems, notes + tensor_notes
    zeros = {id(p): nn.Parameter(torch.zeros_like(p), p.requires_grad) for p in rewritten.parameters()}
    fresh = deep_copy(rewritten, dict(zeros))
    known = {name for name, _ in _plain_tensors(original, before)}
    plain = _empty(fresh, known)
    try:
        fresh.load_state_dict(_through_file(state))
    except Exception as error:
        return None, [*problems, f"the state_dict does not reload: {first_line(error)}"], notes
    if plain:
        notes.append(f"tensors outside the state_dict: {', '.join(plain[:5])}")
    return fresh, problems, notes


def _through_file(state: dict[str, object]) -> dict[str, object]:
    """A state as it comes out of a file; of plain dense tensors only a few elements of one of each dtype go through it.

    Raises:
        Exception: Whatever `torch.save` and `torch.load` raise; ValueError where values come back changed.
    """
    usual = type(state) in (dict, OrderedDict)
    dense = {name: value for name, value in state.items() if usual and _is_dense(value)}
    samples = {name: _sample(dense[name]) for name in {t.dtype: name for name, t in dense.items()}.values()}
    held, again = copy.copy(state), copy.copy(state)  # which keep what torch notes beside the items
    for name in dense:
        del held[name]
    held.update(samples)
    file = io.BytesIO()
    torch.save(held, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    for name, sample in samples.items():
        _compare(sample, loaded.pop(name))
    again.update(loaded)
    if type(state) is OrderedDict:
        vars(again).update(vars(loaded))
    return again


def _is_dense(value: object) -> TypeGuard[Tensor]:
    """Whether a value is a tensor like any other, of which formats keep dtype, shape and elements."""
    if type(value) is not Tensor or value.layout is not torch.strided:
        return False
    return not (value.is_quantized or value.is_conj() or value.is_neg())


def _sample(t: Tensor) -> Tensor:
    """A few elements in a tensor of their own."""
    return t.detach().cpu().contiguous().flatten()[:8].clone()


def _compare(before: Tensor, after: Tensor) -> None:
    if before.dtype != after.dtype or not torch.equal(before.view(torch.uint8), after.view(torch.uint8)):
        raise ValueError("comes back changed")


def _safetensors(state: Mapping[str, object], known: Collection[str]) -> tuple[list[str], list[str]]:
    """Whether safetensors takes what the state holds: problems, and notes where the original's is alike (``known``)."""
    from safetensors.torch import load, save

    problems, notes = list[str](), list[str]()
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    samples = {(t.dtype, t.layout, type(t)): name for name, t in reversed(tensors.items())}
    for name in (name for name in tensors if name in samples.values()):
        try:
            sample = _sample(tensors[name])
            _compare(sample, load(save({"sample": sample}))["sample"])
        except Exception as error:
            report = notes if name in known else problems
            report.append(f"safetensors does not take {name}: {first_line(error)}")
    if others := [name for name in state if name not in tensors]:
        new = [name for name in others if name not in known]
        (problems if new else notes).append(f"not a tensor in the state_dict: {', '.join((new or others)[:5])}")
    return problems, notes


@torch.no_grad()
def _empty(model: nn.Module, known: Collection[str]) -> list[str]:
    """Zeroes what the state_dict should bring, and tensors beside it that are not ``known``; returns their names."""
    state = model.state_dict(keep_vars=True)
    for tensor in state.values():
        if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter):  # those are made of zeros
            with suppress(Exception):
                tensor.zero_()
    emptied = []
    for name, tensor in _plain_tensors(model, state):
        if name not in known:
            emptied.append(name)
            with suppress(Exception):
                tensor.zero_()
    return emptied


def _plain_tensors(model: nn.Module, saved: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """Tensors that are not ``saved``: plain attributes, and buffers that are not persistent."""
    yield from ((name, t) for name, t in model.named_buffers(remove_duplicate=False) if name not in saved)
    owned = {id(t) for t in (*model.parameters(), *model.buffers())}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules") or (isinstance(value, (dict, int, str)) and not value):
                continue
            held = value.values() if isinstance(value, dict) else value
            held = held if isinstance(value, (dict, list, tuple)) else (value,)
            yield from [(prefix + name, t) for t in held if isinstance(t, Tensor) and id(t) not in owned]
