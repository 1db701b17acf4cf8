"""Recurrent layers (``torch.lstm``, ``gru``, ``rnn_tanh``, ``rnn_relu``) by rule: ``meta`` runs them step by step.

Every weight matrix is applied once per step and batch item, in every layer and direction::

    MACs = steps · batch · Σ numel(W)     over the input, hidden and projection weights
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


def _parts(args: Any) -> tuple[Any, Any, Any, Any]:
    """Input, initial state, weights and, for packed sequences, batch sizes."""
    if isinstance(args[3], (list, tuple)):
        return args[0], args[2], args[3], args[1]
    return args[0], args[1], args[2], None


def recurrent(*args: Any, **kwargs: Any) -> Any:
    """What a recurrent function returns: the output and the last state or states."""
    if kwargs:
        return NotImplemented
    x, state, _, packed = _parts(args)
    states = [state] if isinstance(state, Tensor) else list(state)
    bidirectional = bool(args[7 if packed is None else 8])
    shape = (*x.shape[:-1], states[0].shape[-1] * (2 if bidirectional else 1))
    if packed is None and bool(args[8]) and x.dim() == 3:  # batch first: the output is a transposed view
        out = torch.empty((shape[1], shape[0], shape[2]), dtype=x.dtype, device=x.device).transpose(0, 1)
    else:
        out = torch.empty(shape, dtype=x.dtype, device=x.device)
    return (out, *(torch.empty(s.shape, dtype=s.dtype, device=s.device) for s in states))


def recurrent_macs(args: Any, kwargs: Any, out: Any) -> int:
    """MACs of a recurrent function."""
    x, _, weights, _ = _parts(args)
    return int(x[..., 0].numel() * sum(w.numel() for w in weights if w.dim() == 2))
