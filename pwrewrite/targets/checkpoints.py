"""Reads weights from disk without running anything that the file contains.

``.safetensors`` (one file, an ``*.index.json`` with its shards, or a folder that holds one) and what ``torch.save``
writes, through ``torch.load(weights_only=True)`` with the file mapped into memory where its format allows. One class is
allowed beyond torch's own list: ``argparse.Namespace``, a bag of attributes that training scripts like timm's put
beside the weights.

A pickle that asks for anything else is refused by name. Regular files only, and none that claims to unpack to many
times its size: ``torch.save`` does not compress.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pickletools
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..core.errors import WeightsError, shortened
from ..core.files import read_text
from .factories import kind_of
from .user_code import suggest_files

SUFFIXES = (".safetensors", ".safetensors.index.json", ".pt", ".pth", ".bin", ".ckpt", ".tar")

#: Where a checkpoint keeps its weights, the averaged ones first, as timm chooses.
_WRAPPERS = (
    "state_dict_ema", "model_ema", "model_ema_state_dict", "ema_state_dict", "ema", "params_ema",
    "state_dict", "model_state_dict", "model", "net", "network", "params", "weights", "module",
)  # fmt: skip
_EMA = tuple(name for name in _WRAPPERS if "ema" in name)
_CODE = "Python code: it makes a model, and holds no weights"
_NO_CHECKPOINTS = {".py": _CODE, ".ipynb": _CODE, ".onnx": "an ONNX model", ".pt2": "an exported program"}
_AGAIN = "copy or download it again"
_SPARE = 64 << 20
"""Bytes that a compressed checkpoint may unpack to beyond ten times its size."""


def check_checkpoint(path: Path) -> None:
    """Refuses (`WeightsError`), before a model is built, what is not there, no file, or no checkpoint by its name."""
    if re.match(r"\w{2,}:/", str(path)):
        raise WeightsError(f"{path} is an address, and pwrewrite downloads nothing", hint="fetch it, and give the file")
    if not path.exists():
        raise WeightsError(f"no such file: {path}", hint=suggest_files(path, SUFFIXES))
    if not path.is_file() and not path.is_dir():
        raise WeightsError(f"{path} is not a regular file", expected="a checkpoint on disk: a pipe may never end")
    if path.suffix in _NO_CHECKPOINTS:
        expected = "a checkpoint: safetensors, or a file that torch.save wrote"
        hint = f"torch.save(torch.export.load({str(path)!r}).state_dict, 'w.pt')" if path.suffix == ".pt2" else None
        raise WeightsError(f"{path} is {_NO_CHECKPOINTS[path.suffix]}", expected=expected, hint=hint)


def read_weights(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors by name, on the CPU, of a file or of a folder with safetensors, and notes on what was chosen.

    A `WeightsError` says that there is no such file, or that it is empty, truncated, holds code, or is no checkpoint.
    """
    check_checkpoint(path)
    try:
        with torch.device("cpu"):
            if path.is_dir():
                path = _in_folder(path)
                check_checkpoint(path)
            if path.name.endswith(".index.json"):
                return _read_shards(path), ()
            _check_start(path)
            if path.suffix == ".safetensors":
                return _read_safetensors(path), ()
            state, notes = find_state(_read_torch(path), str(path))
            if any(t.is_meta for t in state.values()):
                raise WeightsError(f"{path} holds shapes without values: it was saved from a model on the meta device")
            return state, notes
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from error


def _in_folder(folder: Path) -> Path:
    """The one checkpoint in a folder: an index, or the only safetensors file."""
    files = sorted(folder.glob("*.safetensors.index.json")) or sorted(folder.glob("*.safetensors"))
    for candidates in (files, [p for p in files if p.name.startswith("model.")]):
        if len(candidates) == 1:
            return candidates[0]
    message = f"the folder {folder} holds " + ("several checkpoints" if files else "no safetensors")
    expected = "one *.safetensors file, or one *.safetensors.index.json with its shards"
    got = _some(p.name for p in files or sorted(folder.iterdir())) or "nothing"
    raise WeightsError(message, expected=expected, got=got, hint=f"--weights {files[0]}" if files else None)


