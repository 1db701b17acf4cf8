"""From what a person types to a model: targets, weights, example inputs.

``open_target`` is the whole way; ``resolve_model``, ``load_weights`` and ``resolve_inputs`` are its three steps, for
callers who hold a part of it already. torchvision and timm are imported only when a target asks for them, and nothing
is downloaded.
"""

from ..core.options import TargetOptions as TargetOptions
from .inputs import describe_inputs as describe_inputs, parse_input as parse_input, resolve_inputs as resolve_inputs
from .opening import LoadedModel as LoadedModel, load as load, load_target as load_target, open_target as open_target
from .resolve import parse_target as parse_target, resolve_model as resolve_model
from .user_code import class_name as class_name
from .weights import fit_weights as fit_weights, load_weights as load_weights, strip_prefixes as strip_prefixes
