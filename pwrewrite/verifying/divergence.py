"""Where two models part: the first layer, in the order in which the original runs, whose outputs differ too much.

Both models run with hooks on the modules that both have under the same path. A hook keeps a *clone*: an
in-place operation behind the layer (``out += x``) would change the tensor it kept, and blame the wrong layer.
Only the original's outputs are kept; the rewritten model's are compared as they come.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from contextlib import ExitStack
from math import inf

import torch
from torch import Tensor, nn

from ..capturing import Capture, TensorSpec, info
from .inputs import Arguments
from .numerics import relative_difference
from .outputs import flatten
from .runs import run

ROOT = "(root)"
"""What a place in no submodule is called: the model's own code."""

Key = tuple[str, int]
"""Path of a module and the number of its call."""

See = Callable[[Key, object], None]
"""What is shown the output of a call."""


def watch(
    model: nn.Module, paths: Collection[str], inputs: Arguments, seed: int, training: bool, see: See
) -> str | None:
    """Runs a model and shows every output of the modules at ``paths``; returns the innermost module that raised."""
    calls: Counter[str] = Counter()
    entered: list[str] = []

    def before(path: str) -> Callable[..., None]:
        return lambda module, args: entered.append(path)

    def after(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            while entered and entered.pop() != path:
                pass
            if path in paths:
                see((path, calls[path]), output)
                calls[path] += 1

        return hook

    with ExitStack() as stack:
        for path, module in model.named_modules():
            if path and not isinstance(module, torch.jit.ScriptModule):
                stack.callback(module.register_forward_pre_hook(before(path)).remove)
                stack.callback(module.register_forward_hook(after(path)).remove)
        outcome = run(model, inputs, seed=seed, training=training)
    return None if outcome.ran else entered[-1] if entered else ROOT


def layer_differences(
    original: nn.Module,
    rewritten: nn.Module,
    inputs: Arguments,
    *,
    seed: int,
    training: bool = False,
    reference: tuple[nn.Module, Arguments] | None = None,
) -> tuple[dict[Key, float], dict[Key, float], str | None]:
    """Relative difference of every common layer's output, in the original's order.

    ``reference`` is the original in another precision, with its inputs. Returns the rewritten model's differences (∞
    where shapes differ or only it has NaN or Inf) in layers that both call equally often, the reference's, and the
    module in which the rewritten model raised.
    """
    names = {path for path, module in original.named_modules() if path and type(module) is not nn.Sequential}
    paths = names & {path for path, _ in rewritten.named_modules()}  # plain sequences repeat what their last part says
    outputs: dict[Key, list[Tensor]] = {}

    def keep(key: Key, output: object) -> None:
        outputs[key] = [t.detach().clone() for t in flatten(output).floating.values()]

    watch(original, paths, inputs, seed, training, keep)

    calls: Counter[str] = Counter()

    def differ(errors: dict[Key, float]) -> See:
        calls.clear()

        def see(key: Key, output: object) -> None:
            calls[key[0]] += 1
            old, new = outputs.get(key), list(flatten(output).floating.values())
            if old is None:
                return
            same = len(old) == len(new) and all(a.shape == b.shape for a, b in zip(old, new))
            errors[key] = max((relative_difference(b, a) for a, b in zip(old, new)), default=0.0) if same else inf

        return see

    rounding: dict[Key, float] = {}
    if reference is not None:
        watch(reference[0], paths, reference[1], seed, training, differ(rounding))
    errors: dict[Key, float] = {}
    raised = watch(rewritten, paths, inputs, seed, training, differ(errors))
    # Where a layer is called less often than before, its calls are no longer the same ones.
    before = Counter(path for path, _ in outputs)
    other = {path for path, count in before.items() if calls[path] != count} if raised is None else set()
    return {key: errors[key] for key in outputs if key in errors and key[0] not in other}, rounding, raised


def within(path: str, edited: Collection[str]) -> bool:
    """Whether a path is one of ``edited`` or inside one."""
    return any(path == place or path.startswith(f"{place}.") for place in edited)


def first_shape_divergence(before: Capture, after: Capture) -> str:
    """Where two captures part: the first common path whose call has other shapes or dtypes, or `ROOT`."""
    old, new = _outputs_at(before), _outputs_at(after)
    return next((path for path, specs in old.items() if path in new and new[path] != specs), ROOT)


def _outputs_at(capture: Capture) -> dict[str, tuple[TensorSpec, ...]]:
    """Path to the output of the last node there, or within: leaves in the order of the original."""
    outputs: dict[str, tuple[TensorSpec, ...]] = {}
    for node in capture.graph.nodes:
        path = node.target if node.op == "call_module" else ""
        while path:
            outputs.pop(path, None)  # in the order in which modules return
            outputs[path] = info(node).outputs
            path = path.rpartition(".")[0]
    return outputs
