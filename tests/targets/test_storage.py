"""Saving and loading: nothing is lost, nothing is pickled, and what does not fit is told."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pwrewrite.capturing import capture
from pwrewrite.core import files
from pwrewrite.core.errors import OutputError, PlanError, TargetError, WeightsError
from pwrewrite.core.plan import Edit, Op, Plan
from pwrewrite.edit.apply import carry_out
from pwrewrite.passes import InsertBottleneck
from pwrewrite.targets import load, storage
from pwrewrite.targets.storage import check_place, is_saved, read_plan, save

X = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))

CODE = '''
import torch
from torch import nn


class Net(nn.Module):
    """Everything that a checkpoint must get right."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.twin = self.first
        self.register_buffer("scale", torch.arange(3.0).to(torch.bfloat16))
        self.register_buffer("steps", torch.tensor(5))
        self.register_buffer("scratch", torch.ones(2), persistent=False)
        self.view = nn.Parameter(torch.arange(12.0).reshape(3, 4).t())

    def forward(self, x):
        x = self.bn(self.conv(x)).mean((2, 3))
        return self.second(torch.relu(self.twin(x))) + self.view.sum()


def build_model():
    torch.manual_seed(1)
    return Net()
'''


@pytest.fixture
def target(tmp_path: Path) -> Path:
    file = tmp_path / "net.py"
    file.write_text(CODE)
    return file


def build(target: Path) -> Any:
    space: dict[str, Any] = {"__name__": "net"}
    exec(compile(target.read_text(), str(target), "exec"), space)
    return space["build_model"]()


def rewritten(model: nn.Module) -> tuple[nn.Module, Plan, tuple[Edit, ...]]:
    found = InsertBottleneck(4).propose(capture(model, X.to(next(model.parameters()).dtype)))
    plan = Plan(tuple(p for p in found if isinstance(p, Op)), model={"params": 1})
    applied = carry_out(model, plan)
    return applied.model.eval(), plan, applied.edits


def saved(folder: Path, model: nn.Module, **settings: Any) -> nn.Module:
    changed, plan, edits = rewritten(model)
    save(folder, changed, plan, edits=edits, **settings)
    return changed


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)).eval()


# ------------------------------------------------------------------------------------------------------ roundtrip


def test_a_new_process_computes_the_same_bits(tmp_path: Path, target: Path) -> None:
    model = build(target)
    changed = saved(tmp_path / "out", model)
    torch.save(changed(X), tmp_path / "expected.pt")
    code = f"""
import sys, torch
sys.path.insert(0, {str(tmp_path)!r})
from net import build_model
from pwrewrite.targets import load
x = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))
expected = torch.load({str(tmp_path / "expected.pt")!r}, weights_only=True)
assert torch.equal(load({str(tmp_path / "out")!r}, build_model())(x), expected)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_state_is_the_same_after_a_roundtrip(tmp_path: Path, target: Path) -> None:
    model = build(target)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    changed: Any = saved(tmp_path / "out", model)
    loaded: Any = load(tmp_path / "out", model)
    assert not loaded.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    for name, tensor in changed.state_dict().items():
        found = loaded.state_dict()[name]
        assert torch.equal(found, tensor)
        assert found.dtype == tensor.dtype
    assert loaded.second.weight is loaded.first.weight is loaded.twin.weight
    assert torch.equal(loaded.scratch, torch.ones(2))


def test_the_same_model_is_the_same_file(tmp_path: Path) -> None:
    model = net()
    model.add_module('ünd "so"\n', nn.Linear(3, 2))
    for number in range(12):
        save(tmp_path / str(number), model, Plan())
    assert len({(tmp_path / str(number) / storage.WEIGHTS).read_bytes() for number in range(12)}) == 1
    assert 'ünd "so"\n.weight' in load_file(tmp_path / "0" / storage.WEIGHTS)


def test_names_of_old_parameters(tmp_path: Path) -> None:
    saved(tmp_path / "out", net())
    names = json.loads((tmp_path / "out" / "plan.json").read_text())["names"]
    assert names == {"0.weight": ["0.reduce.weight", "0.core.weight", "0.expand.weight"], "0.bias": ["0.expand.bias"]}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_saved_dtype_counts(tmp_path: Path, dtype: torch.dtype) -> None:
    changed = saved(tmp_path / "out", net().to(dtype))
    loaded = load(tmp_path / "out", net())
    assert torch.equal(loaded(X.to(dtype)), changed(X.to(dtype)))


def test_a_model_on_meta_is_filled(tmp_path: Path) -> None:
    changed = saved(tmp_path / "out", net())
    with torch.device("meta"):
        empty = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    assert torch.equal(load(tmp_path / "out", empty)(X), changed(X))


def test_a_tensor_on_meta_that_was_not_saved(tmp_path: Path, target: Path) -> None:
    saved(tmp_path / "out", build(target))
    with torch.device("meta"):
        empty = build(target)
    with pytest.raises(WeightsError, match="neither saved nor made") as caught:
        load(tmp_path / "out", empty)
    assert caught.value.got == "scratch"


def test_random_weights_are_not_drawn_on_loading(tmp_path: Path) -> None:
    saved(tmp_path / "out", net())
    model, state = net(), torch.get_rng_state()
    load(tmp_path / "out", model)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_files(tmp_path: Path) -> None:
    changed, plan, edits = rewritten(net())
    save(tmp_path / "a" / "b", changed, plan, edits=edits, report={"schema": "x"}, readme="# Read\n")
    folder = tmp_path / "a" / "b"
    assert sorted(f.name for f in folder.iterdir()) == ["README.md", "model.safetensors", "plan.json", "report.json"]
    assert is_saved(folder)
    assert read_plan(folder) == plan
    assert json.loads((folder / "report.json").read_text()) == {"schema": "x"}
    mask = os.umask(0)
    os.umask(mask)
    assert folder.stat().st_mode & 0o777 == 0o777 & ~mask


# ------------------------------------------------------------------------------------------------- what is refused


class Extra(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3)

    def get_extra_state(self) -> Any:
        return {"version": 1}

    def set_extra_state(self, state: Any) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def test_state_that_is_no_tensor(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="not a tensor") as caught:
        saved(tmp_path / "out", Extra())
    assert caught.value.where == "_extra_state"
    assert list(tmp_path.iterdir()) == []


def test_weights_on_meta(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(8, 8, 3))
    with pytest.raises(OutputError, match="on meta"):
        saved(tmp_path / "out", model)


def test_a_folder_that_exists(tmp_path: Path) -> None:
    first = saved(tmp_path / "out", net())
    with pytest.raises(OutputError, match="exists") as caught:
        saved(tmp_path / "out", net())
    assert "--force" in str(caught.value.hint)
    assert torch.equal(load(tmp_path / "out", net())(X), first(X))
    torch.manual_seed(7)
    second = saved(tmp_path / "out", nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)), force=True)
    assert torch.equal(load(tmp_path / "out", net())(X), second(X))
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    saved(tmp_path / "out", net())
    assert is_saved(tmp_path / "out")
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_a_link_to_a_folder(tmp_path: Path) -> None:
    saved(tmp_path / "real", net())
    (tmp_path / "out").symlink_to(tmp_path / "real")
    saved(tmp_path / "out", net(), force=True)
    assert (tmp_path / "out").is_symlink()
    assert is_saved(tmp_path / "real")


@pytest.mark.parametrize("files", [("notes.txt",), ("plan.json",), ("plan.json", "model.safetensors", "thesis.tex")])
def test_a_folder_that_is_not_ours_is_never_replaced(tmp_path: Path, files: tuple[str, ...]) -> None:
    (tmp_path / "out").mkdir()
    for name in files:
        (tmp_path / "out" / name).write_text('{"schema": "other/1"}')
    with pytest.raises(OutputError, match="did not write"):
        saved(tmp_path / "out", net(), force=True)
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == sorted(files)


def test_a_saved_folder_with_something_else_in_it(tmp_path: Path) -> None:
    saved(tmp_path / "out", net())
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="did not write") as caught:
        saved(tmp_path / "out", net(), force=True)
    assert caught.value.got == "notes.txt"


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="is a file"):
        saved(tmp_path / "out", net(), force=True)
    with pytest.raises(OutputError, match="cannot be written"):
        check_place(tmp_path / "out" / "deeper")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_parent_without_permission(tmp_path: Path) -> None:
    parent = tmp_path / "locked"
    parent.mkdir(mode=0o500)
    with pytest.raises(OutputError, match="cannot be written"):
        saved(parent / "out", net())


def test_a_parent_in_which_nothing_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(OutputError, match="read-only file system"):
        check_place(tmp_path / "out")


def test_a_parent_that_says_no(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="cannot be written") as caught:
        check_place(tmp_path / "a" / "b")
    assert "no write permission" in str(caught.value.got)


# ----------------------------------------------------------------------------------------------------- interruptions


def failing(times: int, real: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
    """A function that fails the nth time."""
    left = [times]

    def run(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            raise error
        return real(*args, **kwargs)

    return run


STEPS = [
    ("files.tempfile.mkdtemp", 1),
    ("_save_weights", 1),
    ("Path.write_text", 1),
    ("Path.write_text", 3),
    ("files._flush", 1),
    ("files._flush", 4),
    ("files._exchange", 1),
    ("files.os.rename", 1),
    ("files.os.rename", 2),
    ("files._move_in", 1),
]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize(("step", "times"), STEPS)
def test_a_failure_at_any_step_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, times: int, error: BaseException
) -> None:
    first = saved(tmp_path / "out", net(), readme="first")
    if "rename" in step:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    owner: Any = SimpleNamespace(files=files, Path=Path, _save_weights=storage._save_weights)
    owner = storage if step == "_save_weights" else owner
    *path, name = step.split(".")
    for part in path:
        owner = getattr(owner, part)
    monkeypatch.setattr(owner, name, failing(times, getattr(owner, name), error))
    expected = OutputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        saved(tmp_path / "out", nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)), readme="second", force=True)
    if isinstance(error, OSError):
        assert "no space left" in str(caught.value)
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "README.md").read_text() == "first"
    assert torch.equal(load(tmp_path / "out", net())(X), first(X))


def test_a_full_disk_under_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError, torch as safetensors_torch

    error = SafetensorError("I/O error: No space left on device (os error 28)")
    monkeypatch.setattr(safetensors_torch, "save_file", failing(1, print, error))
    with pytest.raises(OutputError, match="No space left"):
        saved(tmp_path / "out", net())
    assert list(tmp_path.iterdir()) == []


def test_an_old_folder_that_cannot_come_back_is_kept_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = saved(tmp_path / "out", net(), readme="first")
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    real, calls = os.rename, []

    def rename(source: Any, to: Any) -> None:
        calls.append(source)
        if len(calls) > 1:
            raise OSError(errno.EIO, "Input/output error")
        real(source, to)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OutputError):
        saved(tmp_path / "out", net(), force=True)
    assert [f.read_text() for f in tmp_path.rglob("README.md")] == ["first"]
    monkeypatch.setattr(os, "rename", real)
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputError, match="exists"):  # the next save moves it back first
        saved(tmp_path / "out", net())
    assert torch.equal(load(tmp_path / "out", net())(X), first(X))
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


# ---------------------------------------------------------------------------------------------------------- loading


def test_a_target_is_code_and_needs_trust(tmp_path: Path, target: Path) -> None:
    changed, plan, edits = rewritten(build(target))
    save(tmp_path / "out", changed, replace(plan, model={**plan.model, "target": str(target)}), edits=edits)
    with pytest.raises(TargetError, match="not the model's code") as caught:
        load(tmp_path / "out")
    assert "net.py" in str(caught.value.hint)
    assert torch.equal(load(tmp_path / "out", trust_target=True)(X), changed(X))


def test_a_plan_without_a_target(tmp_path: Path) -> None:
    saved(tmp_path / "out", net())
    with pytest.raises(TargetError, match="records no target"):
        load(tmp_path / "out", trust_target=True)


def test_not_a_saved_folder(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="not a folder that pwrewrite saved"):
        load(tmp_path, net())


@pytest.mark.parametrize(
    ("model", "error", "word"),
    [
        (nn.Sequential(nn.ReLU()), PlanError, "a layer that is none here"),
        (nn.Sequential(nn.Conv2d(8, 8, 3)), WeightsError, "1.bias"),
        (nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Linear(2, 2)), WeightsError, "2.bias"),
        (
            nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(9)),
            WeightsError,
            "1.weight: 8 in the checkpoint, 9",
        ),
    ],
)
def test_the_wrong_model(tmp_path: Path, model: nn.Module, error: type[Exception], word: str) -> None:
    saved(tmp_path / "out", net())
    with pytest.raises(error) as caught:
        load(tmp_path / "out", model)
    assert word in str(caught.value)


def test_a_model_that_holds_the_layer_elsewhere(tmp_path: Path) -> None:
    saved(tmp_path / "out", net())
    model: Any = net()
    model.plain = [model[0]]
    with pytest.raises(PlanError, match="cannot be carried out"):
        load(tmp_path / "out", model)


@pytest.mark.parametrize("keep", [None, 0, 4, 100, -10])
def test_damaged_weights(tmp_path: Path, keep: int | None) -> None:
    saved(tmp_path / "out", net())
    file = tmp_path / "out" / "model.safetensors"
    content = file.read_bytes()
    file.unlink()
    if keep is not None:
        file.write_bytes(content[:keep])
    with pytest.raises(WeightsError, match="cannot be read") as caught:
        load(tmp_path / "out", net())
    assert str(file) in str(caught.value)


def test_nothing_is_pickled(tmp_path: Path) -> None:
    saved(tmp_path / "out", net())
    assert not [f for f in (tmp_path / "out").iterdir() if f.suffix in (".pt", ".pth", ".pkl", ".bin")]
    assert (tmp_path / "out" / "model.safetensors").read_bytes()[8:9] == b"{"


# ------------------------------------------------------------------------------------------------------ crafted folders


@pytest.mark.parametrize("aliases", ["[]", '{"a": 3}', '{"a": ["b"]}', "3", "null", "{", "[" * 100000])
def test_other_names_of_another_type(tmp_path: Path, aliases: str) -> None:
    saved(tmp_path / "out", net())
    state = load_file(tmp_path / "out" / "model.safetensors")
    save_file(state, tmp_path / "out" / "model.safetensors", metadata={"pwrewrite.aliases": aliases})
    with pytest.raises(WeightsError, match="cannot be read"):
        load(tmp_path / "out", net())


@pytest.mark.parametrize("names", [[], 3, "x", {"a": "b"}, {"a": [1]}, {"a": {}}])
def test_a_map_of_names_of_another_type(tmp_path: Path, names: Any) -> None:
    saved(tmp_path / "out", net())
    path = tmp_path / "out" / "plan.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "names": names}))
    if names:
        with pytest.raises(PlanError, match="map of names"):
            storage.read_names(tmp_path / "out")


@pytest.mark.parametrize("name", ["plan.json", "model.safetensors"])
def test_pipes_in_a_folder_are_not_waited_for(tmp_path: Path, name: str) -> None:
    saved(tmp_path / "out", net())
    (tmp_path / "out" / name).unlink()
    os.mkfifo(tmp_path / "out" / name)
    with pytest.raises((WeightsError, TargetError)):
        load(tmp_path / "out", net())


@pytest.mark.parametrize("name", ["README.md", "model.safetensors", "plan.json"])
def test_a_folder_under_the_name_of_one_of_our_files_is_not_ours(tmp_path: Path, name: str) -> None:
    saved(tmp_path / "out", net(), readme="x")
    (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / name).mkdir()
    (tmp_path / "out" / name / "theirs").write_text("kept")
    with pytest.raises(OutputError, match="did not write"):
        saved(tmp_path / "out", net(), force=True)
    assert (tmp_path / "out" / name / "theirs").read_text() == "kept"
