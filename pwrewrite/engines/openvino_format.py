"""OpenVINO IR, made by OpenVINO's own converter from the program of `torch.export`, and run by it on the CPU.

The converter loosens every axis; those that do not vary get their sizes back. Weights stay in their own precision. For
the comparison and the time the CPU computes in float32, which a user's compilation may set otherwise.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..core.nested import tensors_of
from ..core.numbers import plural
from .exporting import Call, Format, Program, Run, measured

_LAYERS = frozenset(("Convolution", "GroupConvolution", "ConvolutionBackpropData", "Deconvolution", "FullyConnected"))


class Openvino(Format):
    """``model.xml`` and ``model.bin``."""

    name, extra = "openvino", "openvino"
    needs: tuple[str, ...] = ("openvino",)
    files, main = ("model.xml", "model.bin"), "model.xml"
    precision = "float32"

    def write(self, program: Program, folder: Path) -> None:
        """Converts, and names inputs, outputs and axes."""
        openvino = quiet_import("openvino")
        model = openvino.convert_model(program.exported)
        program.check_ports("IR", model.inputs, model.outputs)
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
        compiled = self.compiled(folder / self.main)
        pairs = zip(compiled.outputs, program.outputs.values())
        names = [name if name in port.names else port.get_any_name() for port, name in pairs]  # a port may have several

        def call(inputs: Call) -> dict[str, Tensor]:
            results = compiled(program.feeds(inputs)).values()
            return {name: torch.as_tensor(value.copy(), device="cpu") for name, value in zip(names, results)}

        outputs = [call(inputs) for inputs in calls]
        version = import_module("openvino").__version__.partition("-")[0]
        engine = f"OpenVINO {version}, CPU, {self.precision}, {plural(torch.get_num_threads(), 'thread')}"
        return Run(outputs, measured(lambda: call(calls[0])), engine, call)

    def compiled(self, model: object) -> Any:
        """A model, or the path of one, as it runs on the CPU; OpenVINO has no types."""
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        return quiet_import("openvino").compile_model(model, "CPU", settings)


def quiet_import(name: str) -> ModuleType:
    """``openvino`` or ``nncf``; at its first import without the package by which it reports its use to its makers."""
    if name not in sys.modules and "openvino_telemetry" not in sys.modules:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # Python's way to say: not there
        try:
            import_module({"openvino": "openvino.tools.ovc"}.get(name, name))
        finally:
            del sys.modules["openvino_telemetry"]
    return import_module(name)


class OpenvinoInt8(Openvino):
    """``model.int8.xml`` and ``model.int8.bin``: NNCF's post-training quantization of the float32 IR."""

    name, extra = "openvino int8", "int8"
    needs = ("openvino", "nncf")
    files, main, precision = ("model.int8.xml", "model.int8.bin"), "model.int8.xml", "int8 and float32"

    def write(self, program: Program, folder: Path) -> None:
        """Quantizes the float32 IR beside it by what calibration inputs make of its activations."""
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # bars and notes of its own
            nncf, openvino = quiet_import("nncf"), quiet_import("openvino")
            nncf.set_log_level(logging.ERROR)
            feeds = list(map(program.feeds, program.calibration))
            model = openvino.Core().read_model(folder / Openvino.main)
            quantized = nncf.quantize(model, nncf.Dataset(feeds), subset_size=len(feeds))
        openvino.save_model(quantized, folder / self.main, compress_to_fp16=False)

    def precisions(self, folder: Path) -> dict[str, bool]:
        """Which layers the plugin's own graph computes in int8, by their names in the IR."""
        layers = {}
        for operation in self.compiled(folder / self.main).get_runtime_model().get_ops():
            facts = operation.get_rt_info()
            if "layerType" in facts and facts["layerType"].astype(str) in _LAYERS:
                layers[operation.get_friendly_name()] = facts["runtimePrecision"].astype(str) in ("u8", "i8")
        return layers


FORMAT = Openvino()
FORMAT.int8 = OpenvinoInt8()
