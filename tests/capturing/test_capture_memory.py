"""The memory log against the live storages of a real eager run."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pwrewrite.capturing import Capture, capture, info
from pwrewrite.core.nested import tensors_of


class LiveStorages(TorchDispatchMode):
    """Adds up the bytes of all storages alive, inputs included, while real code runs."""

    def __init__(self, model: nn.Module, inputs: list[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        for t in inputs:
            self.born(t)

    def born(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.live += nbytes
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.died, key, nbytes)

    def died(self, key: int, nbytes: int) -> None:
        self.known.discard(key)
        self.live -= nbytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tensors_of(out):
            self.born(t)
        return out


def logged(captured: Capture) -> int:
    """The peak of a capture's log."""
    live = peak = 0
    for event in captured.memory:
        live += event.nbytes
        assert live >= 0
        peak = max(peak, live)
    return peak


def measured(model: nn.Module, *inputs: Any) -> int:
    mode = LiveStorages(model, tensors_of(inputs))
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), mode:
            model.eval()(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    return mode.peak


SMALL = {
    "torchvision:squeezenet1_1": 96,
    "torchvision:googlenet": 96,
    "torchvision:shufflenet_v2_x0_5": 96,
    "torchvision:densenet121": 64,
    "timm:ghostnet_100": 96,
    "timm:levit_128s": 224,
    "timm:nfnet_f0": 64,
    "timm:xcit_nano_12_p16_224": 64,
}
LARGE = {
    "torchvision:alexnet": 224,
    "torchvision:vgg11": 224,
    "torchvision:resnet50": 224,
    "torchvision:efficientnet_b0": 224,
    "torchvision:mnasnet1_0": 224,
    "torchvision:swin_t": 224,
    "torchvision:vit_b_16": 224,
    "timm:swinv2_tiny_window8_256": 256,
    "timm:resnest14d": 224,
    "timm:mobilevitv2_050": 256,
    "timm:botnet26t_256": 256,
    "timm:coatnet_0_rw_224": 224,
    "timm:res2net50_14w_8s": 224,
    "timm:poolformer_s12": 224,
}


def within_five_percent(name: str, size: int) -> None:
    library, _, model_name = name.partition(":")
    zoo: Any = pytest.importorskip("torchvision.models" if library == "torchvision" else "timm")
    make = zoo.get_model if library == "torchvision" else zoo.create_model
    model = make(model_name, **({"init_weights": False} if model_name == "googlenet" else {}))
    x = torch.rand(1, 3, size, size)
    log = logged(capture(model, x))  # first: an eager run may fill caches that the model keeps
    assert log == pytest.approx(measured(model, x), rel=0.05)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "size"), SMALL.items())
def test_peak_of_small_models(name: str, size: int) -> None:
    within_five_percent(name, size)


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "size"), LARGE.items())
def test_peak_of_models(name: str, size: int) -> None:
    within_five_percent(name, size)


def test_everything_dies_but_what_the_caller_holds() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True))
    made = capture(model, torch.zeros(1, 4, 8, 8))
    alive: dict[str, int] = {}
    for event in made.memory:
        alive[event.node] = alive.get(event.node, 0) + event.nbytes
    assert set(alive.values()) == {0}
    assert list(alive) == ["input_1", "_0", "_1", "_2"]  # the last activation shares the storage of the one before


def test_views_share_a_storage() -> None:
    class Views(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            return y.view(-1)[:5].t() + 0

    made = capture(Views(), torch.zeros(4, 8))
    assert [e.nbytes for e in made.memory if e.nbytes > 0] == [128, 128, 20]
    aliases = {n.name: info(n).alias_of for n in made.graph.nodes}
    assert aliases["view"] == aliases["getitem"] == aliases["t"] == "mul"
    assert all(info(n).cost.write_bytes == 0 for n in made.graph.nodes if n.name in ("view", "getitem", "t"))


def test_a_max_pooling_holds_its_indices_for_a_moment() -> None:
    made = capture(nn.MaxPool2d(2), torch.zeros(1, 1, 4, 4))
    assert [e.nbytes for e in made.memory][:4] == [64, 16, 32, -32]
