"""Every operation that the package knows by name, in one table: `OPERATIONS`.

A row says under which name captured graphs, reports and passes speak of an operation, which modules, torch functions
and dispatched operations carry it out, how its output's shape follows, what it costs, which kernel can apply it behind
a convolution, and what is exact about it. A new activation or a new operation with a cost is a new row (and a test).

MACs are multiply-accumulates and FLOPs are 2 × MACs. Formulas follow ``torch.utils.flop_counter`` and add what it
leaves out: matrix-vector products, recurrent layers, deformable convolution. Elementwise arithmetic, norms, pooling
and data movement have no MACs. An operation in no row and not in `FREE` is *unpriced*: reported, never taken for zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .convolution import CONV_MODULES, ConvSpec
from .nested import Args, Kwargs

Formula = Callable[[Args, Kwargs, Tensor], int]
"""``formula(args, kwargs, out) -> MACs``, from shapes alone."""


@dataclass(frozen=True, slots=True)
class FusedActivation:
    """An activation that a kernel can apply while it still holds a convolution's output: ``plain(x, *scalars)``.

    Plans call it ``name``, oneDNN ``attr`` and, where there are several approximations, ``algorithm``. It takes
    ``count`` numbers; ``fixed`` are those that oneDNN wants and that its name already says.
    """

    name: str
    plain: Callable[..., Tensor]
    attr: str
    count: int = 0
    algorithm: str = ""
    fixed: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation, by its canonical name.

    Attributes:
        kind: ``activation``, ``elementwise`` (of one tensor), ``arithmetic`` (of several, broadcast), ``norm``,
            ``dropout``, ``cast``, ``pool``, ``product`` or ``movement``.
        shape: Name of the rule in `pwrewrite.capturing.shapes` for its output's shape; empty where it runs on ``meta``.
        modules: Modules whose forward is nothing but this.
        functions: Names of torch functions and tensor methods; those with ``_`` behind work in place.
        dispatched: Names of the operations that reach the dispatcher, ``aten::`` left out.
        macs: Its cost, for functions and dispatched operations alike; None where it has no MACs.
        scalars: Names and defaults of the numbers that the kernel takes: attributes of the module, arguments of the
            function from the second on.
        linear: Whether it applies one linear map to every channel, so that a 1×1 convolution may move across it.
    """

    name: str
    kind: str
    shape: str = ""
    modules: tuple[type[nn.Module], ...] = ()
    functions: tuple[str, ...] = ()
    dispatched: tuple[str, ...] = ()
    macs: Formula | None = None
    kernel: FusedActivation | None = None
    scalars: tuple[tuple[str, float | None], ...] = ()
    linear: bool = False

    @property
    def pointwise(self) -> bool:
        """Whether every position of its output depends on that position of its inputs only."""
        return self.kind in ("activation", "elementwise", "arithmetic", "norm", "dropout", "cast")

    @property
    def names(self) -> set[str]:
        """Its names in captured graphs, where a function's is that of the function without underscores."""
        return {self.name, *(function.strip("_") for function in self.functions)}


def _product(position: int, *names: str) -> Formula:
    """A product whose left operand, dense or sparse, is the argument at ``position``, or under one of ``names``."""

    def macs(args: Args, kwargs: Kwargs, out: Tensor) -> int:
        left = args[position] if len(args) > position else next(kwargs[name] for name in names if name in kwargs)
        if left.layout is not torch.strided:  # every stored element meets every column
            return int(left._nnz() * out.shape[-1])
        return int(prod(out.shape) * left.shape[-1])

    return macs


def _linear(args: Args, kwargs: Kwargs, out: Tensor) -> int:
    return int(out.numel() * (args[1] if len(args) > 1 else kwargs["weight"]).shape[-1])


