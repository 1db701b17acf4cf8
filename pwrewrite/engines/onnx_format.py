"""ONNX: torch's dynamo exporter, checked by ``onnx`` and run by onnxruntime on the CPU."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ..core.errors import RefusedError, first_line
from ..core.fx_names import keywords_spelt_out
from ..core.numbers import plural
from .exporting import Call, Format, Program, Run, measured

_SUFFIX = "_quantized"
_LAYERS = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul"))


class Onnx(Format):
    """``model.onnx``, with its weights in ``model.onnx.data`` where they are too large for one file."""

    name, extra, needs = "onnx", "onnx", ("onnx", "onnxscript", "onnxruntime")
    files, main = ("model.onnx", "model.onnx.data"), "model.onnx"

    def write(self, program: Program, folder: Path) -> None:
        """Exports, names inputs, outputs and axes, and lets the checker look at it."""
        import onnx

        made = _translated(program)
        graph = made.model.graph
        program.check_ports("ONNX graph", graph.inputs, graph.outputs)
        names = [*program.input_names, *program.outputs.values()]
        for value in (v for node in graph for v in node.outputs if v.name in names):
            value.name = f"{value.name}_"  # a node inside that happens to have the name of an input or output
        symbols: dict[str, str] = {}
        for value, name, axes in zip(graph.inputs, program.input_names, program.axes):
            value.name = name
            shape = value.shape or ()
            symbols |= {str(getattr(shape[axis], "value", "")): label for axis, label in axes.items()}
        made.rename_axes({old: new for old, new in symbols.items() if old != new})
        for value, name in zip(graph.outputs, program.outputs.values()):
            value.name = name
        path = folder / self.main
        made.save(path)
        onnx.checker.check_model(path, full_check=True)

    def run(self, program: Program, folder: Path, calls: Sequence[Call]) -> Run:
        """Runs the file with onnxruntime's CPU provider."""
        session = session_of(str(folder / self.main))
        names = [output.name for output in session.get_outputs()]

        def call(inputs: Call) -> dict[str, Tensor]:
            return dict(zip(names, map(torch.as_tensor, session.run(None, program.feeds(inputs)))))

        outputs = [call(inputs) for inputs in calls]
        version, provider = import_module("onnxruntime").__version__, session.get_providers()[0]
        engine = f"onnxruntime {version}, {provider}, {plural(torch.get_num_threads(), 'thread')}"
        return Run(outputs, measured(lambda: call(calls[0])), engine, call)

    def values(self, program: Program, folder: Path, call: Call) -> dict[str, Tensor]:
        """What every node of the graph gives, from a copy of it in which all are outputs."""
        import onnx

        model = onnx.load(folder / self.main)
        known = {output.name for output in model.graph.output}
        names = [name for node in model.graph.node for name in node.output if name and name not in known]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        session = session_of(model.SerializeToString())
        outputs = session.run(names, program.feeds(call))
        return {name: torch.as_tensor(value, device="cpu") for name, value in zip(names, outputs)}

    def inner(self, program: Program) -> ExportedProgram:
        """The program without operations in place, whose nodes the exporter names its own after."""
        inner: ExportedProgram = _translated(program).exported_program
        return inner


def _translated(program: Program) -> Any:
    """The program in ONNX; raises `RefusedError` where torch has none."""
    try:
        with _of_errors_only("torch.onnx"), keywords_spelt_out():
            made = torch.onnx.export(program.exported, (), dynamo=True, verbose=False)
    except torch.onnx.OnnxExporterError as error:
        cause = _cause(error)
        varies = any(program.axes) and "No ONNX function" not in cause
        static = "; --static writes it for one size, which may do" if varies else ""
        raise RefusedError("torch has no ONNX for the program", got=f"{cause}{static}") from error
    assert made is not None
    return made


def _cause(error: BaseException) -> str:
    """What an error of torch's exporter began with, and the node that it was at where the exporter says so."""
    node = ""
    while error.__cause__ is not None:
        if named := re.search(r"node (%\S+) .*?target=([\w.]+)", str(error)):
            node = f" at {named[1]}, {named[2]}"
        error = error.__cause__
    return f"{first_line(error)}{node}"


@contextmanager
def _of_errors_only(name: str) -> Iterator[None]:
    """While a logger tells of errors only: torch's exporter warns of every operation of packages that are not there."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def session_of(model: str | bytes, optimized: str = "") -> Any:
    """A session on the CPU with as many threads as torch, of a file or of bytes; onnxruntime has no types.

    ``optimized`` is where to write the graph that really runs.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    if optimized:
        options.optimized_model_filepath = optimized
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class OnnxInt8(Onnx):
    """``model.int8.onnx``: pairs of QuantizeLinear and DequantizeLinear, which the runtime fuses into kernels.

    By onnxruntime's static quantizer, from the float32 file, one scale per output channel of a weight.
    """

    name = "onnx int8"
    files, main = ("model.int8.onnx", "model.int8.onnx.data"), "model.int8.onnx"

    def write(self, program: Program, folder: Path) -> None:
        """Quantizes the float32 file beside it by the ranges that calibration inputs reach."""
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
            def __init__(self) -> None:
                self.feeds: Iterator[dict[str, Any]] = map(program.feeds, program.calibration)

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


FORMAT = Onnx()
FORMAT.int8 = OnnxInt8()
