"""Weights: every kind of checkpoint that is understood, and what is said about each that is not."""

import argparse
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from safetensors.torch import save_file, save_model
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from pwrewrite.core.errors import WeightsError
from pwrewrite.targets import fit_weights, load_target, load_weights, strip_prefixes


class Net(nn.Module):
    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x)).mean((2, 3)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3, bias=False)
        self.b = nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight


def state(seed: int = 1, **kwargs: int) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return dict(Net(**kwargs).state_dict())


def snapshot(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    return {k: (id(v), v.detach().clone()) for k, v in model.state_dict(keep_vars=True).items()}


def assert_loaded(model: nn.Module, wanted: dict[str, Tensor]) -> None:
    for key, value in model.state_dict().items():
        assert torch.equal(value, wanted[key]), key


def refusal(path: Path, model: nn.Module | None = None, lenient: bool = False) -> str:
    """The message for a checkpoint that is refused, after making sure that the model was left alone."""
    model = model or Net()
    before = snapshot(model)
    with pytest.raises(WeightsError) as caught:
        load_weights(model, path, lenient)
    assert caught.value.exit_code == 2
    after = snapshot(model)
    assert before.keys() == after.keys()
    for key, (identity, value) in before.items():
        assert after[key][0] == identity
        assert torch.equal(after[key][1], value)
    return str(caught.value)


# What is understood


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".pth.tar"])
@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_saves(tmp_path: Path, suffix: str, zipped: bool) -> None:
    path = tmp_path / f"w{suffix}"
    torch.save(state(), path, _use_new_zipfile_serialization=zipped)
    model = Net()
    assert load_weights(model, path) == ()
    assert_loaded(model, state())


@pytest.mark.parametrize("form", ["file", "folder", "index", "folder with index", "folder with a named one"])
def test_safetensors(tmp_path: Path, form: str) -> None:
    tensors = state()
    path = tmp_path
    if "index" in form:
        half = dict(list(tensors.items())[:3])
        save_file(half, tmp_path / "model-00001-of-00002.safetensors")
        save_file({k: v for k, v in tensors.items() if k not in half}, tmp_path / "model-00002-of-00002.safetensors")
        places = {k: f"model-0000{1 if k in half else 2}-of-00002.safetensors" for k in tensors}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
        path = path if "folder" in form else tmp_path / "model.safetensors.index.json"
    else:
        save_file(tensors, tmp_path / "model.safetensors")
        if "named" in form:
            save_file(tensors, tmp_path / "other.safetensors")
        path = path if "folder" in form else tmp_path / "model.safetensors"
    model = Net()
    assert load_weights(model, path) == ()
    assert_loaded(model, tensors)


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "params", "whatever"])
def test_a_nested_state_dict(tmp_path: Path, key: str) -> None:
    torch.save({key: state(), "epoch": 3, "optimizer": {"state": {0: {"step": torch.tensor(1)}}}}, tmp_path / "w.pt")
    model = Net()
    load_weights(model, tmp_path / "w.pt")
    assert_loaded(model, state())


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema", "ema"])
def test_averaged_weights_come_first_and_are_told(tmp_path: Path, key: str) -> None:
    torch.save({"state_dict": state(1), key: {"module": state(2)}}, tmp_path / "w.pt")
    model = Net()
    assert load_weights(model, tmp_path / "w.pt") == (f"took the averaged (EMA) weights {key!r} of the checkpoint",)
    assert_loaded(model, state(2))


def test_a_training_checkpoint_with_its_arguments(tmp_path: Path) -> None:
    torch.save({"state_dict": state(), "args": argparse.Namespace(lr=0.1), "arch": "net"}, tmp_path / "w.pth.tar")
    model = Net()
    load_weights(model, tmp_path / "w.pth.tar")
    assert_loaded(model, state())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "model.model."])
def test_prefixes(tmp_path: Path, prefix: str) -> None:
    torch.save({prefix + k: v for k, v in state().items()}, tmp_path / "w.pt")
    model = Net()
    assert load_weights(model, tmp_path / "w.pt") == (f"left the prefix {prefix!r} off the checkpoint's keys",)
    assert_loaded(model, state())


