"""Which models can be captured: whatever their code does, the graph is whole or says what it misses."""

from __future__ import annotations

import threading
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from pwrewrite.capturing import Capture, capture, info
from pwrewrite.core.errors import CaptureError, InputError
from pwrewrite.core.nested import tensors_of

X = torch.rand(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


class Fn(nn.Module):
    """A function with a 4-channel convolution and whatever else is given."""

    def __init__(self, function: Any, **parts: Any) -> None:
        super().__init__()
        self.function = function
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


class Replay(fx.Interpreter):
    """Runs a captured graph on the modules and constants that it refers to."""

    def __init__(self, captured: Capture) -> None:
        self.captured = captured
        super().__init__(nn.Module(), graph=captured.graph)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.captured.model.get_submodule(target)(*args, **kwargs)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in self.captured.constants:
            return self.captured.constants[target].clone()
        owner, _, name = target.rpartition(".")
        return getattr(self.captured.model.get_submodule(owner), name).clone()

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        out = super().call_method(target, args, kwargs)
        return args[0] if target == "__setitem__" else out


def whole(model: nn.Module, *inputs: Any, values: str = "meta", **kwargs: Any) -> Capture:
    """Captures, and checks that the graph is whole and computes what the model does."""
    model.eval()
    with torch.no_grad():
        want = tensors_of(model(*inputs, **kwargs))
    made = capture(model, kwargs or inputs, items=True)
    assert made.coverage.capture == "whole", made.notes
    assert made.coverage.values == values, made.notes
    with torch.no_grad():
        got = tensors_of(Replay(made).run(*(t.clone() for t in tensors_of((inputs, kwargs)))))
    assert len(want) == len(got)
    for a, b in zip(want, got):
        torch.testing.assert_close(a, b)
    return made


# ------------------------------------------------------------------------------------------------- model code

Pair = namedtuple("Pair", "first second")


@dataclass
class Data:
    first: Tensor
    second: Any = None


def on_shapes(s: Any, x: Tensor) -> Tensor:
    for _ in range(x.shape[-1] // 4):
        x = s.conv(x)
    return x if x.size(0) > 1 and len(x) == 2 and x.numel() > 3 else x.sum()


def iteration(s: Any, x: Tensor) -> Tensor:
    return torch.stack([s.conv(one[None]) for one in x])


def asks_isinstance(s: Any, x: Any) -> Tensor:
    return s.conv(x) if isinstance(x, Tensor) and type(x) is Tensor and torch.is_tensor(x) else x


def in_place(s: Any, x: Tensor) -> Tensor:
    out = s.conv(x)
    out += x
    out.mul_(2).clamp_(min=0)
    out[:, 0] = 1
    out[:, 1] += x[:, 1]
    F.relu(out, inplace=True)
    return out - x


def slices(s: Any, x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    c, d = torch.split(s.conv(x), [1, 3], dim=1)
    return torch.cat((b, a, d, c), 1)[:, ::2, ..., :-1][None].squeeze(0).unsqueeze(-1)


def device_strings(s: Any, x: Tensor) -> Tensor:
    z = torch.zeros(x.shape, device=x.device) + torch.arange(8, device=x.device).to(x.device, x.dtype)
    z = z.to("cpu").to(x) + x.new_zeros(()) + x.new_full((8,), 2.0) + torch.zeros_like(x)
    assert x.device.type == "cpu"
    assert not x.is_cuda
    return s.conv(x + z)


def real_constants(s: Any, x: Tensor) -> Tensor:
    grid = torch.zeros(8, 8)
    for i in range(8):
        grid[i, i] = i
    if grid.sum().item() > 5:
        x = x + grid
    return s.conv(x.masked_fill(grid > 3, 0.0))


def writes_data_into_a_constant(s: Any, x: Tensor) -> Tensor:
    canvas = torch.ones(2, 4, 10, 10)
    canvas[:, :, 1:-1, 1:-1] = x
    canvas[:, :, 0].copy_(x[:, :, 0].mean())
    return s.conv(canvas)


def constant_mask(s: Any, x: Tensor) -> Tensor:
    mask = torch.arange(8) % 2 == 0
    y = s.conv(x)
    y[..., ~mask] = 0
    return y[..., mask] + y[:, :, mask].sum() + y[..., torch.tensor([0, 2, 4, 6])]


def inner_function(s: Any, x: Tensor) -> Tensor:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * 2

    return s.conv(Double.apply(s.conv(x)))


def checkpointed(s: Any, x: Tensor) -> Tensor:
    return s.conv(checkpoint(lambda y: s.conv(y) + 1, x, use_reentrant=False))


def odd_attributes(s: Any, x: Tensor) -> Tensor:
    return s.conv(x.mT.T.permute(3, 2, 1, 0).mT + x.real).data


def keyword_calls(s: Any, x: Tensor) -> Tensor:
    y = F.conv2d(input=x, weight=s.conv.weight, bias=s.conv.bias, padding=1)
    y = s.conv(input=y)
    return F.max_pool2d(F.interpolate(input=y, scale_factor=2.0), kernel_size=2)


def pads(s: Any, x: Tensor) -> Tensor:
    return s.conv(F.pad(x, (1, 2, 3, 0), mode="reflect")) + F.pad(x, (1, 2, 3, 0))


def pools(s: Any, x: Tensor) -> Any:
    y, index = F.max_pool2d(s.conv(x), 2, return_indices=True)
    return F.max_unpool2d(y, index, 2), F.adaptive_avg_pool2d(x, (3, None)), F.avg_pool2d(x, 3, 2, 1, True)


def normalized(s: Any, x: Tensor) -> Tensor:
    x = F.layer_norm(s.conv(x), (8, 8)) + F.group_norm(x, 2) + F.normalize(x, dim=1)
    return F.batch_norm(x, torch.zeros(4), torch.ones(4))


def complex_numbers(s: Any, x: Tensor) -> Tensor:
    y = torch.fft.rfft2(s.conv(x))
    return torch.fft.irfft2(y * torch.polar(torch.ones(8, 5), torch.zeros(8, 5)), s=(8, 8)) + y.abs().sum()


def spectrogram(s: Any, x: Tensor) -> Tensor:
    window = torch.hann_window(4)  # istft checks by values that it is not zero somewhere
    y = torch.stft(s.conv(x).flatten(0, 2), 4, 2, window=window, return_complex=True)
    return torch.istft(y, 4, 2, window=window, length=8).view(2, 4, 8, 8)


CODE = [
    on_shapes,
    iteration,
    asks_isinstance,
    in_place,
    slices,
    device_strings,
    real_constants,
    writes_data_into_a_constant,
    constant_mask,
    inner_function,
    checkpointed,
    odd_attributes,
    keyword_calls,
    pads,
    pools,
    normalized,
    complex_numbers,
    spectrogram,
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("code", CODE, ids=lambda f: f.__name__)
def test_code_runs_as_it_is(code: Any) -> None:
    made = whole(Fn(code), X)
    assert made.layer("conv").called
    assert all("fft" in name for name, _ in made.coverage.unpriced)
    assert not made.coverage.unpriced or code in (complex_numbers, spectrogram)


@pytest.mark.parametrize(
    "output",
    [
        lambda y: {"a": y, "b": {"c": [y + 1]}},
        lambda y: [y, (y, y * 2), None, 3],
        lambda y: Pair(y, y + 1),
        lambda y: Data(y, [y + 1]),
        lambda y: OrderedDict(out=y),
        lambda y: y,
        lambda y: type("Plain", (), {})(),
    ],
)
def test_outputs_of_any_kind(output: Any) -> None:
    def code(s: Any, x: Tensor) -> Any:
        out = output(s.conv(x))
        if type(out).__name__ == "Plain":
            out.logits = s.conv(x)
        return out

    made = capture(Fn(code), X)
    assert made.coverage.capture == "whole"
    node = next(iter(reversed(made.graph.nodes)))
    assert node.op == "output"
    assert info(node).inputs[0].shape == (2, 4, 8, 8)
    assert node.all_input_nodes


def test_nested_inputs_keep_their_types() -> None:
    def code(s: Any, pair: Pair, data: Data, *rest: Any, scale: Any = None) -> Tensor:
        assert isinstance(pair, Pair)
        assert isinstance(data, Data)
        assert isinstance(rest[0], OrderedDict)
        return s.conv(pair.first + data.first + data.second["x"] + rest[0]["y"][0]) + pair.second

    whole(Fn(code), Pair(X, X), Data(X, {"x": X}), OrderedDict(y=[X]))


def test_keyword_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, image: Tensor, *, mask: Tensor | None = None) -> Tensor:
            return self.conv(image) if mask is None else self.conv(image) * mask

    made = whole(Two(), image=X, mask=X)
    assert [name for name, _ in made.inputs] == ["image", "mask"]
    assert [name for name, _ in capture(Two(), X).inputs] == ["image"]


def test_integers_in() -> None:
    model = nn.Sequential(nn.Embedding(10, 16), nn.Linear(16, 4))
    made = whole(model, torch.randint(0, 10, (2, 5)))
    assert made.params == 160 + 68
    assert sum(info(n).cost.params for n in made.graph.nodes) == made.params


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    made = capture(nn.Sequential(nn.Conv2d(4, 4, 3, dtype=dtype), nn.Flatten()), X.to(dtype))
    assert made.layers[0].weight_bytes == (4 * 4 * 9 + 4) * dtype.itemsize
    assert info(next(iter(made.graph.nodes))).outputs[0].dtype is dtype


# ------------------------------------------------------------------------------------------- kinds of modules


def test_root_is_a_convolution() -> None:
    made = whole(nn.Conv2d(4, 8, 3), X)
    assert [layer.path for layer in made.layers] == [""]
    assert made.layers[0].weight == "weight"


def test_nested_containers() -> None:
    blocks = nn.ModuleList([nn.ModuleDict({"c": nn.Conv2d(4, 4, 1)}), nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 3)))])
    made = whole(Fn(lambda s, x: s.blocks[1](s.blocks[0]["c"](x)), blocks=blocks), X)
    assert [layer.path for layer in made.layers if layer.called] == ["blocks.0.c", "blocks.1.0.0"]


