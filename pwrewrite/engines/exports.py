"""Files for other runtimes: how each format is written, and how what was written is run.

All formats are written from one ``torch.export`` program of a plain copy of the model (fused layers taken apart, so
that the runtime fuses as it likes). A format is a class with a name, the packages that it needs, and how it is written
and run; adding one is adding such a class and naming it in `FORMATS`. What a format's `run` returns is what the file
computes in its own runtime, never what torch remembers of the model.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection

from ..core.errors import RefusedError, UsageError, first_line

Batch = Sequence[Tensor]
"""The input tensors of one run, in the order in which the model takes them."""


class Format(ABC):
    """A format that a model can be exported to.

    Attributes:
        name: As it is typed.
        extra: The extra of pwrewrite that brings the packages.
        packages: What must be importable.
        files: Names of the files that it may write; the first one is what is opened.
    """

    name: ClassVar[str]
    extra: ClassVar[str] = ""
    packages: ClassVar[tuple[str, ...]] = ()
    files: ClassVar[tuple[str, ...]]

    @abstractmethod
    def write(self, program: ExportedProgram, outputs: Sequence[str], folder: Path) -> None:
        """Writes the files of an exported program, whose outputs get these names, into a folder."""

    @abstractmethod
    def open(self, folder: Path) -> Callable[[Batch], list[Tensor]]:
        """What runs the file in this process, as a runtime does that knows nothing of torch."""

    def run(self, folder: Path, batches: Sequence[Batch]) -> list[list[Tensor]]:
        """What the file computes, batch by batch, as a stranger would run it."""
        call = self.open(folder)
        return [call(batch) for batch in batches]

    @abstractmethod
    def runtime(self, folder: Path) -> str:
        """What runs it: name, version, device, precision, threads."""


class Onnx(Format):
    """ONNX by torch's own exporter, checked by ``onnx.checker`` and run by onnxruntime."""

    name = "onnx"
    extra = "onnx"
    packages = ("onnx", "onnxruntime", "onnxscript")
    files = ("model.onnx", "model.onnx.data")

    def write(self, program: ExportedProgram, outputs: Sequence[str], folder: Path) -> None:
        """Writes the model; weights stand beside it only where protobuf's 2 GiB do not hold them."""
        import onnx

        file = folder / self.files[0]
        exported = torch.onnx.export(program, dynamo=True, output_names=list(outputs), verbose=False)
        assert exported is not None
        exported.save(file)
        onnx.checker.check_model(str(file), full_check=True)

    def open(self, folder: Path) -> Callable[[Batch], list[Tensor]]:
        """A session on the CPU."""
        session = self._session(folder)
        names = [value.name for value in session.get_inputs()]

        def call(batch: Batch) -> list[Tensor]:
            feed = {name: t.detach().cpu().numpy() for name, t in zip(names, batch, strict=True)}
            return [torch.from_numpy(value) for value in session.run(None, feed)]

        return call

    @staticmethod
    def _session(folder: Path):  # type: ignore[no-untyped-def]  # onnxruntime has no types
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
        return onnxruntime.InferenceSession(str(folder / Onnx.files[0]), options, providers=["CPUExecutionProvider"])

    def runtime(self, folder: Path) -> str:
        """Its version, the provider that really runs it, and threads."""
        provider = self._session(folder).get_providers()[0]
        return f"onnxruntime {importlib.metadata.version('onnxruntime')}, {provider}, {_threads()}"


_RUN_PT2 = """
import sys
sys.modules["pwrewrite"] = None  # as where it is not installed
import torch
program = torch.export.load(sys.argv[1]).module()
torch.set_num_threads(int(sys.argv[4]))
batches = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    results = [[t for t in torch.utils._pytree.tree_leaves(program(*args, **kwargs)) if isinstance(t, torch.Tensor)]
               for args, kwargs in batches]
torch.save([[t.contiguous().clone() for t in result] for result in results], sys.argv[3])
"""


