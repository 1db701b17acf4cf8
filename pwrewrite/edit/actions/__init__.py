"""What an op of a plan can do to a model: `ACTIONS`, by the name that a plan gives them.

An action changes the model on a `Bench` and returns the `Edit` that says what it did, or raises `Refused`.
"""

from __future__ import annotations

from collections.abc import Callable

from ...core.plan import Edit, Op
from .bake import bake_weights
from .bench import Bench, Decomposer, Refused
from .channels_last import use_channels_last
from .factorize import factorize_layer
from .fold import fold_norm
from .fuse import fuse_layer
from .merge import merge_layers
from .project import project_branch
from .remove import remove_module
from .unfuse import unfuse_layer

ACTIONS: dict[str, Callable[[Bench, Op], Edit]] = {
    "bake": bake_weights,
    "factorize": factorize_layer,
    "project": project_branch,
    "fold": fold_norm,
    "fuse": fuse_layer,
    "merge": merge_layers,
    "remove": remove_module,
    "channels-last": use_channels_last,
    "unfuse": unfuse_layer,
}
"""Name of an action to what carries it out."""

__all__ = ["ACTIONS", "Bench", "Decomposer", "Refused"]