def test_graph_module_as_root() -> None:
    model = fx.symbolic_trace(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)))
    made = whole(model, X)
    assert [layer.path for layer in made.layers] == ["0"]


def test_compiled_child() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), torch.compile(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())))
    made = capture(model, X)
    assert made.coverage.capture == "whole"
    assert made.coverage.in_graph == 2


def test_script_module_is_opaque_and_priced() -> None:
    child = torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()))
    model = nn.Sequential(nn.Conv2d(4, 4, 1), child)
    made = capture(model, X)
    assert made.coverage.capture == "islands"
    assert any("TorchScript" in note for note in made.notes)
    assert sum(info(n).cost.macs for n in made.graph.nodes) == 2 * 64 * (16 + 16 * 9)


@pytest.mark.filterwarnings("ignore")
def test_code_that_torch_functions_do_not_show_is_recorded_as_operations() -> None:
    @torch.jit.script
    def hidden(x: Tensor) -> Tensor:
        return torch.relu(x) @ x

    model = Fn(lambda s, x: s.conv(hidden(s.conv(x))))
    made = capture(model, X)
    assert (made.coverage.capture, made.coverage.values) == ("whole", "meta")
    assert sum(info(n).cost.macs for n in made.graph.nodes) == 2 * (2 * 64 * 16 * 9) + 2 * 4 * 8 * 8 * 8
    assert {"conv2d", "relu", "bmm"} <= {info(n).op for n in made.graph.nodes}
    with torch.no_grad():
        torch.testing.assert_close(Replay(made).run(X), model(X))


