"""What is counted, and how often: traps that other tools fall into, against a count by hand or torch's own counter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

from pwrewrite.capturing import Capture, capture, info
from pwrewrite.core.cost import register_formula
from pwrewrite.core.operations import FORMULAS


class Fn(nn.Module):
    """A function with the given modules and parameters as attributes."""

    def __init__(self, function: Any, **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def macs(captured: Capture) -> int:
    return sum(info(node).cost.macs for node in captured.graph.nodes)


def node_params(captured: Capture) -> int:
    return sum(info(node).cost.params for node in captured.graph.nodes)


def counted(model: nn.Module, *inputs: Tensor) -> int:
    """MACs by torch's own counter."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.eval()(*inputs)
    return counter.get_total_flops() // 2


X = torch.zeros(2, 4, 10, 10)


# ------------------------------------------------------------------------------------------------ convolutions


def test_functional_convolution_is_a_layer_of_its_module() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(6, 4, 3, 3))
            self.bias = nn.Parameter(torch.zeros(6))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight, self.bias, padding=1)

    made = capture(nn.Sequential(Functional()), X)
    assert macs(made) == 2 * 100 * 6 * 4 * 9
    assert node_params(made) == made.params == 6 * 4 * 9 + 6
    (layer,) = made.layers
    assert (layer.path, layer.functional, layer.weight, layer.op) == ("0", True, "0.weight", "conv2d")
    assert made.coverage.convolutions == made.coverage.in_graph == 1


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 8, 3),
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2),
        nn.Conv2d(4, 4, 3, groups=4, dilation=2),
        nn.Conv2d(4, 8, (1, 3), padding="same"),
        nn.Conv2d(4, 8, 3, padding=2, padding_mode="circular"),
        nn.ConvTranspose2d(4, 8, 3, stride=2),
        nn.ConvTranspose2d(4, 8, 4, stride=2, padding=1, groups=4, output_padding=1),
        nn.ConvTranspose2d(4, 6, 3, stride=3, dilation=2, groups=2),
    ],
    ids=str,
)
def test_convolutions_count_as_torch_counts(layer: nn.Module) -> None:
    made = capture(layer, X)
    assert macs(made) == counted(layer, X)
    assert made.layers[0].path == ""
    assert made.layers[0].calls[0].output_shape == tuple(layer(X).shape)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose3d])
def test_one_and_three_dims(kind: Any) -> None:
    layer = kind(4, 6, 3, stride=2, padding=1, groups=2)
    x = torch.zeros(2, 4, *[8] * len(layer.kernel_size))
    made = capture(layer, x)
    assert macs(made) == counted(layer, x)
    assert made.layers[0].calls[0].output_shape == tuple(layer(x).shape)


def test_unbatched_convolution() -> None:
    layer = nn.Conv2d(4, 8, 3)
    assert macs(capture(layer, (X[0],))) == 64 * 8 * 4 * 9


def test_transposed_convolution_called_with_output_size() -> None:
    model = Fn(
        lambda s, x: s.up(s.down(x), output_size=x.shape), down=nn.Conv2d(4, 4, 3, 2), up=nn.ConvTranspose2d(4, 4, 3, 2)
    )
    made = capture(model, X)
    assert made.layer("up").calls[0].output_shape == tuple(X.shape)
    assert macs(made) == counted(model, X)


def test_module_called_twice_is_one_layer_with_two_calls() -> None:
    model = Fn(lambda s, x: s.c(s.c(x)), c=nn.Conv2d(4, 4, 3, padding=1))
    made = capture(model, X)
    (layer,) = made.layers
    assert len(layer.calls) == 2
    assert layer.params == made.params == node_params(made) == 4 * 4 * 9 + 4
    assert macs(made) == layer.macs == 2 * layer.calls[0].cost.macs == counted(model, X)


def test_aliases_are_one_layer() -> None:
    conv = nn.Conv2d(4, 4, 1)
    made = capture(nn.Sequential(conv, nn.ReLU(), conv), X)
    (layer,) = made.layers
    assert (layer.path, layer.aliases, len(layer.calls)) == ("0", ("2",), 2)
    assert made.layer("2") is layer


