"""What --calibration, --preprocess, --metric and --labels name, and what is said when they name something else."""

import sys
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pwrewrite.core.errors import PwrewriteError, UsageError
from pwrewrite.planning.batches import Batches
from pwrewrite.targets.arrays import open_labels
from pwrewrite.targets.calibration import open_calibration
from pwrewrite.targets.user_objects import open_metric

IMAGE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
N = 70


def images(n: int = N) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal((n, 3, 8, 8)).astype(np.float32)


def joined(source: Any, example: Any = IMAGE) -> Tensor:
    return torch.cat([args[0] for args, _ in Batches(source, example)])


def refusal(text: object, example: Any = IMAGE, **settings: Any) -> str:
    with pytest.raises(PwrewriteError) as caught:
        list(Batches(open_calibration(str(text), example_inputs=example, **settings), example))
    assert caught.value.exit_code == 2
    return str(caught.value)


def code(folder: Path, text: str, name: str = "mine.py") -> Path:
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return path


# Arrays


def _savez_fortran(path: Path) -> None:
    np.savez(path, np.asfortranarray(images()))


SAVED: dict[str, Callable[[Path], None]] = {
    "plain.npy": lambda p: np.save(p, images()),
    "double.npy": lambda p: np.save(p, images().astype(">f8")),
    "fortran.npy": lambda p: np.save(p, np.asfortranarray(images())),
    "one.npz": lambda p: np.savez(p, images()),
    "packed.npz": lambda p: np.savez_compressed(p, anything=images()),
    "fortran.npz": _savez_fortran,
    "named.npz": lambda p: np.savez(p, images=images(), other=np.zeros(3), labels=np.arange(N)),
    "x.npz": lambda p: np.savez(p, x=images(), y=np.arange(N, dtype=np.uint8)),
    "one.safetensors": lambda p: save_file({"w": torch.from_numpy(images())}, p),
    "two.safetensors": lambda p: save_file({"inputs": torch.from_numpy(images()), "labels": torch.arange(N)}, p),
}


@pytest.mark.parametrize("name", SAVED)
def test_arrays_come_back(name: str, tmp_path: Path) -> None:
    SAVED[name](tmp_path / name)
    source = open_calibration(str(tmp_path / name), example_inputs=IMAGE)
    batches = Batches(source, IMAGE)
    for _ in range(2):
        assert torch.equal(torch.cat([args[0] for args, _ in batches]), torch.from_numpy(images()))
    assert batches.samples == N
    labels = batches.labels()
    assert (labels is not None) == (name in ("named.npz", "x.npz", "two.safetensors"))
    assert labels is None or labels.tolist() == list(range(N))
    assert any("left out other" in note for note in batches.notes) == (name == "named.npz")


def test_size_takes_the_first_ones(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", images())
    source = open_calibration(str(tmp_path / "x.npy"), example_inputs=IMAGE, size=40)
    assert torch.equal(joined(source), torch.from_numpy(images(N)[:40]))
    more = open_calibration(str(tmp_path / "x.npy"), example_inputs=IMAGE, size=400)
    assert len(joined(more)) == N


def test_labels_from_another_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=images(), labels=np.zeros(N, np.int64))
    source = open_calibration(str(tmp_path / "x.npz"), example_inputs=IMAGE, labels=torch.arange(N), size=50)
    labels = Batches(source, IMAGE).labels()
    assert labels is not None
    assert labels.tolist() == list(range(50))
    assert "3 labels were given" in refusal(tmp_path / "x.npz", labels=torch.arange(3))


def test_several_inputs(tmp_path: Path) -> None:
    mask = np.zeros((N, 4), bool)
    named = {"image": IMAGE, "mask": torch.zeros(1, 4, dtype=torch.bool)}
    np.savez(tmp_path / "named.npz", mask=mask, image=images(), labels=np.arange(N))
    batches = Batches(open_calibration(str(tmp_path / "named.npz"), example_inputs=named), named)
    assert all(list(kwargs) == ["image", "mask"] for _, kwargs in batches)
    assert batches.labels() is not None
    np.savez(tmp_path / "placed.npz", images(), mask)
    placed = tuple(named.values())
    batches = Batches(open_calibration(str(tmp_path / "placed.npz"), example_inputs=placed), placed)
    assert all(args[1].dtype is torch.bool for args, _ in batches)
    assert "nothing says which arrays" in refusal(tmp_path / "named.npz", placed)
    assert "image, mask" in refusal(tmp_path / "placed.npz", named)
    np.savez(tmp_path / "uneven.npz", image=images(), mask=mask[1:])
    assert "as many samples each" in refusal(tmp_path / "uneven.npz", named)
    one = {"image": IMAGE}
    np.save(tmp_path / "x.npy", images())
    batches = Batches(open_calibration(str(tmp_path / "x.npy"), example_inputs=one), one)
    assert [list(kwargs) for _, kwargs in batches] == [["image"]] * 4
    assert all(len(kwargs["image"]) <= 32 for _, kwargs in batches)