def _attention(args: Args, kwargs: Kwargs, out: Tensor) -> int:
    """softmax(Q Kᵀ) V of ``(…, L, E)``, ``(…, S, E)``, ``(…, S, Ev)``: L·S·(E + Ev) per head and batch item."""
    tensors = [*args[:3], *(kwargs[name] for name in ("query", "key", "value") if name in kwargs)]
    (*_, length, width), key, value = (tuple(t.shape) for t in tensors[:3])
    return int(prod(out.shape[:-2]) * length * key[-2] * (width + value[-1]))


_ORDER = {
    "conv": ("bias", "stride", "padding", "dilation", "groups"),
    "conv_transpose": ("bias", "stride", "padding", "output_padding", "groups", "dilation"),
    "convolution": ("bias", "stride", "padding", "dilation", "transposed", "output_padding", "groups"),
}
"""Arguments of the convolution functions behind input and weight."""


def convolution_call(name: str, args: Args, kwargs: Kwargs) -> tuple[ConvSpec, Tensor, Tensor | None]:
    """The spec, weight and bias of a call of ``conv1d`` … ``conv_transpose3d`` or the dispatched ``convolution``."""
    order = _ORDER[name.strip("_").removesuffix("_overrideable").rstrip("123d")]
    settings = {**dict(zip(("input", "weight", *order), args)), **kwargs}
    weight, bias = settings["weight"], settings.get("bias")
    chosen = {key: settings[key] for key in order[1:] if key in settings}
    chosen.setdefault("transposed", "transpose" in name)
    return ConvSpec.of_call(weight.shape, bias=bias is not None, **chosen), weight, bias


def _convolution(name: str) -> Formula:
    def macs(args: Args, kwargs: Kwargs, out: Tensor) -> int:
        x = args[0] if args else kwargs["input"]
        return convolution_call(name, args, kwargs)[0].macs(tuple(x.shape), tuple(out.shape))

    return macs


def _recurrent(args: Args, kwargs: Kwargs, out: Tensor) -> int:
    """Every weight matrix is applied once per step and batch item, in every layer and direction."""
    weights = args[3] if isinstance(args[3], (list, tuple)) else args[2]  # packed sequences bring batch sizes along
    return int(args[0][..., 0].numel() * sum(w.numel() for w in weights if w.dim() == 2))


def _convolution_backward(args: Args, kwargs: Kwargs, out: Tensor) -> int:
    """The gradients of input and weight cost what the convolution costs, each where it is asked for."""
    grad, x, weight, _, stride, padding, dilation, transposed, extra, groups, mask = args
    how = {"transposed": transposed, "output_padding": extra}
    spec = ConvSpec.of_call(weight.shape, stride, padding, dilation, groups, **how)
    return spec.macs(tuple(x.shape), tuple(grad.shape)) * (bool(mask[0]) + bool(mask[1]))


def _attention_backward(args: Args, kwargs: Kwargs, out: Tensor) -> int:
    """Five products: the scores once more, and the gradients of values, scores, queries and keys."""
    query, key, value = (tuple(t.shape) for t in args[1:4])
    return int(prod(query[:-1]) * key[-2] * (3 * query[-1] + 2 * value[-1]))


def _activation(
    module: type[nn.Module] | None,
    name: str,
    attr: str = "",
    fixed: tuple[float, ...] = (),
    *,
    algorithm: str = "",
    scalars: tuple[tuple[str, float | None], ...] = (),
) -> Operation:
    """An activation; one that oneDNN fuses under the name ``attr``, where that is given."""
    plain = getattr(F, name, None) or getattr(torch, name)
    fused = FusedActivation(name, plain, attr, len(scalars), algorithm, fixed) if attr else None
    modules = () if module is None else (module,)
    return Operation(name, "activation", "same", modules, (name,), kernel=fused, scalars=scalars)


_HARDTANH = _activation(nn.Hardtanh, "hardtanh", "hardtanh", scalars=(("min_val", -1.0), ("max_val", 1.0)))


