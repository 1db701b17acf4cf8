"""From what a person types to a model: targets, weights, example inputs.

``open_target`` is the whole way; ``resolve_model``, ``load_weights`` and ``resolve_inputs`` are its three steps, for
callers who hold a part of it already. torchvision and timm are imported only when a target asks for them, and nothing
is downloaded.
"""

from ..core.numbers import parse_arg
from ..core.options import TargetOptions
from .defaults import forward_parameters
from .empty import empty_weights
from .inputs import ExampleInputs, InputSpec, describe_inputs, parse_input, resolve_inputs
from .opening import LoadedModel, load, load_target, open_target
from .resolve import TargetInfo, parse_target, resolve_model
from .user_code import class_name
from .weights import Fit, fit_weights, load_weights, strip_prefixes

__all__ = [
    "ExampleInputs",
    "Fit",
    "InputSpec",
    "LoadedModel",
    "TargetInfo",
    "TargetOptions",
    "class_name",
    "describe_inputs",
    "empty_weights",
    "fit_weights",
    "forward_parameters",
    "load",
    "load_target",
    "load_weights",
    "open_target",
    "parse_arg",
    "parse_input",
    "parse_target",
    "resolve_inputs",
    "resolve_model",
    "strip_prefixes",
]