def test_the_keys_of_a_dict_that_is_the_one_input_name_arrays(tmp_path: Path) -> None:
    example = ({"image": IMAGE, "mask": torch.zeros(1, 4, dtype=torch.bool)},)
    np.savez(tmp_path / "named.npz", mask=np.zeros((N, 4), bool), image=images(), labels=np.arange(N))
    batches = Batches(open_calibration(str(tmp_path / "named.npz"), example_inputs=example), example)
    assert all(list(args[0]) == ["image", "mask"] and not kwargs for args, kwargs in batches)
    assert batches.labels() is not None
    assert batches.samples == N


class Conditioned(nn.Module):
    """Its last input has a name that labels have elsewhere."""

    def forward(self, x: Tensor, steps: Tensor, y: Tensor) -> Tensor:
        return x * steps[:, None] + y


def test_several_inputs_are_called_as_the_model_calls_them(tmp_path: Path) -> None:
    values = {name: np.full((6, 4) if name == "x" else (6,), i) for i, name in enumerate(("y", "x", "steps"))}
    np.savez(tmp_path / "some.npz", **values)
    example = (torch.zeros(1, 4), torch.zeros(1), torch.zeros(1))
    batch = next(iter(open_calibration(str(tmp_path / "some.npz"), example_inputs=example, model=Conditioned())))
    assert isinstance(batch, tuple)
    assert [np.asarray(each).flat[0] for each in batch] == [1, 2, 0]
    np.savez(tmp_path / "less.npz", x=values["x"], y=values["y"])
    assert "expected: x, steps, y" in refusal(tmp_path / "less.npz", example, model=Conditioned())