def _each(kind: str, shape: str, names: str, *, linear: bool = False) -> Iterator[Operation]:
    for name in names.split():
        yield Operation(name.strip("_"), kind, shape, (), (name,), linear=linear)


def _activations() -> Iterator[Operation]:
    yield _activation(nn.ReLU, "relu", "relu")
    yield _activation(nn.ReLU6, "relu6", "hardtanh", (0.0, 6.0))
    yield _activation(nn.SiLU, "silu", "swish")
    yield _activation(nn.GELU, "gelu", "gelu", algorithm="none")
    tanh = FusedActivation("gelu_tanh", partial(F.gelu, approximate="tanh"), "gelu", algorithm="tanh")
    yield Operation("gelu_tanh", "activation", kernel=tanh)  # how plans name F.gelu(x, approximate="tanh")
    yield _activation(nn.Hardswish, "hardswish", "hardswish")
    yield _activation(nn.Hardsigmoid, "hardsigmoid", "hardsigmoid")
    yield _HARDTANH
    limits = (("min", None), ("max", None))
    yield Operation("clamp", "elementwise", "same", (), ("clamp", "clip"), kernel=_HARDTANH.kernel, scalars=limits)
    yield _activation(nn.LeakyReLU, "leaky_relu", "leaky_relu", scalars=(("negative_slope", 0.01),))
    yield _activation(nn.Sigmoid, "sigmoid", "sigmoid")
    yield _activation(nn.Tanh, "tanh", "tanh")
    yield _activation(nn.ELU, "elu")
    yield _activation(nn.SELU, "selu")
    yield _activation(nn.CELU, "celu")
    yield _activation(nn.Mish, "mish")
    yield _activation(nn.Softplus, "softplus")
    yield _activation(None, "softsign")
    yield Operation("prelu", "activation", "same", (nn.PReLU,))  # as a function it takes a weight
    yield Operation("logsigmoid", "activation", "default", functions=("logsigmoid", "log_sigmoid"))
    yield from _each("activation", "", "rrelu hardshrink softshrink tanhshrink")


def _arithmetic() -> Iterator[Operation]:
    yield from _each("elementwise", "same", "exp sqrt rsqrt abs log log1p expm1 sin cos erf square sign reciprocal")
    yield from _each("elementwise", "same", "floor ceil round clamp_min clamp_max threshold")
    yield from _each("elementwise", "same", "neg", linear=True)
    yield from _each("elementwise", "", "nan_to_num logical_not __invert__")
    yield from _each("arithmetic", "broadcast", "mul div true_divide divide multiply", linear=True)
    yield from _each("arithmetic", "broadcast", "add sub subtract pow maximum minimum __rsub__ __rdiv__ __rpow__")
    yield from _each("arithmetic", "", "rsub __radd__ __rmul__ __rtruediv__ __truediv__ __floordiv__ __iadd__ __isub__")
    yield from _each("arithmetic", "", "__imul__ __idiv__ __itruediv__ addcmul addcdiv lerp floor_divide remainder")
    yield from _each("arithmetic", "", "fmod where masked_fill __eq__ __ne__ __lt__ __le__ __gt__ __ge__ eq ne lt le")
    yield from _each("arithmetic", "", "gt ge logical_and logical_or __and__ __or__ __xor__")


def _norms() -> Iterator[Operation]:
    legit = ("_native_batch_norm_legit", "_native_batch_norm_legit_no_training")
    dispatched = ("native_batch_norm", *legit, "batch_norm", "cudnn_batch_norm", "miopen_batch_norm")
    batch = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    yield Operation("batch_norm", "norm", "format", batch, ("batch_norm",), dispatched)
    yield Operation("group_norm", "norm", "format", (nn.GroupNorm,), ("group_norm",), ("native_group_norm",))
    yield Operation("rms_norm", "norm", "format", (), ("rms_norm",), ("_fused_rms_norm", "rms_norm"))
    instance = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
    yield Operation("instance_norm", "norm", "default", instance, ("instance_norm",))
    yield Operation("layer_norm", "norm", "layer", (nn.LayerNorm,), ("layer_norm",), ("native_layer_norm",))
    yield from _each("norm", "same", "local_response_norm normalize")