def _check_start(path: Path) -> None:
    """Refuses what its first bytes give away: empty files, pointers to large files, web pages."""
    with path.open("rb") as file:
        head = file.read(256)
    if not head:
        raise WeightsError(f"{path} is empty (0 bytes)", hint=_AGAIN)
    if head.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{path} is a Git LFS pointer, not the weights themselves", hint="git lfs pull")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise WeightsError(f"{path} is a web page, not a checkpoint", hint="download the file itself")


def _read_safetensors(path: Path, only: set[str] | None = None) -> dict[str, Tensor]:
    """The tensors of one safetensors file, mapped rather than read; those in ``only``, if given."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            names = list(file.keys())
            if only is not None and (absent := sorted(only - set(names))):
                raise WeightsError(f"{path} lacks {len(absent)} tensors that the index places in it", got=_some(absent))
            tensors = {name: file.get_tensor(name) for name in names if only is None or name in only}
    except SafetensorError as error:
        message = f"{path} is a truncated or damaged safetensors file"
        raise WeightsError(message, got=shortened(str(error)), hint=_AGAIN) from error
    if not tensors:
        raise WeightsError(f"{path} holds no tensors")
    return tensors


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of a sharded checkpoint, by its index."""
    try:
        places: dict[str, str] = dict(json.loads(read_text(index))["weight_map"])
        if not places or not all(isinstance(v, str) for v in places.values()):
            raise TypeError("weight_map must map tensor names to file names")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        message = f"{index} is not an index of a sharded checkpoint"
        expected = '{"weight_map": {"tensor name": "file name"}}'
        raise WeightsError(message, expected=expected, got=f"{type(error).__name__}: {error}") from error
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(places.values())):
        path = index.parent / shard
        if Path(shard).name != shard:
            raise WeightsError(f"{index} points outside its own folder", got=shard)
        if not path.is_file():
            hint = suggest_files(path, (".safetensors",))
            raise WeightsError(f"a shard is missing: {path}", where=str(index), hint=hint)
        tensors |= _read_safetensors(path, {name for name, place in places.items() if place == shard})
    return tensors


