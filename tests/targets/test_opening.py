"""Opening targets: what is recorded, what is seeded, where a folder's inputs come from."""

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pwrewrite.core.errors import TargetError, UsageError
from pwrewrite.targets import LoadedModel, TargetOptions, class_name, load, load_target, open_target as open_options
from pwrewrite.targets.opening import recordable
from pwrewrite.workflows.rewrite import rewrite

NET = """
import random, torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.a = nn.Conv2d(3, width, 3, padding=1)
        self.b = nn.Conv2d(width, width, 3, padding=1)
        self.drawn = random.random()

    def forward(self, x, scale=None):
        y = self.b(self.a(x).relu())
        return y if scale is None else y * scale

def example_inputs():
    return (torch.full((1, 3, 8, 8), 2.0),)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "net.py").write_text(NET)
    return tmp_path


def open_target(target: str, **options: Any) -> LoadedModel:
    return open_options(TargetOptions(target, **options))


def save(target: str = "net.py", **request: object) -> None:
    loaded = open_options(TargetOptions(target, **request))  # type: ignore[arg-type]
    rewrite(loaded, settings=["b=reduce:4"], verify=False).save("out", unverified=True)


def test_what_a_constructor_draws_is_seeded_and_the_caller_keeps_his_state() -> None:
    states = torch.random.get_rng_state(), random.getstate()
    one, two, other = open_target("net.py"), open_target("net.py"), open_target("net.py", seed=7)
    assert torch.equal(states[0], torch.random.get_rng_state())
    assert states[1] == random.getstate()
    assert torch.equal(one.model.a.weight, two.model.a.weight)
    assert one.model.drawn == two.model.drawn
    assert not torch.equal(one.model.a.weight, other.model.a.weight)
    assert any("seed 7" in note for note in other.notes)


def test_files_are_recorded_so_that_they_are_found_from_elsewhere(folder: Path) -> None:
    assert recordable("net.py:Net") == f"{folder.resolve() / 'net.py'}:Net"
    assert recordable("torchvision:resnet18") == "torchvision:resnet18"
    assert recordable("package.module:Net") == "package.module:Net"
    assert class_name(open_target("net.py").model) == "net.Net"


def test_a_folder_opens_from_elsewhere_with_its_arguments(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(args={"width": 12})
    (folder / "deeper").mkdir()
    monkeypatch.chdir(folder / "deeper")
    opened = open_target("../out", trust_target=True)
    assert opened.args == {"width": 12}
    assert opened.model.a.out_channels == 12
    assert opened.names == {"b.weight": ("b.reduce.weight", "b.core.weight"), "b.bias": ("b.core.bias",)}
    (x,) = opened.example_inputs
    assert x.eq(2).all()  # the file's own inputs: they have the recorded shapes
    assert not opened.notes


def test_inputs_of_other_shapes_are_made_as_recorded() -> None:
    save(inputs=("2x3x6x6",))
    (x,) = open_target("out", trust_target=True).example_inputs
    assert x.shape == (2, 3, 6, 6)
    (y,) = open_target("out", trust_target=True, inputs=["1x3x5x5"]).example_inputs
    assert y.shape == (1, 3, 5, 5)


def test_inputs_by_name_stay_by_name() -> None:
    save(inputs=("x=1x3x6x6", "scale=1"))
    inputs = open_target("out", trust_target=True).example_inputs
    assert {name: tuple(t.shape) for name, t in inputs.items()} == {"x": (1, 3, 6, 6), "scale": (1,)}


def test_a_folder_is_not_trusted_by_itself() -> None:
    save()
    with pytest.raises(TargetError, match="not the model's code"):
        open_target("out")
    assert open_target("out", base="net.py").plan is not None


@pytest.mark.parametrize(
    ("target", "more", "said"),
    [
        ("out", {"weights": Path("w.pt"), "trust_target": True}, "holds its own weights"),
        ("out", {"base": "out"}, "itself a saved folder"),
        ("net.py", {"base": "net.py"}, "--model is for a saved folder"),
        ("nett", {"base": "net.py"}, "no such folder: nett"),
    ],
)
def test_what_does_not_go_together(target: str, more: dict[str, object], said: str) -> None:
    save()
    with pytest.raises(UsageError, match=said):
        open_target(target, **more)  # type: ignore[arg-type]


def test_a_saved_folder_is_a_target_of_load_target() -> None:
    save()
    with pytest.raises(TargetError, match="not the model's code"):
        load_target("out")
    loaded, again = load_target("out", trust_target=True), load_target("out", base="net.py")
    assert loaded.plan is not None
    assert len(loaded.plan) == 1
    x = loaded.example_inputs
    assert torch.equal(loaded.model(*x), again.model(*x))
    assert torch.equal(loaded.model(*x), load("out", trust_target=True)(*x))
    assert torch.equal(loaded.model(*x), load("out", load_target("net.py").model)(*x))
    assert load_target("out", base="net.py", need_inputs=False).example_inputs == ()