def _noise_and_casts() -> Iterator[Operation]:
    modules = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
    names = "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout"
    yield Operation("dropout", "dropout", "", modules, tuple(names.split()), ("native_dropout",), linear=True)
    yield Operation("identity", "cast", "input", (nn.Identity,), linear=True)
    yield from _each("cast", "", "contiguous clone to float half bfloat16 double", linear=True)
    yield from _each("cast", "", "type type_as detach copy lift_fresh requires_grad")


def _movement() -> Iterator[Operation]:
    yield Operation("softmax", "movement", "", (nn.Softmax,), ("softmax",))
    yield Operation("log_softmax", "movement", "", (nn.LogSoftmax,), ("log_softmax",))
    yield Operation("flatten", "movement", "", (nn.Flatten,), ("flatten",))
    yield from _each("movement", "cat", "cat concat concatenate")
    yield from _each("movement", "reduce", "mean sum")
    yield from _each("movement", "resize", "interpolate", linear=True)
    for d in (1, 2, 3):
        for kind in ("max", "avg"):
            for prefix, shape in (("", "pool"), ("adaptive_", "adaptive")):
                name, module = f"{prefix}{kind}_pool{d}d", f"{prefix[:-1].title()}{kind.title()}Pool{d}d"
                yield Operation(name, "pool", shape, (getattr(nn, module),), (name,), linear=kind == "avg")