def test_bytes_need_preprocess(tmp_path: Path) -> None:
    raw = np.random.default_rng(0).integers(0, 256, (N, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "images.npz", images=raw, labels=np.arange(N))
    text = refusal(tmp_path / "images.npz")
    for part in ("float32 N×3×8×8", f"uint8 {N}×8×8×3, channels last", "--preprocess file.py:NAME"):
        assert part in text
    mine = code(
        tmp_path,
        """
        import torch
        def scale(batch):
            return torch.from_numpy(batch).permute(0, 3, 1, 2) / 255
        def each(batch):
            return scale(batch)[0]
        def loses(batch):
            return scale(batch)[:-1]
        def broken(batch):
            return batch.nothing
        twice = 2
        """,
    )
    source = open_calibration(str(tmp_path / "images.npz"), example_inputs=IMAGE, preprocess=f"{mine}:scale")
    batches = Batches(source, IMAGE)
    assert torch.equal(torch.cat([a[0] for a, _ in batches]), torch.from_numpy(raw).permute(0, 3, 1, 2) / 255)
    labels = batches.labels()
    assert labels is not None
    assert labels.tolist() == list(range(N))
    for name, said in {
        "each": "made 3×8×8 of a batch of 32",
        "loses": "made 31×3×8×8 of a batch of 32",
        "broken": "line 10",
        "twice": "is not a function",
        "scal": "did you mean scale",
    }.items():
        assert said in refusal(tmp_path / "images.npz", preprocess=f"{mine}:{name}")
    assert "file.py:NAME" in refusal(tmp_path / "images.npz", preprocess="scale")


def test_arrays_for_a_detector(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", images())
    example = ([torch.rand(3, 8, 8)],)
    batches = Batches(open_calibration(str(tmp_path / "x.npy"), example_inputs=example), example)
    assert [len(args[0]) for args, _ in batches] == [32, 32, 6]


def _half(path: Path) -> None:
    np.savez(path, images())
    path.write_bytes(path.read_bytes()[:-5000])


def _damaged(path: Path) -> None:
    np.savez(path, images())
    whole = bytearray(path.read_bytes())
    whole[2000:2100] = bytes(100)
    path.write_bytes(bytes(whole))


def _short(path: Path) -> None:
    np.save(path.with_suffix(".npy"), images())
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", path.with_suffix(".npy").read_bytes()[:-400])


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "half.npz": (_half, "truncated, damaged"),
    "damaged.npz": (_damaged, "truncated, damaged"),
    "short.npz": (_short, "truncated, damaged"),
    "text.npy": (lambda p: p.write_text("hello"), "no .npy file"),
    "text.npz": (lambda p: p.write_text("hello"), "no .npz file"),
    "empty.npy": (lambda p: p.write_bytes(b""), "is empty"),
    "empty.npz": (lambda p: np.savez(p), "holds no arrays"),
    "none.npy": (lambda p: np.save(p, images()[:0]), "holds no samples"),
    "scalar.npy": (lambda p: np.save(p, np.float32(1)), "holds no samples"),
    "objects.npy": (lambda p: np.save(p, np.array([{}, []], dtype=object)), "Python objects"),
    "objects.npz": (lambda p: np.savez(p, np.array([{}, []], dtype=object)), "Python objects"),
    "words.npy": (lambda p: np.save(p, np.array(["a", "b"])), "dtype"),
    "last.npy": (lambda p: np.save(p, images().transpose(0, 2, 3, 1)), "channels come last"),
    "nan.npy": (
        lambda p: np.save(p, np.where(np.arange(N)[:, None, None, None] == 41, np.nan, images())),
        "NaN in image",
    ),
    "model.pt": (lambda p: torch.save({}, p), "is a pickle"),
    "x.csv": (lambda p: p.write_text("1,2"), "is no file of arrays"),
    "x.safetensors": (lambda p: p.write_bytes(b"\x08"), "damaged"),
    "many.npz": (lambda p: np.savez(p, a=images(), b=images()), "nothing says which arrays"),
}


@pytest.mark.parametrize("name", WRONG)
def test_files_that_do_not_do(name: str, tmp_path: Path) -> None:
    make, said = WRONG[name]
    make(tmp_path / name)
    assert said in refusal(tmp_path / name)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", images())
    assert "images.npy" in refusal(tmp_path / "image.npy").partition("try")[2]
    assert "no such file or folder" in refusal("nowhere")
    assert "mine.py:NAME" in refusal(code(tmp_path, "x = 1"))


# A user's code


def test_code_gives_batches(tmp_path: Path) -> None:
    mine = code(
        tmp_path,
        """
        import torch
        from torch.utils.data import DataLoader, TensorDataset
        images = torch.arange(10.0)[:, None, None, None].expand(10, 3, 8, 8)
        data = TensorDataset(images, torch.arange(10))
        loader = DataLoader(data, batch_size=4)
        batches = [images]
        def made():
            print("made")
            return loader
        def generator():
            yield images[:5]
            yield images[5:]
        class Source:
            def __iter__(self):
                return generator()
        number = 3
        def nothing(): pass
        def needs(folder): pass
        def broken(): raise KeyError("gone")
        """,
    )
    for name in ("images", "data", "loader", "batches", "made", "generator", "Source"):
        source = open_calibration(f"{mine}:{name}", example_inputs=IMAGE)
        assert joined(source)[:, 0, 0, 0].tolist() == list(range(10))
    for name, said in {
        "number": "is not a function",
        "nothing": "returned no iterable",
        "needs": "needs the arguments folder",
        "broken": "raised KeyError",
        "load": "did you mean loader",
    }.items():
        assert said in refusal(f"{mine}:{name}")
    assert "--preprocess is for files" in refusal(f"{mine}:loader", preprocess=f"{mine}:made")
    assert "--labels is for files" in refusal(f"{mine}:loader", labels=torch.arange(10))
    assert "no such file" in refusal(f"{tmp_path}/other.py:loader")
    assert "no module named" in refusal("nothing_of_this_name:loader")


# Folders of images


def folder_of(tmp_path: Path, n: int = 6, mode: str = "RGB") -> Path:
    from PIL import Image

    (tmp_path / "a" / "b").mkdir(parents=True)
    for i in range(n):
        path = tmp_path / ("a/b" if i % 2 else "a") / f"{i:02}.{'png' if i % 3 else 'jpg'}"
        Image.new(mode, (20 + i, 16), (40 * i,) * len(mode) if len(mode) > 1 else 40 * i).save(path)
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "a" / ".hidden.png").write_bytes(b"not an image")
    return tmp_path


