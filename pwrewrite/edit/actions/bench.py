"""The model that a plan is being carried out on, and what every action asks of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass
from functools import partial
from typing import TypeVar, cast
from zlib import crc32

import torch
from torch import Tensor, nn

from ...capturing.code_trace import NotTraceable
from ...capturing.eligibility import find_holders, module_refusal
from ...core.convolution import CONV_MODULES, ConvSpec
from ...core.plan import Op, Skip, SkipReason
from ...decompose import Factors
from ...forms.specs import linear_spec
from ...layers.factorized import make_layer
from ...layers.kernels import FORMATS
from ...layers.known import hooked
from ..graph_edit import Regraphed
from ..swap import held_elsewhere, names_of, replace_module
from .evaluation import Functions, code_graph
from .settings import wrong

Function = Callable[[Tensor], Tensor]
_T = TypeVar("_T")
_M = TypeVar("_M", bound=nn.Module)


class WeightedModule(nn.Module):
    """A convolution or linear module, for types only."""

    weight: nn.Parameter
    bias: nn.Parameter | None


Decomposer = Callable[[Op, Tensor], Factors | None]
"""From an op and the layer's weight to factors of the form and widths that the op names; None for the plain ones."""
ELSEWHERE = "the plan was made for another model, or was carried out already"
"""What to try where a plan does not find what it was made for."""


class Refused(Exception):
    """An op that is not carried out, with the skip that says why."""

    def __init__(self, path: str, reason: SkipReason, detail: str) -> None:
        super().__init__(detail)
        self.skip = Skip(path, reason, detail)


@dataclass(eq=False)
class Bench:
    """A copy of a model on which ops are carried out one after the other."""

    model: nn.Module  # a deep copy of the model; changed by the ops
    original: InitVar[nn.Module]
    fill: bool  # whether new layers get weights; without it their parameters are unset, for saved ones
    known: dict[int, object]  # what was worked out before on another copy, by op; filled here
    decomposer: Decomposer | None  # gives a layer's factors; the plain decomposition of its weights where None

    def __post_init__(self, original: nn.Module) -> None:
        self._holders = find_holders(dict(self.model.named_modules(remove_duplicate=False)))
        self._held = held_elsewhere(self.model, original)

    def find(self, op: Op, path: str, key: str = "path") -> nn.Module:
        """The module under a path that an op names in a setting; raises `PlanError` if there is none."""
        try:
            return self.model.get_submodule(path)
        except AttributeError:
            hint = "the plan was made for another model, or for this one before another rewrite"
            message = f"the model has no module {path!r}"
            raise wrong(op, key, message, "a path of this model", path, hint) from None

    def tensor(self, op: Op, name: str, key: str) -> Tensor:
        """The parameter or buffer of a full name; raises `PlanError` if there is none."""
        owner, _, attribute = name.rpartition(".")
        tensor = getattr(self.find(op, owner, key), attribute, None)
        if not isinstance(tensor, Tensor):
            raise wrong(op, key, "the model has no such tensor", "a parameter or buffer", name)
        return tensor

    def layer(self, op: Op, path: str, spec: ConvSpec, key: str = "path") -> WeightedModule:
        """A convolution or linear module that an op was made for, with these shape facts, and that may be replaced.

        ``key`` is the setting that holds the path. Raises `PlanError` if there is no such module, else `Refused`.
        """
        module = self.same_layer(op, path, spec, key)
        skip = module_refusal(path, module, self._holders)
        if skip is not None:
            raise Refused(skip.path, skip.reason, skip.detail)
        return module

    def same_layer(self, op: Op, path: str, spec: ConvSpec, key: str = "path") -> WeightedModule:
        """As `layer`, for one whose code may be its own."""
        module = self.find(op, path, key)
        actual = spec_of_module(module)
        if actual is None:
            message, got = "the plan replaces a layer that is none here", f"{path} is a {type(module).__name__}"
            raise wrong(op, key, message, "a convolution or linear module", got, ELSEWHERE)
        check_spec(op, actual, spec, path)
        self.check_held(path, module)
        return cast("WeightedModule", module)

    def check_held(self, path: str, module: nn.Module) -> None:
        """Raises `Refused` where anything but the model's registrations refers to a module."""
        holder = self._held.get(id(module))
        if holder is not None:
            detail = f"also held by {holder}, which would keep calling the old one; register it as a submodule only"
            raise Refused(path, SkipReason.HELD_ELSEWHERE, detail)

    def check_removable(self, op: Op, path: str, module: nn.Module) -> None:
        """As `check_held`, for a module that goes: also where a hook sees its calls."""
        self.check_held(path, module)
        if hooked(module):
            what = "" if path == op.path else f"{path} "
            raise Refused(op.path, SkipReason.HOOKS, f"{what}has a hook, which would no longer be called")

    def graph(self, op: Op, module: nn.Module, functions: Functions = frozenset()) -> Regraphed:
        """A module's own code as a graph, to be changed and put in its place (see `code_graph`), or `Refused`."""
        self.check_held(op.path, module)
        try:
            return code_graph(module, functions)
        except NotTraceable as error:
            raise not_traced(op, error) from error

    def replace(self, old: nn.Module, new: nn.Module, path: str = "") -> tuple[str, ...]:
        """Puts a module in another's place, under every name; where it has a ``path``, its names beside that."""
        aliases = tuple(name for name in names_of(self.model, old) if name != path) if path else ()
        self.model = replace_module(self.model, old, new)
        return aliases

    def remove(self, module: nn.Module, path: str = "") -> tuple[str, ...]:
        """Puts an identity in a module's place; see `replace`."""
        return self.replace(module, nn.Identity().train(module.training), path)

    def once(self, op: Op, work: Callable[[], _T]) -> _T:
        """The result of the one long computation of an op, worked out for the first copy of the model."""
        if id(op) not in self.known:
            self.known[id(op)] = work()
        return cast("_T", self.known[id(op)])


