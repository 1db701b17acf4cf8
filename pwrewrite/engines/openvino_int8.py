"""OpenVINO IR in int8: NNCF's post-training quantization of the float32 IR."""

from __future__ import annotations

import logging
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

from .exporting import Program
from .openvino_format import Openvino, quiet_import

_LAYERS = frozenset(("Convolution", "GroupConvolution", "ConvolutionBackpropData", "Deconvolution", "FullyConnected"))


class OpenvinoInt8(Openvino):
    """``model.int8.xml`` and ``model.int8.bin``."""

    name, extra = "openvino int8", "int8"
    needs = ("openvino", "nncf")
    files, main, precision = ("model.int8.xml", "model.int8.bin"), "model.int8.xml", "int8 and float32"

    def write(self, program: Program, folder: Path) -> None:
        """Quantizes the float32 IR beside it by what calibration inputs make of its activations."""
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # bars and notes of its own
            nncf, openvino = quiet_import("nncf"), quiet_import("openvino")
            nncf.set_log_level(logging.ERROR)
            feeds = [{name: t.numpy() for name, t in program.feeds(call).items()} for call in program.calibration]
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


FORMAT = OpenvinoInt8()