def _products() -> Iterator[Operation]:
    functions: tuple[str, ...]
    dispatched: tuple[str, ...]
    for module in CONV_MODULES:
        kind, d = ("conv_transpose" if "Transpose" in module.__name__ else "conv"), module.__name__[-2:]
        yield Operation(kind + d, "product", "convolution", (module,), (kind + d,), macs=_convolution(kind))
    dispatched = ("convolution", "_convolution", "convolution_overrideable")
    yield Operation("convolution", "product", "convolution", (), dispatched, dispatched, _convolution("convolution"))
    yield Operation("linear", "product", "linear", (nn.Linear,), ("linear",), macs=_linear)
    functions = ("matmul", "__matmul__", "mm", "bmm", "mv", "dot")
    dispatched = ("mm", "bmm", "mv", "dot", "vdot", "_sparse_mm", "_int_mm", "_scaled_mm")
    yield Operation("matmul", "product", "", (), functions, dispatched, _product(0, "input", "self"))
    functions = ("addmm", "baddbmm", "addmv")
    dispatched = (*functions, "_addmm_activation", "_sparse_addmm")
    yield Operation("addmm", "product", "", (), functions, dispatched, _product(1, "mat1", "batch1", "mat"))
    kernels = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
    attention = tuple(f"_scaled_dot_product_{kernel}" for kernel in (*kernels, "fused_attention_overrideable"))
    yield Operation("attention", "product", "", (), ("scaled_dot_product_attention",), attention, _attention)
    yield Operation("lstm", "product", "recurrent", (), ("lstm", "gru", "rnn_tanh", "rnn_relu"), (), _recurrent)
    pointwise: Formula = lambda args, kwargs, out: int(prod(args[1].shape) * out.numel() // out.shape[1])
    formulas: dict[str, Formula] = {
        "addbmm": lambda args, kwargs, out: prod(args[1].shape) * int(args[2].shape[-1]),
        "convolution_backward": _convolution_backward,
        **{f"{kernel}_backward": _attention_backward for kernel in attention},
        "mkldnn_rnn_layer": lambda args, kwargs, out: prod(args[0].shape[:2]) * (args[1].numel() + args[2].numel()),
        "torchvision::deform_conv2d": lambda args, kwargs, out: out.numel() * prod(args[1].shape[1:]),
        "mkldnn::_convolution_pointwise": pointwise,
        "mkldnn::_convolution_pointwise_": pointwise,
        "mkldnn::_linear_pointwise": _product(0),
    }
    for name, macs in formulas.items():
        yield Operation(name.split("::")[-1], "product", dispatched=(name,), macs=macs)


_ROWS = (_activations, _arithmetic, _norms, _noise_and_casts, _movement, _products)
OPERATIONS: tuple[Operation, ...] = tuple(row for rows in _ROWS for row in rows())

BY_FUNCTION: dict[str, Operation] = {name: operation for operation in OPERATIONS for name in operation.functions}
"""Name of a torch function or tensor method to its row."""


def _qualified(name: str) -> str:
    return name if "::" in name else f"aten::{name}"


FORMULAS: dict[str, Formula] = {_qualified(n): row.macs for row in OPERATIONS for n in row.dispatched if row.macs}
"""Qualified name of a dispatched operation (``aten::mm``) to its MACs."""

_MOVEMENT = """
    _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d avg_pool1d avg_pool2d avg_pool3d
    max_pool2d_with_indices max_pool3d_with_indices max_pool2d mkldnn_max_pool2d max_unpool2d max_unpool3d
    _adaptive_avg_pool2d_backward fractional_max_pool2d
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
    unfold_backward
    clone copy_ copy _to_copy to contiguous lift_fresh lift_fresh_copy detach detach_ alias empty empty_like
    empty_strided new_empty new_empty_strided new_zeros new_ones new_full zeros zeros_like ones ones_like full full_like
    hann_window hamming_window blackman_window bartlett_window kaiser_window
    arange linspace logspace eye scalar_tensor rand rand_like randn randn_like randint randperm bernoulli bernoulli_
    normal_ uniform_ random_ fill_ fill zero_ zero tril triu tril_ triu_ tril_indices triu_indices
    diag diagonal diag_embed diagonal_copy meshgrid one_hot bucketize searchsorted
    sort topk nonzero nonzero_static unique_dim _unique2 unique_consecutive argsort isin kthvalue
    _local_scalar_dense item equal is_same_size _is_all_true _is_any_true
    _assert_async _assert_tensor_metadata _unsafe_view _reshape_alias view_as_real view_as_complex resize_
    view reshape expand permute transpose t squeeze unsqueeze select slice narrow as_strided unfold movedim
    _has_same_storage_numel _efficientzerotensor _make_dual _unpack_dual _fw_primal _zerotensor
    select_copy dequantize quantize_per_tensor quantize_per_channel _to_sparse _to_dense to_padded_tensor
    set_ _conj _neg_view resolve_conj resolve_neg complex polar
    _nested_tensor_from_mask bincount histc multinomial floor_divide unsafe_split unsafe_split_with_sizes unsafe_chunk
    mse_loss smooth_l1_loss huber_loss binary_cross_entropy nll_loss_forward nll_loss2d_forward soft_margin_loss
    multi_margin_loss multilabel_margin_loss_forward
    torchvision::nms torchvision::roi_align torchvision::ps_roi_align torchvision::roi_pool
"""
FREE: frozenset[str] = frozenset(
    _qualified(name)
    for name in (*_MOVEMENT.split(), *(name for row in OPERATIONS if row.macs is None for name in row.dispatched))
)
"""Qualified names of dispatched operations that have no MACs: movement, reductions, norms, pooling, comparisons."""

FREE_FUNCTIONS: frozenset[str] = frozenset(
    (
        *(name for row in OPERATIONS if row.macs is None for name in row.functions),
        *(name for name in _MOVEMENT.split() if "::" not in name),
        *("__getitem__", "__setitem__", "unflatten", "expand_as", "view_as", "reshape_as", "swapaxes", "broadcast_to"),
    )
)
"""Names of torch functions that have no MACs whatever their arguments."""