def not_traced(op: Op, why: object) -> Refused:
    """An op that the code around its layer does not let happen."""
    return Refused(op.path, SkipReason.NOT_TRACED, str(why))


def param_count(*modules: nn.Module) -> int:
    """Parameters of some modules."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def spec_of_module(module: nn.Module) -> ConvSpec | None:
    """Shape facts of a convolution or linear module; None for anything else."""
    if isinstance(module, nn.Linear):
        return linear_spec(module.in_features, module.out_features, module.bias is not None)
    return ConvSpec.of_module(module) if isinstance(module, CONV_MODULES) else None


def check_spec(op: Op, actual: ConvSpec, spec: ConvSpec, name: str) -> None:
    """Raises `PlanError` where an op was made for another layer."""
    if actual != spec:
        message, hint = "the plan was made for another layer", "make the plan anew for this model"
        raise wrong(op, "layer", message, f"{name} is {_brief(actual)}", _brief(spec), hint)


def _brief(spec: ConvSpec) -> str:
    """A layer in a few words, for an error."""
    kernel = "×".join(map(str, spec.kernel_size)) + " convolution" if spec.dims else "linear map"
    kernel = f"transposed {kernel}" if spec.transposed else kernel
    settings = f", stride {spec.stride}, groups {spec.groups}" if spec.dims else ""
    return f"a {kernel} {spec.in_channels}→{spec.out_channels}{settings}, {'a' if spec.bias else 'no'} bias"


def same_outputs(
    first: Function, second: Function, inputs: Sequence[Tensor], rtol: float = 1e-2, atol: float = 1e-3
) -> bool | None:
    """Whether two functions give the same tensors; None where one of them fails."""
    try:
        with torch.no_grad():
            pairs = [(first(x.clone()), second(x)) for x in inputs]
        alike = all(isinstance(a, Tensor) and a.shape == b.shape for a, b in pairs)
        return alike and all(torch.allclose(a, b, rtol, atol, equal_nan=True) for a, b in pairs)
    except Exception:
        return None


def train_like(parameter: nn.Parameter, *sources: Tensor | None) -> None:
    """Makes a parameter need a gradient where any of what it was made of does."""
    parameter.requires_grad_(any(source is not None and source.requires_grad for source in sources))


def make_like(weight: Tensor, path: str, make: Callable[..., _M], *, initialised: bool) -> _M:
    """A new module with the device, dtype and memory format of the weight that it replaces; ``make`` takes a device.

    ``path`` seeds its initialisation, if it is to have one: equal on every device, and no random generator moves.
    """
    if weight.is_meta or not initialised:
        new = make(device="meta") if weight.is_meta else make(device="meta").to_empty(device=weight.device)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(crc32(path.encode()))
            new = make(device="cpu").to(weight.device)
    memory_format = FORMATS.get(weight.dim(), torch.contiguous_format)
    if not weight.is_contiguous() and weight.is_contiguous(memory_format=memory_format):
        new = new.to(memory_format=memory_format)
    return new


def layer_like(weight: Tensor, path: str, spec: ConvSpec, *, initialised: bool) -> WeightedModule:
    """As `make_like`, an ordinary layer of some shape."""
    make = partial(make_layer, spec, dtype=weight.dtype)
    return cast("WeightedModule", make_like(weight, path, make, initialised=initialised))