def test_tied_weights_count_once() -> None:
    a, b = nn.Conv2d(4, 4, 3, bias=False), nn.Conv2d(4, 4, 3, bias=False)
    b.weight = a.weight
    made = capture(nn.Sequential(a, b), X)
    assert made.params == node_params(made) == 4 * 4 * 9
    assert [len(layer.calls) for layer in made.layers] == [1, 1]


def test_subclass_with_the_stock_forward_is_a_leaf() -> None:
    class Mine(nn.Conv2d):
        pass

    made = capture(nn.Sequential(Mine(4, 4, 3)), X)
    assert [n.op for n in made.graph.nodes] == ["placeholder", "call_module", "output"]
    assert not made.layers[0].functional


def test_subclass_that_standardizes_its_weight_is_counted() -> None:
    class Standardized(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            w = self.weight
            w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
            return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)

    model = nn.Sequential(Standardized(4, 8, 3, padding=1, groups=2))
    made = capture(model, X)
    assert macs(made) == counted(model, X)
    (layer,) = made.layers
    assert (layer.path, layer.functional, layer.weight) == ("0", True, "0.weight")
    assert layer.spec is not None
    assert layer.spec.groups == 2
    assert node_params(made) == made.params


def test_subclass_that_pads_itself_is_counted() -> None:
    timm_layers = pytest.importorskip("timm.layers")
    model = nn.Sequential(timm_layers.Conv2dSame(4, 8, 3, stride=2), timm_layers.StdConv2d(8, 8, 3))
    made = capture(model, X)
    assert macs(made) == counted(model, X)
    assert [layer.path for layer in made.layers] == ["0", "1"]
    assert node_params(made) == made.params


@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.spectral_norm], ids=["weight_norm", "spectral_norm"])
@pytest.mark.filterwarnings("ignore")
def test_weight_computed_by_a_hook(wrap: Any) -> None:
    model = nn.Sequential(wrap(nn.Conv2d(4, 8, 3)))
    made = capture(model, X)
    (layer,) = made.layers
    assert (layer.path, layer.weight) == ("0", "")
    assert made.coverage.capture == "whole"
    assert layer.macs == 2 * 64 * 8 * 4 * 9
    assert made.params == node_params(made) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_weight_computed_by_a_parametrization(wrap: Any) -> None:
    model = nn.Sequential(wrap(nn.Conv2d(4, 8, 3)))
    made = capture(model, X)
    (layer,) = made.layers
    assert (layer.path, layer.weight) == ("0", "")
    assert layer.macs == 2 * 64 * 8 * 4 * 9
    assert layer.params == made.params == node_params(made) == sum(p.numel() for p in model.parameters())
    # spectral norm multiplies the weight by a vector, which torch's counter leaves out
    assert macs(made) - layer.macs == (8 * 36 + 8 if wrap is parametrizations.spectral_norm else 0)


def test_weight_of_an_unused_parametrized_layer_is_not_computed() -> None:
    class Counting(nn.Module):
        calls = 0

        def forward(self, weight: Tensor) -> Tensor:
            Counting.calls += 1
            return weight * 2

    unused = nn.Conv2d(4, 4, 3)
    nn.utils.parametrize.register_parametrization(unused, "weight", Counting())
    before = Counting.calls
    made = capture(Fn(lambda s, x: s.used(x), used=nn.Conv2d(4, 4, 1), unused=unused), X)
    assert Counting.calls == before
    assert [(layer.called, layer.params) for layer in made.layers] == [(True, 20), (False, 4 * 4 * 9 + 4)]


def test_layers_unused_in_evaluation_are_listed() -> None:
    model = Fn(lambda s, x: s.aux(x) if s.training else s.main(x), main=nn.Conv2d(4, 4, 1), aux=nn.Conv2d(4, 8, 3))
    model.train()
    made = capture(model, X)
    assert {layer.path: layer.called for layer in made.layers} == {"main": True, "aux": False}
    assert (made.coverage.convolutions, made.coverage.in_graph) == (2, 1)
    assert made.params == sum(p.numel() for p in model.parameters())
    assert model.training
    assert capture(model, X, training=True).layer("aux").called