def test_functorch_inside_forward() -> None:
    model = Fn(lambda s, x: s.conv(torch.vmap(lambda t: t * 2)(x)))
    made = capture(model, X)
    assert made.coverage.in_graph == 1


def test_hooks_run_around_the_node() -> None:
    model = Fn(lambda s, x: s.conv(s.conv2(x)), conv2=nn.Conv2d(4, 4, 3, padding=1))
    model.conv2.register_forward_hook(lambda m, args, out: out * 2)
    model.conv.register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    made = capture(model, X)
    assert made.coverage.capture == "whole"
    assert [info(n).op for n in made.graph.nodes] == ["input", "conv2d", "mul", "add", "conv2d", "output"]


def test_replaced_forward_is_what_runs() -> None:
    conv = nn.Conv2d(4, 4, 3)
    conv.forward = lambda x: F.conv2d(x, conv.weight, conv.bias, stride=2)  # type: ignore[method-assign]
    made = capture(nn.Sequential(conv), X)
    assert made.layers[0].calls[0].output_shape == (2, 4, 3, 3)
    assert made.layers[0].functional


def test_no_convolution_at_all() -> None:
    made = whole(Fn(lambda s, x: x.relu() + 1), X)
    assert made.coverage.in_graph == 0
    assert capture(nn.ReLU(), X).layers == ()


