"""The modules that rewrites put in place of a convolution or a linear map.

Each is a chain of ordinary convolutions under names (``conv.reduce``, ``conv.core``, ``conv.expand``), so state_dict,
``.to()``, training, tracing and export see nothing new. Each also reads like the layer that it stands for: its
``in_channels``, ``kernel_size``, …, the ``bias`` of the last stage, and ``output_size`` where it is transposed. Between
the stages an architect may want a norm and an activation, as in GoogLeNet (Szegedy et al. 2014) and ResNet (He et al.
2015). Without them the chain is linear, and holds exactly what its factors hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..core.convolution import ConvSpec, StandsForLayer
from ..core.errors import RefusedError
from ..core.operations import OPERATIONS
from ..decompose import Factors
from ..forms import FORMS
from ..forms.form import Form
from ..forms.specs import owns_axis
from .unfused import SamePadded

ACTIVATIONS: dict[str, type[nn.Module]] = {
    row.name: row.modules[0] for row in OPERATIONS if row.kind == "activation" and row.modules and row.name != "prelu"
}
"""Activations without parameters, which may follow the inner stages of a fresh chain."""

NORMS: dict[str, tuple[type[nn.Module], ...]] = {
    row.name: (row.modules[0], *row.modules) for row in OPERATIONS if row.name in ("batch_norm", "instance_norm")
}
"""Norms that may follow the inner stages of a fresh chain, by number of spatial dims."""

Device = torch.device | str | None


def make_layer(
    spec: ConvSpec, *, same: bool = False, device: Device = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """An ordinary layer from its shape facts; with ``same`` one that pads as TensorFlow's ``SAME``."""
    channels, factory = (spec.in_channels, spec.out_channels), {"device": device, "dtype": dtype}
    if not spec.dims:
        return nn.Linear(*channels, bias=spec.bias, device=device, dtype=dtype)
    facts = ("kernel_size", "stride", "dilation", "groups", "bias")
    settings: dict[str, object] = {name: getattr(spec, name) for name in facts}
    if same:
        kind: type[nn.Module] = SamePadded
        return kind(*channels, **settings, **factory)
    symmetric = all(left == right for left, right in spec.padding)
    settings["padding"] = tuple(left for left, _ in spec.padding) if symmetric else "same"
    settings |= {"output_padding": spec.output_padding} if spec.transposed else {}
    kind = getattr(nn, f"Conv{'Transpose' * spec.transposed}{spec.dims}d")
    return kind(*channels, **settings, padding_mode=spec.padding_mode, **factory)


class Factorized(StandsForLayer, nn.Module):
    """A layer as a chain of smaller ones; takes and returns what the layer does.

    Args:
        spec: The layer that it stands for.
        form: The form of the chain.
        widths: The form's widths, per group.
        axes: The spatial axes of the first stage, where the form leaves a choice.
        norm: Name of a norm after every stage but the last, one of `NORMS`.
        activation: Likewise, one of `ACTIVATIONS`.
        device: Where the parameters live.
        dtype: Their dtype.
    """

    def __init__(
        self,
        spec: ConvSpec,
        form: Form,
        widths: Mapping[str, int],
        *,
        axes: Sequence[int] | None = None,
        norm: str | None = None,
        activation: str | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.form, self.widths = spec, form, dict(widths)
        self.axes = None if axes is None else tuple(axes)
        self.norm, self.activation = norm, activation
        chain = form.stages(spec, widths, self.axes)
        self.stage_names = tuple(name for name, _ in chain)
        for name, stage in chain:
            self.add_module(name, make_layer(stage, device=device, dtype=dtype))
            if name != self.stage_names[-1] and norm is not None:
                between = NORMS[norm][spec.dims](stage.out_channels, device=device, dtype=dtype)
                self.add_module(f"{name}_norm", between)
            if name != self.stage_names[-1] and activation is not None:
                self.add_module(f"{name}_act", ACTIVATIONS[activation]())

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Runs the stages in order; ``output_size`` is as ``nn.ConvTranspose2d`` takes it."""
        modules: Mapping[str, Any] = self._modules
        for module in modules.values():
            if output_size is not None and getattr(module, "transposed", False):
                spec = ConvSpec.of_module(module)
                wanted, size = output_size[-spec.dims :], x.shape[-spec.dims :]
                x = module(x, output_size=[wanted[i] if owns_axis(spec, i) else size[i] for i in range(spec.dims)])
            else:
                x = module(x)
        return x

    def load_factors(self, factors: Factors, bias: Tensor | None) -> None:
        """Takes weights from a decomposition, and a bias; raises `RefusedError` where the dtype is too small."""
        with torch.no_grad():
            for name, stage in zip(self.stage_names, factors.stages(self.spec.transposed), strict=True):
                weight = self.get_parameter(f"{name}.weight")
                weight.copy_(stage.weight.reshape(weight.shape))
                if not torch.isfinite(weight).all():
                    message, hint = "a factor is too large for the dtype of the weights", "rewrite the model in float32"
                    got = f"{float(stage.weight.abs().max()):.3g} in {weight.dtype}"
                    raise RefusedError(message, where=name, got=got, hint=f"{hint} and convert the result")
            if bias is not None:
                self.get_parameter(f"{self.stage_names[-1]}.bias").copy_(bias)

    @property
    def bias(self) -> Tensor | None:
        """The bias of the last stage."""
        bias: Tensor | None = getattr(self, self.stage_names[-1]).bias
        return bias

    def extra_repr(self) -> str:
        """The layer it stands for, in one line."""
        widths = ", ".join(f"{name}={width}" for name, width in self.widths.items())
        kernel = f", kernel_size={self.spec.kernel_size}" if self.spec.dims else ""
        return f"{self.spec.in_channels}, {self.spec.out_channels}{kernel}, {self.form.name}, {widths}"

    def _get_name(self) -> str:
        return self.form.title


class FactorizedLinear(Factorized):
    """A linear map as a chain of smaller ones."""

    in_features = property(attrgetter("spec.in_channels"), doc="Input features of the layer it stands for.")
    out_features = property(attrgetter("spec.out_channels"), doc="Output features of the layer it stands for.")

    def _get_name(self) -> str:
        return "LowRankLinear"


def build(spec: ConvSpec, form: str, widths: Mapping[str, int], **settings: Any) -> Factorized:
    """The module for a form by name; ``settings`` as for `Factorized`."""
    return (Factorized if spec.dims else FactorizedLinear)(spec, FORMS[form], widths, **settings)


class Projected(nn.Module):
    """A branch with a 1×1 projection behind it, as GoogLeNet's pool projection."""

    def __init__(self, branch: nn.Module, project: nn.Module) -> None:
        super().__init__()
        self.branch, self.project = branch, project

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Runs the branch, then projects its channels."""
        out: Tensor = self.project(self.branch(*args, **kwargs))
        return out