def test_module_made_inside_forward() -> None:
    model = Fn(lambda s, x: nn.Conv2d(4, 8, 3)(x))
    made = capture(model, X)
    assert macs(made) == 2 * 64 * 8 * 4 * 9
    assert made.params == 0


# --------------------------------------------------------------------------------------------------- products

A, B, V = torch.zeros(5, 6), torch.zeros(6, 7), torch.zeros(6)


@pytest.mark.parametrize(
    ("function", "inputs", "expected"),
    [
        (lambda s, a, b: a @ b, (A, B), 5 * 6 * 7),
        (lambda s, a, b: torch.mm(a, b), (A, B), 5 * 6 * 7),
        (lambda s, a, b: b.t().matmul(a.t()), (A, B), 5 * 6 * 7),
        (lambda s, a, v: a @ v, (A, V), 5 * 6),
        (lambda s, a, v: torch.mv(a, v), (A, V), 5 * 6),
        (lambda s, v, b: v @ b, (V, B), 6 * 7),
        (lambda s, v, w: v @ w, (V, V), 6),
        (lambda s, v, w: torch.dot(v, w), (V, V), 6),
        (lambda s, v, a: torch.addmv(torch.zeros(5), a, v), (V, A), 5 * 6),
        (lambda s, a, b: torch.addmm(torch.zeros(5, 7), a, b), (A, B), 5 * 6 * 7),
        (lambda s, a, b: torch.baddbmm(torch.zeros(3, 5, 7), a, b), (torch.zeros(3, 5, 6), torch.zeros(3, 6, 7)), 630),
        (lambda s, a, b: torch.bmm(a, b), (torch.zeros(3, 5, 6), torch.zeros(3, 6, 7)), 630),
        (lambda s, a, b: a @ b, (torch.zeros(2, 1, 5, 6), torch.zeros(3, 6, 7)), 2 * 630),
        (lambda s, a, b: torch.einsum("ij,jk->ik", a, b), (A, B), 5 * 6 * 7),
        (lambda s, a, b: torch.einsum("bij,bjk->bik", a, b), (torch.zeros(3, 5, 6), torch.zeros(3, 6, 7)), 630),
        (lambda s, a, b: torch.tensordot(a, b, 1), (A, B), 5 * 6 * 7),
        (lambda s, a, b: F.linear(a, b.t()), (A, B), 5 * 6 * 7),
        (lambda s, a, b: torch.inner(a, b.t()), (A, B), 5 * 6 * 7),
        (lambda s, a, b: torch.linalg.multi_dot([a, b]), (A, B), 5 * 6 * 7),
        (lambda s, a, b: a.matmul(b).relu_().sum(), (A, B), 5 * 6 * 7),
        (lambda s, a, b: F.mse_loss(a, a * 2) + F.smooth_l1_loss(a, a) + a.matmul(b).sum(), (A, B), 5 * 6 * 7),
    ],
)
def test_products(function: Any, inputs: tuple[Tensor, ...], expected: int) -> None:
    made = capture(Fn(function), inputs)
    assert macs(made) == expected
    assert made.coverage.unpriced == ()


def test_what_was_no_product_once_may_be_one_later() -> None:
    model = Fn(
        lambda s, a, b, v: (torch.inner(a, a.new_ones(())), torch.einsum("i,j->ij", v, v), torch.inner(a, b.t()))
    )
    assert macs(capture(model, (A, B, V))) == 5 * 6 * 7


def test_linear_layers() -> None:
    made = capture(nn.Sequential(nn.Flatten(2), nn.Linear(100, 7)), X)
    (layer,) = made.layers
    assert (layer.op, layer.macs, layer.in_channels, layer.out_channels) == ("linear", 2 * 4 * 100 * 7, 100, 7)
    assert layer.spec is None
    assert made.coverage.convolutions == 0


