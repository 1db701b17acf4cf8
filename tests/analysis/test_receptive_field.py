"""Receptive fields: published figures, closed forms, and the support of real gradients.

The gradient check makes every weight positive, so that nothing cancels, replaces max pooling by average pooling
(whose gradient reaches the whole window) and runs in float64: the input positions with a gradient are then exactly
those that an output position sees. Predictions count padding as input, so they are cut at the borders of the input
before comparing.
"""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings, strategies as st
from torch import Tensor, nn

from pwrewrite.analysis import receptive_fields
from pwrewrite.capturing import Capture, capture


class Fn(nn.Module):
    """A function as a model, with the modules that it uses."""

    def __init__(self, forward: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def last(made: Capture) -> str:
    """Name of the node whose value the model returns."""
    (output,) = (node for node in made.graph.nodes if node.op == "output")
    return str(output.args[0].name)


def positive(model: nn.Module) -> nn.Module:
    """The model in float64 with positive weights, average pooling and nothing that saturates, in evaluation mode."""
    for name, module in list(model.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if isinstance(module, nn.MaxPool2d):
            pool = nn.AvgPool2d(module.kernel_size, module.stride, module.padding, module.ceil_mode)
            setattr(model.get_submodule(parent), leaf, pool)
        elif isinstance(module, nn.ReLU6):
            setattr(model.get_submodule(parent), leaf, nn.ReLU())
    model.to_empty(device="cpu").double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.rand_like(parameter) + 0.5)
            if parameter.dim() > 1:
                parameter /= parameter[0].numel()
        for name, buffer in model.named_buffers():
            buffer.fill_(1 if name.endswith("var") else 0)
    return model


def support(model: nn.Module, shape: tuple[int, ...], positions: list[tuple[int, ...]]) -> list[Any]:
    """First and last input position, per spatial dim, with a gradient from each output position (all channels)."""
    x = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    out = model(x)
    found = []
    for position in positions:
        (grad,) = torch.autograd.grad(out[(slice(None), slice(None), *position)].sum(), x, retain_graph=True)
        seen = grad.abs().sum((0, 1)).nonzero()
        if len(seen):  # a gap of a transposed convolution sees nothing
            found.append(tuple(zip(seen.amin(0).tolist(), seen.amax(0).tolist())))
    return found


def check(model: nn.Module, shape: tuple[int, ...], *, slack: int = 0, short: int = 0, most: int = 40) -> None:
    """Compares the extent with that of gradients around the centre (all phases), where no border cuts them.

    It may be larger by ``slack`` and smaller by ``short``.
    """
    model = positive(model)
    made = capture(model, torch.zeros(shape, dtype=torch.float64))
    extents, whole = receptive_fields(made)[last(made)]
    assert not whole
    size = tuple(model(torch.zeros(shape, dtype=torch.float64)).shape[2:])
    near = [[n // 2 + d for d in range(-3, 4) if 0 <= n // 2 + d < n] for n in size]
    positions = list(product(*near))[:most]
    seen = support(model, shape, positions)
    for dim, extent in enumerate(extents):
        spans = [bounds[dim] for bounds in seen]
        inside = [high - low + 1 for low, high in spans if low > 0 and high < shape[2 + dim] - 1]
        assert all(high - low + 1 <= extent + short for low, high in spans)
        if inside and len(inside) == len(spans):
            assert extent - slack <= max(inside) <= extent + short


def conv(kernel: Any = 3, stride: Any = 1, padding: Any = 0, dilation: Any = 1, channels: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, kernel, stride, padding, dilation, bias=False)


def up(kernel: Any, stride: Any, padding: Any = 0, output_padding: Any = 0, dilation: Any = 1) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(1, 1, kernel, stride, padding, output_padding, bias=False, dilation=dilation)


# ------------------------------------------------------------------------------------------- published figures


@pytest.mark.parametrize(
    ("name", "layer", "extent"),
    [
        # Araujo, Norris & Sim 2019, table of architectures; resnet50 here has its strides in the 3×3 convolutions
        # (427), that of the article in the 1×1 convolutions before them (483).
        ("alexnet", "features.10", 163),
        ("vgg16", "features.28", 196),
        ("resnet50", "layer4.2.conv2", 427),
        ("resnet18", "layer4.1.conv2", 435),
    ],
)
def test_published_figures(torchvision_capture, name: str, layer: str, extent: int) -> None:
    made = torchvision_capture(name)
    assert receptive_fields(made)[made.layer(layer).calls[0].node] == ((extent, extent), False)


def test_every_convolution_of_common_networks_has_one(torchvision_capture) -> None:
    for name in (
        "googlenet",
        "densenet121",
        "mobilenet_v3_small",
        "efficientnet_b0",
        "convnext_tiny",
        "shufflenet_v2_x0_5",
    ):
        made = torchvision_capture(name)
        fields = receptive_fields(made)
        assert all(call.node in fields for call in made.calls), name


# ------------------------------------------------------------------------------------------------ closed forms


def extent_of(model: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    made = capture(model, torch.zeros(shape))
    return receptive_fields(made).get(last(made), (None, False))[0]


def test_recurrence_by_hand() -> None:
    # r = 1 → 3 → 3 + 2·4 = 11 (dilation 2, kernel 5) with jump 1 → stride 2: jump 2 → + 2·2 = 15
    model = nn.Sequential(conv(3), conv(5, stride=2, dilation=2), conv(3))
    assert extent_of(model, (1, 1, 32, 32)) == (15, 15)


def test_dims_are_kept_apart() -> None:
    model = nn.Sequential(conv((1, 3)), conv((5, 1), stride=(1, 2)), conv((1, 3)))
    assert extent_of(model, (1, 1, 32, 32)) == (5, 7)


@pytest.mark.parametrize(("dims", "kind"), [(1, nn.Conv1d), (3, nn.Conv3d)])
def test_other_numbers_of_dims(dims: int, kind: Any) -> None:
    model = nn.Sequential(kind(2, 2, 3), kind(2, 2, 3, stride=2), kind(2, 2, 3))
    assert extent_of(model, (1, 2, *(16,) * dims)) == (9,) * dims
    assert extent_of(model, (2, *(16,) * dims)) == (9,) * dims  # not batched


def test_the_longest_branch_counts() -> None:
    model = Fn(lambda m, x: m.a(x) + m.b(x) + x, a=conv(5, padding=2), b=conv(3, padding=4, dilation=4))
    assert extent_of(model, (1, 1, 16, 16)) == (9, 9)


def test_an_upsampled_branch_sees_no_more_than_it_does() -> None:
    # one position of the small map stands behind two of the large one
    assert extent_of(nn.Sequential(conv(2, stride=2), up(2, 2)), (1, 1, 16, 16)) == (2, 2)
    assert extent_of(
        nn.Sequential(conv(2, stride=2), nn.Upsample(scale_factor=2), conv(3, padding=1)), (1, 1, 16, 16)
    ) == (4, 4)


WHOLE: dict[str, Fn] = {
    "adaptive pool": Fn(lambda m, x: F.adaptive_avg_pool2d(m.c(x), 1), c=conv()),
    "mean": Fn(lambda m, x: m.c(x).mean((2, 3)), c=conv()),
    "mean of all": Fn(lambda m, x: m.c(x).mean().view(1, 1), c=conv()),
    "mean, dims kept": Fn(lambda m, x: m.c(x).mean((-2, -1), keepdim=True), c=conv()),
    "flatten, linear": Fn(lambda m, x: m.f(m.c(x).flatten(1)), c=conv(), f=nn.Linear(196, 2)),
    "view, linear": Fn(lambda m, x: m.f(m.c(x).view(1, -1)), c=conv(), f=nn.Linear(196, 2)),
    "squeeze-excite": Fn(lambda m, x: x * m.c(F.adaptive_avg_pool2d(x, 1)).sigmoid(), c=conv(1)),
    "self-attention": Fn(
        lambda m, x: F.scaled_dot_product_attention(*[m.c(x).flatten(2).transpose(1, 2)] * 3), c=conv()
    ),
    "attention by hand": Fn(
        lambda m, x: ((t := m.c(x).flatten(2).transpose(1, 2)) @ t.transpose(-2, -1)).softmax(-1) @ t, c=conv()
    ),
    "non-local by bmm": Fn(lambda m, x: torch.bmm(m.c(x).flatten(2).transpose(1, 2), m.c(x).flatten(2)), c=conv()),
    "mixing tokens": Fn(lambda m, x: m.f(m.c(x).flatten(2)), c=conv(), f=nn.Linear(196, 196)),
    "max of all positions": Fn(lambda m, x: m.c(x).flatten(2).max(-1)[0], c=conv()),
    "softmax over positions": Fn(lambda m, x: m.c(x).flatten(2).softmax(-1), c=conv()),
    "tokens": Fn(lambda m, x: m.f(m.c(x).flatten(2).transpose(1, 2)), c=conv(), f=nn.Linear(1, 3)),
    "tokens put back on the grid": Fn(
        lambda m, x: m.d(m.c(x).flatten(2).transpose(1, 2).transpose(1, 2).reshape(1, 1, 14, 14)), c=conv(), d=conv(1)
    ),
    "convolution over tokens": Fn(lambda m, x: m.t(m.c(x).flatten(2)), c=conv(), t=nn.Conv1d(1, 1, 3)),
    "multi-head attention": Fn(
        lambda m, x: m.a(*[m.c(x).flatten(2).transpose(1, 2).repeat(1, 1, 4)] * 3)[0],
        c=conv(),
        a=nn.MultiheadAttention(4, 2, batch_first=True),
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_mixes_all_positions_sees_the_whole_input(name: str) -> None:
    assert extent_of(WHOLE[name].eval(), (1, 1, 16, 16)) == (16, 16)


def test_mixing_one_dim() -> None:
    assert extent_of(Fn(lambda m, x: m.c(x).mean(2, keepdim=True), c=conv()), (1, 1, 16, 12)) == (16, 3)


KEEPS: dict[str, Fn] = {
    "channels last and back": Fn(lambda m, x: m.c(x).permute(0, 2, 3, 1).permute(0, 3, 1, 2), c=conv()),
    "linear on channels": Fn(lambda m, x: m.f(m.c(x).permute(0, 2, 3, 1)), c=conv(), f=nn.Linear(1, 3)),
    "channel shuffle": Fn(lambda m, x: m.c(x).view(1, 1, 1, 14, 14).transpose(1, 2).reshape(1, 1, 14, 14), c=conv()),
    "chunks of channels": Fn(lambda m, x: torch.cat(torch.cat([m.c(x)] * 2, 1).chunk(2, 1), 1), c=conv()),
    "unsqueeze, squeeze": Fn(lambda m, x: m.c(x).unsqueeze(0).squeeze(0), c=conv()),
    "stack, sum": Fn(lambda m, x: torch.stack([m.c(x), m.c(x)], 2).sum(2), c=conv()),
    "norms": Fn(lambda m, x: m.g(m.c(x)).relu(), c=conv(), g=nn.GroupNorm(1, 1)),
    "in place": Fn(lambda m, x: m.c(x).relu_().add_(1).mul_(2), c=conv()),
    "gate from another branch": Fn(lambda m, x: m.c(x) * torch.sigmoid(m.c(x)).expand(1, 1, 14, 14), c=conv()),
    "time before space": Fn(lambda m, x: m.c(x.unsqueeze(1).flatten(0, 1)), c=conv()),
    "split and one of the pieces": Fn(lambda m, x: torch.cat([m.c(x)] * 3, 1).split([1, 2], 1)[1], c=conv()),
    "matrix product over channels": Fn(lambda m, x: m.c(x).permute(0, 2, 3, 1) @ torch.ones(1, 5), c=conv()),
}


KEEPS |= {
    "pieces of positions": Fn(lambda m, x: m.c(x).chunk(2, 3)[1], c=conv()),
    "narrow": Fn(lambda m, x: m.c(x).narrow(2, 0, 9), c=conv()),
}


@pytest.mark.parametrize("name", KEEPS)
def test_what_keeps_positions(name: str) -> None:
    assert extent_of(KEEPS[name], (1, 1, 16, 16)) == (3, 3)


UNKNOWN: dict[str, Fn] = {
    "windows of tokens": Fn(lambda m, x: m.c(x).view(1, 1, 2, 7, 2, 7).transpose(3, 4).reshape(4, 1, 7, 7), c=conv()),
    "roll": Fn(lambda m, x: torch.roll(m.c(x), 1, 2), c=conv()),
    "flip": Fn(lambda m, x: m.c(x).flip(3), c=conv()),
    "grid_sample": Fn(lambda m, x: F.grid_sample(m.c(x), torch.zeros(1, 4, 4, 2), align_corners=False), c=conv()),
    "unfold": Fn(lambda m, x: F.unfold(m.c(x), 3), c=conv()),
    "index": Fn(lambda m, x: m.c(x)[:, :, torch.tensor([3, 1])], c=conv()),
    "two halves in one": Fn(lambda m, x: torch.cat([m.c(x), m.c(x)], 3), c=conv()),
    "transposed against straight": Fn(lambda m, x: m.c(x) + m.c(x).transpose(2, 3), c=conv()),
    "cumsum": Fn(lambda m, x: m.c(x).cumsum(2), c=conv()),
    "a piece that is all": Fn(lambda m, x: m.c(x).split([1], 2)[0], c=conv((16, 3))),
    "bicubic": Fn(lambda m, x: F.interpolate(m.c(x), scale_factor=2, mode="bicubic"), c=conv()),
    "antialias": Fn(lambda m, x: F.interpolate(m.c(x), (9, 13), mode="bilinear", antialias=True), c=conv()),
    "einsum": Fn(lambda m, x: torch.einsum("nchw,ndhw->ncd", m.c(x), m.c(x)), c=conv()),
    "written into": Fn(lambda m, x: _write(m.c(x)), c=conv()),
}


def _write(x: Tensor) -> Tensor:
    out = x * 1
    out[:, :, 1:] = x[:, :, :-1]
    return out


UNKNOWN["copied into a view"] = Fn(lambda m, x: m.d(_copy(m.c(x))), c=conv(), d=conv(1))
UNKNOWN["added into a view"] = Fn(lambda m, x: m.d(_copy(m.c(x), add=True)), c=conv(), d=conv(1))


def _copy(x: Tensor, *, add: bool = False) -> Tensor:
    out = x * 1
    view = out[:, :, 1:]
    view.add_(x[:, :, :-1]) if add else view.copy_(x[:, :, :-1])
    return out


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_followed_is_unknown(name: str) -> None:
    assert extent_of(UNKNOWN[name], (1, 1, 16, 16)) is None


def test_all_that_follows_the_unknown_is_unknown_until_the_whole_is_seen() -> None:
    model = Fn(lambda m, x: m.d(torch.roll(m.c(x), 1, 2)), c=conv(), d=conv())
    assert extent_of(model, (1, 1, 16, 16)) is None
    gated = Fn(lambda m, x: torch.roll(m.c(x), 1, 2) * m.c(x).mean((2, 3), keepdim=True), c=conv())
    assert extent_of(gated, (1, 1, 16, 16)) == (16, 16)


def test_models_without_a_frame() -> None:
    made = capture(nn.Linear(3, 2), torch.zeros(1, 3))
    assert receptive_fields(made) == {}


def test_a_stereo_pair_shares_coordinates() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv(3, padding=1), conv(5, padding=2)

        def forward(self, left: Tensor, right: Tensor, scale: Tensor) -> Tensor:
            return self.a(left) + self.b(right) * scale

    made = capture(Pair(), (torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8), torch.zeros(1)))
    assert receptive_fields(made)[last(made)] == ((5, 5), False)


NO_VALUE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "to": lambda x, wide, c: x * c.to(wide),
    "type_as": lambda x, wide, c: x * c.type_as(wide),
    "expand_as": lambda x, wide, c: x + c.expand_as(wide),
    "view_as": lambda x, wide, c: x + c.expand(wide.shape).contiguous().view_as(wide),
    "reshape_as": lambda x, wide, c: x + c.expand(wide.shape).reshape_as(wide),
    "expand": lambda x, wide, c: x + c.expand(wide.size()),
    "broadcast_to": lambda x, wide, c: x + torch.broadcast_to(c, wide.shape),
    "zeros_like": lambda x, wide, c: x + torch.zeros_like(wide),
    "full_like": lambda x, wide, c: x + torch.full_like(wide, 2),
    "rand_like": lambda x, wide, c: x + torch.rand_like(wide),
    "new_zeros": lambda x, wide, c: x + wide.new_zeros(wide.shape),
    "new_full": lambda x, wide, c: x + wide.new_full((1,), 3.0),
    "new_tensor": lambda x, wide, c: x + wide.new_tensor([1.0]),
    "size": lambda x, wide, c: x * wide.size(2) + wide.shape[3] + wide.numel(),
    "input cast to the type of a wider one": lambda x, wide, c: x.to(wide),
    "input as the type of a wider one": lambda x, wide, c: x.type_as(wide),
    "input expanded to a wider one": lambda x, wide, c: x.expand_as(wide),
    "input viewed as a wider one": lambda x, wide, c: x.view_as(wide),
    "zeroed": lambda x, wide, c: x + wide.clone().zero_(),
    "filled": lambda x, wide, c: x + wide.clone().fill_(1.0),
    "overwritten": lambda x, wide, c: wide.clone().copy_(x),
    "a constant resized to it": lambda x, wide, c: x + F.interpolate(c, size=wide.shape[2:]),
}


@pytest.mark.parametrize("name", NO_VALUE)
def test_operands_that_give_a_type_or_a_shape_are_not_seen(name: str) -> None:
    model = Fn(
        lambda m, x: NO_VALUE[name](m.c(x), m.wide(x), m.scale),
        c=conv(3, padding=1),
        wide=conv(7, padding=3),
    )
    model.register_buffer("scale", torch.ones(1, 1, 1, 1, dtype=torch.float64))
    assert extent_of(model.float(), (1, 1, 16, 16)) == (3, 3)


# --------------------------------------------------------------------------------------------------- gradients

MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Sequential(conv(3, padding=1), conv((5, 3), padding=2), conv(1)),
    "strided": lambda: nn.Sequential(conv(3, 2, 1), conv(3, 2, 1), conv(3, 1, 1)),
    "dilated": lambda: nn.Sequential(conv(3, padding=2, dilation=2), conv(3, padding=4, dilation=4)),
    "atrous pyramid": lambda: Fn(
        lambda m, x: torch.cat([m.a(x), m.b(x), m.c(x)], 1), a=conv(1), b=conv(3, 1, 2, 2), c=conv(3, 1, (5, 3), (5, 3))
    ),
    "residual with a stride": lambda: Fn(
        lambda m, x: F.relu(m.b(m.a(x)) + m.s(x)), a=conv(3, 2, 1), b=conv(3, 1, 1), s=conv(1, 2)
    ),
    "pooling": lambda: nn.Sequential(conv(3), nn.AvgPool2d(3, 2, 1), conv(3), nn.AvgPool2d(2)),
    "ceiling": lambda: nn.Sequential(nn.AvgPool2d(3, 2, ceil_mode=True), conv(3, 1, 1)),
    "transposed 2/2": lambda: nn.Sequential(conv(3, 2, 1), up(2, 2), conv(3, 1, 1)),
    "transposed 3/2": lambda: nn.Sequential(conv(3, 2, 1), up(3, 2, 1, 1), conv(3, 1, 1)),
    "transposed 4/2": lambda: nn.Sequential(conv(4, 2, 1), conv(4, 2, 1), up(4, 2, 1), up(4, 2, 1)),
    "transposed with gaps": lambda: nn.Sequential(conv(3, 3, 1), up(2, 3), conv(3, 1, 1)),
    "transposed and dilated": lambda: nn.Sequential(up(3, 2, 2, 1, dilation=2), conv(3, 1, 1)),
    "nearest": lambda: nn.Sequential(conv(3, 2, 1), nn.Upsample(scale_factor=2), conv(3, 1, 1)),
    "nearest-exact": lambda: nn.Sequential(nn.Upsample(size=(15, 21), mode="nearest-exact"), conv(3, 1, 1)),
    "nearest by three halves": lambda: nn.Sequential(conv(2, 2), nn.Upsample(scale_factor=1.5), conv(3, 1, 1)),
    "bilinear": lambda: nn.Sequential(
        conv(3, 2, 1), nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False), conv(3, 1, 1)
    ),
    "bilinear, smaller": lambda: Fn(
        lambda m, x: m.a(F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False)), a=conv(3, 1, 1)
    ),
    "uneven adaptive": lambda: nn.Sequential(conv(3, 1, 1), nn.AdaptiveAvgPool2d((5, 7)), conv(3, 1, 1)),
    "area": lambda: Fn(lambda m, x: F.interpolate(m.a(x), (6, 8), mode="area"), a=conv(3, 1, 1)),
    "pixel shuffle": lambda: Fn(
        lambda m, x: m.b(F.pixel_shuffle(torch.cat([m.a(x)] * 4, 1), 2)), a=conv(3, 2, 1), b=conv(3, 1, 1)
    ),
    "pixel unshuffle": lambda: Fn(
        lambda m, x: m.a(F.pixel_unshuffle(x, 2)[:, :1] + F.pixel_unshuffle(x, 2)[:, 3:]), a=conv()
    ),
    "focus": lambda: Fn(
        lambda m, x: m.a(torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2]], 1).sum(1, keepdim=True)),
        a=conv(3, 1, 1),
    ),
    "same": lambda: nn.Sequential(nn.Conv2d(1, 1, (4, 3), padding="same", bias=False), conv(3, 1, 1)),
    "skip around a bottleneck": lambda: Fn(
        lambda m, x: m.c(torch.cat([x, m.u(m.d(x))], 1).sum(1, keepdim=True)),
        d=conv(5, 4, 2),
        u=up(4, 4),
        c=conv(3, 1, 1),
    ),
    "window shorter than the step": lambda: nn.Sequential(conv(2, 3), conv(2, 2)),
}


