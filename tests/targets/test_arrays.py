"""Files of arrays are believed only as far as they hold what their headers say."""

import io
import os
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from pwrewrite.core.errors import UsageError
from pwrewrite.targets.arrays import open_arrays


def npy(shape: str, data: bytes = b"", descr: str = "'<f4'", fortran: bool = False) -> bytes:
    """A ``.npy`` file with any header."""
    text = f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


SHAPES = [
    "(-1, 4)",
    "(True, 4)",
    "(2, 10**30)",
    "(2, 99999999999999999999)",
    "(2.0, 4)",
    "('a',)",
    "[2, 4]",
    "(2, 5)",
    "()*9",
]


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, "(" * 300 + ")" * 300, "(2, -4)", "(-2, -4)"])
def test_shapes_that_cannot_be(tmp_path: Path, shape: str, zipped: bool) -> None:
    path = tmp_path / ("x.npz" if zipped else "x.npy")
    content = npy(shape, bytes(32))
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", content)
    else:
        path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        list(open_arrays(path).popitem()[1].parts(1, 2))
    assert str(path) in str(caught.value)


def test_a_member_that_declares_more_than_it_holds_is_not_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", npy("(4, 4)", bytes(300 << 20), fortran=True))
    (tmp_path / "copy.npz").write_bytes((tmp_path / "x.npz").read_bytes())
    tracemalloc.start()
    (part,) = open_arrays(tmp_path / "x.npz")["x"].parts(4, 4)
    assert tracemalloc.get_traced_memory()[1] < 30 << 20
    tracemalloc.stop()
    assert part.shape == (4, 4)


def test_fortran_order(tmp_path: Path) -> None:
    array = np.arange(24.0).reshape(4, 3, 2)
    np.savez(tmp_path / "x.npz", x=np.asfortranarray(array))
    assert np.array_equal(np.concatenate(list(open_arrays(tmp_path / "x.npz")["x"].parts(3, 4))), array)
    with zipfile.ZipFile(tmp_path / "y.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("y.npy", npy("(1024, 1024, 80)", bytes(320 << 20), fortran=True))
    with pytest.raises(UsageError, match="Fortran order") as caught:
        open_arrays(tmp_path / "y.npz")
    assert "ascontiguousarray" in str(caught.value)


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.safetensors"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(UsageError, match="not a regular file"):
        open_arrays(tmp_path / name)


def test_what_numpy_writes_is_read(tmp_path: Path) -> None:
    for array in (np.zeros((0, 3)), np.arange(6, dtype=np.int8).reshape(2, 3), np.float64(3)):
        np.save(tmp_path / "x.npy", array)
        stored = open_arrays(tmp_path / "x.npy")[""]
        assert (stored.shape, stored.dtype) == (array.shape, str(array.dtype))
    stream = io.BytesIO()
    np.savez_compressed(stream, a=np.ones((5, 2)))
    (tmp_path / "z.npz").write_bytes(stream.getvalue())
    assert sum(len(part) for part in open_arrays(tmp_path / "z.npz")["a"].parts(2, 5)) == 5
