"""Facts about torch functions by name: which read values, which move tensors between devices, which write in place."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, fx

from ..core.nested import Args, Kwargs, Tree
from ..core.operations import BY_FUNCTION, OPERATIONS


def words(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


VALUE_READS = words(
    """item _local_scalar_dense tolist __bool__ __int__ __float__ __index__ __complex__ numpy __array__ nonzero
    masked_select unique unique_consecutive bincount __contains__ equal allclose data_ptr"""
)
"""They need a tensor's values."""

PLAIN_ATTRIBUTES = words(
    """shape dtype ndim layout requires_grad is_sparse is_quantized is_nested names grad_fn is_leaf itemsize nbytes
    grad is_mkldnn is_sparse_csr is_inference _backward_hooks _base _version output_nr retains_grad volatile"""
)
"""Attributes that are the same on ``meta``."""

DEVICE_ATTRIBUTES = words("device is_cuda is_cpu is_meta is_xpu is_mps is_xla is_mtia is_maia is_vulkan")
"""Attributes that say where a tensor is."""

SILENT = words(
    """size numel nelement dim ndimension stride is_contiguous element_size is_floating_point is_complex __len__
    storage_offset get_device is_same_size is_signed requires_grad_ __hash__ __repr__ __format__ is_tensor
    result_type promote_types can_cast is_grad_enabled register_hook untyped_storage is_inference is_conj is_neg"""
)
"""They ask about a tensor and compute nothing."""

DEVICE_METHODS = words("cuda cpu xpu npu mtia ipu hpu")
"""They move a tensor to the device that they are named after."""

CASTS = DEVICE_METHODS | words("to type _to_copy")
"""They may move a tensor to a device."""

SOMETIMES_PRODUCTS = words(
    """einsum inner tensordot cdist multi_dot linalg_multi_dot chain_matmul matrix_power linalg_matrix_power
    corrcoef cov __rmatmul__ bilinear kron istft"""
)
"""Built-in functions that are a matrix product or not, depending on the arguments: free once is not free always; and
one that runs on ``meta`` only where it is priced."""

CONVOLUTIONS = frozenset(name for row in OPERATIONS if row.shape == "convolution" for name in row.functions)
WINDOWED = frozenset(f"{kind}_pool{d}d" for kind in ("max", "avg") for d in (1, 2, 3))


def writes(name: str, args: Args, kwargs: Kwargs) -> bool:
    """Whether a function writes into its first argument."""
    if name == "__setitem__" or (name[-1] == "_" and name[-2:] != "__") or (name[:3] == "__i" and name[3:4] != "n"):
        return name not in ("__index__", "__int__", "__invert__", "__iter__", "__instancecheck__")
    return (bool(kwargs) and bool(kwargs.get("inplace"))) or (
        name in BY_FUNCTION and BY_FUNCTION[name].kind == "activation" and any(a is True for a in args[1:])
    )


def is_method(func: object) -> bool:
    """Whether a torch function is a method of ``Tensor``."""
    return type(func).__name__ in ("method_descriptor", "wrapper_descriptor", "getset_descriptor") or (
        getattr(func, "__module__", None) == "torch._tensor"
    )


def function_name(node: fx.Node) -> str:
    """Name of the function or method that a node of a graph calls; of a module its path."""
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target))


def argument(node: fx.Node, position: int, name: str, default: object = None) -> Tree:
    """An argument of a call in a graph, by position or name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def is_device(value: object) -> bool:
    """Whether an argument names a device."""
    if isinstance(value, torch.device):
        return True
    return isinstance(value, str) and value.split(":")[0] in ("cpu", "cuda", "meta", "mps", "xpu")


INDEXED = frozenset(f"{kind}max_pool{d}d" for kind in ("", "adaptive_") for d in (2, 3))
"""Pooling that makes an index tensor beside its result, asked for or not."""


def temporary_bytes(name: str, values: Args, out: object) -> int:
    """Bytes that a function holds beside its result while it runs.

    Max pooling makes an index tensor; a batched matrix product copies operands with leading dims that are not one dim.
    """
    if name in INDEXED:
        return int(out.numel() * torch.int64.itemsize) if isinstance(out, Tensor) else 0
    if name not in ("matmul", "__matmul__"):
        return 0
    return sum(t.nbytes for t in values[:2] if t.dim() > 3 and not _one_batch(t))


def _one_batch(t: Tensor) -> bool:
    """Whether the leading dims of a tensor are one dim as they lie in memory."""
    lead = [(n, s) for n, s in zip(t.shape[:-2], t.stride()[:-2]) if n != 1]
    return all(outer == inner * n for (_, outer), (n, inner) in pairwise(lead))