class Pt2(Format):
    """``torch.export``'s own archive, run by torch in a process that cannot import pwrewrite."""

    name = "pt2"
    files = ("model.pt2",)

    def write(self, program: ExportedProgram, outputs: Sequence[str], folder: Path) -> None:
        """Writes the archive; torch keeps the structure of inputs and outputs, and so their names."""
        with tempfile.TemporaryDirectory() as scratch:  # torch refuses names in which it finds a dot too many
            torch.export.save(program, Path(scratch, self.files[0]))
            (folder / self.files[0]).write_bytes(Path(scratch, self.files[0]).read_bytes())

    def open(self, folder: Path) -> Callable[[Batch], list[Tensor]]:
        """The program as a module, in this process: to time it."""
        program = torch.export.load(folder / self.files[0])
        module, spec = program.module(), program.call_spec.in_spec

        def call(batch: Batch) -> list[Tensor]:
            args, kwargs = torch.utils._pytree.tree_unflatten(list(batch), spec)
            with torch.no_grad():
                return tensors_of(module(*args, **kwargs))

        return call

    def run(self, folder: Path, batches: Sequence[Batch]) -> list[list[Tensor]]:
        """What a process without pwrewrite computes."""
        spec = torch.export.load(folder / self.files[0]).call_spec.in_spec
        given = [torch.utils._pytree.tree_unflatten(list(batch), spec) for batch in batches]
        with tempfile.TemporaryDirectory() as scratch:
            names = [str(Path(scratch, name)) for name in ("inputs.pt", "outputs.pt")]
            torch.save([(tuple(args), dict(kwargs)) for args, kwargs in given], names[0])
            command = [
                sys.executable,
                "-c",
                _RUN_PT2,
                str(folder / self.files[0]),
                *names,
                str(torch.get_num_threads()),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=scratch)
            if done.returncode:
                raise RuntimeError((done.stderr.strip().splitlines() or ["the process ended"])[-1])
            results: list[list[Tensor]] = torch.load(names[1], weights_only=True)
        return results

    def runtime(self, folder: Path) -> str:
        """torch, alone."""
        return f"torch {torch.__version__} without pwrewrite, cpu, {_threads()}"


class OpenVino(Format):
    """OpenVINO's IR in float32 by its own converter, run by it on the CPU."""

    name = "openvino"
    extra = "openvino"
    packages = ("openvino",)
    files = ("model.xml", "model.bin")

    def write(self, program: ExportedProgram, outputs: Sequence[str], folder: Path) -> None:
        """Writes network and weights."""
        import openvino

        converted = openvino.convert_model(program)
        for port, name in zip(converted.outputs, outputs, strict=True):
            port.get_tensor().set_names({name})
        openvino.save_model(converted, folder / self.files[0], compress_to_fp16=False)

    def open(self, folder: Path) -> Callable[[Batch], list[Tensor]]:
        """The compiled network, told to compute in float32 also where the processor has something shorter."""
        compiled = self._compiled(folder)

        def call(batch: Batch) -> list[Tensor]:
            results = compiled([t.detach().cpu().numpy() for t in batch])
            return [torch.from_numpy(results[port].copy()) for port in compiled.outputs]

        return call

    @staticmethod
    def _compiled(folder: Path):  # type: ignore[no-untyped-def]  # openvino's types come and go with its extensions
        import openvino

        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": str(torch.get_num_threads())}
        return openvino.Core().compile_model(folder / OpenVino.files[0], "CPU", settings)

    def runtime(self, folder: Path) -> str:
        """Its version, device, precision and threads, as the compiled network says them."""
        compiled = self._compiled(folder)
        precision = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        return f"openvino {importlib.metadata.version('openvino')}, CPU, {precision}, {_threads()}"


FORMATS: tuple[Format, ...] = (Onnx(), Pt2(), OpenVino())
"""Every format there is."""


def formats_of(names: Sequence[str]) -> list[Format]:
    """Formats by name.

    Raises:
        UsageError: If there is none of that name.
        RefusedError: If a package is missing; says which, and the command that installs it.
    """
    known = {each.name: each for each in FORMATS}
    for name in names:
        if name not in known:
            raise UsageError("no such format", expected=", ".join(known), got=repr(name))
    chosen = [known[name] for name in dict.fromkeys(names)]
    for each in chosen:
        missing = [package for package in each.packages if find_spec(package) is None]
        if missing:
            hint = f"pip install 'pwrewrite[{each.extra}]'"
            raise RefusedError(f"{each.name} needs {', '.join(missing)}, not installed here", hint=hint)
    return chosen


def tensors_of(value: object) -> list[Tensor]:
    """The tensors of a nested value, in torch's order, which is that of every export."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def program_of(
    model: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object], scaled: Sequence[Tensor]
) -> ExportedProgram:
    """The model as one graph of operators.

    Args:
        model: A plain model in evaluation mode.
        args: Positional example inputs; their batch is not 1 where it may vary.
        kwargs: Keyword ones.
        scaled: Those of their tensors whose first dim is the batch, which may vary.

    Raises:
        RefusedError: If torch cannot trace it so; says why.
    """
    shapes, batch = ShapesCollection(), Dim("batch")  # type: ignore[no-untyped-call]
    for t in scaled:
        shapes[t] = {0: batch}
    try:
        with torch.no_grad(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            return torch.export.export(
                model, args, dict(kwargs), dynamic_shapes=shapes if scaled else None, strict=False
            )
    except Exception as error:
        hint = "--static exports it for the shapes of the example inputs only" if scaled else None
        raise RefusedError(f"torch.export cannot trace the model: {first_line(error)}", hint=hint) from error


def _threads() -> str:
    threads = torch.get_num_threads()
    return f"{threads} thread" + ("s" if threads > 1 else "")
