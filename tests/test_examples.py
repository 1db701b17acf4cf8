"""The models in `examples`: each builds, runs, and is the architecture it says it is.

Most of this happens on the meta device, where neither weights nor activations are computed.
"""

import importlib.util
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> ModuleType:
    """Execute `examples/NAME.py` as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"pwrewrite_example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = load(name).build_model()
    return model.eval()


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def conv(in_channels: int, out_channels: int, kernel: int, bias: bool = False) -> int:
    return in_channels * out_channels * kernel**2 + out_channels * bias


def inception(in_channels: int, ch1: int, ch3: tuple[int, int], ch5: tuple[int, int], pool: int, bias: bool) -> int:
    """Parameters of figure 2(b) in closed form."""
    return (
        conv(in_channels, ch1, 1, bias)
        + conv(in_channels, ch3[0], 1, bias)
        + conv(*ch3, 3, bias)
        + conv(in_channels, ch5[0], 1, bias)
        + conv(*ch5, 5, bias)
        + conv(in_channels, pool, 1, bias)
    )


def googlenet() -> int:
    """Table 1 of the paper with biases; Caffe's bvlc_googlenet without auxiliary heads has as many: 6,998,552."""
    stem = conv(3, 64, 7, bias=True) + conv(64, 64, 1, bias=True) + conv(64, 192, 3, bias=True)
    rows = [
        (192, 64, (96, 128), (16, 32), 32),
        (256, 128, (128, 192), (32, 96), 64),
        (480, 192, (96, 208), (16, 48), 64),
        (512, 160, (112, 224), (24, 64), 64),
        (512, 128, (128, 256), (24, 64), 64),
        (512, 112, (144, 288), (32, 64), 64),
        (528, 256, (160, 320), (32, 128), 128),
        (832, 256, (160, 320), (32, 128), 128),
        (832, 384, (192, 384), (48, 128), 128),
    ]
    return stem + sum(inception(*row, bias=True) for row in rows) + 1024 * 1000 + 1000


def unet(in_channels: int, num_classes: int, width: int) -> int:
    def double(a: int, b: int) -> int:
        return conv(a, b, 3) + conv(b, b, 3) + 2 * 2 * b

    w = [width * 2**level for level in range(5)]
    down = double(in_channels, w[0]) + sum(double(a, b) for a, b in pairwise(w))
    up = sum(conv(b, a, 2, bias=True) + double(2 * a, a) for a, b in pairwise(w))
    return down + up + conv(width, num_classes, 1, bias=True)


def attention() -> int:
    def block(a: int, b: int) -> int:
        return conv(a, b, 3) + conv(b, b, 3) + 2 * 2 * b + conv(a, b, 1)

    stem = conv(3, 32, 3) + 2 * 32
    squeeze_excite = conv(64, 4, 1, bias=True) + conv(4, 64, 1, bias=True)
    cbam = conv(128, 8, 1) + conv(8, 128, 1) + conv(2, 1, 7)
    return stem + block(32, 64) + squeeze_excite + block(64, 128) + cbam + conv(128, 10, 1, bias=True)


def digits(width: int) -> int:
    pairs = [(1, width), (width, width), (width, 2 * width), (2 * width, 2 * width), (2 * width, 4 * width)]
    return sum(conv(a, b, 3) + 2 * b for a, b in pairs) + conv(4 * width, 10, 1, bias=True)


# name: (parameters, output shape)
KNOWN: dict[str, tuple[int, tuple[int, ...]]] = {
    "attention": (attention(), (1, 10)),
    "channel_mixing": (12, (1, 4, 3, 3)),
    "digits": (digits(48), (1, 10)),
    "googlenet": (6_998_552, (1, 1000)),
    "inception_naive": (387_072, (1, 416, 28, 28)),
    "inception_reduced": (163_328, (1, 256, 28, 28)),
    "mobilenet": (4_231_976, (1, 1000)),
    "resnet18": (11_689_512, (1, 1000)),
    "resnet50": (25_557_032, (1, 1000)),
    "unet": (unet(in_channels=1, num_classes=2, width=64), (1, 2, 256, 256)),
    "vgg16": (138_357_544, (1, 1000)),
}


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*KNOWN, "mask_rcnn"}


@pytest.mark.parametrize("name", KNOWN)
def test_builds_runs_and_has_the_known_size(name: str) -> None:
    params, output_shape = KNOWN[name]
    example = load(name)
    assert example.__doc__
    model = build_on_meta(name)
    inputs = example.example_inputs()
    assert isinstance(inputs, tuple)
    assert count(model) == params
    assert tuple(model(*(x.to("meta") for x in inputs)).shape) == output_shape


@pytest.mark.parametrize("name", KNOWN)
def test_traces_whole(name: str) -> None:
    """Nothing in the plain examples needs more than torch.fx itself."""
    torch.fx.symbolic_trace(build_on_meta(name)).graph.lint()


@pytest.mark.parametrize("name", ["inception_naive", "inception_reduced", "channel_mixing", "attention"])
def test_runs_for_real(name: str) -> None:
    example = load(name)
    torch.manual_seed(0)
    model = example.build_model().eval()
    with torch.no_grad():
        output = model(*(torch.randn_like(x) for x in example.example_inputs()))
    assert tuple(output.shape) == KNOWN[name][1]
    assert output.isfinite().all()
    assert output.std() > 0


