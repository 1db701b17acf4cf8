"""``canonicalize``: torch's own activation takes the place of a module whose code writes it out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ...core.errors import shortened
from ...core.plan import Edit, Op
from ...layers.known import ACTIVATIONS, activation_module
from ...layers.written_out import written_out
from .bench import Bench
from .settings import one_of, wrong


@dataclass(frozen=True)
class CanonicalizeSettings:
    """Settings of ``canonicalize``: the activation and its numbers, and name of the module's class."""

    activation: Annotated[str, one_of(*(name for name in ACTIVATIONS if name != "none"))]
    kind: str
    scalars: tuple[float, ...] = ()


def canonicalize_activation(bench: Bench, op: Op, settings: CanonicalizeSettings) -> Edit:
    """Carries out a ``canonicalize`` op."""
    module = bench.find(op, op.path)
    found = written_out(module)
    if type(module).__name__ != settings.kind or found is None or found[0] != (settings.activation, settings.scalars):
        expected = f"a {settings.kind} that computes {settings.activation}"
        raise wrong(op, "activation", "the plan has another activation", expected, shortened(str(module), 80))
    bench.check_removable(op, op.path, module)
    new = activation_module(settings.activation, settings.scalars)
    if found[1]:
        setattr(new, "inplace", True)  # noqa: B010 - those that may be have it
    aliases = bench.replace(module, new.train(module.training), op.path)
    return Edit(op, "module", "canonicalize", exact="both", aliases=aliases)
