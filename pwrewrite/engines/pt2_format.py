"""PT2: the program of `torch.export` itself, saved, and run by torch in a process without pwrewrite."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..core.files import check_room
from .apart import run_apart
from .exporting import Call, Format, Program, Run


class Pt2(Format):
    """``model.pt2``, which ``torch.export.load`` reads."""

    name = "pt2"
    files, main = ("model.pt2",), "model.pt2"

    def write(self, program: Program, folder: Path) -> None:
        """Saves the program."""
        exported = program.exported
        check_room(folder, sum(t.nbytes for t in exported.state_dict.values()))  # torch ends the process on a full disk
        torch.export.save(exported, folder / self.main)

    def run(self, program: Program, folder: Path, calls: Sequence[Call]) -> Run:
        """Reads it again and runs it."""
        load = f"model = torch.export.load({self.main!r}).module()"
        libraries = [f"import {name}; " for name in program.libraries]
        return run_apart("".join(libraries) + load, program, folder, calls, imports=["torch._export.serde.serialize"])


FORMAT = Pt2()
