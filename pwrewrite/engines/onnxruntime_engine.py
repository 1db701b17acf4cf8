"""onnxruntime on the CPU, given what ``pwrewrite export --to onnx`` writes, with fixed shapes."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from ..core.nested import Args, Kwargs, tensors_of
from .engine import Engine, Session, program_of, stages_of
from .onnx_format import FORMAT, session_of

_OPSET, _IR = 18, 10


class OnnxRuntime(Engine):
    """The CPU provider, with all of onnxruntime's own graph optimisations."""

    name, extra, needs = "onnxruntime", FORMAT.extra, FORMAT.needs

    @property
    def version(self) -> str:
        return str(import_module("onnxruntime").__version__)

    def _session(self, model: nn.Module, args: Args, kwargs: Kwargs) -> Session:
        stages = stages_of(model, args, kwargs)
        if stages is not None:
            session = session_of(_chain(stages, args[0]))
        else:
            program = program_of(model, args, kwargs)
            with TemporaryDirectory() as folder:
                FORMAT.write(program, Path(folder))
                session = session_of(str(Path(folder) / FORMAT.main))
        names = [port.name for port in session.get_inputs()]
        kinds = "/".join(sorted({port.type.removeprefix("tensor(").rstrip(")") for port in session.get_inputs()}))

        def run(*args: object, **kwargs: object) -> list[Tensor]:
            feed = {name: t.numpy() for name, t in zip(names, tensors_of((args, kwargs)))}
            return [torch.as_tensor(value, device="cpu") for value in session.run(None, feed)]

        return Session(run, self._ran(session.get_providers()[0], kinds.replace("float", "float32")))


def _chain(stages: Sequence[nn.Module], x: Tensor) -> bytes:
    """Convolutions or linear maps in a row as an ONNX model, as the exporter writes them."""
    from onnx import TensorProto, helper, numpy_helper

    nodes, weights = [], []
    for i, stage in enumerate(stages):
        inputs, flat = [f"x{i}"], isinstance(stage, nn.Linear) and x.dim() == 2
        for name, parameter in stage.named_parameters():
            inputs.append(f"{name}{i}")
            value = parameter.detach().T if isinstance(stage, nn.Linear) and not flat else parameter.detach()
            weights.append(numpy_helper.from_array(value.contiguous().numpy(), inputs[-1]))
        if flat:
            nodes.append(helper.make_node("Gemm", inputs, [f"x{i + 1}"], transB=1))
            continue
        if isinstance(stage, nn.Linear):
            nodes.append(helper.make_node("MatMul", inputs[:2], [f"p{i}" if inputs[2:] else f"x{i + 1}"]))
            nodes += [helper.make_node("Add", [f"p{i}", bias], [f"x{i + 1}"]) for bias in inputs[2:]]
            continue
        assert isinstance(stage, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        node = helper.make_node("Conv", inputs, [f"x{i + 1}"], group=stage.groups, strides=stage.stride)
        pads = helper.make_attribute("pads", (*stage.padding, *stage.padding))
        node.attribute.extend((pads, helper.make_attribute("dilations", stage.dilation)))
        nodes.append(node)
    source = helper.make_tensor_value_info("x0", TensorProto.FLOAT, list(x.shape))
    result = helper.make_tensor_value_info(f"x{len(stages)}", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "layer", [source], [result], weights)
    opsets = [helper.make_opsetid("", _OPSET)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=_IR).SerializeToString())


ENGINE = OnnxRuntime()
