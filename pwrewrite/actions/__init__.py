"""What an op of a plan can do to a model: `ACTIONS`, by the name that a plan gives them.

An action changes the model on a `Bench` and returns the `Edit` that says what it did, or raises `Refused`.
"""

from __future__ import annotations

from collections.abc import Callable

from ..plan import Edit, Op
from .bench import Bench, Refused
from .factorize import factorize_layer
from .project import project_branch

ACTIONS: dict[str, Callable[[Bench, Op], Edit]] = {"factorize": factorize_layer, "project": project_branch}
"""Name of an action to what carries it out."""

__all__ = ["ACTIONS", "Bench", "Refused"]
