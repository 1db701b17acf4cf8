"""Peak activation memory: by hand on event lists, and against the live storages of real eager runs."""

import importlib.util
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pwrewrite.analysis.memory import TENSORS, peak_memory
from pwrewrite.capturing import MemoryEvent, capture, info

EXAMPLES = Path(__file__).parents[2] / "examples"


def events(*pairs: tuple[str, int]) -> list[MemoryEvent]:
    return [MemoryEvent(node, nbytes) for node, nbytes in pairs]


def test_births_and_deaths_by_hand() -> None:
    # x 4, a 8, b 16 are alive at once; then x and a go and c of 12 comes: 28
    found = peak_memory(events(("x", 4), ("a", 8), ("b", 16), ("x", -4), ("a", -8), ("c", 12)), {})
    assert (found.nbytes, found.node) == (28, "b")
    assert [(t.node, t.nbytes) for t in found.tensors] == [("b", 16), ("a", 8), ("x", 4)]


def test_the_first_of_equal_moments_counts() -> None:
    assert peak_memory(events(("x", 4), ("x", -4), ("y", 4)), {}).node == "x"


def test_nothing_alive() -> None:
    found = peak_memory([], {})
    assert (found.nbytes, found.node, found.tensors) == (0, "", ())


def test_several_storages_of_a_node_add_up_and_die_apart() -> None:
    found = peak_memory(events(("a", 4), ("a", 6), ("a", -4), ("b", 5)), {})
    assert found.nbytes == 11
    assert [(t.node, t.nbytes) for t in found.tensors] == [("a", 6), ("b", 5)]


def test_the_list_of_tensors_is_bounded() -> None:
    found = peak_memory(events(*((f"n{i}", 1 + i) for i in range(100))), {})
    assert len(found.tensors) == TENSORS
    assert found.tensors[0].nbytes == 100


def test_a_residual_is_held() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) + x

    made = capture(Residual(), torch.zeros(1, 4, 8, 8))
    found = peak_memory(made.memory, {n.name: info(n) for n in made.graph.nodes})
    # x, a and b while b runs; then x, b and the sum
    assert found.nbytes == 3 * 4 * 4 * 64
    assert {t.node for t in found.tensors} == {"x", "a", "b"}
    assert found.path == "b"
    assert found.tensors[0].shape == (1, 4, 8, 8)


class LiveStorages(TorchDispatchMode):
    """Adds up the bytes of all storages alive, inputs included, while real code runs."""

    def __init__(self, model: nn.Module, *inputs: Tensor) -> None:
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
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.born(leaf)
        return out


def measured(model: nn.Module, x: Tensor) -> int:
    model.eval()
    mode = LiveStorages(model, x)
    with torch.no_grad(), mode:
        model(x)
    return mode.peak


def predicted(model: nn.Module, x: Tensor) -> int:
    made = capture(model, x)
    return peak_memory(made.memory, {n.name: info(n) for n in made.graph.nodes}).nbytes


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "googlenet",
        "mobilenet_v2",
        "shufflenet_v2_x0_5",
        "densenet121",
        "mobilenet_v3_small",
        "squeezenet1_1",  # its peak is the index tensor that eager max pooling makes and drops
    ],
)
def test_within_five_percent_of_an_eager_run(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):  # initial weights take longer than all the rest
        model = models.get_model(name, weights=None, **({"init_weights": False} if name == "googlenet" else {}))
    model.to_empty(device="cpu")
    x = torch.zeros(1, 3, 64, 64)
    assert predicted(model, x) == pytest.approx(measured(model, x), rel=0.05)


@pytest.mark.parametrize("name", ["unet", "attention", "inception_naive"])
def test_examples_within_five_percent_of_an_eager_run(name: str) -> None:
    spec = importlib.util.spec_from_file_location(f"pwrewrite_memory_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = next(getattr(module, n) for n in ("model", "build_model") if hasattr(module, n))
    model = model if isinstance(model, nn.Module) else model()
    shape = next((tuple(p.shape) for p in model.parameters() if p.dim() == 4), ())
    x = torch.zeros(1, shape[1], 64, 64)
    assert predicted(model, x) == pytest.approx(measured(model, x), rel=0.05)
