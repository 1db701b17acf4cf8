"""`PointwiseActivation`: a convolution or linear map and the activation behind it, in one kernel where that is right.

``act(W · x + b)`` or, with a second argument, ``act(W · x + b + residual)``. The parameters are ``weight`` and
``bias`` as the layer had them, so state_dict, ``.to()``, training, deepcopy and export see an ordinary layer. The fused
kernel runs on plain tensors that need no gradient (`kernels`); everywhere else, and for whoever traces, compiles,
exports or counts, this is the plain convolution followed by the plain activation.

On the CPU in channels_last the weight is packed once per input shape into the layout that oneDNN computes in, and a
layer that is called again and again with one shape becomes a partition (`graphs`), which costs less to call. That cache
is never saved, copied or pickled, and ends when the weight changes. A layer with the flag ``channels_last`` brings its
input into that format itself, so that the first one of a model converts for all. A 1×1 on a 1×1 map, as in
squeeze-excite blocks, is a matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.convolution import ConvSpec, StandsForLayer
from ..core.errors import UsageError
from . import cuda
from . import partitions as graphs
from .activations import ACTIVATIONS, checked
from .kernels import CPU_DTYPES, Packed, Partition, plain_tensors, unwatched

_mkldnn: Any = torch.ops.mkldnn
_unary: Any = _mkldnn._convolution_pointwise.default if CPU_DTYPES else None
_binary: Any = _mkldnn._convolution_pointwise.binary if CPU_DTYPES else None
_enabled: Any = torch._C._get_mkldnn_enabled
_CONVOLVE: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_FORMATS: dict[int, Any] = {4: torch.channels_last, 5: torch.channels_last_3d}
_compiling: Any = torch.compiler.is_compiling
_grad: Any = torch.is_grad_enabled
_threads: Any = torch.get_num_threads


class PointwiseActivation(StandsForLayer, nn.Module):
    """A convolution or linear map with its activation.

    Args:
        spec: The layer's shape facts; a linear map has no spatial axes. Not transposed.
        activation: One of `pwrewrite.layers.ACTIVATIONS`; ``none`` for the layer alone.
        scalars: The activation's numbers.
        channels_last: Whether inputs are brought into channels_last.
        same: Whether the padding is TensorFlow's ``SAME``, worked out from each input's size.
        device: Where the parameters live.
        dtype: Their dtype.

    Shape:
        - Input: ``(N, in_channels, *size)`` or unbatched; ``(*, in_features)`` for a linear map.
        - Residual: as the output.
        - Output: as of the layer.
    """

    def __init__(
        self,
        spec: ConvSpec,
        activation: str = "relu",
        scalars: Sequence[float] = (),
        *,
        channels_last: bool = False,
        same: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if spec.transposed:
            raise UsageError("a transposed convolution has no fused form", got=spec.op)
        self.spec, self.activation, self.scalars = spec, activation, checked(activation, scalars)
        self.channels_last, self.same = channels_last, same
        shape = spec.weight_shape
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias: nn.Parameter | None
        bias = nn.Parameter(torch.empty(spec.out_channels, device=device, dtype=dtype)) if spec.bias else None
        self.register_parameter("bias", bias)
        self._prepare()
        self.reset_parameters()

    @classmethod
    def of_layer(cls, layer: Any, spec: ConvSpec, activation: str, scalars: Sequence[float] = (), **flags: Any) -> Any:
        """The same with the parameters of a layer, which it takes over.

        Args:
            layer: A convolution or linear module.
            spec: Its shape facts.
            activation: As above.
            scalars: As above.
            **flags: ``channels_last`` and ``same``.
        """
        made = cls(spec, activation, scalars, device="meta", dtype=layer.weight.dtype, **flags)
        made._parameters["weight"] = layer._parameters["weight"]
        made._parameters["bias"] = layer._parameters["bias"]
        made.training = layer.training
        return made

    def _prepare(self) -> None:
        """What each call needs, worked out once."""
        spec, entry = self.spec, ACTIVATIONS[self.activation]
        self._packed: Packed | None = None
        self._act = entry.plain
        self._attr: list[Any] = [entry.attr, [*entry.fixed, *self.scalars], entry.algorithm]
        even = all(left == right for left, right in spec.padding)
        ahead = self.same or spec.padding_mode != "zeros" or not even
        self._pad: list[int] | None = None
        if ahead and not self.same and any(map(any, spec.padding)):
            self._pad = [side for pair in reversed(spec.padding) for side in pair]
        self._padding = [0 if ahead else left for left, _ in spec.padding]
        self._settings: list[Any] = [self._padding, list(spec.stride), list(spec.dilation), spec.groups]
        self._step = all(k == s == 1 for k, s in zip(spec.kernel_size, spec.stride)) and not any(self._padding)

    def reset_parameters(self) -> None:
        """Initialises as ``nn.Conv2d`` does."""
        if self.weight.is_meta:
            return
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        if self.bias is not None:
            fan = self.weight[0].numel()
            bound = fan**-0.5 if fan else 0.0
            nn.init.uniform_(self.bias, -bound, bound)

    # -------------------------------------------------------------------------------------------- running

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Runs the layer, adds the residual where there is one, and applies the activation."""
        if _compiling() or not unwatched():
            return self._plain(x, residual)
        weight, bias = self._parameters.get("weight"), self._parameters.get("bias")
        packed = self._packed
        if packed is not None and packed.partitions and not _grad() and packed.of(weight, bias):
            done = self._by_partition(packed, x, residual)
            if done is not None:
                return done
        if not plain_tensors(x, weight, bias):
            return self._plain(x, residual)
        out: Tensor | None = None
        if x.is_cpu:
            if x.dtype in CPU_DTYPES and _enabled():
                out = self._on_cpu(x, weight, bias, residual)
        elif x.is_cuda:
            out = cuda.run(self, x, weight, bias, residual)
        return self._plain(x, residual) if out is None else out

    def _plain(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """Convolution, addition, activation, one after the other."""
        spec = self.spec
        if not spec.dims:
            out = F.linear(x, self.weight, self.bias)
        else:
            padding, stride, dilation, groups = self._settings
            x = self._padded(x)
            out = _CONVOLVE[spec.dims](x, self.weight, self.bias, stride, padding, dilation, groups)
        if residual is not None:
            out = out + residual
        return self._act(out, *self.scalars)

    def _padded(self, x: Tensor) -> Tensor:
        """An input with the padding that the convolution itself cannot do."""
        if self.same:
            spec, pads = self.spec, list[int]()
            for i in reversed(range(spec.dims)):
                size, step = x.shape[i - spec.dims], spec.stride[i]
                reach = spec.dilation[i] * (spec.kernel_size[i] - 1) + 1
                total = max((-(-size // step) - 1) * step + reach - size, 0)
                pads += [total // 2, total - total // 2]
            return F.pad(x, pads) if any(pads) else x
        if self._pad is None:
            return x
        mode = self.spec.padding_mode
        return F.pad(x, self._pad, "constant" if mode == "zeros" else mode)

    def _on_cpu(self, x: Tensor, weight: Any, bias: Any, residual: Tensor | None) -> Tensor | None:
        """The fused kernel of oneDNN; None where it has none for this call."""
        rank = x.dim()
        if not self.spec.dims:
            if residual is not None or rank < 2 or not x.numel() or self.activation == "none":
                return None
            return _as_tensor(_mkldnn._linear_pointwise(x, weight, bias, *self._attr))
        if rank != self.spec.dims + 2 or rank not in _FORMATS or not x.numel():
            return None
        if self.same or self._pad is not None:
            x = self._padded(x)
        if self._step and rank == 4 and residual is None and x.shape[2] == x.shape[3] == 1 and self.spec.groups == 1:
            point: Tensor = self._act(F.linear(x.flatten(1), weight.flatten(1), bias), *self.scalars)
            return point[:, :, None, None]
        last = _FORMATS[rank]
        packs = x.is_contiguous(memory_format=last)
        if not packs and self.channels_last:
            x, packs = x.contiguous(memory_format=last), True
        if residual is not None:
            if not self._adds(x, weight, residual):
                return None
            if not packs and x.dtype is not torch.float32:
                return None  # falls back to an addition that knows no half precision
            if packs:
                residual = residual.contiguous(memory_format=last)
        form = self._pack(weight, bias, x) if packs else weight
        if residual is not None:
            unary = None if self.activation == "none" else "relu"
            out = _as_tensor(_binary(x, residual, form, bias, *self._settings, "add", 1.0, unary, [], ""))
        else:
            out = _as_tensor(_unary(x, form, bias, *self._settings, *self._attr))
        if form is not weight and not _grad():
            self._compile(x, weight, bias, residual, out)
        return out

    def _adds(self, x: Tensor, weight: Tensor, residual: Any) -> bool:
        """Whether the kernel can add this residual: the same shape, no gradient, and ReLU or nothing behind it."""
        if self.activation not in ("relu", "none") or type(residual) is not Tensor or residual.dtype is not x.dtype:
            return False
        if residual.device != x.device or residual.layout is not torch.strided or residual.is_neg():
            return False
        if residual.requires_grad and torch.is_grad_enabled():
            return False
        if residual.shape[:2] != (x.shape[0], weight.shape[0]):
            return False
        if self._step:
            return residual.shape[2:] == x.shape[2:]
        padding, stride, dilation, _ = self._settings
        facts = zip(x.shape[2:], self.spec.kernel_size, padding, stride, dilation)
        return tuple(residual.shape[2:]) == tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, p, s, d in facts)

    def _by_partition(self, packed: Packed, x: Any, residual: Any) -> Tensor | None:
        """Runs a partition; None where there is none for this call, or its inputs are not plain tensors."""
        if type(x) is not Tensor or x.dtype is not torch.float32 or not x.is_cpu or x.layout is not torch.strided:
            return None
        if x.is_neg():
            return None
        if self.same or self._pad is not None:
            x = self._padded(x)
        found = packed.partitions.get((x.shape, residual is None))
        if found is None or found.threads != _threads() or x.requires_grad or not _enabled():
            return None
        if not x.is_contiguous(memory_format=torch.channels_last):
            if not self.channels_last:
                return None
            x = x.contiguous(memory_format=torch.channels_last)
        if residual is None:
            return found.run(x)
        if not self._adds(x, packed.weight, residual) or residual.requires_grad:
            return None
        return found.run(x, residual.contiguous(memory_format=torch.channels_last))

    def _compile(self, x: Tensor, weight: Any, bias: Any, residual: Tensor | None, out: Tensor) -> None:
        """Counts a call and makes a partition where it was the last before one pays."""
        packed, key = self._packed, (x.shape, residual is None)
        if packed is None or not graphs.worthwhile(x, out, weight) or not packed.due(key, graphs.CALLS):
            return
        run = graphs.compiled(x, weight, bias, self._settings, self._act, self.scalars, adds=residual)
        if run is not None:
            packed.add(key, Partition(run, _threads()))

    def _pack(self, weight: Any, bias: Any, x: Tensor) -> Tensor:
        """The weight in the layout that oneDNN wants for this input; the weight itself where it cannot be kept."""
        if self.spec.dims != 2 or weight.is_inference():
            return weight  # type: ignore[no-any-return]
        packed = self._packed
        if packed is None or not packed.of(weight, bias):
            packed = self._packed = Packed(weight, bias)
        found = packed.get(x.shape)
        if found is not None:
            return found
        with torch.no_grad():
            made = _mkldnn._reorder_convolution_weight(weight.detach(), *self._settings, list(x.shape))
        return packed.put(x.shape, made)

    # --------------------------------------------------------------------------------- copies and conversions

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the packed weights."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_packed", "_act")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._packed, self._act = None, ACTIVATIONS[self.activation].plain

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._packed = None
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def train(self, mode: bool = True) -> PointwiseActivation:
        """As ever; also drops the packed weights."""
        self._packed = None
        return super().train(mode)

    # ------------------------------------------------------------------------------------- reads like the layer

    @property
    def in_features(self) -> int:
        """Input features of a linear map."""
        return self.spec.in_channels

    @property
    def out_features(self) -> int:
        """Output features of a linear map."""
        return self.spec.out_channels

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
        last = ", channels_last" if self.channels_last else ""
        return f"{spec.in_channels}, {spec.out_channels}{kernel}{groups}, {self.activation}{numbers}{last}"


def _as_tensor(out: Any) -> Tensor:
    assert isinstance(out, Tensor)
    return out
