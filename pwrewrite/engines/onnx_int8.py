"""ONNX in int8: onnxruntime's static quantizer, from the float32 file, one scale per output channel of a weight."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .exporting import Program
from .onnx_format import Onnx, session_of

_SUFFIX = "_quantized"
_LAYERS = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul"))


class OnnxInt8(Onnx):
    """``model.int8.onnx``, with pairs of QuantizeLinear and DequantizeLinear that the runtime fuses into kernels."""

    name = "onnx int8"
    files, main = ("model.int8.onnx", "model.int8.onnx.data"), "model.int8.onnx"

    def write(self, program: Program, folder: Path) -> None:
        """Quantizes the float32 file beside it by the ranges that calibration inputs reach."""
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
            def __init__(self) -> None:
                self.feeds: Iterator[dict[str, Any]] = (
                    {name: t.numpy() for name, t in program.feeds(call).items()} for call in program.calibration
                )

            def get_next(self) -> dict[str, Any] | None:
                return next(self.feeds, None)

        with TemporaryDirectory() as scratch:
            prepared = f"{scratch}/model.onnx"
            quant_pre_process(str(folder / Onnx.main), prepared, skip_symbolic_shape=True)
            quantize_static(
                prepared,
                str(folder / self.main),
                Reader(),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )

    def precisions(self, folder: Path) -> dict[str, bool]:
        """Which layers the runtime's own optimized graph computes in int8."""
        import onnx

        with TemporaryDirectory() as scratch:
            session_of(str(folder / self.main), optimized=f"{scratch}/optimized.onnx")
            ran = onnx.load(f"{scratch}/optimized.onnx", load_external_data=False).graph.node
        quantized = {
            name.removesuffix(_SUFFIX)
            for node in ran
            if node.op_type.startswith("Q") or "Integer" in node.op_type
            for name in node.input
            if name.endswith(_SUFFIX) and node.op_type != "QuantizeLinear"
        }
        graph = onnx.load(folder / Onnx.main, load_external_data=False).graph
        stored = {each.name for each in graph.initializer}
        weights = [node.input[1] for node in graph.node if node.op_type in _LAYERS and node.input[1] in stored]
        return {name.removesuffix(".weight"): name in quantized for name in weights}


FORMAT = OnnxInt8()
