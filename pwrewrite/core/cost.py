"""What operations cost, from shapes alone: MACs of every matrix-product-like aten operation, in an open table.

MACs are multiply-accumulates and FLOPs are 2 × MACs. The table follows what ``torch.utils.flop_counter`` counts, and
adds what it leaves out: matrix-vector products, attention kernels, deformable convolution. Elementwise arithmetic,
norms, pooling and data movement have no MACs by this convention (`FREE`). An operation in neither table is
*unpriced*: it is reported, never taken for zero in silence.

`register_formula` adds a formula for an operation of one's own::

    register_formula(torch.ops.mylib.correlate, lambda args, kwargs, out: out.numel() * args[1].shape[1])
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .convolution import ConvSpec

aten = torch.ops.aten

Formula = Callable[[tuple[Any, ...], dict[str, Any], Any], int]


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of an operation, a layer or a model.

    Attributes:
        params: Parameter elements.
        macs: Multiply-accumulates.
        read_bytes: Bytes of activations and weights read.
        write_bytes: Bytes of activations written.
    """

    params: int = 0
    macs: int = 0
    read_bytes: int = 0
    write_bytes: int = 0

    @property
    def flops(self) -> int:
        """Floating-point operations, 2 × MACs."""
        return 2 * self.macs

    @property
    def bytes(self) -> int:
        """Bytes moved, read and written."""
        return self.read_bytes + self.write_bytes

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.params + other.params,
            self.macs + other.macs,
            self.read_bytes + other.read_bytes,
            self.write_bytes + other.write_bytes,
        )

    def __sub__(self, other: Cost) -> Cost:
        return Cost(
            self.params - other.params,
            self.macs - other.macs,
            self.read_bytes - other.read_bytes,
            self.write_bytes - other.write_bytes,
        )


def matmul_macs(left: tuple[int, ...], out: tuple[int, ...]) -> int:
    """MACs of a matrix product: every output element sums over the left operand's last axis."""
    return prod(out) * left[-1]


def attention_macs(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...]) -> int:
    """MACs of softmax(Q Kᵀ) V for ``(…, L, E)``, ``(…, S, E)``, ``(…, S, Ev)``: L·S·(E + Ev) per head and batch
    item.
    """
    *lead, length, width = query
    return prod(lead) * length * key[-2] * (width + value[-1])


def _product(position: int) -> Formula:
    return lambda args, kwargs, out: matmul_macs(tuple(args[position].shape), tuple(out.shape))