SHORT = {
    "transposed 4/2": 2,
    "transposed with gaps": 1,
    "nearest by three halves": 1,
    "focus": 1,
    "skip around a bottleneck": 2,
}
"""By how much an extent may be too small, which is less than a jump before an upsampling or between branches."""


@pytest.mark.parametrize("name", MODELS)
def test_gradients(name: str) -> None:
    check(MODELS[name](), (1, 1, 20, 28), short=SHORT.get(name, 0))


@pytest.mark.parametrize(
    "model",
    [
        lambda: nn.Sequential(conv(3), nn.Upsample(size=(17, 23), mode="bilinear", align_corners=True), conv(3)),
        lambda: Fn(lambda m, x: m.a(x[:, :, 2:-1, 3:]), a=conv(3, 1, 1)),
        lambda: Fn(lambda m, x: m.a(F.pad(x, (2, 0, 1, 4))), a=conv(3)),
        lambda: Fn(
            lambda m, x: x + F.interpolate(m.a(x), (20, 28), mode="bilinear", align_corners=True), a=conv(3, 3, 1)
        ),
    ],
)
def test_gradients_away_from_the_border(model: Callable[[], nn.Module]) -> None:
    # with aligned corners the period is as long as the tensor, and its widest position may lie at the border
    check(model(), (1, 1, 20, 28), slack=1)


