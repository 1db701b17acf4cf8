"""Plain source: ``model.py`` and ``model.safetensors``, which need torch and libraries whose operations are called.

They are run in a process without pwrewrite. The code is that of the program of `torch.export`: Python's control flow is
unrolled. A call of one of torch's own leaf modules is a call of that module again, made by its own ``repr`` where that
gives the same settings; everything else is written as methods, functions and operators of torch, and where none is
known to be the same, as ``torch.ops``. A variable is reused once its value is not needed, as in code by hand. Named
tuples become tuples.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ..core.errors import RefusedError
from ..core.version import version
from .apart import run_apart
from .exporting import Call, Format, Program, Run
from .source_code import Writer

_TEXT = '''"""{name}, as plain torch: written by pwrewrite {version}. ``load()`` gives the model with its weights."""

import json
import operator  # noqa: F401
from pathlib import Path

import torch
{libraries}from torch import nn
from torch.nn import functional as F  # noqa: F401


class Model(nn.Module):
    """{name}, for inference."""

    def __init__(self):
        super().__init__()
{init}

    def forward({parameters}):
{body}


def load(folder=Path(__file__).parent):
    """The model with the weights of ``model.safetensors``, in evaluation mode."""
    data = bytearray((Path(folder) / "model.safetensors").read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    state = {{}}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            dtype, (first, last) = DTYPES[entry["dtype"]], entry["data_offsets"]
            state[name] = torch.empty(entry["shape"], dtype=dtype)
            if first < last:
                state[name] = torch.frombuffer(data, dtype=dtype, offset=start + first, count=state[name].numel())
                state[name] = state[name].reshape(entry["shape"]).clone()
    model = Model()
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


DTYPES = {{
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}}
'''


class Source(Format):
    """``model.py`` and ``model.safetensors``."""

    name = "source"
    files, main = ("model.py", "model.safetensors"), "model.py"

    def write(self, program: Program, folder: Path) -> None:
        """Writes code and weights."""
        from safetensors.torch import save_file

        writer = Writer(program)
        body, parameters = writer.body(), writer.parameters()
        init = writer.lines or ["pass"]
        text = _TEXT.format(
            name=type(program.model).__name__,
            version=version(),
            libraries="".join(f"import {name}  # noqa: F401\n" for name in program.libraries),
            init="\n".join(f"        {line}" for line in init),
            parameters=", ".join(["self", *parameters]),
            body="\n".join(f"        {line}" for line in body),
        )
        (folder / self.main).write_text(text, encoding="utf-8")
        state: dict[str, Tensor] = {name: t.detach().clone().contiguous() for name, t in writer.state.items()}
        if strange := next((n for n, t in state.items() if t.dtype.is_complex), None):
            raise RefusedError("complex tensors cannot be written", where=strange, got=strange)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    def run(self, program: Program, folder: Path, calls: Sequence[Call]) -> Run:
        """Imports the code and runs it."""
        return run_apart("from model import load; model = load()", program, folder, calls)


FORMAT = Source()
