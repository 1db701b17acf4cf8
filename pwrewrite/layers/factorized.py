"""The modules that rewrites put in place of a convolution or a linear map.

Each is a chain of ordinary convolutions under names (``conv.reduce``, ``conv.core``, ``conv.expand``), so state_dict,
``.to()``, training, tracing and export see nothing new. Each also reads like the layer that it stands for:
``in_channels``, ``kernel_size``, ``stride``, … are those of the original, ``bias`` is that of the last stage, and a
transposed one takes ``output_size``.

Between the stages an architect may want a norm and an activation, as in GoogLeNet (Szegedy et al. 2014) and ResNet (He
et al. 2015): ``norm`` and ``activation`` put them after every stage but the last. Without them the chain is linear, and
holds exactly what its factors hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.convolution import ConvSpec, StandsForLayer
from ..core.errors import RefusedError, UsageError
from ..core.operations import OPERATIONS
from ..decompose import Factors
from ..forms import form_named
from ..forms.form import Form
from ..forms.specs import owns_axis, pointwise_spec

ACTIVATIONS: dict[str, type[nn.Module]] = {
    row.name: row.modules[0] for row in OPERATIONS if row.kind == "activation" and row.modules and row.name != "prelu"
}
"""Activations without parameters, which may follow the inner stages of a fresh chain."""

NORMS: dict[str, tuple[type[nn.Module], ...]] = {
    row.name: (row.modules[0], *row.modules) for row in OPERATIONS if row.name in ("batch_norm", "instance_norm")
}
"""Norms that may follow the inner stages of a fresh chain, by number of spatial dims."""

_CONVS: dict[tuple[int, bool], type[nn.Module]] = {
    (1, False): nn.Conv1d,
    (2, False): nn.Conv2d,
    (3, False): nn.Conv3d,
    (1, True): nn.ConvTranspose1d,
    (2, True): nn.ConvTranspose2d,
    (3, True): nn.ConvTranspose3d,
}


def make_layer(spec: ConvSpec, **factory: Any) -> nn.Module:
    """An ordinary layer from its shape facts.

    Args:
        spec: The convolution, or a linear map as one without spatial axes.
        **factory: ``device`` and ``dtype``.
    """
    if not spec.dims:
        return nn.Linear(spec.in_channels, spec.out_channels, bias=spec.bias, **factory)
    symmetric = all(left == right for left, right in spec.padding)
    settings: dict[str, Any] = {
        "kernel_size": spec.kernel_size,
        "stride": spec.stride,
        "padding": tuple(left for left, _ in spec.padding) if symmetric else "same",
        "dilation": spec.dilation,
        "groups": spec.groups,
        "bias": spec.bias,
        "padding_mode": spec.padding_mode,
    }
    if spec.transposed:
        settings["output_padding"] = spec.output_padding
    return _CONVS[spec.dims, spec.transposed](spec.in_channels, spec.out_channels, **settings, **factory)


class Factorized(StandsForLayer, nn.Module):
    """A layer as a chain of smaller ones.

    Args:
        spec: The layer that it stands for.
        form: The form of the chain.
        widths: The form's widths, per group.
        axes: The spatial axes of the first stage, where the form leaves a choice.
        norm: Name of a norm after every stage but the last, or None.
        activation: Name of an activation after every stage but the last, or None.
        device: Where the parameters live.
        dtype: Their dtype.

    Shape:
        - Input: ``(N, in_channels, *size)`` or unbatched; ``(*, in_features)`` for a linear map.
        - Output: as of the layer it stands for.
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
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.form, self.widths = spec, form, dict(widths)
        self.axes = None if axes is None else tuple(axes)
        self.norm, self.activation = norm, activation
        chain = form.stages(spec, widths, self.axes)
        self.stage_names = tuple(name for name, _ in chain)
        for i, (name, stage) in enumerate(chain):
            self.add_module(name, make_layer(stage, device=device, dtype=dtype))
            if i < len(chain) - 1:
                if norm is not None:
                    kind = _named(NORMS, norm, "norm")[spec.dims]
                    self.add_module(f"{name}_norm", kind(stage.out_channels, device=device, dtype=dtype))
                if activation is not None:
                    self.add_module(f"{name}_act", _named(ACTIVATIONS, activation, "activation")())

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Runs the stages in order.

        Args:
            x: ``(N, in_channels, *size)``.
            output_size: For a transposed convolution: the spatial size to make, as ``nn.ConvTranspose2d`` takes it.
        """
        for module in self._modules.values():
            if output_size is not None and getattr(module, "transposed", False):
                x = module(x, output_size=self._stage_size(module, x, output_size))  # type: ignore[misc]
            else:
                x = module(x)  # type: ignore[misc]
        return x

    def _stage_size(self, stage: Any, x: Tensor, wanted: Sequence[int]) -> list[int]:
        """The part of a wanted output size that is one stage's business."""
        spec = ConvSpec.of_module(stage)
        wanted = list(wanted)[-spec.dims :]
        return [wanted[i] if owns_axis(spec, i) else x.shape[i - spec.dims] for i in range(spec.dims)]

    def load_factors(self, factors: Factors, bias: Tensor | None) -> None:
        """Takes weights from a decomposition and the bias of the layer it stands for.

        Raises:
            RefusedError: If a factor does not fit into the range of the dtype.
        """
        with torch.no_grad():
            for name, stage in zip(self.stage_names, factors.stages(self.spec.transposed), strict=True):
                target: Any = getattr(self, name)
                target.weight.copy_(stage.weight.reshape(target.weight.shape))
                if not torch.isfinite(target.weight).all():
                    raise RefusedError(
                        "a factor is too large for the dtype of the weights",
                        where=name,
                        got=f"{float(stage.weight.abs().max()):.3g} in {target.weight.dtype}",
                        hint="rewrite the model in float32 and convert the result",
                    )
            if bias is not None:
                last: Any = getattr(self, self.stage_names[-1])
                last.bias.copy_(bias)

    @property
    def bias(self) -> Tensor | None:
        """The bias of the last stage."""
        last: Any = self._modules[self.stage_names[-1]]
        bias: Tensor | None = last.bias
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

    @property
    def in_features(self) -> int:
        """Input features of the layer it stands for."""
        return self.spec.in_channels

    @property
    def out_features(self) -> int:
        """Output features of the layer it stands for."""
        return self.spec.out_channels

    def _get_name(self) -> str:
        return "LowRankLinear"