@pytest.mark.parametrize(
    ("name", "size"),
    [("resnet18", 48), ("googlenet", 48), ("mobilenet_v2", 48), ("densenet121", 32), ("fcn_resnet50", 32)],
)
def test_gradients_of_torchvision_models(name: str, size: int) -> None:
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        settings = {"googlenet": {"init_weights": False}, "fcn_resnet50": {"weights_backbone": None}}
        model = models.get_model(name, weights=None, **settings.get(name, {}))
    if name == "fcn_resnet50":
        body = nn.Sequential(*model.backbone.values(), model.classifier)
    elif name == "resnet18":
        body = nn.Sequential(*list(model.children())[:-2])
    elif name == "googlenet":
        wanted = [child for n, child in model.named_children() if n.startswith(("conv", "maxpool", "inception"))]
        body = nn.Sequential(*wanted[:8])
    else:
        body = nn.Sequential(*list(model.features)[:8])
    check(body, (1, 3, size, size), most=5)


def test_gradients_of_a_u_net() -> None:
    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.ModuleList(conv(3, 1, 1) for _ in range(4))
            self.up = nn.ModuleList(up(2, 2) for _ in range(3))
            self.out = nn.ModuleList(nn.Conv2d(2, 1, 3, padding=1, bias=False) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            kept = []
            for layer in self.down:
                x = layer(F.avg_pool2d(x, 2) if kept else x)
                kept.append(x)
            for rise, layer, skip in zip(self.up, self.out, kept[-2::-1]):
                x = layer(torch.cat([skip, rise(x)], 1))
            return x

    check(UNet(), (1, 1, 48, 32), most=16)


def parts() -> st.SearchStrategy[tuple[Any, ...]]:
    """One operation along one dim: its kind and settings."""
    kernel, step, hole = st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)
    return st.one_of(
        st.tuples(st.just("conv"), kernel, step, st.integers(0, 2), hole),
        st.tuples(st.just("branch"), st.integers(1, 3), st.integers(1, 3)),
    )


