"""Example inputs: what they may be, and what their tensors are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import Parameter, signature

import torch
from torch import Tensor, nn

from ..core.convolution import CONV_MODULES
from ..core.errors import InputError, shortened
from ..core.nested import Args, Kwargs, Tree, tensors_of

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
FRAMES = 16
"""Frames of a clip that nothing tells the length of."""
_SPATIAL: dict[int, tuple[int, ...]] = {1: (1024,), 2: (224, 224), 3: (FRAMES, 112, 112)}

Inputs = Tensor | Sequence[Tree] | Mapping[str, Tree]


def tensors_for(inputs: object) -> Tree:
    """Example inputs with a tensor where something else plainly stands for one: zeros for a shape, or a NumPy array's.

    ``(1, 3, 224, 224)`` is a shape, and so is every item of ``[(1, 3, 64, 64), (1, 10)]``; other values stay.
    """
    if isinstance(inputs, Tensor):
        return inputs
    if hasattr(inputs, "__array__"):
        return torch.as_tensor(inputs)
    if isinstance(inputs, Mapping):
        return {name: tensors_for(value) for name, value in inputs.items()}
    if isinstance(inputs, (tuple, list)) and inputs:
        if len(inputs) > 1 and all(type(n) is int and n > 0 for n in inputs):
            return torch.zeros(tuple(inputs))
        if all(isinstance(value, (tuple, list)) or hasattr(value, "__array__") for value in inputs):
            made = [tensors_for(value) for value in inputs]
            if hasattr(inputs, "_fields"):
                return type(inputs)(*made)
            return made if isinstance(inputs, list) else tuple(made)
    return inputs


def split_inputs(example_inputs: Inputs) -> tuple[Args, Kwargs]:
    """Example inputs as positional and keyword arguments; an `InputError` for what is neither a tensor, a sequence nor
    a mapping, or holds no tensor.
    """
    args: Args = ()
    kwargs: Kwargs = {}
    example_inputs = tensors_for(example_inputs)
    if isinstance(example_inputs, Tensor):
        args = (example_inputs,)
    elif isinstance(example_inputs, Mapping):
        kwargs = dict(example_inputs)
    elif isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        args = tuple(example_inputs)
    else:
        expected = "a tensor, a tuple of positional inputs or a dict of keyword inputs"
        got = type(example_inputs).__name__
        raise InputError("example inputs of a kind that no model takes", expected=expected, got=got)
    if not tensors_of((args, kwargs)):
        expected = "a tensor, a tuple of positional inputs, a dict of keyword ones, or a shape: (1, 3, 64, 64)"
        got = shortened(repr(example_inputs), 80)
        raise InputError("no tensor among the example inputs", expected=expected, got=got)
    return args, kwargs


def input_names(model: nn.Module, args: Args, kwargs: Kwargs) -> list[str]:
    """One name per input tensor: the forward parameter's, with the key in a dict, numbered in other containers."""
    try:
        parameters = [p for p in signature(model.forward).parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
    except (TypeError, ValueError):
        parameters = []
    names: list[str] = []
    for i, value in enumerate(args):
        name = f"input_{i}"
        if parameters:
            p = parameters[min(i, len(parameters) - 1)]
            name = f"{p.name}_{i}" if p.kind is Parameter.VAR_POSITIONAL else p.name if i < len(parameters) else name
        names += _numbered(name, value)
    for name, value in kwargs.items():
        names += _numbered(name, value)
    return names


def inputs_of_none(model: nn.Module, args: Args, kwargs: Kwargs) -> list[str]:
    """The parameters of ``forward`` that have no default and are given None."""
    try:
        bound = signature(model.forward).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return []
    parameters = bound.signature.parameters
    return [n for n, value in bound.arguments.items() if value is None and parameters[n].default is Parameter.empty]


def _numbered(name: str, value: object) -> list[str]:
    if isinstance(value, Tensor):
        return [name]
    count, named = len(tensors_of(value)), list[str]()
    if isinstance(value, Mapping) and all(str(key).isidentifier() for key in value):
        named = [each for key, item in value.items() for each in _numbered(f"{name}_{key}", item)]
    return named if named and len(named) == count else [f"{name}_{i}" for i in range(count)]


def first_layer(model: nn.Module) -> nn.Module | None:
    """The layer whose class tells what a model takes: its first convolution in the order of definition, or its first
    linear layer or embedding where no convolution comes that could see an input; None without any.
    """
    layers = [m for m in model.modules() if isinstance(m, (*CONV_MODULES, nn.Linear, nn.Embedding))]
    convolution = next((m for m in layers if isinstance(m, CONV_MODULES)), None)
    first = layers[0] if layers else None
    before = isinstance(first, nn.Linear) and (convolution is None or isinstance(convolution, _TRANSPOSED))
    return first if before or isinstance(first, nn.Embedding) else convolution


def shape_for(layer: nn.Module | None, *, channels: int = 0) -> tuple[int, ...]:
    """A shape for a layer of `first_layer`, with ``channels`` where it does not tell them; an image's without one."""
    if isinstance(layer, nn.Linear):
        return (1, layer.in_features or channels)
    if not isinstance(layer, CONV_MODULES):
        return (1, channels, *_SPATIAL[2])
    spatial = _SPATIAL[len(layer.kernel_size)]
    if isinstance(layer, _TRANSPOSED):  # a decoder or generator: it makes the image out of something small
        spatial = (1,) * len(spatial)
    return (1, layer.in_channels or channels, *spatial)


def example_of(model: nn.Module) -> str:
    """A shape such as the model's first layer takes, as it is typed; an image's where no layer tells."""
    layer = first_layer(model)
    if isinstance(layer, nn.Embedding):
        return "1x128:int64"
    return "x".join(map(str, shape_for(layer, channels=3)))
