"""Rules against reality: shape, dtype and memory format of what a rule returns are those of a real run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import Tensor, nn

from pwrewrite.capturing import capture, info
from pwrewrite.capturing.functions import words
from pwrewrite.capturing.leaves import MODULE_RULES, leaf_rule
from pwrewrite.capturing.shapes import FUNCTION_RULES, ShapeError
from pwrewrite.core.errors import CaptureError
from pwrewrite.core.nested import map_tensors, tensors_of

FAST = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def order(t: Tensor) -> list[tuple[int, int]]:
    """Sizes and strides of the dims that have an extent: the memory format, without what it leaves open."""
    if t.numel() == 0:
        return []
    return [(n, s) for n, s in zip(t.shape, t.stride()) if n != 1]


def agree(rule: Any, real: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, mixed: bool = False) -> bool:
    """Checks a rule against the real call; False where the rule leaves the call to torch.

    ``mixed``: whether some of torch's kernels for it return the default format where others keep channels_last.
    """

    def meta(t: Tensor) -> Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")

    stands_for = map_tensors(args, meta), map_tensors(kwargs, meta)
    failure: Exception | None = None
    try:
        with torch.no_grad():
            want = real(*map_tensors(args, Tensor.clone), **kwargs)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        failure = error
    try:
        got = rule(*stands_for[0], **stands_for[1])
    except ShapeError:
        assert failure is not None, "the rule refuses what torch takes"
        return True
    if failure is not None or got is NotImplemented:
        return False  # what a rule lets pass, the user's own run refuses
    assert got.is_meta
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    if all(n > 1 for t in tensors_of((args, want)) for n in t.shape[1:]):
        # a dim of extent 1 leaves open which format a tensor has, and operations differ in what they make of it
        assert order(got) == order(want) or (mixed and want.is_contiguous())
    return True


@st.composite
def images(draw: Any, dims: int = 2, channels: Any = None, smallest: int = 1) -> Tensor:
    """``(N, C, *size)`` in either memory format, sometimes a view of a larger tensor."""
    c = draw(channels if channels is not None else st.integers(1, 6))
    shape = (draw(st.integers(1, 3)), c, *(draw(st.integers(smallest, 9)) for _ in range(dims)))
    x = torch.rand(shape)
    kind = draw(st.sampled_from(["contiguous", "contiguous", "channels_last", "transposed"]))
    if kind == "channels_last" and dims in (2, 3):
        x = x.to(memory_format=torch.channels_last if dims == 2 else torch.channels_last_3d)
    elif kind == "transposed":
        x = x.transpose(-1, -2).contiguous().transpose(-1, -2) if dims > 1 else x
    return x


def module_agrees(module: nn.Module, x: Tensor, *args: Any, mixed: bool = False) -> bool:
    module.eval()
    leaf = leaf_rule(type(module))
    assert leaf is not None

    def rule(x: Tensor, *args: Any) -> Any:
        return leaf.output(module, x, *args)

    return agree(rule, module, (x, *args), {}, mixed=mixed)


def captured_agrees(module: nn.Module, x: Tensor) -> None:
    """Checks what a capture says of a leaf without a rule against the real call."""
    module.eval()
    try:
        want = module(x.clone())
    except RuntimeError:
        return
    (facts,) = (info(node) for node in capture(module, x).graph.nodes if node.op == "call_module")
    assert (facts.outputs[0].shape, facts.outputs[0].dtype) == (want.shape, want.dtype)


TRIPLES = st.tuples(*[st.integers(1, 3)] * 3)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@FAST
@given(data=st.data())
def test_convolutions(kind: Any, data: Any) -> None:
    dims = int(kind.__name__[4])
    draw = data.draw
    groups = draw(st.integers(1, 3))
    k, d = (draw(TRIPLES)[:dims] for _ in range(2))
    same = draw(st.booleans())
    stride = 1 if same else draw(TRIPLES)[:dims]
    padding: Any = draw(st.sampled_from(["same", "valid"])) if same else tuple(n - 1 for n in draw(TRIPLES)[:dims])
    mode = draw(st.sampled_from(["zeros", "zeros", "circular"]))
    layer = kind(2 * groups, 3 * groups, k, stride, padding, d, groups, draw(st.booleans()), mode)
    x = draw(images(dims, st.sampled_from([2 * groups, 2 * groups, 2 * groups, 5])))
    module_agrees(layer, x, mixed=dims == 3)


@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
@FAST
@given(data=st.data())
def test_transposed_convolutions(kind: Any, data: Any) -> None:
    dims = int(kind.__name__[13])
    draw = data.draw
    groups = draw(st.integers(1, 3))
    k, stride, d = (draw(TRIPLES)[:dims] for _ in range(3))
    padding = tuple(n - 1 for n in draw(TRIPLES)[:dims])
    extra = tuple(draw(st.integers(0, max(s, e) - 1)) for s, e in zip(stride, d))
    layer = kind(2 * groups, 3 * groups, k, stride, padding, extra, groups, draw(st.booleans()), d)
    x = draw(images(dims, st.just(2 * groups)))
    module_agrees(layer, x, mixed=dims == 3)
    try:
        smallest = nn.functional.__dict__[f"conv_transpose{dims}d"](
            x, layer.weight, None, stride, padding, 0, groups, d
        ).shape[2:]
    except RuntimeError:
        return
    wanted = [n + draw(st.integers(0, s - 1)) for n, s in zip(smallest, stride)]
    module_agrees(layer, x, wanted, mixed=dims == 3)


@pytest.mark.parametrize("kind", [nn.Conv3d, nn.ConvTranspose3d])
def test_convolutions_in_3d_keep_the_format_that_onednn_keeps(kind: Any) -> None:
    """Torch's own kernel, which runs in float64 and for one small sample, returns the default format instead."""
    layer = kind(2, 3, 3, bias=False).eval()
    x = torch.rand(2, 2, 4, 4, 4).to(memory_format=torch.channels_last_3d)
    assert not layer(x).is_contiguous()
    assert module_agrees(layer, x)
    assert layer(x[:1]).is_contiguous()
    assert layer.double()(x.double()).is_contiguous()