def test_closed_forms() -> None:
    assert conv(192, 64, 1) + conv(192, 128, 3) + conv(192, 32, 5) == 387_072
    assert inception(192, 64, (96, 128), (16, 32), 32, bias=False) == 163_328
    assert googlenet() == 6_998_552


def test_naive_and_reduced_inception_have_the_same_branches() -> None:
    naive = dict(build_on_meta("inception_naive").named_children())
    reduced = dict(build_on_meta("inception_reduced").named_children())
    assert list(naive) == ["b1", "b3", "b5", "pool"]
    assert isinstance(naive["pool"], nn.MaxPool2d)
    for branch in ("b1", "b3", "b5"):
        assert isinstance(naive[branch], nn.Conv2d)
        assert naive[branch].kernel_size == reduced[branch].kernel_size
        assert naive[branch].out_channels == reduced[branch].out_channels
    assert {"b3_reduce", "b5_reduce", "pool_proj"} < set(reduced)


def test_naive_inception_rectifies_as_if_each_branch_did() -> None:
    """Behind the concatenation and before it, a ReLU is the same, for the pool too, whose input is rectified."""
    torch.manual_seed(0)
    model = load("inception_naive").build_model()
    x = torch.rand(1, 192, 6, 6)
    with torch.no_grad():
        each = [torch.relu(branch(x)) for branch in (model.b1, model.b3, model.b5)] + [model.pool(x)]
        assert torch.equal(model(x), torch.cat(each, dim=1))


def test_channel_mixing_is_a_matrix_at_every_place() -> None:
    example = load("channel_mixing")
    (x,) = example.example_inputs()
    with torch.no_grad():
        y = example.build_model()(x)
    red, green, blue = x[0]
    expected = torch.stack([red, green - blue, red + green + blue, red / 2 + green / 4 + blue / 4])
    # Small integers and powers of two: float32 holds every value exactly.
    assert torch.equal(y[0], expected)


def test_resnet50_macs() -> None:
    model = build_on_meta("resnet50")
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() == 2 * 4_089_184_256


@pytest.mark.parametrize(
    ("in_channels", "num_classes", "width", "height"), [(1, 2, 8, 16), (3, 5, 4, 48), (2, 1, 16, 80)]
)
def test_unet_of_any_size(in_channels: int, num_classes: int, width: int, height: int) -> None:
    with torch.device("meta"):
        model = load("unet").UNet(in_channels=in_channels, num_classes=num_classes, width=width)
        output = model(torch.zeros(2, in_channels, height, 32))
    assert tuple(output.shape) == (2, num_classes, height, 32)
    assert count(model) == unet(in_channels, num_classes, width)


@pytest.mark.parametrize("name", ["vgg16", "resnet18", "resnet50"])
def test_same_tensors_as_torchvision(name: str) -> None:
    """Same weights and buffers, in the same order."""
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    with torch.device("meta"):
        theirs = getattr(models, name)(weights=None)
    ours = build_on_meta(name)
    assert [t.shape for t in ours.state_dict().values()] == [t.shape for t in theirs.state_dict().values()]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_same_function_as_torchvision(name: str) -> None:
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    torch.manual_seed(0)
    theirs = getattr(models, name)(weights=None).eval()
    ours = load(name).build_model().eval()
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        # The same operations on the same numbers; only the residual sum's order may differ.
        torch.testing.assert_close(ours(x), theirs(x))


def test_mask_rcnn() -> None:
    pytest.importorskip("torchvision.models.detection", reason="torchvision is not installed")
    example = load("mask_rcnn")
    torch.manual_seed(0)
    model = example.build_model().eval()
    # torchvision states 44,401,393 for its trained model, whose batch norms are frozen: buffers, not parameters.
    # Untrained, the backbone's 53,120 norm parameters count too.
    assert count(model) == 44_401_393 + 53_120
    (images,) = example.example_inputs()
    assert [tuple(image.shape) for image in images] == [(3, 320, 320)]
    model.transform.min_size = (64,)  # the default of 800 takes some seconds
    with torch.no_grad():
        (found,) = model([image[:, :64, :64] for image in images])
    n = len(found["boxes"])
    assert tuple(found["boxes"].shape) == (n, 4)
    assert tuple(found["masks"].shape) == (n, 1, 64, 64)


def test_mask_rcnn_without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("torchvision", "torchvision.models", "torchvision.models.detection"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"needs torchvision.*pip install torchvision"):
        load("mask_rcnn")


@pytest.mark.parametrize(
    ("style", "inside"),
    [
        ("module", lambda text: "nn.ReLU()" in text),
        ("functional", lambda text: "F.relu(" in text),
        ("inplace", lambda text: "inplace=True" in text),
    ],
)
def test_activations_come_in_every_style(style: str, inside: Callable[[str], bool]) -> None:
    assert any(inside(path.read_text()) for path in EXAMPLES.glob("*.py")), style


def test_digits_learns() -> None:
    pytest.importorskip("sklearn")
    example = load("digits")
    images, classes = example.digits()
    assert tuple(images.shape) == (1797, 1, 24, 24)
    assert (float(images.min()), float(images.max())) == (0, 1)
    assert sorted(classes.unique().tolist()) == list(range(10))
    torch.manual_seed(0)
    model = example.DigitsNet(width=8)
    example.train(model, images[:640], classes[:640], epochs=2, rate=2e-2)
    assert not model.training
    with torch.no_grad():
        right = (model(images[640:]).argmax(1) == classes[640:]).float().mean()
    assert right > 0.5  # of ten classes; trained for seconds
