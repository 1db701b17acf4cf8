"""What an op of a plan can do to a model: `ACTIONS`, by the name that a plan gives them.

An action has a record of its settings, read before any model is changed (`prepare`), and a function that changes the
model on a `Bench` and returns the `Edit` that says what it did. It raises `PlanError` where the op makes no sense or
was made for another model, and `Refused` where something must stay as it is: its code does more, something else refers
to it, or the code around it cannot become a graph. A new action is a file with both, and a row here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...core.plan import Edit, Op
from .bench import Bench, Decomposer, Refused
from .branches import BranchSettings, merge_branches
from .canonicalize import CanonicalizeSettings, canonicalize_activation
from .channels_last import ChannelsLastSettings, ReshapeSettings, reshape_views, use_channels_last
from .factorize import FactorizeSettings, factorize_layer
from .fold import WEIGHT, FoldSettings, FoldWeightSettings, fold_norm, fold_weight
from .fuse import FuseSettings, fuse_layer
from .merge import MergeSettings, merge_layers
from .narrow import NarrowSettings, narrow_channels
from .plain_layers import BakeSettings, UnfuseSettings, bake_weights, unfuse_layer
from .project import ProjectSettings, project_branch
from .settings import read, wrong
from .share_reduction import ShareSettings, share_reduction
from .simplify import CODE, RemoveSettings, SimplifySettings, remove_module, simplify_code
from .substitute import SubstituteSettings, substitute_module

Action = tuple[type[Any], Callable[[Bench, Op, Any], Edit]]
"""What an op of one kind may say, and what carries it out."""

ACTIONS: dict[str, Action] = {
    "bake": (BakeSettings, bake_weights),
    "factorize": (FactorizeSettings, factorize_layer),
    "project": (ProjectSettings, project_branch),
    "narrow": (NarrowSettings, narrow_channels),
    "substitute": (SubstituteSettings, substitute_module),
    "share-reduction": (ShareSettings, share_reduction),
    "fold": (FoldSettings, fold_norm),
    "fuse": (FuseSettings, fuse_layer),
    "merge": (MergeSettings, merge_layers),
    "merge-branches": (BranchSettings, merge_branches),
    "canonicalize": (CanonicalizeSettings, canonicalize_activation),
    "remove": (RemoveSettings, remove_module),
    "channels-last": (ChannelsLastSettings, use_channels_last),
    "unfuse": (UnfuseSettings, unfuse_layer),
}
"""Name of an action to what it is."""

VARIANTS: dict[tuple[str, str, str], Action] = {
    ("fold", "side", WEIGHT): (FoldWeightSettings, fold_weight),
    ("remove", "kind", CODE): (SimplifySettings, simplify_code),
    ("channels-last", "kind", CODE): (ReshapeSettings, reshape_views),
}
"""Name of an action and a setting with its value, to what the action is then."""


def prepare(op: Op) -> Callable[[Bench], Edit]:
    """What carries out an op, its settings read; raises `PlanError` where there is no such action or they are wrong."""
    action = ACTIONS.get(op.action)
    if action is None:
        raise wrong(op, "action", "unknown action", f"one of {', '.join(ACTIONS)}", op.action)
    for (name, key, value), variant in VARIANTS.items():
        if op.action == name and op.settings.get(key) == value:
            action = variant
    record, carry_out = action
    settings = read(record, op)
    return lambda bench: carry_out(bench, op, settings)


__all__ = ["ACTIONS", "Bench", "Decomposer", "Refused", "prepare"]