def test_model_on_meta() -> None:
    with torch.device("meta"):
        model = Fn(lambda s, x: s.conv(x) + s.scale + s.table[0], table=[torch.ones(8)])
        model.scale = nn.Parameter(torch.ones(8))
    made = capture(model, X.to("meta"))
    assert (made.coverage.capture, made.coverage.values) == ("whole", "meta")
    assert made.params == 4 * 4 * 9 + 4 + 8


def test_channels_last_is_kept() -> None:
    def code(s: Any, x: Tensor) -> Tensor:
        assert s.conv(x).relu().is_contiguous(memory_format=torch.channels_last)
        return s.conv(x)

    whole(Fn(code).to(memory_format=torch.channels_last), X.to(memory_format=torch.channels_last))


# ---------------------------------------------------------------------------------------------------- values


def branches_on_data(s: Any, x: Tensor) -> Tensor:
    return s.conv(x) if x.sum() > 0 else x


def data_dependent_shape(s: Any, x: Tensor) -> Tensor:
    return s.conv(x)[:, :, (x[0, 0] > 0.5).nonzero()[:, 0]]


def without_shape_on_meta(s: Any, x: Tensor) -> Tensor:
    return s.conv(x) + torch.geqrf(x)[0]


class Pads(nn.Module):
    """Works out sizes from buffers, as networks for audio do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 4, 2)
        self.register_buffer("stride", torch.tensor(2), persistent=False)
        self.register_buffer("size", torch.tensor(4))

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.ceil((x.shape[-1] - self.size) / self.stride).to(torch.int64)
        more = steps * self.stride + self.size - x.shape[-1]
        out: Tensor = self.conv(F.pad(x, (self.size - self.stride, more)))
        return out


def test_sizes_that_code_works_out_from_buffers_are_known() -> None:
    made = whole(Pads(), torch.randn(1, 3, 13), values="meta")
    assert made.layer("conv").macs == 7 * 4 * 3 * 4  # of seven steps
    assert not made.notes
    with pytest.raises(CaptureError, match="takes 3 channels, got 4"):
        capture(Pads(), torch.randn(1, 4, 13))


NEEDS = {
    branches_on_data: "__bool__ reads the values of a tensor of shape (), in test_capture_models.py:",
    data_dependent_shape: "nonzero reads the values of a tensor of shape (8, 8), in test_capture_models.py:",
    without_shape_on_meta: "torch cannot tell the shape that aten::geqrf gives, in test_capture_models.py:",
}


@pytest.mark.parametrize("code", NEEDS, ids=lambda f: f.__name__)
def test_what_needs_values_is_run_once_on_real_ones(code: Any) -> None:
    made = whole(Fn(code), X, values="real")
    assert f"the model needs values ({NEEDS[code]}" in made.notes[0]
    with pytest.raises(CaptureError):
        capture(Fn(code), X, values="meta")


def test_values_that_only_depend_on_the_model_are_there() -> None:
    def code(s: Any, x: Tensor) -> Tensor:
        return s.conv(x) * float(s.scale) if s.flag.item() and bool(s.scale > 0) is not None else x

    model = Fn(code, scale=nn.Parameter(torch.tensor(2.0)))
    model.register_buffer("flag", torch.tensor(1))
    with torch.no_grad():
        assert capture(model, X).layer("conv").called


def test_real_values_on_meta_inputs_and_weights() -> None:
    with torch.device("meta"):
        model = Fn(branches_on_data)
    made = capture(model, X.to("meta"))
    assert (made.coverage.capture, made.coverage.values) == ("whole", "real")
    assert all(p.is_meta for p in model.parameters())


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("model", "inputs", "where", "says"),
    [
        (nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 3)), X, "1", "takes 3 channels, got 4"),
        (nn.Sequential(nn.Conv2d(4, 4, 3)), torch.zeros(4, 4), "0", "takes 3 or 4 dims"),
        (nn.Sequential(nn.Conv2d(4, 4, 9)), X, "0", "does not fit"),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(5)), X, "1", "takes 5 channels"),
        (nn.Sequential(nn.Flatten(), nn.Linear(5, 5)), X, "1", "takes 5 features"),
        (nn.Sequential(nn.MaxPool2d(16)), X, "0", "Output size is too small"),
        (nn.Sequential(nn.LayerNorm(7)), X, "0", "takes (7,)"),
        (nn.Sequential(nn.GroupNorm(1, 3)), X, "0", "takes 3 channels"),
        (nn.Sequential(nn.Conv2d(4, 4, 1)), X.double(), "0", "takes float32, got float64"),
        (nn.Sequential(nn.Conv2d(4, 4, 1)), X.to(torch.uint8), "0", "takes float32, got uint8"),
        (nn.Sequential(Fn(lambda s, x: torch.cat([x, x[:, :, 1:]], 1))), X, "0", "cat along dim 1"),
        (nn.Sequential(Fn(lambda s, x: x + x[:, :, 1:])), X, "0", "do not broadcast"),
    ],
)
def test_refused_inputs_name_the_layer(model: nn.Module, inputs: Tensor, where: str, says: str) -> None:
    with pytest.raises(CaptureError) as caught:
        capture(model, inputs)
    assert caught.value.where == where
    assert says in str(caught.value)
    shown = "×".join(map(str, inputs.shape))
    assert shown in str(caught.value.got)
    with torch.no_grad(), pytest.raises(Exception):  # noqa: B017
        model(inputs)


class Unpacking(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        b, t, c, h, w = x.shape
        return x.view(b * t, c, h, w)


def test_what_the_models_code_raises_names_the_line() -> None:
    line = "test_capture_models.py:"
    for model, where in ((Unpacking(), line), (nn.Sequential(Unpacking()), f"0, in {line}")):
        with pytest.raises(CaptureError, match="not enough values to unpack") as caught:
            capture(model, X)
        assert str(caught.value.where).startswith(where)
        assert str(caught.value.where).endswith("b, t, c, h, w = x.shape")
    with pytest.raises(CaptureError, match="cat along dim 1") as caught:  # not in a module that is called
        capture(Fn(lambda s, x: torch.cat([x, x[:, :, 1:]], 1)), X)
    assert "torch.cat([x, x[:, :, 1:]], 1)" in str(caught.value.where)


def test_exceptions_of_the_model_get_nothing_from_a_capture() -> None:
    seen: list[Exception] = []

    class Catching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Conv2d(5, 1, 1))
            self.outer = nn.Conv2d(3, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            for attempt in (self.inner, lambda x: x.view(7)):
                try:
                    attempt(x)
                except Exception as error:
                    seen.append(error)
            return self.outer(x)

    capture(Catching(), torch.zeros(1, 3, 2, 2))
    assert len(seen) == 2
    assert all(vars(error) == {} for error in seen)
    assert [str(error.__cause__) for error in seen] == ["None"] * 2


def test_the_path_is_that_of_the_failure_that_was_not_caught() -> None:
    class Retrying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Sequential(nn.Conv2d(5, 1, 1)), nn.Sequential(nn.Conv2d(7, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.first(x)
            except Exception:
                return self.second(x)

    with pytest.raises(CaptureError) as caught:
        capture(Retrying(), torch.zeros(1, 3, 2, 2))
    assert caught.value.where == "second.0"


def test_wrong_number_of_inputs() -> None:
    with pytest.raises(CaptureError, match="positional argument"):
        capture(nn.Sequential(nn.ReLU()), (X, X))


@pytest.mark.parametrize("inputs", [3, "1x3x224x224", None, (), {}, ("a", 2), {"x": 1}])
def test_inputs_of_the_wrong_kind(inputs: Any) -> None:
    with pytest.raises(InputError):
        capture(nn.ReLU(), inputs)


def test_not_a_model() -> None:
    with pytest.raises(InputError, match="not a model"):
        capture(lambda x: x, X)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="unknown values"):
        capture(nn.ReLU(), X, values="fake")


def test_lazy_modules_take_their_shapes_on_a_copy() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Dropout(), nn.Flatten(), nn.LazyLinear(5))
    state = torch.get_rng_state()
    captured = capture(model, X)
    assert torch.equal(torch.get_rng_state(), state)
    assert model[0].has_uninitialized_params()
    assert captured.layers[0].in_channels == 4
    assert [type(m).__name__ for m in model] == ["LazyConv2d", "LazyBatchNorm2d", "Dropout", "Flatten", "LazyLinear"]
    assert capture(model, X.to("meta")).params == captured.params
    model(X)
    assert capture(model, X).layers[0].in_channels == 4


class Uncalled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.LazyConv2d(4, 3), nn.LazyConv2d(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@pytest.mark.parametrize(
    ("model", "got", "where"),
    [
        (Uncalled(), "does not call it", "spare"),
        (nn.Sequential(nn.LazyConv2d(4, 30)), "does not run", "0"),
    ],
)
def test_lazy_modules_without_shapes(model: nn.Module, got: str, where: str) -> None:
    with pytest.raises(CaptureError, match="lazy") as caught:
        capture(model, X)
    assert got in str(caught.value)
    assert caught.value.where == where


# ------------------------------------------------------------------------------------------------------ threads


def test_captures_in_several_threads_do_not_mix() -> None:
    models = [nn.Sequential(*[nn.Conv2d(4, 4, 3, padding=1) for _ in range(2 + i)]) for i in range(6)]
    found: dict[int, int] = {}
    plain: list[bool] = []
    stop = threading.Event()

    def run(i: int) -> None:
        for _ in range(5):
            found[i] = len(capture(models[i], X).calls)

    def compute() -> None:
        with torch.no_grad():
            while not stop.is_set():
                plain.append(nn.Conv2d(4, 4, 1)(X).device.type == "cpu")

    bystander = threading.Thread(target=compute)
    bystander.start()
    threads = [threading.Thread(target=run, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    stop.set()
    bystander.join()
    assert found == {i: 2 + i for i in range(6)}
    assert plain
    assert all(plain)
