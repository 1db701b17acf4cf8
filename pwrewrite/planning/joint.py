"""The kinds of groups that change several layers at once, by the action of their ops: `JOINT`."""

from __future__ import annotations

from collections.abc import Mapping

from .groups import JointGroup
from .regions import RegionCandidates
from .sharing import SharedCandidates
from .units import UnitCandidates

_KINDS = (UnitCandidates, RegionCandidates, SharedCandidates)
JOINT: Mapping[str, type[JointGroup]] = {kind.action: kind for kind in _KINDS}
