"""An independent count of parameters and multiply-accumulates: torch's own `FlopCounterMode` around a plain run.

That tool counts nothing for matrix-vector products and a few kernels; formulas for those are given to it here, written
apart from the package's own.
"""

from __future__ import annotations

import copy
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten


def _deform_conv(x: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    return 2 * prod(out_shape) * prod(weight[1:])


def _lstm_layer(x: Any, w0: Any, w1: Any, *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[1] * (prod(w0) + prod(w1))


def _mapping() -> dict[Any, Any]:
    import torchvision  # noqa: F401

    return {
        aten.mv: lambda a, b, *_, **__: 2 * prod(a),
        aten.addmv: lambda c, a, b, *_, **__: 2 * prod(a),
        aten.dot: lambda a, b, *_, **__: 2 * prod(a),
        aten.vdot: lambda a, b, *_, **__: 2 * prod(a),
        aten.mkldnn_rnn_layer: _lstm_layer,
        torch.ops.torchvision.deform_conv2d: _deform_conv,
    }


def independent_macs(model: nn.Module, inputs: tuple[Any, ...]) -> int:
    """MACs of one evaluation run of ``model`` on ``inputs``, on the device that the inputs are on."""
    tensors = [t for value in inputs for t in (value if isinstance(value, list) else [value])]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        # The counter's module tracker fails on a parameter that is handed to a module.
        for p in trained:
            p.requires_grad_(False)
        counter = FlopCounterMode(display=False, custom_mapping=_mapping())
        with torch.device(tensors[0].device), torch.no_grad(), counter:
            model(*copy.deepcopy(inputs))
        flops = counter.get_total_flops()
    finally:
        for p in trained:
            p.requires_grad_(True)
        torch.backends.mha.set_fastpath_enabled(fastpath)
    assert flops % 2 == 0
    return flops // 2


def independent_params(model: nn.Module) -> int:
    """Elements of all parameters, each tensor once."""
    found = {id(p): p for module in model.modules() for p in module._parameters.values() if p is not None}
    return sum(p.numel() for p in found.values())