def test_an_averaged_model_of_torch(tmp_path: Path) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(Net())
    torch.save(averaged.state_dict(), tmp_path / "w.pt")
    model = Net()
    load_weights(model, tmp_path / "w.pt")
    assert_loaded(model, dict(averaged.module.state_dict()))


def test_a_prefix_that_the_model_has_too_stays(tmp_path: Path) -> None:
    model = nn.Module()
    model.model = Net()
    torch.save({"model." + k: v for k, v in state().items()}, tmp_path / "w.pt")
    assert load_weights(model, tmp_path / "w.pt") == ()
    torch.save({"module.model." + k: v for k, v in state().items()}, tmp_path / "w.pt")
    assert load_weights(model, tmp_path / "w.pt") == ("left the prefix 'module.' off the checkpoint's keys",)
    assert_loaded(model.model, state())


KEYS = st.lists(st.text("abc.", min_size=1, max_size=6), min_size=1, max_size=20, unique=True)
WRAPS = st.lists(st.sampled_from(["module.", "_orig_mod.", "model."]), max_size=3)


@given(KEYS, WRAPS)
def test_any_pile_of_prefixes_comes_off_and_no_more(keys: list[str], wraps: list[str]) -> None:
    tensor = torch.zeros(1)
    prefix = "".join(wraps)
    stripped, taken = strip_prefixes({prefix + k: tensor for k in keys}, set(keys))
    assert taken == prefix
    assert list(stripped) == keys


@given(KEYS, WRAPS)
def test_keys_that_match_already_are_left_alone(keys: list[str], wraps: list[str]) -> None:
    full = {"".join(wraps) + k: torch.zeros(1) for k in keys}
    assert strip_prefixes(full, set(full)) == (full, "")


@given(KEYS, KEYS)
def test_a_checkpoint_of_another_model_keeps_its_keys(keys: list[str], others: list[str]) -> None:
    full = {"module.x" + k: torch.zeros(1) for k in keys}
    assert strip_prefixes(full, set(others) - {"x" + k for k in keys}) == (full, "")


@given(st.integers(1, 40), st.integers(0, 40))
def test_nine_tenths_must_carry_the_prefix(carrying: int, bare: int) -> None:
    full = {
        **{f"module.k{i}": torch.zeros(1) for i in range(carrying)},
        **{f"b{i}": torch.zeros(1) for i in range(bare)},
    }
    wanted = {f"k{i}" for i in range(carrying)}
    _, taken = strip_prefixes(full, wanted)
    assert (taken == "module.") == (carrying >= 0.9 * (carrying + bare))


def test_tied_weights_may_be_stored_once(tmp_path: Path) -> None:
    source, model = Tied(), Tied()
    save_model(source, str(tmp_path / "w.safetensors"))
    load_weights(model, tmp_path / "w.safetensors")
    assert torch.equal(model.b.weight, source.a.weight)
    assert model.a.weight is model.b.weight
    for only in ("a.weight", "b.weight"):
        torch.save({only: source.a.weight.detach() + 1}, tmp_path / "w.pt")
        load_weights(model, tmp_path / "w.pt")
        assert torch.equal(model.a.weight, source.a.weight + 1)


def test_tied_weights_that_differ_in_the_checkpoint_are_an_error(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.zeros(3, 3), "b.weight": torch.ones(3, 3)}, tmp_path / "w.pt")
    message = refusal(tmp_path / "w.pt", Tied())
    assert "tied in the model but not in the checkpoint" in message
    assert "a.weight and b.weight" in message


def test_step_counters_may_be_missing_or_too_many(tmp_path: Path) -> None:
    model = Net()
    torch.save({k: v for k, v in state().items() if "num_batches" not in k}, tmp_path / "w.pt")
    assert load_weights(model, tmp_path / "w.pt") == ()
    model.norm.num_batches_tracked = None
    torch.save(state(), tmp_path / "w.pt")
    assert load_weights(model, tmp_path / "w.pt") == ()