# -------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("causal", [False, True])
def test_attention_function(causal: bool) -> None:
    q, k, v = torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 7, 8), torch.zeros(2, 3, 7, 4)
    made = capture(Fn(lambda s, *qkv: F.scaled_dot_product_attention(*qkv, is_causal=causal)), (q, k, v))
    assert macs(made) == 2 * 3 * 5 * 7 * (8 + 4)
    assert "attention" in [info(node).op for node in made.graph.nodes]


def attention_by_hand(tokens: int, width: int, batch: int) -> int:
    return batch * (4 * tokens * width * width + 2 * tokens * tokens * width)


def test_multi_head_attention() -> None:
    x = torch.zeros(2, 5, 16)
    layer = nn.MultiheadAttention(16, 4, batch_first=True)
    for weights in (False, True):
        made = capture(Fn(lambda s, x, w=weights: s.a(x, x, x, need_weights=w)[0], a=layer), x)
        assert macs(made) == attention_by_hand(5, 16, 2)
        assert node_params(made) == made.params


def test_transformer_layer() -> None:
    x = torch.zeros(2, 5, 16)
    made = capture(nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2), x)
    assert macs(made) == 2 * (attention_by_hand(5, 16, 2) + 2 * 2 * 5 * 16 * 32)
    assert node_params(made) == made.params
    assert made.coverage.capture == "whole"


# -------------------------------------------------------------------------------------------------- recurrent


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize("real", ["meta", "real"])
def test_recurrent_layers(kind: Any, gates: int, real: str) -> None:
    x = torch.zeros(2, 5, 8)
    model = Fn(lambda s, x: s.r(x)[0], r=kind(8, 6, num_layers=2, batch_first=True, bidirectional=True))
    made = capture(model, x, values=real)
    first, second = gates * 6 * (8 + 6), gates * 6 * (12 + 6)
    assert macs(made) == 2 * 5 * 2 * (first + second)
    assert node_params(made) == made.params
    assert made.coverage.unpriced == ()


def test_recurrent_cell_called_in_a_loop() -> None:
    def loop(s: Any, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 6)
        for step in x.unbind(1):
            h = s.cell(step, h)
        return h

    made = capture(Fn(loop, cell=nn.GRUCell(8, 6)), torch.zeros(2, 5, 8))
    assert macs(made) == 2 * 5 * 3 * 6 * (8 + 6)
    assert node_params(made) == made.params


# ------------------------------------------------------------------------------------------ custom operations


@torch.library.custom_op("pwrewrite_test::correlate", mutates_args=())
def correlate(x: Tensor, y: Tensor) -> Tensor:
    return x * y.sum()


@correlate.register_fake
def _(x: Tensor, y: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_custom_operation_is_unpriced_until_it_has_a_formula() -> None:
    model = Fn(lambda s, x: s.c(correlate(correlate(x, x), x)), c=nn.Conv2d(4, 4, 1))
    made = capture(model, X)
    assert made.coverage.unpriced == (("pwrewrite_test::correlate", 2),)
    assert made.coverage.capture == "whole"
    packet = torch.ops.pwrewrite_test.correlate
    register_formula(packet, lambda args, kwargs, out: out.numel() * args[1].shape[1])
    try:
        priced = capture(model, X)
    finally:
        del FORMULAS["pwrewrite_test::correlate"]
    assert priced.coverage.unpriced == ()
    assert macs(priced) == macs(made) + 2 * 800 * 4


def test_views_and_arithmetic_cost_nothing() -> None:
    made = capture(Fn(lambda s, x: (x.view(2, -1) * 2 + 1).softmax(-1).cumsum(1).sort().values.std()), X)
    assert macs(made) == 0
    assert made.coverage.unpriced == ()


def test_resnet50_to_the_last_digit() -> None:
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        model = models.resnet50(weights=None)
    made = capture(model, torch.zeros(1, 3, 224, 224, device="meta"))
    assert made.params == node_params(made) == 25_557_032
    assert macs(made) == 4_089_184_256
    assert (made.coverage.capture, made.coverage.values, made.coverage.in_graph) == ("whole", "meta", 53)
