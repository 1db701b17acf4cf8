"""ONNX: torch's dynamo exporter, checked by ``onnx`` and run by onnxruntime on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import RefusedError
from .exporting import Call, Format, Program, Run, measured


class Onnx(Format):
    """``model.onnx``, with its weights in ``model.onnx.data`` where they are too large for one file."""

    name, extra, needs = "onnx", "onnx", ("onnx", "onnxscript", "onnxruntime")
    files, main = ("model.onnx", "model.onnx.data"), "model.onnx"
    int8 = "onnx_int8"

    def write(self, program: Program, folder: Path) -> None:
        """Exports, names inputs, outputs and axes, and lets the checker look at it."""
        import onnx

        made = torch.onnx.export(program.exported, (), dynamo=True, verbose=False)
        assert made is not None
        graph = made.model.graph
        if len(graph.inputs) != len(program.input_names) or len(graph.outputs) != len(program.outputs):
            counts = f"{len(graph.inputs)} inputs and {len(graph.outputs)} outputs"
            raise RefusedError("the ONNX graph has other inputs or outputs than the model", got=counts)
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
            feed = {k: t.numpy() for k, t in program.feeds(inputs).items()}
            return dict(zip(names, map(torch.as_tensor, session.run(None, feed))))

        outputs = [call(inputs) for inputs in calls]
        engine = f"onnxruntime {_version()}, {session.get_providers()[0]}, {torch.get_num_threads()} threads"
        return Run(outputs, measured(lambda: call(calls[0])), engine, call)

    def values(self, program: Program, folder: Path, call: Call) -> dict[str, Tensor]:
        """What every node of the graph gives, from a copy of it in which all are outputs."""
        import onnx

        model = onnx.load(folder / self.main)
        known = {output.name for output in model.graph.output}
        names = [name for node in model.graph.node for name in node.output if name and name not in known]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        session = session_of(model.SerializeToString())
        outputs = session.run(names, {k: t.numpy() for k, t in program.feeds(call).items()})
        return {name: torch.as_tensor(value) for name, value in zip(names, outputs)}


def session_of(model: str | bytes, optimized: str = "") -> Any:
    """A session on the CPU with as many threads as torch; onnxruntime has no types.

    Args:
        model: A path, or the bytes of a model.
        optimized: Where to write the graph that really runs.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    if optimized:
        options.optimized_model_filepath = optimized
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)


FORMAT = Onnx()