def test_what_the_models_own_hooks_rename_is_not_missing(tmp_path: Path) -> None:
    model = nn.Sequential(weight_norm(nn.Linear(3, 2)))
    torch.save(
        {"0.weight_g": torch.full((2, 1), 2.0), "0.weight_v": torch.eye(2, 3), "0.bias": torch.zeros(2)},
        tmp_path / "w.pt",
    )
    assert load_weights(model, tmp_path / "w.pt") == ()
    assert torch.equal(model[0].weight, 2 * torch.eye(2, 3))


class Copies(Net):
    """Loads in its own way and returns nothing, as EDSR and its descendants do."""

    def load_state_dict(self, state_dict: Any, strict: bool = True) -> None:  # type: ignore[override]
        own = self.state_dict()
        for name, value in state_dict.items():
            own[name].copy_(value)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_override_that_returns_nothing(tmp_path: Path, device: str) -> None:
    torch.save(state(), tmp_path / "net.pt")
    with torch.device(device):
        model = Copies()
    load_weights(model, tmp_path / "net.pt")
    assert all(torch.equal(value, state()[name]) for name, value in model.state_dict().items())
    less = {name: value for name, value in state().items() if name != "fc.bias"}
    torch.save(less, tmp_path / "less.pt")
    with pytest.raises(WeightsError, match="missing"):
        load_weights(model, tmp_path / "less.pt")


