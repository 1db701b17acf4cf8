"""OpenVINO on the CPU, given what ``pwrewrite export --to openvino`` writes, with fixed shapes and in float32."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from ..core.nested import Args, Kwargs, tensors_of
from .engine import Engine, Session, program_of, stages_of
from .openvino_format import FORMAT, quiet_import


class OpenVino(Engine):
    """The CPU plugin."""

    name, extra, needs = "openvino", FORMAT.extra, FORMAT.needs

    @property
    def version(self) -> str:
        return str(quiet_import("openvino").__version__).partition("-")[0]

    def _session(self, model: nn.Module, args: Args, kwargs: Kwargs) -> Session:
        stages = stages_of(model, args, kwargs)
        if stages is not None:
            compiled = FORMAT.compiled(_chain(stages, args[0]))
        else:
            program = program_of(model, args, kwargs)
            with TemporaryDirectory() as folder:
                FORMAT.write(program, Path(folder))
                compiled = FORMAT.compiled(Path(folder) / FORMAT.main)
        request = compiled.create_infer_request()

        def run(*args: object, **kwargs: object) -> list[Tensor]:
            feed = [t.numpy() for t in tensors_of((args, kwargs))]
            return [torch.as_tensor(value, device="cpu") for value in request.infer(feed, share_inputs=True).values()]

        asked = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        devices = ", ".join(compiled.get_property("EXECUTION_DEVICES"))
        return Session(run, self._ran(devices, asked.replace("f", "float")))


def _chain(stages: Sequence[nn.Module], x: Tensor) -> object:
    """Convolutions or linear maps in a row as an OpenVINO model, as its converter makes them."""
    openvino, ops = quiet_import("openvino"), import_module("openvino.opset13")
    source = ops.parameter(list(x.shape), name="x")
    value = source
    for stage in stages:
        weight = ops.constant(stage.get_parameter("weight").detach().contiguous().numpy())
        spread: tuple[int, ...] = ()
        if isinstance(stage, nn.Linear):
            value = ops.matmul(value, weight, False, True)
        else:
            assert isinstance(stage, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
            spread = (1,) * len(stage.kernel_size)
            place = list(stage.stride), list(stage.padding), list(stage.padding), list(stage.dilation)
            if stage.groups > 1:
                shape = (stage.groups, stage.out_channels // stage.groups, *stage.weight.shape[1:])
                weight = ops.constant(stage.weight.detach().reshape(shape).contiguous().numpy())
            value = (ops.group_convolution if stage.groups > 1 else ops.convolution)(value, weight, *place)
        if stage.bias is not None:
            bias = stage.get_parameter("bias").detach()
            value = ops.add(value, ops.constant((bias.reshape(1, -1, *spread) if spread else bias).numpy()))
    return openvino.Model([value], [source], "layer")


ENGINE = OpenVino()