@pytest.mark.parametrize("kind", [nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d])
@FAST
@given(data=st.data())
def test_pools(kind: Any, data: Any) -> None:
    dims, draw = int(kind.__name__[7]), data.draw
    k = draw(TRIPLES)[:dims]
    stride = draw(st.one_of(st.none(), TRIPLES.map(lambda t: t[:dims])))
    padding = tuple(draw(st.integers(0, n // 2)) for n in k)
    settings: dict[str, Any] = {"stride": stride, "padding": padding, "ceil_mode": draw(st.booleans())}
    if kind.__name__.startswith("Max"):
        settings["dilation"] = draw(TRIPLES)[:dims]
    captured_agrees(kind(k, **settings), draw(images(dims)))


@pytest.mark.parametrize("name", ["Avg", "Max"])
@pytest.mark.parametrize("dims", [1, 2, 3])
@FAST
@given(data=st.data())
def test_adaptive_pools(name: str, dims: int, data: Any) -> None:
    size = tuple(data.draw(st.sampled_from([None, 1, 2, 5])) for _ in range(dims))
    module_agrees(
        getattr(nn, f"Adaptive{name}Pool{dims}d")(size if dims > 1 else size[0] or 1), data.draw(images(dims))
    )


ACTIVATIONS = [
    nn.ReLU(), nn.ReLU6(), nn.SiLU(), nn.GELU(), nn.Hardswish(), nn.Hardsigmoid(), nn.Hardtanh(),
    nn.Sigmoid(), nn.Tanh(), nn.ELU(), nn.SELU(), nn.CELU(), nn.LeakyReLU(), nn.Mish(), nn.Softplus(),
    nn.PReLU(), nn.Identity(), nn.ReLU(inplace=True), nn.SiLU(inplace=True),
]  # fmt: skip
WITHOUT_RULE = [
    nn.Softmax(1), nn.LogSoftmax(-1), nn.Dropout(), nn.Dropout1d(), nn.Dropout2d(), nn.Dropout3d(), nn.AlphaDropout(),
    nn.FeatureAlphaDropout(), nn.Flatten(), nn.Flatten(0, 1),
]  # fmt: skip


@pytest.mark.parametrize("module", ACTIVATIONS, ids=str)
@FAST
@given(x=images())
def test_activations(module: nn.Module, x: Tensor) -> None:
    assert module_agrees(module, x)


@pytest.mark.parametrize("module", WITHOUT_RULE, ids=str)
@FAST
@given(x=images())
def test_leaves_without_a_rule(module: nn.Module, x: Tensor) -> None:
    captured_agrees(module, x)


@pytest.mark.parametrize("kind", ["BatchNorm", "InstanceNorm"])
@pytest.mark.parametrize("dims", [1, 2, 3])
@FAST
@given(data=st.data())
def test_norms(kind: str, dims: int, data: Any) -> None:
    x = data.draw(images(dims, st.sampled_from([4, 4, 3]), smallest=2))
    module_agrees(getattr(nn, f"{kind}{dims}d")(4), x)
    module_agrees(nn.GroupNorm(2, 4), x)


@FAST
@given(x=images())
def test_layer_norms_and_linear_maps(x: Tensor) -> None:
    assert module_agrees(nn.LayerNorm(x.shape[-1]), x)
    assert module_agrees(nn.LayerNorm(tuple(x.shape[1:])), x)
    assert module_agrees(nn.Linear(x.shape[-1], 5), x)
    assert module_agrees(nn.Linear(x.shape[-1] + 1, 5), x)
    w = torch.rand(4, x.shape[-1])
    assert agree(FUNCTION_RULES["linear"], F.linear, (x, w), {})
    assert agree(FUNCTION_RULES["layer_norm"], F.layer_norm, (x, (x.shape[-1],)), {})
    assert agree(FUNCTION_RULES["rms_norm"], F.rms_norm, (x, (x.shape[-1],)), {})


def test_every_module_rule_is_tested() -> None:
    tested = {type(m).forward for m in (*ACTIVATIONS, *WITHOUT_RULE)} | {
        nn.LayerNorm.forward,
        nn.Linear.forward,
        nn.GroupNorm.forward,
    }
    for d in (1, 2, 3):
        for name in (
            "Conv{}d", "ConvTranspose{}d", "MaxPool{}d", "AvgPool{}d", "AdaptiveAvgPool{}d", "AdaptiveMaxPool{}d",
            "BatchNorm{}d", "InstanceNorm{}d",
        ):  # fmt: skip
            tested.add(getattr(nn, name.format(d)).forward)
    names = {rule.__qualname__ for rule in MODULE_RULES} - {rule.__qualname__ for rule in tested}
    assert not names


# -------------------------------------------------------------------------------------------------- functions

UNARY = sorted(
    words(
        """relu relu6 silu gelu hardswish hardsigmoid hardtanh sigmoid logsigmoid tanh elu selu celu leaky_relu mish
        softplus softsign exp sqrt rsqrt neg abs log log1p expm1 sin cos erf square sign reciprocal floor ceil round
        normalize"""
    )
)
BINARY = sorted(words("add sub mul div true_divide divide multiply subtract pow maximum minimum"))


def function(name: str) -> Any:
    return getattr(F, name, None) or getattr(torch, name, None) or getattr(Tensor, name)


@pytest.mark.parametrize("name", UNARY)
@FAST
@given(x=images())
def test_unary(name: str, x: Tensor) -> None:
    assert agree(FUNCTION_RULES[name], function(name), (x,), {})
    if name in ("relu", "silu", "elu", "hardswish"):
        assert agree(FUNCTION_RULES[name], function(name), (x,), {"inplace": True})


@FAST
@given(x=images())
def test_clamps(x: Tensor) -> None:
    assert agree(FUNCTION_RULES["clamp"], torch.clamp, (x, 0.1, 0.5), {})
    agree(FUNCTION_RULES["clamp"], torch.clamp, (x[:, :1],), {"min": x})
    assert agree(FUNCTION_RULES["clip"], torch.clip, (x, 0.1, 0.5), {})
    assert agree(FUNCTION_RULES["log_sigmoid"], F.logsigmoid, (x,), {})
    assert agree(FUNCTION_RULES["clamp_min"], torch.clamp_min, (x, 0.5), {})
    assert agree(FUNCTION_RULES["clamp_max"], torch.clamp_max, (x, 0.5), {})
    assert agree(FUNCTION_RULES["threshold"], F.threshold, (x, 0.5, 1.0), {})


@pytest.mark.parametrize("name", BINARY)
@FAST
@given(data=st.data())
def test_binary(name: str, data: Any) -> None:
    x = data.draw(images())
    other = data.draw(
        st.sampled_from(
            [
                x.flip(0),
                torch.rand(x.shape),
                torch.rand(x.shape[1:]),
                torch.rand(x.shape[0], x.shape[1], 1, 1),
                torch.rand(1, 1, *x.shape[2:]),
                torch.rand(()),
                torch.rand(2, 3),
                torch.ones(x.shape, dtype=torch.float64),
                torch.ones(x.shape, dtype=torch.int64),
                2.5,
                3,
                True,
            ]
        )
    )
    if name in ("maximum", "minimum") and not isinstance(other, Tensor):
        return
    agree(FUNCTION_RULES[name], function(name), (x, other), {})
    if name in ("add", "mul", "sub") and isinstance(other, Tensor):
        agree(FUNCTION_RULES[name], function(name), (other, x), {})


@FAST
@given(data=st.data())
def test_cat(data: Any) -> None:
    x = data.draw(images())
    others = [data.draw(images()) if data.draw(st.integers(0, 5)) == 0 else torch.rand_like(x) for _ in range(2)]
    agree(FUNCTION_RULES["cat"], torch.cat, ([x, *others], data.draw(st.integers(-4, 3))), {})


@pytest.mark.parametrize("name", ["mean", "sum"])
@FAST
@given(data=st.data())
def test_reductions(name: str, data: Any) -> None:
    x = data.draw(images())
    contiguous = x.is_contiguous()  # otherwise the rule leaves it to torch
    assert agree(FUNCTION_RULES[name], function(name), (x,), {}) is contiguous
    dims = data.draw(st.sampled_from([0, 1, -1, (2, 3), (-1, -2), [1], (0, 1, 2, 3)]))
    assert agree(FUNCTION_RULES[name], function(name), (x, dims, data.draw(st.booleans())), {}) is contiguous
    agree(FUNCTION_RULES[name], function(name), (x,), {"dim": dims, "keepdim": data.draw(st.booleans())})
    agree(FUNCTION_RULES[name], function(name), (x, dims), {"dtype": torch.float64})


@FAST
@given(data=st.data())
def test_function_norms(data: Any) -> None:
    x = data.draw(images(channels=st.just(4), smallest=2))
    assert agree(FUNCTION_RULES["batch_norm"], F.batch_norm, (x, torch.zeros(4), torch.ones(4)), {})
    assert agree(FUNCTION_RULES["group_norm"], F.group_norm, (x, 2), {})
    assert agree(FUNCTION_RULES["instance_norm"], F.instance_norm, (x,), {})
    assert agree(FUNCTION_RULES["local_response_norm"], F.local_response_norm, (x, 3), {})


@FAST
@given(data=st.data())
def test_sizes(data: Any) -> None:
    x, draw = data.draw(images()), data.draw
    mode = draw(st.sampled_from(["nearest", "bilinear", "bicubic", "nearest-exact", "area"]))
    size = draw(st.sampled_from([5, (3, 7), [1, 1]]))
    agree(FUNCTION_RULES["interpolate"], F.interpolate, (x, size), {"mode": mode})
    scale = draw(st.sampled_from([2, 1.5, 0.7, (2.0, 0.5), 3.3]))
    agree(FUNCTION_RULES["interpolate"], F.interpolate, (x,), {"scale_factor": scale, "mode": mode})
    assert agree(FUNCTION_RULES["adaptive_avg_pool2d"], F.adaptive_avg_pool2d, (x, (2, None)), {})


@pytest.mark.parametrize("dims", [1, 2, 3])
@FAST
@given(data=st.data())
def test_functional_convolutions(dims: int, data: Any) -> None:
    draw = data.draw
    groups, k = draw(st.integers(1, 2)), draw(TRIPLES)[:dims]
    x = draw(images(dims, st.just(2 * groups)))
    w = torch.rand(3 * groups, 2, *k)
    if dims == 2 and draw(st.booleans()):
        w = w.to(memory_format=torch.channels_last)
    settings = {"stride": draw(st.integers(1, 3)), "padding": draw(st.integers(0, 2)), "dilation": 1, "groups": groups}
    agree(FUNCTION_RULES[f"conv{dims}d"], getattr(F, f"conv{dims}d"), (x, w), settings)
    w = torch.rand(2 * groups, 3, *k)
    name = f"conv_transpose{dims}d"
    agree(FUNCTION_RULES[name], getattr(F, name), (x, w, torch.rand(3 * groups)), settings)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@FAST
@given(data=st.data())
def test_recurrent_layers(kind: Any, data: Any) -> None:
    draw = data.draw
    settings: dict[str, Any] = {
        "num_layers": draw(st.integers(1, 2)),
        "bidirectional": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bias": draw(st.booleans()),
    }
    if kind is nn.LSTM and draw(st.booleans()):
        settings["proj_size"] = 2
    model = kind(4, 5, **settings).eval()
    x = torch.rand(2, 3, 4) if draw(st.booleans()) else torch.rand(3, 4)
    with torch.no_grad():
        want = tensors_of(model(x))
    output = info(capture(model, x).graph.output_node())
    assert [t.shape for t in output.inputs] == [tuple(t.shape) for t in want]
    padded = torch.rand(2, 3, 4) if settings["batch_first"] else torch.rand(3, 2, 4)
    packed = nn.utils.rnn.pack_padded_sequence(padded, torch.tensor([3, 1]), settings["batch_first"])
    with torch.no_grad():
        want = tensors_of(tuple(model(packed)[0]))
    assert info(capture(model, (packed,)).graph.output_node()).inputs[0].shape == tuple(want[0].shape)


def test_every_function_rule_is_tested() -> None:
    source = Path(__file__).read_text()
    missing = [
        name
        for name in FUNCTION_RULES
        if name not in UNARY
        and name not in BINARY
        and f'"{name}"' not in source
        and not name.startswith(("conv", "_conv", "adaptive_", "__r", "concat", "lstm", "gru", "rnn"))
    ]
    assert not missing


def test_tensors_of_finds_them_everywhere() -> None:
    a, b = torch.zeros(1), torch.zeros(2)
    found = tensors_of(({"x": [a, (b,)]}, slice(a, None), 3, None))
    assert [id(t) for t in found] == [id(a), id(b), id(a)]


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate", "zeros"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("padding", [0, 1, 2, 3, "same"])
def test_padding_by_the_input_needs_enough_of_it(mode: str, size: int, padding: int | str) -> None:
    conv = nn.Conv2d(2, 2, 3, padding=padding, padding_mode=mode, dilation=1 if padding != "same" else 2)
    x = torch.zeros(1, 2, size, 9)
    try:
        expected = tuple(conv(x).shape)
    except RuntimeError:
        with pytest.raises(CaptureError):
            capture(conv, x)
    else:
        assert info(list(capture(conv, x).graph.nodes)[-2]).outputs[0].shape == expected