class Versioned(Net):
    """Asks for its version, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
        if local_metadata.get("version") != 2:
            raise ValueError("version should be 2")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def test_a_module_that_asks_for_its_version(tmp_path: Path) -> None:
    for name, save in (("net.pt", torch.save), ("net.safetensors", save_file)):
        save(state(), tmp_path / name)  # type: ignore[operator]
        model = Versioned()
        load_weights(model, tmp_path / name)
        assert all(torch.equal(value, state()[key]) for key, value in model.state_dict().items())


def test_a_model_on_meta_gets_the_checkpoints_own_tensors(tmp_path: Path) -> None:
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in state().items()}, tmp_path / "w.pt")
    with torch.device("meta"):
        model, tied = Net(), Tied()
        assert load_weights(model, tmp_path / "w.pt") == ()
        save_file({"a.weight": torch.ones(3, 3, device="cpu")}, tmp_path / "t.safetensors")
        load_weights(tied, tmp_path / "t.safetensors")
    assert {t.device.type for t in model.state_dict().values()} == {"cpu"}
    assert model.conv.weight.dtype is torch.float32, "the model's own dtype"
    assert isinstance(model.conv.weight, nn.Parameter)
    assert model.conv.weight.requires_grad
    assert tied.a.weight is tied.b.weight
    assert tied.a.weight.sum() == 9


def test_what_stays_on_meta_is_told(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = Net()
        model.register_buffer("index", torch.zeros(3), persistent=False)
    torch.save(state(), tmp_path / "w.pt")
    assert load_weights(model, tmp_path / "w.pt")[-1].startswith("1 tensors have no values")


def test_the_rehearsal_leaves_no_trace(tmp_path: Path) -> None:
    model = Net()
    before = snapshot(model)
    usable, fit = fit_weights(model, state(), "w")
    assert fit.perfect
    assert fit.matched == fit.total == 8
    assert usable.keys() == state().keys()
    assert {k: v[0] for k, v in snapshot(model).items()} == {k: v[0] for k, v in before.items()}
    assert all(torch.equal(snapshot(model)[k][1], v) for k, (_, v) in before.items())


def test_lenient_takes_what_fits_and_tells_the_rest(tmp_path: Path) -> None:
    tensors = state(classes=7)
    del tensors["norm.weight"]
    tensors["extra"] = torch.zeros(1)
    torch.save(tensors, tmp_path / "w.pt")
    refusal(tmp_path / "w.pt")
    model = Net()
    fc = model.fc.weight.detach().clone()
    (note,) = load_weights(model, tmp_path / "w.pt", lenient=True)
    assert "1 missing; 1 unexpected; 2 of another shape" in note
    assert torch.equal(model.conv.weight, tensors["conv.weight"])
    assert torch.equal(model.fc.weight, fc)


def test_load_target_checks_weights_before_it_builds(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text("raise RuntimeError\n")
    with pytest.raises(WeightsError, match="no such file"):
        load_target(str(tmp_path / "m.py"), weights=tmp_path / "w.pt")


def test_load_target_loads_weights(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text("from torch import nn\nmodel = nn.Conv2d(3, 4, 3)\n")
    torch.save({"module.weight": torch.ones(4, 3, 3, 3), "module.bias": torch.zeros(4)}, tmp_path / "w.pt")
    loaded = load_target(str(tmp_path / "m.py"), weights=tmp_path / "w.pt")
    assert loaded.model.weight.sum() == 108
    assert "module." in loaded.notes[0]


@pytest.mark.parametrize("empty", [True, False])
def test_load_target_fills_an_empty_model(tmp_path: Path, empty: bool) -> None:
    text = "from torch import nn\nmodel = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))\n"
    (tmp_path / "m.py").write_text(text)
    source = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    source(torch.randn(2, 3, 5, 5))  # running statistics of its own
    torch.save(source.state_dict(), tmp_path / "w.pt")
    loaded = load_target(str(tmp_path / "m.py"), weights=tmp_path / "w.pt", empty=empty)
    assert_loaded(loaded.model, dict(source.state_dict()))


# What is not


def test_a_missing_file_and_an_address(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "resnet50.pth")
    message = refusal(tmp_path / "resnet5.pth")
    assert "no such file" in message
    assert str(tmp_path / "resnet50.pth") in message
    assert "downloads nothing" in refusal(Path("https://example.com/w.pt"))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
def test_a_truncated_torch_file(tmp_path: Path, zipped: bool, share: float) -> None:
    torch.save(state(), tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "w.pt").read_bytes()
    (tmp_path / "w.pt").write_bytes(whole[: int(len(whole) * share)])
    message = refusal(tmp_path / "w.pt")
    assert "truncated" in message
    assert "download it again" in message


@pytest.mark.parametrize("size", [4, 5000, 21000])
def test_a_short_rest_of_an_archive(tmp_path: Path, size: int) -> None:
    """Torch's reader looks for the end of an archive before the start of a short one: an OSError."""
    torch.save({"weight": torch.zeros(50_000)}, tmp_path / "w.pt")
    (tmp_path / "w.pt").write_bytes((tmp_path / "w.pt").read_bytes()[:size])
    assert "truncated" in refusal(tmp_path / "w.pt")


@pytest.mark.parametrize("size", [3, 40, -1])
def test_a_truncated_safetensors_file(tmp_path: Path, size: int) -> None:
    save_file(state(), tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:size])
    assert "truncated" in refusal(tmp_path / "w.safetensors")


