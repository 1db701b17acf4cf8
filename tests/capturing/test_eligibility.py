"""Every reason for which a layer may not be replaced, and the layers that may."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from pwrewrite.capturing import Capture, capture
from pwrewrite.capturing.eligibility import Owners, eligible
from pwrewrite.core.convolution import ConvSpec
from pwrewrite.core.plan import Skip, SkipReason
from pwrewrite.layers import PointwiseActivation

X = torch.zeros(1, 4, 8, 8)


class Plain(nn.Module):
    """One convolution, ready to be tampered with."""

    def __init__(self, conv: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = conv or nn.Conv2d(4, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def verdict(model: nn.Module, path: str = "conv", x: Tensor = X) -> Skip | None:
    made = capture(model, x)
    layer = made.layer(path)
    found = eligible(made, layer)
    assert found == eligible(made, layer, Owners(made))
    if found is not None:
        assert found.path == layer.path
        assert found.detail
    return found


def reason(model: nn.Module, path: str = "conv", x: Tensor = X) -> SkipReason | None:
    found = verdict(model, path, x)
    return found.reason if found else None


def test_a_plain_layer_may_be_replaced() -> None:
    assert verdict(Plain()) is None
    assert verdict(Plain(nn.ConvTranspose2d(4, 6, 3))) is None
    assert verdict(Plain(nn.Linear(8, 2))) is None
    assert verdict(Plain().half(), x=X.half()) is None


def test_a_subclass_with_the_stock_forward_may() -> None:
    class Named(nn.Conv2d):
        pass

    assert verdict(Plain(Named(4, 6, 3))) is None


def test_a_module_under_two_names_may() -> None:
    class Aliased(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.also = self.conv

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + self.also(x)

    assert verdict(Aliased()) is None
    assert verdict(Aliased(), "also") is None


@pytest.mark.parametrize(
    ("register", "word"),
    [
        ("register_forward_hook", "forward hook"),
        ("register_forward_pre_hook", "forward pre-hook"),
        ("register_full_backward_hook", "backward hook"),
        ("register_full_backward_pre_hook", "backward pre-hook"),
        ("register_state_dict_post_hook", "state_dict hook"),
        ("register_load_state_dict_pre_hook", "load_state_dict pre-hook"),
    ],
)
def test_hooks(register: str, word: str) -> None:
    model = Plain()
    getattr(model.conv, register)(lambda *_: None)
    found = verdict(model)
    assert found is not None
    assert found.reason == SkipReason.HOOKS
    assert word in found.detail


def test_parametrized() -> None:
    for wrap in (parametrizations.weight_norm, parametrizations.spectral_norm):
        found = verdict(Plain(wrap(nn.Conv2d(4, 6, 3))))
        assert found is not None
        assert found.reason == SkipReason.PARAMETRIZED
        assert "remove_parametrizations" in found.detail


def test_parametrized_in_the_older_way() -> None:
    assert reason(Plain(nn.utils.spectral_norm(nn.Conv2d(4, 6, 3)))) == SkipReason.PARAMETRIZED
    pruned = nn.Conv2d(4, 6, 3)
    prune.l1_unstructured(pruned, "weight", amount=0.5)
    found = verdict(Plain(pruned))
    assert found is not None
    assert found.reason == SkipReason.PARAMETRIZED
    assert "prune.remove" in found.detail


def test_overridden_forward() -> None:
    class Scaled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    class Inner(nn.Conv2d):
        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(x, weight, bias)

    class Standardized(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight - self.weight.mean(), self.bias)

    for kind, reason in ((Scaled, "overridden-forward"), (Inner, "overridden-forward"), (Standardized, "parametrized")):
        found = verdict(Plain(kind(4, 6, 3)))
        assert found is not None
        assert found.reason == reason
        assert kind.__name__ in found.detail


def test_an_instance_with_a_forward_of_its_own() -> None:
    model = Plain()
    stock = model.conv.forward
    model.conv.forward = lambda x: stock(x) + 1  # type: ignore[method-assign]
    assert reason(model) == SkipReason.OVERRIDDEN_FORWARD


def test_a_linear_map_with_a_forward_of_its_own() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    assert reason(Plain(Doubled(8, 2))) == SkipReason.OVERRIDDEN_FORWARD


def test_a_weight_shared_by_two_modules() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    found = verdict(Tied(), "a")
    assert found is not None
    assert found.reason == SkipReason.SHARED_WEIGHT
    assert " b," in found.detail
    assert reason(Tied(), "b") == SkipReason.SHARED_WEIGHT


def test_a_weight_that_is_read_beside_the_call() -> None:
    class Regularized(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + self.conv.weight.mean()

    found = verdict(Regularized())
    assert found is not None
    assert found.reason == SkipReason.WEIGHT_READ
    assert "mean" in found.detail


class Functional(nn.Module):
    """Calls ``F.conv2d`` on a parameter of its own, so many times."""

    def __init__(self, calls: int = 1) -> None:
        super().__init__()
        self.calls = calls
        self.kernel = nn.Parameter(torch.zeros(4, 4, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.calls):
            x = F.conv2d(x, self.kernel, padding=1)
        return x


def test_functional_calls() -> None:
    assert reason(Functional(), "kernel") is None
    found = verdict(Functional(2), "kernel")
    assert found is not None
    assert found.reason == SkipReason.FUNCTIONAL
    assert "2 functional calls" in found.detail


def test_a_functional_weight_that_is_read_beside_the_call() -> None:
    class Both(Functional):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.kernel.sum()

    assert reason(Both(), "kernel") == SkipReason.WEIGHT_READ


def test_a_weight_computed_in_the_graph() -> None:
    class Computed(Functional):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.kernel * 2)

    made = capture(Computed(), X)
    (layer,) = made.layers
    assert layer.weight == ""
    found = eligible(made, layer)
    assert found is not None
    assert found.reason == SkipReason.PARAMETRIZED
    assert "computed in the graph" in found.detail


def test_a_fused_layer() -> None:
    fused = PointwiseActivation.of_layer(conv := nn.Conv2d(4, 6, 3), ConvSpec.of_module(conv), "relu")
    assert reason(Plain(fused)) == SkipReason.ALREADY_FUSED


def test_not_called() -> None:
    class Auxiliary(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.aux = nn.Conv2d(4, 6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + (self.aux(x) if self.training else 0)

    found = verdict(Auxiliary(), "aux")
    assert found is not None
    assert found.reason == SkipReason.NOT_CALLED
    assert "training" in found.detail


def test_not_traced(replace_coverage) -> None:
    class Auxiliary(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.aux = nn.Conv2d(4, 6, 3)

    made = replace_coverage(capture(Auxiliary(), X), "islands")
    found = eligible(made, made.layer("aux"))
    assert found is not None
    assert found.reason == SkipReason.NOT_TRACED


@pytest.fixture
def replace_coverage():
    from dataclasses import replace

    def change(made: Capture, kind: str) -> Capture:
        return replace(made, coverage=replace(made.coverage, capture=kind))

    return change


def test_complex_weights() -> None:
    model = Plain(nn.Conv2d(4, 6, 3, dtype=torch.complex64))
    assert reason(model, x=X.to(torch.complex64)) == SkipReason.COMPLEX


def test_lazy_and_quantized_weights() -> None:
    made = capture(Plain(), X)
    layer = made.layer("conv")

    class Packed(Tensor):
        """What a quantization library puts in place of a weight."""

    conv = made.model.conv
    stock = conv.weight
    conv.weight = nn.Parameter(stock.data.as_subclass(Packed))
    found = eligible(made, layer)
    assert found is not None
    assert found.reason == SkipReason.QUANTIZED
    assert "Packed" in found.detail

    conv.weight = nn.Parameter(stock.data.to(torch.int8), requires_grad=False)
    found = eligible(made, layer)
    assert found is not None
    assert found.reason == SkipReason.QUANTIZED

    conv.weight = nn.parameter.UninitializedParameter()
    found = eligible(made, layer)
    assert found is not None
    assert found.reason == SkipReason.LAZY

    made.model.conv = nn.LazyConv2d(6, 3)
    found = eligible(made, layer)
    assert found is not None
    assert found.reason == SkipReason.LAZY


def test_a_projection_that_attention_reads_without_calling_it() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]

    found = verdict(Attention().eval(), "attention.out_proj", torch.zeros(1, 5, 8))
    assert found is not None
    assert found.reason == SkipReason.WEIGHT_READ
    assert found.detail == "it is not called: its weight is read directly, by attention"


def test_parts_of_one_weight_are_no_computed_weight() -> None:
    class Halves(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            left = F.conv2d(x, self.weight[:8, :8], None, self.stride, self.padding)
            return torch.cat([left, F.conv2d(x, self.weight[8:, 8:], None, self.stride, self.padding)], 1)

    made = capture(nn.Sequential(Halves(16, 16, 3, padding=1)), torch.randn(1, 8, 8, 8))
    found = eligible(made, made.layer("0"))
    assert found is not None
    assert found.reason is SkipReason.OVERRIDDEN_FORWARD
    assert found.detail.endswith(
        "Halves uses parts of its weight (8×8 of 16×16 channels); make each a layer of its own"
    )
