"""Targets out of torchvision and timm: built without a download, with inputs of the size they were trained on."""

import importlib
import socket
import subprocess
import sys
from typing import Any

import pytest
import torch

from pwrewrite.core.errors import TargetError
from pwrewrite.targets import LoadedModel, describe_inputs, load_target, resolve_model


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Packages that this fixture holds cannot be imported."""
    names: set[str] = set()
    real = importlib.import_module

    def fake(name: str, package: str | None = None) -> Any:
        if name.partition(".")[0] in names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", fake)
    return names


def on_meta(target: str, **kwargs: Any) -> LoadedModel:
    with torch.device("meta"):
        return load_target(target, **kwargs)


def shapes(loaded: LoadedModel) -> list[tuple[int, ...]]:
    return [tuple(d["shape"]) for d in describe_inputs(loaded.example_inputs)]


def run(loaded: LoadedModel) -> object:
    def move(value: Any) -> Any:
        return value.to("meta") if isinstance(value, torch.Tensor) else type(value)(map(move, value))

    with torch.no_grad(), torch.device("meta"):
        return loaded.model.to("meta")(*move(loaded.example_inputs))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("regnet_x_400mf", (1, 3, 224, 224)),
        ("resnet18", (1, 3, 224, 224)),
        ("inception_v3", (1, 3, 299, 299)),
        ("efficientnet_b1", (1, 3, 240, 240)),
        ("vit_h_14", (1, 3, 224, 224)),  # its best weights are of 518; the model that is built is not
        ("swin_v2_t", (1, 3, 256, 256)),
        ("lraspp_mobilenet_v3_large", (1, 3, 520, 520)),
        ("deeplabv3_mobilenet_v3_large", (1, 3, 520, 520)),
        ("r3d_18", (1, 3, 16, 112, 112)),
        ("s3d", (1, 3, 16, 224, 224)),
        ("quantized_mobilenet_v2", (1, 3, 224, 224)),
    ],
)
def test_torchvision_models_take_what_their_transforms_crop_to(name: str, shape: tuple[int, ...]) -> None:
    loaded = load_target(f"torchvision:{name}", empty=True)
    assert shapes(loaded) == [shape]
    assert not loaded.model.training
    assert all(p.is_meta for p in loaded.model.parameters())
    if name not in ("s3d", "vit_h_14"):  # slow, for what it shows
        run(loaded)
    assert ("a clip of 16 frames" in "".join(loaded.notes)) == (len(shape) == 5)


@pytest.mark.parametrize(
    ("name", "side"),
    [("fasterrcnn_resnet50_fpn", 800), ("ssd300_vgg16", 300), ("fasterrcnn_mobilenet_v3_large_320_fpn", 320)],
)
def test_detection_models_take_a_list_of_images(name: str, side: int) -> None:
    loaded = on_meta(f"torchvision:{name}")
    assert isinstance(loaded.example_inputs, tuple)
    assert isinstance(loaded.example_inputs[0], list)
    assert shapes(loaded) == [(3, side, side)]
    assert "a list of one image" in loaded.notes[0]
    for specs in (["3x64x96"], ["1x3x64x96"]):
        given = on_meta(f"torchvision:{name}", inputs=specs)
        assert isinstance(given.example_inputs[0], list)
        assert shapes(given) == [(3, 64, 96)]
    two = on_meta(f"torchvision:{name}", inputs=["3x64x96", "3x32x32"])
    assert shapes(two) == [(3, 64, 96), (3, 32, 32)]
    assert len(two.example_inputs) == 1


def test_a_model_that_probes_itself_when_built_goes_wholly_on_meta() -> None:
    model = load_target("torchvision:ssdlite320_mobilenet_v3_large", empty=True).model
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))


def test_a_detection_model_accepts_its_inputs() -> None:
    loaded = load_target("torchvision:ssdlite320_mobilenet_v3_large")
    with torch.no_grad():
        (result,) = loaded.model(*loaded.example_inputs)
    assert set(result) == {"boxes", "scores", "labels"}


def test_optical_flow_models_take_two_images() -> None:
    loaded = on_meta("torchvision:raft_small")
    assert shapes(loaded) == [(1, 3, 520, 960)] * 2
    assert "two images" in loaded.notes[0]


def test_arguments_reach_the_builder() -> None:
    assert on_meta("torchvision:resnet18", args={"num_classes": 10}).model.fc.out_features == 10
    assert shapes(on_meta("torchvision:vit_b_16", args={"image_size": 384})) == [(1, 3, 384, 384)]
    assert on_meta("timm:resnet18", args={"num_classes": 10, "in_chans": 1}).model.fc.out_features == 10
    assert shapes(on_meta("timm:resnet18", args={"in_chans": 1})) == [(1, 1, 224, 224)]
    assert shapes(on_meta("timm:vit_tiny_patch16_224", args={"img_size": 384})) == [(1, 3, 384, 384)]


def test_timm_models_take_their_own_input_size() -> None:
    for name, side in [("resnet18", 224), ("efficientnet_b3.ra2_in1k", 288), ("resnet18.a1_in1k", 224)]:
        loaded = on_meta(f"timm:{name}")
        assert shapes(loaded) == [(1, 3, side, side)]
        assert loaded.notes == ()
    run(on_meta("timm:resnet18"))


def refusal(target: str, **args: object) -> str:
    with pytest.raises(TargetError) as caught, torch.device("meta"):
        resolve_model(target, args)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize("zoo", ["torchvision", "timm"])
def test_an_unknown_name_suggests_the_nearest(zoo: str) -> None:
    message = refusal(f"{zoo}:resnet_50")
    assert f"{zoo} has no model 'resnet_50'" in message
    assert "did you mean resnet50" in message
    assert "list_models()" in refusal(f"{zoo}:qqqqqqqqqq")


def test_a_name_of_the_other_zoo() -> None:
    assert "timm:convnextv2_tiny" in refusal("torchvision:convnextv2_tiny")
    assert "torchvision:raft_small" in refusal("timm:raft_small")
    assert "names no model" in refusal("timm:")


def test_an_unknown_tag_and_a_hub_address() -> None:
    message = refusal("timm:resnet50.nope")
    assert "no tag 'nope'" in message
    assert "a1_in1k" in message
    assert "downloads nothing" in refusal("timm:hf-hub:timm/resnet50")
    assert "downloads nothing" in refusal("timm:hf_hub:timm/resnet50")


@pytest.mark.parametrize("zoo", ["torchvision", "timm"])
def test_an_unknown_argument(zoo: str) -> None:
    message = refusal(f"{zoo}:resnet18", num_clases=10)
    assert "takes no argument num_clases" in message
    assert "num_classes=1000" in message
    assert "did you mean num_classes?" in message
    assert "weights" not in message


@pytest.mark.parametrize(
    ("target", "args"),
    [
        ("torchvision:resnet18", {"weights": "DEFAULT"}),
        ("torchvision:fcn_resnet50", {"weights_backbone": "DEFAULT"}),
        ("timm:resnet18", {"pretrained": True}),
        ("timm:resnet18", {"checkpoint_path": "x.pt"}),
    ],
)
def test_what_would_fetch_weights_is_refused(target: str, args: dict[str, object]) -> None:
    message = refusal(target, **args)
    assert "would download or read weights" in message
    assert "--weights FILE" in message


def test_weights_that_are_off_are_accepted() -> None:
    resolve_model("timm:resnet18", {"pretrained": False})
    resolve_model("torchvision:resnet18", {"weights": None})


def test_a_missing_zoo(absent: set[str]) -> None:
    absent.update(("torchvision", "timm"))
    for zoo in ("torchvision", "timm"):
        message = refusal(f"{zoo}:resnet18")
        assert f"{zoo} is not installed" in message
        assert "pip install pwrewrite[zoo]" in message


def test_a_zoo_that_does_not_fit_this_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str, package: str | None = None) -> Any:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(importlib, "import_module", broken)
    message = refusal("torchvision:resnet18")
    assert "does not import: operator torchvision::nms does not exist" in message
    assert "matching versions" in message


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    heavy = ("torchvision", "timm", "torch._dynamo")
    code = f"import sys, pwrewrite.targets; print([m for m in {heavy} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
