"""`PointwiseActivation`: a convolution or linear map and the activation behind it, in one kernel where that is right.

``act(W · x + b)`` or, with a second argument, ``act(W · x + b + residual)``. The parameters are ``weight`` and
``bias`` as the layer had them, so state_dict, ``.to()``, training, deepcopy and export see an ordinary layer. The fused
kernel runs on plain tensors that need no gradient (`kernels`); everywhere else, and for whoever traces, compiles,
exports or counts, this is the plain convolution followed by the plain activation.

On the CPU in channels_last the weight is packed once into the layout that oneDNN computes in (`packing`), and a layer
that is called again and again with one shape becomes a partition (`partitions`), which costs less to call. That cache
is never saved, copied or pickled, and ends when the weight changes. With the flag ``channels_last`` the first layer of
a model converts for all. A 1×1 on a 1×1 map, as in squeeze-excite blocks, is a matrix product.

NaN: the fused kernels of ReLU, ReLU6, hardtanh and hardsigmoid return a number for NaN, and GELU's returns NaN for Inf.
With the flag ``keep_nan`` the first four run behind the kernel, in place, on its output.

Few channels: oneDNN computes 16 at once and throws away what is padding, so that with fewer than 8 a k×k runs its
exponential activations behind the kernel, and contiguous inputs for which torch itself would not take oneDNN take the
plain path where the layer is a 1×1 or has fewer than 16 channels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.convolution import ConvSpec, StandsForLayer
from ..core.errors import UsageError
from . import kernels, partitions
from .factorized import Device, make_layer
from .kernels import CPU_DTYPES, EXPONENTIAL, FORMATS, LOSES_NAN, Geometry, plain_input, plain_tensors, unwatched
from .known import ACTIVATIONS, activation_module, checked
from .packing import Packed
from .unfused import Unfused, same_padding

_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_compiling = torch.compiler.is_compiling
_grad = torch.is_grad_enabled
_threads = torch.get_num_threads
_now = time.monotonic

_IN_PLACE: dict[str, Callable[..., Tensor]] = {
    "relu": torch.relu_,
    "relu6": partial(torch.clamp_, min=0.0, max=6.0),
    "hardtanh": torch.clamp_,
    "hardsigmoid": partial(F.hardsigmoid, inplace=True),
}
"""Activations in place, NaN kept; those of `kernels.LOSES_NAN`."""

_DERIVED = frozenset({"_packed", "_pad", "_how", "_step", "_thin", "_act", "_late", "_kernel_act"})


class PointwiseActivation(StandsForLayer, nn.Module):
    """A convolution or linear map with its activation; takes and returns what the layer does, and a residual.

    Args:
        spec: The layer's shape facts; a linear map has no spatial axes. Not transposed.
        activation: One of `pwrewrite.layers.ACTIVATIONS`; ``none`` for the layer alone.
        scalars: The activation's numbers.
        channels_last: Whether inputs are brought into channels_last.
        same: Whether the padding is TensorFlow's ``SAME``, worked out from each input's size.
        keep_nan: Whether NaN stays NaN behind activations whose fused kernel returns a number for it.
        device: Where the parameters live.
        dtype: Their dtype.
    """

    def __init__(
        self,
        spec: ConvSpec,
        activation: str = "relu",
        scalars: Sequence[float] = (),
        *,
        channels_last: bool = False,
        same: bool = False,
        keep_nan: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if spec.transposed:
            raise UsageError("a transposed convolution has no fused form", got=spec.op)
        self.spec, self.activation, self.scalars = spec, activation, checked(activation, scalars)
        self.channels_last, self.same, self.keep_nan = channels_last, same, keep_nan
        self.weight = nn.Parameter(torch.empty(spec.weight_shape, device=device, dtype=dtype))
        self.bias: nn.Parameter | None
        bias = nn.Parameter(torch.empty(spec.out_channels, device=device, dtype=dtype)) if spec.bias else None
        self.register_parameter("bias", bias)
        self._prepare()
        self.reset_parameters()

    @classmethod
    def of_layer(
        cls, layer: nn.Module, spec: ConvSpec, activation: str, scalars: Sequence[float] = (), **flags: bool
    ) -> PointwiseActivation:
        """The same with the parameters of a layer, which it takes over; ``flags`` as above."""
        fused = cls(spec, activation, scalars, device="meta", dtype=layer.get_parameter("weight").dtype, **flags)
        fused._parameters.update(weight=layer._parameters["weight"], bias=layer._parameters["bias"])
        fused.training = layer.training
        return fused

    def _prepare(self) -> None:
        """What each call needs, worked out once."""
        spec, entry = self.spec, ACTIVATIONS[self.activation]
        self._packed: Packed | None = None
        ahead = self.same or spec.pads_copy
        self._pad: list[int] | None = None
        if ahead and not self.same and any(map(any, spec.padding)):
            self._pad = [side for pair in reversed(spec.padding) for side in pair]
        padding = [0 if ahead else left for left, _ in spec.padding]
        self._how = Geometry(padding, list(spec.stride), list(spec.dilation), spec.groups)
        self._step = all(k == s == 1 for k, s in zip(spec.kernel_size, spec.stride)) and not any(padding)
        numbers, plain = self.scalars, entry.plain
        self._act: Callable[[Tensor], Tensor] = (lambda x: plain(x, *numbers)) if numbers else plain
        late = _IN_PLACE[self.activation] if self.keep_nan and self.activation in LOSES_NAN else None
        self._late: Callable[[Tensor], Tensor] | None = late and ((lambda x: late(x, *numbers)) if numbers else late)
        self._thin = self._step or spec.out_channels < kernels.VECTOR
        if spec.dims and not self._step and spec.out_channels < kernels.VECTOR // 2 and entry.attr in EXPONENTIAL:
            self._late = self._act
        act: kernels.Act = (entry.attr, [*entry.fixed, *numbers], entry.algorithm)
        self._kernel_act: kernels.Act = act if self._late is None else ("none", [], "")

    def reset_parameters(self) -> None:
        """Initialises as ``nn.Conv2d`` does."""
        if not self.weight.is_meta:
            nn.Conv2d.reset_parameters(cast(nn.Conv2d, self))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Runs the layer, adds the residual where there is one, and applies the activation."""
        if _compiling() or not unwatched():
            return self._plain(x, residual)
        weight, bias = self._parameters.get("weight"), self._parameters.get("bias")
        packed, out = self._packed, None
        if packed is not None and packed.compiled and not _grad() and weight is not None and packed.of(weight, bias):
            out = self._by_partition(packed, x, residual)
        if out is None and weight is not None and plain_tensors(x, weight, bias):
            if x.is_cpu:
                if x.dtype in CPU_DTYPES and kernels.enabled():
                    try:
                        out = self._on_cpu(x, weight, bias, residual)
                    except RuntimeError:
                        kernels.check_known(self.activation, self._kernel_act)
                        raise
            elif x.is_cuda and self._late is None:
                out = self._on_cuda(x, weight, bias, residual)
        if out is None:
            return self._plain(x, residual)
        return out if self._late is None else self._late(out)

    def _plain(self, x: Tensor, residual: Tensor | None) -> Tensor:
        spec, how = self.spec, self._how
        if not spec.dims:
            out = F.linear(x, self.weight, self.bias)
        else:
            convolve = _CONVOLVE[spec.dims]
            out = convolve(self._padded(x), self.weight, self.bias, how.stride, how.padding, how.dilation, how.groups)
        return self._act(out if residual is None else out + residual)

    def _padded(self, x: Tensor) -> Tensor:
        """An input with the padding that the convolution itself cannot do."""
        if self.same:
            kernel = list(self.spec.kernel_size)
            pads = same_padding(list(x.shape[-len(kernel) :]), kernel, self._how.stride, self._how.dilation)
            return F.pad(x, pads) if any(pads) else x
        mode = self.spec.padding_mode
        return x if self._pad is None else F.pad(x, self._pad, "constant" if mode == "zeros" else mode)

    def _on_cpu(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor | None:
        """The fused kernel of oneDNN; None where it has none for this call."""
        rank = x.dim()
        if not self.spec.dims:
            if residual is not None or rank < 2 or not x.numel() or self._kernel_act[0] == "none":
                return None
            return kernels.multiply(x, weight, bias, self._kernel_act)
        if rank != self.spec.dims + 2 or rank not in FORMATS or not x.numel():
            return None
        if self.same or self._pad is not None:
            x = self._padded(x)
        if self._step and rank == 4 and residual is None and x.shape[2] == x.shape[3] == 1 and self.spec.groups == 1:
            product = F.linear(x.flatten(1), weight.flatten(1), bias)
            return (product if self._late is not None else self._act(product))[:, :, None, None]
        last, packs = FORMATS[rank], True
        if self.channels_last:
            x = x.contiguous(memory_format=last)
        else:
            packs = kernels.in_last(x)
        if not packs and self._thin and not kernels.chosen(x, weight, bias, self._how):
            return None
        if residual is not None:
            if not self._adds(x, weight, residual) or (not packs and x.dtype is not torch.float32):
                return None  # without packing it falls back to an addition that knows no half precision
            if packs:
                residual = residual.contiguous(memory_format=last)
        form = self._pack(weight, bias, x) if packs else weight
        if residual is not None:
            act = "relu" if self.activation == "relu" and self._late is None else None
            out = kernels.convolve_add(x, residual, form, bias, self._how, act)
        else:
            out = kernels.convolve(x, form, bias, self._how, self._kernel_act)
        if form is not weight and not _grad():
            self._compile(x, weight, bias, residual, out)
        return out

    def _on_cuda(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor | None:
        """A fused kernel on CUDA; None where there is none for this call."""
        spec = self.spec
        if self.activation != "relu" or bias is None or x.dtype not in kernels.CUDA_DTYPES or not x.numel():
            return None
        if not spec.dims:
            return None if residual is not None or x.dim() < 2 else kernels.multiply_on_cuda(x, weight, bias)
        if spec.dims != 2 or x.dim() != 4 or self.same or self._pad is not None:
            return None
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        in_last = self.channels_last or kernels.in_last(x)
        if self._step and spec.groups == 1 and residual is None and in_last:
            return kernels.multiply_on_cuda(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
        if max(spec.kernel_size) > kernels.LARGEST_ON_CUDA:
            return None
        if residual is not None and not self._adds(x, weight, residual):
            return None
        return kernels.convolve_on_cuda(x, residual, weight, bias, self._how)

    def _adds(self, x: Tensor, weight: Tensor, residual: Tensor) -> bool:
        """Whether the kernel can add this residual: the same shape, no gradient, and ReLU or nothing behind it."""
        if self.activation not in ("relu", "none") or not plain_input(residual) or residual.dtype is not x.dtype:
            return False
        if residual.device != x.device or (residual.requires_grad and _grad()):
            return False
        if residual.shape[:2] != (x.shape[0], weight.shape[0]):
            return False
        if self._step:
            return residual.shape[2:] == x.shape[2:]
        how = self._how
        facts = zip(x.shape[2:], self.spec.kernel_size, how.padding, how.stride, how.dilation)
        return tuple(residual.shape[2:]) == tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, p, s, d in facts)

    def _by_partition(self, packed: Packed, x: Tensor, residual: Tensor | None) -> Tensor | None:
        """Runs a partition; None where there is none for this call, or its inputs are not plain tensors."""
        if not plain_input(x) or x.dtype is not torch.float32 or not x.is_cpu:
            return None
        if self.same or self._pad is not None:
            x = self._padded(x)
        partition = packed.compiled.get((x.shape, residual is None))
        if partition is None or partition.threads != _threads() or x.requires_grad or not kernels.enabled():
            return None
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        elif not kernels.in_last(x):
            return None
        if residual is not None:
            if not self._adds(x, packed.weight, residual) or residual.requires_grad:
                return None
            residual = residual.contiguous(memory_format=torch.channels_last)
        partition.used = _now()
        out: Tensor = partition.run(x) if residual is None else partition.run(x, residual)
        return out

    def _compile(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> None:
        """Counts a call and makes a partition where it was the last before one pays."""
        packed, key = self._packed, (x.shape, residual is None)
        if packed is None or not partitions.worthwhile(x, out, weight) or not packed.due(key, partitions.CALLS):
            return
        act = self._act if self._late is None else ACTIVATIONS["none"].plain
        partition = partitions.compiled([x] if residual is None else [x, residual], weight, bias, self._how, act)
        if partition is not None:
            packed.add(key, partition)

    def _pack(self, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        """The weight in the layout that oneDNN wants for this input; the weight itself where it cannot be kept."""
        if self.spec.dims != 2 or weight.is_inference():
            return weight
        packed = self._packed
        if packed is None or not packed.of(weight, bias):
            packed = self._packed = Packed(weight, bias)
        return packed.form(x.shape, lambda: kernels.pack(weight, self._how, x.shape))

    def __getstate__(self) -> dict[str, object]:
        """Everything but what is worked out from it."""
        return {name: value for name, value in self.__dict__.items() if name not in _DERIVED}

    def __setstate__(self, state: dict[str, object]) -> None:
        parent: Any = super()
        parent.__setstate__({"keep_nan": False, **state})
        self._prepare()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PointwiseActivation:
        self._packed = None
        parent: Any = super()
        parent._apply(fn, recurse)
        return self

    def train(self, mode: bool = True) -> PointwiseActivation:
        """As ever; also drops the packed weights."""
        self._packed = None
        return super().train(mode)

    def unfused(self) -> tuple[nn.Module, nn.Module | None]:
        """The plain layer, which has this one's parameters, and the plain activation; None where there is none."""
        layer = make_layer(self.spec, same=self.same, device="meta", dtype=self.weight.dtype)
        layer._parameters.update(weight=self.weight, bias=self.bias)
        act = None if self.activation == "none" else activation_module(self.activation, self.scalars)
        return layer.train(self.training), act

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles in place of this layer."""
        return Unfused(*self.unfused())

    in_features = property(attrgetter("spec.in_channels"), doc="Input features of a linear map.")
    out_features = property(attrgetter("spec.out_channels"), doc="Output features of a linear map.")

    @property
    def padding(self) -> tuple[int, ...] | str:
        """Padding, ``same`` where it is not symmetric."""
        return "same" if self.same else super().padding

    def extra_repr(self) -> str:
        """The layer and its activation, in one line."""
        spec = self.spec
        kernel = f", kernel_size={spec.kernel_size}, stride={spec.stride}" if spec.dims else ""
        groups = f", groups={spec.groups}" if spec.groups > 1 else ""
        numbers = "".join(f", {number:g}" for number in self.scalars)
        flags = "".join(f", {flag}" for flag in ("channels_last", "keep_nan") if getattr(self, flag))
        return f"{spec.in_channels}, {spec.out_channels}{kernel}{groups}, {self.activation}{numbers}{flags}"