class Random(nn.Module):
    """A chain of such operations along one dim; a branch adds two convolutions of different dilation."""

    def __init__(self, chain: list[tuple[Any, ...]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for kind, *given_settings in chain:
            if kind == "conv":
                kernel, step, padding, hole = given_settings
                self.layers.append(nn.Conv1d(1, 1, kernel, step, min(padding, kernel // 2), hole, bias=False))
            else:
                both = [nn.Conv1d(1, 1, 3, padding=d, dilation=d, bias=False) for d in given_settings]
                self.layers.append(Fn(lambda m, x: m.a(x) + m.b(x), a=both[0], b=both[1]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_where_values_lie_is_no_map() -> None:
    """``torch.where`` of a condition gives indices: one axis, with as many positions as there are hits."""

    def forward(m: Any, x: Tensor) -> Tensor:
        rows, columns = torch.where(m.conv(x)[0, 0] > 0)
        return torch.stack((rows, columns), -1)[:, :1].float().view(-1)

    torch.manual_seed(0)
    made = capture(Fn(forward, conv=nn.Conv2d(1, 1, 3)), torch.randn(1, 1, 12, 12))
    assert last(made) not in receptive_fields(made)


@settings(max_examples=80, deadline=None)
@given(st.lists(parts(), min_size=1, max_size=5))
def test_gradients_of_random_chains(chain: list[tuple[Any, ...]]) -> None:
    shape = (1, 1, 48)
    model = positive(Random(chain))
    try:
        out = model(torch.zeros(shape, dtype=torch.float64))
    except RuntimeError:
        assume(False)
    assume(3 <= out.shape[-1] <= 400)
    made = capture(model, torch.zeros(shape, dtype=torch.float64))
    ((extent,), whole) = receptive_fields(made)[last(made)]
    middle = out.shape[-1] // 2
    assert not whole
    positions = [(at,) for at in range(max(0, middle - 6), min(middle + 6, out.shape[-1]))]
    spans = [span for (span,) in support(model, shape, positions)]
    assert all(high - low + 1 <= extent for low, high in spans)
    assume(spans)
    # exact where neither the input's border nor that of a tensor in between (all narrower) can interfere
    if all(low >= 8 and high <= 39 for low, high in spans):
        assert max(high - low + 1 for low, high in spans) == extent