def build(spec: ConvSpec, form: str, widths: Mapping[str, int], **settings: Any) -> Factorized:
    """The module for a form.

    Args:
        spec: The layer it stands for.
        form: Name of the form.
        widths: The form's widths, per group.
        **settings: As for `Factorized`.
    """
    return (Factorized if spec.dims else FactorizedLinear)(spec, form_named(form), widths, **settings)


class Projected(nn.Module):
    """A branch with a 1×1 projection behind it, as GoogLeNet's pool projection.

    Args:
        branch: What ran here before.
        channels: Channels that it returns.
        projected: Channels that leave the projection.
        dims: Number of spatial dims; 0 for features, which a linear map projects.
        device: Where the projection lives.
        dtype: Its dtype.

    Shape:
        - Input: as of the branch.
        - Output: that of the branch, with ``projected`` channels.
    """

    def __init__(
        self,
        branch: nn.Module,
        channels: int,
        projected: int,
        dims: int = 2,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.branch = branch
        self.project = make_layer(pointwise_spec(dims, channels, projected), device=device, dtype=dtype)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Runs the branch, then projects its channels."""
        out: Tensor = self.project(self.branch(*args, **kwargs))
        return out


def _named(table: Mapping[str, Any], name: str, what: str) -> Any:
    try:
        return table[name]
    except KeyError:
        raise UsageError(f"unknown {what} {name!r}", expected=f"one of {', '.join(table)}") from None