def _convolution(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    x, weight, _, stride, padding, dilation, transposed, output_padding, groups = args[:9]
    spec = ConvSpec.of_call(
        weight.shape, stride, padding, dilation, groups, transposed=transposed, output_padding=output_padding
    )
    return spec.macs(tuple(x.shape), tuple(out.shape))


def _pointwise_convolution(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    return int(prod(args[1].shape) * out.numel() // out.shape[1])


def _attention(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    return attention_macs(tuple(args[0].shape), tuple(args[1].shape), tuple(args[2].shape))


def _rnn_layer(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    x, w_input, w_hidden = args[0], args[1], args[2]
    return int(x.shape[0] * x.shape[1] * (w_input.numel() + w_hidden.numel()))


def _deform_conv2d(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    return int(out.numel() * prod(args[1].shape[1:]))


FORMULAS: dict[Any, Formula] = {
    aten.mm: _product(0),
    aten.addmm: _product(1),
    aten.bmm: _product(0),
    aten.baddbmm: _product(1),
    aten.addbmm: lambda args, kwargs, out: prod(args[1].shape) * int(args[2].shape[-1]),
    aten.mv: lambda args, kwargs, out: prod(args[0].shape),
    aten.addmv: lambda args, kwargs, out: prod(args[1].shape),
    aten.dot: lambda args, kwargs, out: prod(args[0].shape),
    aten.vdot: lambda args, kwargs, out: prod(args[0].shape),
    aten._addmm_activation: _product(1),
    aten._int_mm: _product(0),
    aten._scaled_mm: _product(0),
    aten.convolution: _convolution,
    aten._convolution: _convolution,
    aten.convolution_overrideable: _convolution,
    aten._scaled_dot_product_flash_attention: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_efficient_attention: _attention,
    aten._scaled_dot_product_cudnn_attention: _attention,
    aten._scaled_dot_product_fused_attention_overrideable: _attention,
    aten.mkldnn_rnn_layer: _rnn_layer,
}
"""Operation (an ``OpOverloadPacket``) to its MACs."""

_LAZY_FORMULAS: dict[str, Formula] = {
    "torchvision::deform_conv2d": _deform_conv2d,
    "mkldnn::_convolution_pointwise": _pointwise_convolution,
    "mkldnn::_convolution_pointwise_": _pointwise_convolution,
    "mkldnn::_linear_pointwise": _product(0),
}
"""The same by name, for operations of libraries that need not be loaded."""

FREE: set[str] = set()
"""Qualified names (``aten::cat``) of operations that have no MACs: movement, reductions, norms, pooling,
comparisons.
"""

_FREE_ATEN = """
    _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d avg_pool1d avg_pool2d avg_pool3d
    max_pool2d_with_indices max_pool3d_with_indices max_pool2d mkldnn_max_pool2d max_unpool2d max_unpool3d
    _adaptive_avg_pool2d_backward fractional_max_pool2d
    native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training native_layer_norm native_group_norm
    _fused_rms_norm rms_norm batch_norm cudnn_batch_norm miopen_batch_norm native_dropout
    _softmax _log_softmax _safe_softmax _masked_softmax logsumexp softmax
    mean sum amax amin max min prod std var std_mean var_mean var_mean.correction norm linalg_vector_norm _weight_norm
    _weight_norm_interface argmax argmin any all aminmax median nanmedian cumsum cumprod count_nonzero
    cat stack concatenate split split_with_sizes chunk unbind index index_select gather take embedding
    index_put index_put_ _index_put_impl_ index_add index_add_ index_copy index_copy_ index_fill index_fill_ scatter
    scatter_ scatter_add scatter_add_ scatter_reduce masked_fill masked_fill_ masked_select masked_scatter where
    constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
    replication_pad3d pad roll flip rot90 repeat repeat_interleave tile
    upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
    _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d
    _upsample_bilinear2d_aa _upsample_bicubic2d_aa grid_sampler_2d grid_sampler_3d affine_grid_generator
    _grid_sampler_2d_cpu_fallback
    pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle im2col col2im unfold_copy
    clone copy_ copy _to_copy to contiguous lift_fresh lift_fresh_copy detach detach_ alias empty empty_like
    empty_strided new_empty new_empty_strided new_zeros new_ones new_full zeros zeros_like ones ones_like full full_like
    arange linspace logspace eye scalar_tensor rand rand_like randn randn_like randint randperm bernoulli bernoulli_
    normal_ uniform_ random_ fill_ fill zero_ zero tril triu tril_ triu_ tril_indices triu_indices
    diag diagonal diag_embed diagonal_copy meshgrid one_hot bucketize searchsorted
    sort topk nonzero nonzero_static unique_dim _unique2 unique_consecutive argsort isin kthvalue
    _local_scalar_dense item equal is_same_size
    _assert_async _assert_tensor_metadata _unsafe_view _reshape_alias view_as_real view_as_complex resize_
    view reshape expand permute transpose t squeeze unsqueeze select slice narrow as_strided unfold movedim
    set_ _conj _neg_view resolve_conj resolve_neg complex polar
    _nested_tensor_from_mask bincount histc multinomial floor_divide unsafe_split unsafe_split_with_sizes unsafe_chunk
"""
FREE.update(f"aten::{name}" for name in _FREE_ATEN.split())
FREE.update({"torchvision::nms", "torchvision::roi_align", "torchvision::ps_roi_align", "torchvision::roi_pool"})


def register_formula(op: Any, formula: Formula) -> None:
    """Gives an operation its cost.

    Args:
        op: An ``OpOverloadPacket`` such as ``torch.ops.mylib.correlate``.
        formula: ``formula(args, kwargs, out) -> MACs``, from shapes alone: the tensors may be on ``meta``.
    """
    FORMULAS[op] = formula


def price(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int | None:
    """MACs of one dispatched operation.

    Args:
        op: The ``OpOverload`` that ran.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        out: What it returned.

    Returns:
        MACs, 0 for an operation known to have none, None where no formula is known.
    """
    packet = op.overloadpacket
    formula = FORMULAS.get(packet)
    name = packet._qualified_op_name
    if formula is None:
        formula = _LAZY_FORMULAS.get(name)
    if formula is not None:
        return formula(args, kwargs, out[0] if isinstance(out, tuple) else out)
    if name in FREE or torch.Tag.pointwise in op.tags or torch.Tag.inplace_view in op.tags or _is_view(op):
        return 0
    return None


def _is_view(op: Any) -> bool:
    """Whether every output is an alias of an input that is not written: a view, by the operation's schema."""
    returns = op._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


class PricingMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the MACs of everything that runs under it, and lists what has no formula.

    Attributes:
        macs: MACs so far.
        unpriced: Qualified names of operations without a formula, one entry per call.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs = 0
        self.unpriced: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the operation and adds its cost."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        cost = price(func, args, kwargs, out)
        if cost is None:
            self.unpriced.append(func.overloadpacket._qualified_op_name)
        else:
            self.macs += cost
        return out
