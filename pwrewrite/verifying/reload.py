"""Whether a rewritten model can be saved and loaded: its state_dict holds all that it needs, and nothing else does.

The state is written by `torch.save`, read with ``weights_only=True`` and loaded into a copy in which
everything that the state should bring is zero: parameters and persistent buffers, and tensors that are plain
attributes of the rewritten model but not of the original (a weight kept outside the state_dict is lost by
saving). safetensors takes dense tensors by dtype and layout, whatever their size, so one small tensor of each
kind is written; shared tensors are written once, as it requires.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress

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
        inputs = context.draws.draw(size=context.smaller)
        before, after = context.run(context.rewritten, inputs), context.run(again, inputs)
        if before.ran:
            problems += unlike(context, before, after)
    results.check("state_dict", problems, "saves, reloads and gives the same outputs")
    return results


def reloaded(rewritten: nn.Module, original: nn.Module) -> tuple[nn.Module | None, list[str], list[str]]:
    """An emptied copy with the saved state loaded, or None; what is wrong, and what a reader should know."""
    state, before = rewritten.state_dict(), set(original.state_dict())
    left_out = {name for name, _ in original.named_parameters(remove_duplicate=False)} - before
    names = [name for name, _ in rewritten.named_parameters(remove_duplicate=False)]
    tensor_problems, tensor_notes = _safetensors(state, before)
    problems = [f"the state_dict lacks {name}" for name in names if name not in state and name not in left_out]
    notes = [f"the state_dict leaves out {len(left_out)} parameters, as before"] if left_out else []
    problems, notes = problems + tensor_problems, notes + tensor_notes
    zeros = {id(p): nn.Parameter(torch.zeros_like(p), p.requires_grad) for p in rewritten.parameters()}
    fresh = deep_copy(rewritten, dict(zeros))
    plain = _empty(fresh, original)
    try:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        fresh.load_state_dict(torch.load(file, weights_only=True))
    except Exception as error:
        return None, [*problems, f"the state_dict does not reload: {first_line(error)}"], notes
    if plain:
        notes.append(f"tensors outside the state_dict: {', '.join(plain[:5])}")
    return fresh, problems, notes


def _safetensors(state: Mapping[str, object], known: Collection[str]) -> tuple[list[str], list[str]]:
    """Whether safetensors takes what the state holds: problems, and notes where the original's is alike (``known``)."""
    from safetensors.torch import load, save

    problems, notes = list[str](), list[str]()
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    samples = {(t.dtype, t.layout, type(t)): name for name, t in reversed(tensors.items())}
    for name in (name for name in tensors if name in samples.values()):
        try:
            sample = tensors[name].detach().cpu().contiguous().flatten()[:8].clone()
            again = load(save({"sample": sample}))["sample"]
            if not torch.equal(again.view(torch.uint8), sample.view(torch.uint8)):
                raise ValueError("comes back changed")
        except Exception as error:
            report = notes if name in known else problems
            report.append(f"safetensors does not take {name}: {first_line(error)}")
    if others := [name for name in state if name not in tensors]:
        new = [name for name in others if name not in known]
        (problems if new else notes).append(f"not a tensor in the state_dict: {', '.join((new or others)[:5])}")
    return problems, notes


@torch.no_grad()
def _empty(model: nn.Module, original: nn.Module) -> list[str]:
    """Zeroes what the state_dict should bring and what is new beside it; returns the names of the latter."""
    for tensor in model.state_dict(keep_vars=True).values():
        if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter):  # those are made of zeros
            with suppress(Exception):
                tensor.zero_()
    known = {name for name, _ in _plain_tensors(original)}
    emptied = []
    for name, tensor in _plain_tensors(model):
        if name not in known:
            emptied.append(name)
            with suppress(Exception):
                tensor.zero_()
    return emptied


def _plain_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors that are not saved: plain attributes, and buffers that are not persistent."""
    saved = set(model.state_dict())
    yield from ((name, t) for name, t in model.named_buffers(remove_duplicate=False) if name not in saved)
    owned = {id(t) for t in (*model.parameters(), *model.buffers())}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            held = value.values() if isinstance(value, dict) else value
            held = held if isinstance(value, (dict, list, tuple)) else (value,)
            yield from ((prefix + name, t) for t in held if isinstance(t, Tensor) and id(t) not in owned)
