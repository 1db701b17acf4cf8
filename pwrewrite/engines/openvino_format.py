"""OpenVINO IR, made by OpenVINO's own converter from the program of `torch.export`, and run by it on the CPU.

The converter loosens every axis; those that do not vary get their sizes back. Weights stay in their own precision. For
the comparison and the time the CPU computes in float32, which a user's compilation may set otherwise.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch

from ..core.errors import RefusedError
from ..core.nested import tensors_of
from .exporting import Call, Format, Program, Run, measured


class Openvino(Format):
    """``model.xml`` and ``model.bin``."""

    name, extra, needs = "openvino", "openvino", ("openvino",)
    files, main = ("model.xml", "model.bin"), "model.xml"

    def write(self, program: Program, folder: Path) -> None:
        """Converts, and names inputs, outputs and axes."""
        openvino = _openvino()
        model = openvino.convert_model(program.exported)
        if len(model.inputs) != len(program.input_names) or len(model.outputs) != len(program.outputs):
            counts = f"{len(model.inputs)} inputs and {len(model.outputs)} outputs"
            raise RefusedError("the IR has other inputs or outputs than the model", got=counts)
        shapes = {}
        for port, name, axes, t in zip(model.inputs, program.input_names, program.axes, tensors_of(program.inputs)):
            port.get_tensor().set_names({name})
            shapes[port] = openvino.PartialShape([-1 if axis in axes else n for axis, n in enumerate(t.shape)])
        for port, name in zip(model.outputs, program.outputs.values()):
            port.get_tensor().set_names({name})
        model.reshape(shapes)
        openvino.save_model(model, folder / self.main, compress_to_fp16=False)

    def run(self, program: Program, folder: Path, calls: Sequence[Call]) -> Run:
        """Compiles the IR for the CPU and runs it."""
        openvino, threads = _openvino(), torch.get_num_threads()
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
        compiled = openvino.compile_model(folder / self.main, "CPU", settings)
        pairs = zip(compiled.outputs, program.outputs.values())
        names = [name if name in port.names else port.get_any_name() for port, name in pairs]  # a port may have several
        feeds = [{k: t.numpy() for k, t in program.feeds(call).items()} for call in calls]

        outputs = [
            {name: torch.as_tensor(value.copy()) for name, value in zip(names, compiled(feed).values())}
            for feed in feeds
        ]
        engine = f"OpenVINO {openvino.__version__.partition('-')[0]}, CPU, float32, {threads} threads"
        return Run(outputs, measured(lambda: compiled(feeds[0])), engine)


def _openvino() -> ModuleType:
    """OpenVINO; where this is its first import, without the package by which it reports its use to its makers."""
    if "openvino" not in sys.modules and "openvino_telemetry" not in sys.modules:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # Python's way to say: not there
        try:
            import_module("openvino.tools.ovc")
        finally:
            del sys.modules["openvino_telemetry"]
    return import_module("openvino")


FORMAT = Openvino()
