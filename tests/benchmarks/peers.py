"""The peers that count a model's work, each called the way its own documentation calls it.

Shared by the script that records their figures, the test that compares with them and the benchmark. All of them come
with the extra ``bench``.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import runpy
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def torch_total(model: nn.Module, x: Tensor) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() % 2 == 0
    return int(counter.get_total_flops()) // 2


def fvcore_total(model: nn.Module, x: Tensor) -> int:
    from fvcore.nn import FlopCountAnalysis

    analysis = FlopCountAnalysis(model, x)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    return int(analysis.total())


def thop_total(model: nn.Module, x: Tensor) -> int:
    from thop import profile

    macs, _ = profile(model, (x,), verbose=False)
    assert macs == int(macs)
    return int(macs)


def ptflops_total(model: nn.Module, x: Tensor) -> int:
    from ptflops import get_model_complexity_info

    def inputs(_: tuple[int, ...]) -> Tensor:
        return x

    with contextlib.redirect_stdout(io.StringIO()):
        macs, _ = get_model_complexity_info(
            model, tuple(x.shape[1:]), as_strings=False, print_per_layer_stat=False, input_constructor=inputs
        )
    assert macs is not None
    return int(macs)


def torchinfo_total(model: nn.Module, x: Tensor) -> int:
    from torchinfo import summary

    return int(summary(model, input_data=x, verbose=0).total_mult_adds)


TOTALS: dict[str, Callable[[nn.Module, Tensor], int]] = {
    "torch": torch_total,
    "fvcore": fvcore_total,
    "ptflops": ptflops_total,
    "torchinfo": torchinfo_total,
    "thop": thop_total,
}


def version(tool: str) -> str | None:
    """The installed version of a peer, or None."""
    try:
        return importlib.metadata.version(tool)
    except importlib.metadata.PackageNotFoundError:
        return None


def total(tool: str, model: nn.Module, x: Tensor) -> int:
    """What a peer says, its warnings held back."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TOTALS[tool](model, x)


def build(target: str) -> nn.Module:
    """``torchvision:NAME``, ``timm:NAME`` or ``examples:FILE``, in evaluation mode, on the current default device."""
    kind, _, name = target.partition(":")
    if kind == "examples":
        model = runpy.run_path(str(EXAMPLES / f"{name}.py"))["build_model"]()
    elif kind == "timm":
        import timm

        model = timm.create_model(name, pretrained=False)
    else:
        import torchvision

        settings = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        if name in ("fcn_resnet50", "deeplabv3_mobilenet_v3_large"):
            settings = {"weights_backbone": None}
        model = torchvision.models.get_model(name, weights=None, **settings)
    return model.eval()


def skeleton(target: str) -> nn.Module:
    """The same without weights where its constructor allows that."""
    try:
        with torch.device("meta"):
            return build(target)
    except (NotImplementedError, RuntimeError):
        return build(target)


SHAPES = {
    "torchvision:inception_v3": (1, 3, 299, 299),
    "torchvision:efficientnet_v2_s": (1, 3, 384, 384),
    "timm:botnet26t_256": (1, 3, 256, 256),
    "timm:bat_resnext26ts": (1, 3, 256, 256),
    "examples:unet": (1, 1, 256, 256),
}


def shape(target: str) -> tuple[int, ...]:
    """The input that the figures of a model are for."""
    return SHAPES.get(target, (1, 3, 224, 224))


_TORCHVISION = """
alexnet vgg16 vgg16_bn resnet18 resnet50 resnext50_32x4d wide_resnet50_2 squeezenet1_0 densenet121 googlenet
inception_v3 mobilenet_v2 mobilenet_v3_small mobilenet_v3_large efficientnet_b0 efficientnet_v2_s shufflenet_v2_x1_0
mnasnet1_0 regnet_y_400mf convnext_tiny fcn_resnet50 deeplabv3_mobilenet_v3_large
"""
_TIMM = """
seresnet50 skresnet50 ghostnet_100 cspresnet50 dla34 hrnet_w18 repvgg_a0 xception41 legacy_xception res2net50_26w_4s
convnext_atto tf_efficientnet_lite0 nf_regnet_b0 eca_nfnet_l0 resnet50_gn mixnet_s bat_resnext26ts inception_next_atto
rexnet_100 lcnet_100 convmixer_768_32 poolformer_s12 mobileone_s0 starnet_s1 botnet26t_256 edgenext_xx_small
inception_v3
"""
MODELS = (
    *(f"torchvision:{name}" for name in _TORCHVISION.split()),
    *(f"timm:{name}" for name in _TIMM.split()),
    "examples:unet",
)
"""Models whose figures are recorded: plain, branched, depthwise, attentive, functional, dense, padded, hybrid."""
