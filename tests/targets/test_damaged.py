"""Files with bytes changed at random are read or refused, and nothing else."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pwrewrite.core.errors import PwrewriteError
from pwrewrite.targets import load_weights
from pwrewrite.targets.arrays import open_arrays, open_labels

X = np.random.default_rng(0).standard_normal((10, 3, 4, 4)).astype("f")


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


WRITERS: dict[str, Callable[[Path], object]] = {
    "zip.pt": lambda path: torch.save(network().state_dict(), path),
    "old.pt": lambda path: torch.save(network().state_dict(), path, _use_new_zipfile_serialization=False),
    "w.safetensors": lambda path: save_file(network().state_dict(), path),
    "x.npy": lambda path: np.save(path, X),
    "x.npz": lambda path: np.savez(path, x=X, labels=np.arange(10)),
    "fortran.npz": lambda path: np.savez_compressed(path, x=np.asfortranarray(X)),
    "labels.npy": lambda path: np.save(path, np.arange(10)),
    "labels.csv": lambda path: path.write_text("name,label\na,1\nb,2\n"),
}


def read(path: Path) -> None:
    if path.suffix in (".pt", ".safetensors"):
        load_weights(network(), path, lenient=True)
    if path.suffix in (".npy", ".npz", ".safetensors"):
        for stored in open_arrays(path).values():
            list(stored.parts(3, stored.samples(path)))
    open_labels(path)


def damaged(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 5, 30])):
        at = draw.randrange(len(changed)) if draw.random() < 0.5 else draw.randrange(min(len(changed), 300))
        how = draw.random()
        if how < 0.6:
            changed[at] = draw.randrange(256)
        elif how < 0.75:
            del changed[at + 1 : at + draw.randrange(2, 20)]
        elif how < 0.9:
            changed[at:at] = draw.randbytes(draw.randrange(1, 8))
        else:
            del changed[at + 1 :]
    return bytes(changed)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.filterwarnings("ignore")
def test_damaged_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    whole, draw = path.read_bytes(), random.Random(name)
    for _ in range(80):
        path.write_bytes(damaged(whole, draw))
        refusal = None
        try:
            read(path)
        except PwrewriteError as error:
            refusal = error
        if refusal is not None:
            assert str(path) in str(refusal) or "labels" in str(refusal)
            assert refusal.exit_code == 2
            assert len(str(refusal)) < 1500