def test_a_folder_of_images(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    source: Any = open_calibration(str(folder), example_inputs=IMAGE, labels=torch.arange(6) * 10)
    batches = Batches(source, IMAGE)
    found = torch.cat([args[0] for args, _ in batches])
    assert found.shape == (6, 3, 8, 8)
    back = (
        found * torch.tensor([0.229, 0.224, 0.225])[:, None, None] + torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    )
    levels = (back.mean((1, 2, 3)) * 255 / 40).round().tolist()
    assert sorted(levels) == list(range(6))
    labels = batches.labels()
    assert labels is not None
    by_path = [int(path.stem) for path in source.files]
    assert [by_path[label // 10] for label in labels.tolist()] == levels
    assert "ImageNet's mean" in batches.notes[0]
    assert torch.equal(found, torch.cat([args[0] for args, _ in batches]))
    some = open_calibration(str(folder), example_inputs=IMAGE, size=4)
    assert torch.equal(joined(some), found[:4])


def test_a_folder_in_the_way_of_the_model(tmp_path: Path) -> None:
    folder = str(folder_of(tmp_path))

    class Timm(nn.Module):
        pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}

    source = open_calibration(folder, example_inputs=IMAGE, model=Timm())
    assert joined(source).min() >= -1.001
    assert "the model's mean" in source.notes[0]  # type: ignore[attr-defined]
    grey = joined(open_calibration(folder, example_inputs=IMAGE[:, :1]), IMAGE[:, :1])
    assert grey.shape == (6, 1, 8, 8)
    assert grey.min() == 0
    example = ([torch.rand(3, 8, 8)],)
    ((args, _),) = list(Batches(open_calibration(folder, example_inputs=example), example))
    assert sorted(image.shape[-1] for image in args[0]) == [20, 21, 22, 23, 24, 25]
    named = {"x": IMAGE}
    assert all(list(kwargs) == ["x"] for _, kwargs in Batches(open_calibration(folder, example_inputs=named), named))
    assert "4 channels" in refusal(folder, torch.zeros(1, 4, 8, 8))
    assert "does not take one image" in refusal(folder, (IMAGE, IMAGE))
    assert "does not take one image" in refusal(folder, torch.zeros(1, 4))
    assert "2 labels were given" in refusal(folder, labels=torch.arange(2))


def test_a_folder_with_preprocess(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "images")
    mine = code(
        tmp_path,
        """
        import numpy as np, torch
        def small(image):
            assert image.mode == "RGB"
            return torch.from_numpy(np.array(image.resize((8, 8)))).permute(2, 0, 1) / 255
        def as_array(image):
            return small(image).numpy()
        def own_size(image):
            return torch.zeros(3, image.height, image.width)
        def as_is(image):
            return image
        def broken(image):
            raise ValueError("no")
        """,
    )
    for name in ("small", "as_array"):
        source = open_calibration(str(folder), example_inputs=IMAGE, preprocess=f"{mine}:{name}")
        assert joined(source).shape == (6, 3, 8, 8)
        assert not source.notes  # type: ignore[attr-defined]
    for name, said in {"own_size": "different sizes", "as_is": "no image of an image", "broken": "ValueError"}.items():
        assert said in refusal(folder, preprocess=f"{mine}:{name}")


def test_unreadable_images(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    whole = (folder / "a" / "00.jpg").read_bytes()
    (folder / "a" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "a" / "no.png").write_text("not an image")
    source = open_calibration(str(folder), example_inputs=IMAGE, size=6)
    batches = Batches(source, IMAGE)
    assert len(torch.cat([args[0] for args, _ in batches])) == 6
    full = Batches(open_calibration(str(folder), example_inputs=IMAGE), IMAGE)
    assert len(torch.cat([args[0] for args, _ in full])) == 6
    (note,) = [note for note in full.notes if "cannot read" in note]
    assert "2 of 8 images" in note
    assert "no.png (no image that Pillow knows)" in note
    assert "cut.jpg" in note
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "x.png").write_text("not an image")
    assert "none of the 1 images" in refusal(bad)
    (bad / "x.png").rename(bad / "x.npy")
    assert "x.npy" in refusal(bad).partition("try")[2]


def test_a_folder_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    assert "pwrewrite[images]" in refusal(folder)


# The metric


def test_a_metric(tmp_path: Path) -> None:
    mine = code(
        tmp_path,
        """
        import numpy as np, torch
        def accuracy(model): print("scoring"); return 0.75
        def tensor(model): return torch.tensor([0.75])
        def array(model): return np.float32(0.75)
        def nan(model): return float("nan")
        def text(model): return "0.75"
        def flag(model): return True
        def nothing(model): pass
        def broken(model): return model.classifier_of_mine
        def two(model, data): return 1
        score = 0.75
        model = torch.nn.ReLU()
        """,
    )
    for name in ("accuracy", "tensor", "array"):
        assert open_metric(f"{mine}:{name}")(nn.ReLU()) == 0.75
    for name, said in {
        "nan": "returned nan",
        "text": "returned no number",
        "flag": "returned no number",
        "nothing": "got: None",
        "broken": "line 10",
        "two": "needs the arguments model, data",
        "score": "is not a function",
        "model": "is a model",
        "accurcy": "did you mean accuracy",
    }.items():
        with pytest.raises(PwrewriteError) as caught:
            open_metric(f"{mine}:{name}")(nn.ReLU())
        assert said in str(caught.value)
        assert caught.value.exit_code == 2


def test_what_a_metric_prints_stays_out_of_the_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = code(tmp_path, "def accuracy(model):\n    print('scoring')\n    return 1")
    open_metric(f"{mine}:accuracy")(nn.ReLU())
    assert capsys.readouterr().out == ""


# Labels

LABELS: dict[str, Callable[[Path], Any]] = {
    "a.npy": lambda p: np.save(p, np.array([3, 1, 2], np.uint8)),
    "b.npy": lambda p: np.save(p, np.array([[3], [1], [2]])),
    "a.npz": lambda p: np.savez(p, np.array([3, 1, 2])),
    "b.npz": lambda p: np.savez(p, images=images(), labels=np.array([3, 1, 2])),
    "a.safetensors": lambda p: save_file({"labels": torch.tensor([3, 1, 2])}, p),
    "a.txt": lambda p: p.write_text("3\n1\n2\n"),
    "b.txt": lambda p: p.write_text("# classes\n3, 1 2\n\n"),
    "a.csv": lambda p: p.write_text("3\n1\n2\n"),
    "b.csv": lambda p: p.write_text("file,label\na.png,3\nb.png,1\n\nc.png,2\n"),
    "c.csv": lambda p: p.write_text("anything\n3\n1\n2\n"),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels(name: str, tmp_path: Path) -> None:
    LABELS[name](tmp_path / name)
    labels = open_labels(tmp_path / name)
    assert labels.dtype is torch.int64
    assert labels.tolist() == [3, 1, 2]


NO_LABELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a.npy": (lambda p: np.save(p, np.zeros(3)), "float64 3"),
    "b.npy": (lambda p: np.save(p, np.zeros((3, 2), int)), "holds no labels"),
    "c.npy": (lambda p: np.save(p, np.zeros(0, int)), "no samples"),
    "a.npz": (lambda p: np.savez(p, a=np.zeros(3, int), b=np.zeros(3, int)), "nothing says which array"),
    "a.txt": (lambda p: p.write_text("3\ncat\n"), "line 2"),
    "b.txt": (lambda p: p.write_text("\n"), "holds no labels"),
    "a.csv": (lambda p: p.write_text("a.png,3\nb.png,1\n"), "nothing says which column"),
    "b.csv": (lambda p: p.write_text("file,label\na.png,cat\n"), "line 2"),
    "c.csv": (lambda p: p.write_text("file,label\na.png\n"), "line 2: no label"),
    "a.json": (lambda p: p.write_text("[1]"), "is no file of labels"),
}


@pytest.mark.parametrize("name", NO_LABELS)
def test_labels_that_are_none(name: str, tmp_path: Path) -> None:
    make, said = NO_LABELS[name]
    make(tmp_path / name)
    with pytest.raises(UsageError) as caught:
        open_labels(tmp_path / name)
    assert said in str(caught.value)


def test_labels_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("1")
    with pytest.raises(UsageError, match=r"labels\.txt"):
        open_labels(tmp_path / "label.txt")