class Attack:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("how", ["zip", "old", "protocol 2", "protocol 4"])
def test_a_pickle_with_code_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.pt"
    content = {"state_dict": state(), "bad": Attack()}
    if how.startswith("protocol"):
        path.write_bytes(pickle.dumps({"bad": Attack()}, protocol=int(how[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    message = refusal(path)
    assert "contains code" in message
    assert "is not loaded" in message
    assert f"{os.system.__module__}.system" in message
    assert not (tmp_path / "pwned").exists()


def test_a_whole_pickled_model(tmp_path: Path) -> None:
    torch.save(Net(), tmp_path / "w.pt")
    message = refusal(tmp_path / "w.pt")
    assert "a whole pickled model" in message
    assert "state_dict()" in message
    torch.save({"model": nn.Linear(1, 1)}, tmp_path / "w.pt")
    assert "a whole pickled model" in refusal(tmp_path / "w.pt")


def test_a_torchscript_archive(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(1, 1), torch.zeros(1, 1)), str(tmp_path / "w.pt"))
    assert "TorchScript" in refusal(tmp_path / "w.pt")


def test_a_pickled_numpy_scalar_is_named(tmp_path: Path) -> None:
    torch.save({"state_dict": state(), "best": np.float64(1)}, tmp_path / "w.pt")
    assert "multiarray.scalar" in refusal(tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("content", "phrase"),
    [
        (b"", "is empty"),
        (b"hello world, this is text", "is not a checkpoint"),
        (bytes(range(1, 200)), "is not a checkpoint"),
        (b"PK\x05\x06" + bytes(18), "is not a checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>", "web page"),
    ],
)
def test_files_that_are_no_checkpoint(tmp_path: Path, content: bytes, phrase: str) -> None:
    (tmp_path / "w.pt").write_bytes(content)
    assert phrase in refusal(tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("content", "phrase"),
    [
        ({}, "empty dictionary"),
        ([1, 2], "got: a list of int, int"),
        (torch.zeros(3), "got: a Tensor"),
        ({"epoch": 3, "lr": 0.1}, "no weights in a place that is understood"),
        ({"epoch": 3, "a": {"x": torch.zeros(1)}, "b": {"y": torch.zeros(1)}}, "the keys 'epoch', 'a', 'b'"),
        (OrderedDict(), "empty dictionary"),
    ],
)
def test_checkpoints_without_weights(tmp_path: Path, content: object, phrase: str) -> None:
    torch.save(content, tmp_path / "w.pt")
    assert phrase in refusal(tmp_path / "w.pt")


def test_a_checkpoint_of_a_model_on_meta(tmp_path: Path) -> None:
    torch.save(Net().to("meta").state_dict(), tmp_path / "w.pt")
    assert "shapes without values" in refusal(tmp_path / "w.pt")


def test_a_dictionary_that_holds_itself(tmp_path: Path) -> None:
    content: dict[str, object] = {"w": torch.zeros(1)}
    content["model"] = content
    torch.save(content, tmp_path / "w.pt")
    assert "does not fit" in refusal(tmp_path / "w.pt")


def test_folders_and_indices_that_lead_nowhere(tmp_path: Path) -> None:
    assert "no safetensors" in refusal(tmp_path)
    save_file(state(), tmp_path / "a.safetensors")
    save_file(state(), tmp_path / "b.safetensors")
    assert "several checkpoints" in refusal(tmp_path)
    index = tmp_path / "x.safetensors.index.json"
    index.write_text("{")
    assert "not an index" in refusal(index)
    index.write_text('{"weight_map": {}}')
    assert "not an index" in refusal(index)
    index.write_text('{"weight_map": {"conv.weight": "c.safetensors"}}')
    assert "a shard is missing" in refusal(index)
    index.write_text('{"weight_map": {"nothing": "a.safetensors"}}')
    assert "lacks 1 tensors" in refusal(index)
    index.write_text('{"weight_map": {"conv.weight": "../a.safetensors"}}')
    assert "outside its own folder" in refusal(index)


def test_keys_and_shapes_that_do_not_fit_are_listed_together(tmp_path: Path) -> None:
    tensors = {**state(), "conv.weight": torch.zeros(4, 3, 5, 5), "surplus": torch.zeros(1)}
    del tensors["fc.bias"]
    torch.save(tensors, tmp_path / "w.pt")
    message = refusal(tmp_path / "w.pt")
    for phrase in (
        "6 of its 8 tensors match",
        "1 missing:\n    fc.bias",
        "1 unexpected:\n    surplus",
        "1 of another shape:\n    conv.weight: 4x3x5x5 in the checkpoint, 4x3x3x3 in the model",
        "--weights-lenient",
    ):
        assert phrase in message


def test_long_lists_are_cut(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(20)))
    torch.save({"0.weight": torch.zeros(1, 1), **{f"x{i}": torch.zeros(1) for i in range(11)}}, tmp_path / "w.pt")
    message = refusal(tmp_path / "w.pt", model)
    assert "39 missing:" in message
    assert "… and 29 more" in message
    assert "11 unexpected:" in message
    assert "… and 1 more" in message


def test_another_models_checkpoint(tmp_path: Path) -> None:
    torch.save({f"layers.{i}": torch.zeros(1) for i in range(9)}, tmp_path / "w.pt")
    message = refusal(tmp_path / "w.pt")
    assert "0 of its 8 tensors match" in message
    assert "of another model" in message
    assert "of another model" in refusal(tmp_path / "w.pt", lenient=True), "nothing fits: not even leniently"


def test_another_number_of_classes(tmp_path: Path) -> None:
    torch.save(state(classes=7), tmp_path / "w.pt")
    message = refusal(tmp_path / "w.pt")
    assert "7 classes and the model 5" in message
    assert "--arg num_classes=7" in message


def test_renamed_layers(tmp_path: Path) -> None:
    torch.save({k.replace("fc.", "fc1."): v for k, v in state().items()}, tmp_path / "w.pt")
    message = refusal(tmp_path / "w.pt")
    assert "fc1.weight for fc.weight" in message or "fc1.bias for fc.weight" in message


@pytest.mark.parametrize(
    ("dtype", "values", "model_dtype"),
    [
        (torch.complex64, [1 + 2j], torch.float32),
        (torch.complex64, [1 + 0j], torch.float32),
        (torch.float32, [0.5], torch.int64),
        (torch.float32, [3.0], torch.bool),
        (torch.int64, [300], torch.uint8),
        (torch.float32, [1e30], torch.float16),
        (torch.float64, [1e300], torch.bfloat16),
        (torch.float32, [1e30], torch.float8_e5m2),
    ],
)
def test_values_that_the_models_dtype_cannot_hold(
    tmp_path: Path, dtype: torch.dtype, values: list[complex], model_dtype: torch.dtype
) -> None:
    model = nn.Linear(3, 3)
    model.register_buffer("held", torch.zeros(1, dtype=model_dtype))
    torch.save({**model.state_dict(), "held": torch.tensor(values, dtype=dtype)}, tmp_path / "w.pt")
    message = refusal(tmp_path / "w.pt", model)
    assert "1 that would lose values" in message
    assert f"held: {str(dtype)[6:]} in the checkpoint, {str(model_dtype)[6:]} in the model" in message
    load_weights(model, tmp_path / "w.pt", lenient=True)
    assert not model.held.double().any()


def test_values_that_another_dtype_can_hold(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    model.register_buffer("held", torch.zeros(2, dtype=torch.int64))
    state = {"weight": torch.ones(3, 3).to(torch.float8_e5m2), "bias": torch.tensor([1.0, torch.inf, torch.nan]).half()}
    torch.save({**state, "held": torch.tensor([1.0, 2.0])}, tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt")
    assert model.held.tolist() == [1, 2]


@pytest.mark.parametrize("name", ["net.py", "net.onnx", "w.pt", "w.safetensors"])
def test_what_is_no_checkpoint_by_its_name_or_kind(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.startswith("w."):
        os.mkfifo(path)
        assert "not a regular file" in refusal(path)
    else:
        path.write_text('"""A model."""\nimport torch\n')
        assert "Python code" in refusal(path) or "ONNX" in refusal(path)
    path.unlink()
    (tmp_path / "w.bin").write_text('"""A model."""\n')
    assert "neither an archive nor a pickle" in refusal(tmp_path / "w.bin")


def test_a_compressed_archive_that_would_unpack_to_too_much(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(3 << 20)}, tmp_path / "w.pt")
    for copies, refused in ((1, False), (20, True)):
        with zipfile.ZipFile(tmp_path / "w.pt") as source, zipfile.ZipFile(tmp_path / "z.pt", "w", 8) as archive:
            for member in source.infolist():
                archive.writestr(member.filename, source.read(member))
            for number in range(copies):
                archive.writestr(f"w/data/{number + 10}", bytes(12 << 20))
        assert ("would unpack to" in refusal(tmp_path / "z.pt")) == refused