def _read_torch(path: Path) -> object:
    """What ``torch.save`` wrote, unpickled with torch's restricted unpickler."""
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    try:
        if zipped and zipfile.is_zipfile(path):
            _check_unpacked_size(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except WeightsError:
        raise
    except OSError as error:
        if not zipped or zipfile.is_zipfile(path):
            raise
        got = "an archive without its end"  # torch's reader seeks before the start of a short one
        raise WeightsError(f"{path} is truncated or damaged", got=got, hint=_AGAIN) from error
    except Exception as error:  # readers of damaged bytes raise nearly everything
        raise _explained(path, error, zipped) from error


def _check_unpacked_size(path: Path) -> None:
    """Refuses an archive that claims to be many times as large unpacked."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(m.file_size for m in archive.infolist() if m.compress_type != zipfile.ZIP_STORED)
    size = path.stat().st_size
    if unpacked > 10 * size + _SPARE:
        message = f"{path} is compressed and would unpack to {unpacked:,} bytes, and is not loaded"
        expected = "a file that torch.save wrote, which does not compress"
        raise WeightsError(message, expected=expected, got=f"{size:,} bytes on disk")


def _explained(path: Path, error: Exception, zipped: bool) -> WeightsError:
    """Why torch could not, or would not, load a file."""
    text = str(error)
    if "TorchScript" in text:
        hint = "save the weights alone: torch.save(model.state_dict(), 'weights.pt')"
        return WeightsError(f"{path} is a TorchScript program: it holds code, and is not loaded", hint=hint)
    names = _globals_of(path)
    refused = re.search(r"GLOBAL ([\w.]+) (?:whose module|was not an allowed)", text)
    whole = any(name.startswith("torch.nn.modules.") for name in names)
    unsafe = [refused[1]] if refused else [n for n in names if whole or not n.startswith(("torch.", "collections."))]
    if unsafe:
        code = "a whole pickled model, that is code as well as weights" if whole else "code: it is a pickle"
        message, got = f"{path} contains {code}, and is not loaded", _some(unsafe[:1] if whole else unsafe)
        expected = "tensors alone (safetensors, or torch.save(model.state_dict(), …))"
        hint = "where you trust it, load it yourself once and save its state_dict()"
        return WeightsError(message, got=f"it asks for {got}", expected=expected, hint=hint)
    with path.open("rb") as file:
        pickled = file.read(1) == b"\x80"
    cut = isinstance(error, (EOFError, IndexError))
    cut = cut or any(sign in text for sign in ("central directory", "not a ZIP archive", "unexpected EOF"))
    reason = shortened(text.split("WeightsUnpickler error:")[-1].strip() or type(error).__name__)
    if cut and (zipped or names or pickled):
        return WeightsError(f"{path} is truncated or damaged", got=reason, hint=_AGAIN)
    got = reason if zipped or pickled else "neither an archive nor a pickle"
    return WeightsError(f"{path} is not a checkpoint", expected="safetensors, or a file that torch.save wrote", got=got)


def _globals_of(path: Path) -> list[str]:
    """The names that a pickle would import, read off its opcodes, as far as it can be read; only to word an error."""
    with contextlib.suppress(Exception):
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    names, strings = list[str](), list[str]()
    with contextlib.suppress(Exception), path.open("rb") as file:
        for _ in range(4):  # the old format is four pickles in a row: magic, version, system, content
            for opcode, value, _ in pickletools.genops(file):
                if "UNICODE" in opcode.name:
                    strings.append(str(value))
                elif "GLOBAL" in opcode.name:
                    names.append(".".join(strings[-2:]) if value is None else str(value).replace(" ", "."))
    return list(dict.fromkeys(names))


def find_state(content: object, where: str, depth: int = 0) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors by name in what a checkpoint holds, ``depth`` dictionaries deep, and notes on what was chosen."""
    if not isinstance(content, Mapping):
        raise WeightsError(f"{where} is not a checkpoint", expected="a dictionary of tensors", got=kind_of(content))
    if not content:
        raise WeightsError(f"{where} holds an empty dictionary: there are no weights in it")
    for key in _WRAPPERS if depth < 4 else ():
        if isinstance(content.get(key), Mapping) and _has_tensors(content[key]):
            averaged = key in _EMA and any(isinstance(content.get(k), Mapping) for k in _WRAPPERS if k not in _EMA)
            state, notes = find_state(content[key], where, depth + 1)
            return state, (f"took the averaged (EMA) weights {key!r} of the checkpoint", *notes) if averaged else notes
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    if tensors:
        return tensors, ()
    nested = [k for k, v in content.items() if isinstance(v, Mapping) and _has_tensors(v) and "optim" not in str(k)]
    if len(nested) == 1 and depth < 4:
        state, notes = find_state(content[nested[0]], where, depth + 1)
        return state, (f"took the weights under {nested[0]!r} of the checkpoint", *notes)
    message, got = f"{where} has no weights in a place that is understood", _some(repr(k) for k in content)
    expected = f"tensors, or a dictionary of tensors under {', '.join(map(repr, _WRAPPERS[6:9]))}"
    raise WeightsError(message, expected=expected, got=f"the keys {got}")


def _has_tensors(mapping: Mapping[object, object]) -> bool:
    """Whether a dictionary holds tensors, itself or one level below."""
    inner = (v.values() if isinstance(v, Mapping) else [v] for v in mapping.values())
    return any(isinstance(v, Tensor) for values in inner for v in values)


def _some(names: Iterable[str], n: int = 10) -> str:
    listed = list(names)
    return ", ".join(listed[:n]) + (f", … ({len(listed)} in all)" if len(listed) > n else "")
