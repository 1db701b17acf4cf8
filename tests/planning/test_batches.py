"""Calibration inputs: what counts as a batch, what is held out, what is refused, and that every pass is the same."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from pwrewrite.core.errors import UsageError
from pwrewrite.planning.batches import Batches
from pwrewrite.planning.running import Chunk, first_samples, samples_of

IMAGE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def images(n: int, size: int = 8) -> Tensor:
    """Images of which each is its own number."""
    return torch.arange(n, dtype=torch.float32)[:, None, None, None].expand(n, 3, size, size).div(1000)


def numbers(chunks: Iterator[Chunk]) -> list[int]:
    return [round(float(x) * 1000) for args, _ in chunks for x in args[0][:, 0, 0, 0]]


def sizes(chunks: Iterator[Chunk]) -> list[int]:
    return [len(args[0]) for args, _ in chunks]


def refusal(source: Any, example: Any = IMAGE, **settings: Any) -> str:
    with pytest.raises(UsageError) as caught:
        list(Batches(source, example, **settings))
    assert caught.value.exit_code == 2
    return str(caught.value)


# Kinds of batches


@pytest.mark.parametrize(
    "source",
    [
        images(6),
        images(6).numpy(),
        [images(6)],
        [(images(6),)],
        [[images(6)]],
        ((images(6), torch.arange(6)),),
        [[images(6), np.arange(6)]],
        [images(6)[:2], images(6)[2:]],
        [x[None] for x in images(6)],
        iter([images(6)]),
        (x[None] for x in images(6)),
        TensorDataset(images(6)),
        DataLoader(TensorDataset(images(6), torch.arange(6)), batch_size=4),
    ],
)
def test_kinds_of_sources(source: Any) -> None:
    batches = Batches(source, (IMAGE,))
    for _ in range(2):
        assert numbers(iter(batches)) == list(range(6))
    assert batches.samples == 6
    assert sorted(numbers(batches.calibration()) + numbers(batches.held_out())) == list(range(6))


def test_inputs_by_name() -> None:
    example = {"image": IMAGE, "mask": torch.zeros(1, 8, 8, dtype=torch.bool)}
    batch = {"mask": np.zeros((5, 8, 8), bool), "image": images(5), "labels": torch.arange(5)}
    batches = Batches([batch], example, chunk=2)
    chunks = list(batches)
    assert all(args == () and list(kwargs) == ["image", "mask"] for args, kwargs in chunks)
    assert [len(kwargs["mask"]) for _, kwargs in chunks] == [2, 2, 1]
    labels = batches.labels()
    assert labels is not None
    assert labels.tolist() == [0, 1, 2, 3, 4]
    alone = {name: batch[name] for name in example}
    for tuple_ in ((alone, torch.arange(5)), [batch, torch.randn(5)], (alone, torch.arange(5), {"id": 3}), (alone,)):
        read = Batches([tuple_], example, chunk=2)
        assert [len(kwargs["mask"]) for _, kwargs in read] == [2, 2, 1]
        assert (read.labels() is None) == (len(tuple_) == 1)
        assert read.labels() is None or read.labels().tolist() == [0, 1, 2, 3, 4]  # type: ignore[union-attr]
    assert "lacks mask" in refusal([({"image": images(2)}, torch.arange(2))], example)
    chunk = next(iter(Batches([images(3)], {"image": IMAGE})))
    assert list(chunk[1]) == ["image"]
    assert "lacks mask" in refusal([{"image": images(2)}], example)
    assert "also has depth" in refusal([{**batch, "depth": images(5)}], example)
    assert "both by name" in refusal([batch])


def test_a_dict_as_the_one_input() -> None:
    """As of a model with ``forward(self, batch)``."""
    example = ({"image": IMAGE, "mask": torch.zeros(1, 8, 8, dtype=torch.bool)},)
    inputs = {"mask": np.zeros((5, 8, 8), bool), "image": images(5)}
    labels = torch.arange(5)
    for batch in ({**inputs, "label": labels}, (inputs, labels), ((inputs,), labels), [inputs, labels]):
        batches = Batches([batch], example, chunk=2)
        chunks = list(batches)
        assert all(not kwargs and list(args[0]) == ["image", "mask"] for args, kwargs in chunks)
        assert [samples_of(*chunk) for chunk in chunks] == [2, 2, 1]
        assert [len(args[0]["mask"]) for args, _ in chunks] == [2, 2, 1]
        found = batches.labels()
        assert found is not None
        assert found.tolist() == [0, 1, 2, 3, 4]
    assert "lacks mask" in refusal([({"image": images(2)}, labels[:2])], example)
    assert "also has depth" in refusal([{**inputs, "depth": images(5)}], example)
    assert "image of batch 0" in refusal([{**inputs, "image": images(5)[:, :1]}], example)
    assert len(first_samples(chunks[0], 1)[0][0]["image"]) == 1


def test_several_inputs() -> None:
    example = (IMAGE, torch.zeros(1, 4))
    batch = (images(4), torch.zeros(4, 4))
    for one, labelled in ((batch, False), ((*batch, torch.arange(4)), True), ((batch, torch.arange(4)), True)):
        batches = Batches([one], example)
        shapes = [[tuple(x.shape) for x in args] for args, _ in batches]
        assert shapes == [[(3, 3, 8, 8), (3, 4)], [(1, 3, 8, 8), (1, 4)]]
        assert (batches.labels() is not None) == labelled
    assert "input 1 of batch 0" in refusal([(images(4), torch.zeros(4, 5))], example)
    assert "a tuple of 2" in refusal([images(4)], example)


def test_lists_of_images_stay_whole() -> None:
    example = ([torch.rand(3, 8, 8)],)
    two = [torch.rand(3, 8, 8), torch.rand(3, 12, 9)]
    targets = [{"boxes": torch.zeros(1, 4)}] * 2
    for batch in (two, (two,), (tuple(two), targets), [two]):
        batches = Batches([batch] * 5, example, chunk=1)
        chunks = list(batches)
        assert len(chunks) == 5
        assert all(len(args[0]) == 2 and isinstance(args[0], list) for args, _ in chunks)
        assert len(list(batches.calibration())) == 4
        assert batches.samples == 10
    noted = Batches([(two, targets)], example)
    list(noted)
    assert "taken for targets and left out" in noted.notes[0]
    alone = Batches([two], example)
    assert len(list(alone.calibration())) == len(list(alone.held_out())) == 1
    assert "cannot be cut" in alone.notes[0]
    assert "image 1 of batch 0" in refusal([[two[0], two[1][:1]]], example)


def test_targets_that_are_no_classes_are_left_out_with_a_note() -> None:
    batches = Batches([(images(4), torch.zeros(4, 8, 8, dtype=torch.int64))], IMAGE)
    assert len(list(batches)) == 2
    assert batches.labels() is None
    assert "taken for targets" in batches.notes[0]


@pytest.mark.parametrize(
    ("beside", "labels"),
    [
        ((torch.arange(4),), [0, 1, 2, 3]),
        ((torch.arange(4.0),), [0, 1, 2, 3]),
        (([3, 2, 1, 0],), [3, 2, 1, 0]),
        ((torch.eye(4)[:, :3],), [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]]),
        ((np.eye(4, dtype=np.uint8),), np.eye(4).tolist()),
        ((torch.arange(4)[:, None], ["a.png", "b.png", "c.png", "d.png"]), [0, 1, 2, 3]),
        (({"boxes": torch.zeros(4, 4)}, torch.arange(4), "more"), [0, 1, 2, 3]),
        ((torch.rand(4),), None),
        ((torch.rand(4, 2),), None),
        ((images(4, 16),), None),
        (([{"boxes": torch.zeros(1, 4)}] * 4,), None),
        (({"boxes": torch.zeros(1, 4)},), None),
        ((["a", "b", "c", "d"],), None),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_what_loaders_give_beside_the_inputs(beside: tuple[Any, ...], labels: list[Any] | None, nested: bool) -> None:
    first: Any = (images(4),) if nested else images(4)
    batches = Batches([(first, *beside)] * 3, IMAGE)
    assert numbers(iter(batches)) == [0, 1, 2, 3] * 3
    found = batches.labels()
    assert (found is None) == (labels is None)
    if labels is None or found is None:
        assert [note for note in batches.notes if "beside the inputs was taken for targets" in note]
    else:
        assert found.tolist() == labels * 3
        assert not batches.notes


def test_empty_batches_are_passed_over() -> None:
    lists = [([torch.rand(3, 8, 8)] * 2, [{}, {}]), ([], [])]
    assert [len(args[0]) for args, _ in Batches(lists, ([torch.rand(3, 8, 8)],))] == [2]
    batches = Batches([(images(4), torch.arange(4)), (images(0), torch.arange(0)), [], ()], IMAGE)
    assert numbers(iter(batches)) == [0, 1, 2, 3]
    assert batches.labels() is not None


def test_a_function_makes_inputs_of_batches_of_any_kind() -> None:
    raw = [{"path": "a", "pixels": images(4), "class": torch.arange(4)}] * 3
    batches = Batches(raw, IMAGE, batch=lambda one: (one["pixels"], one["class"]))
    assert numbers(iter(batches)) == [0, 1, 2, 3] * 3
    labels = batches.labels("held_out")
    assert labels is not None
    assert labels.tolist() == numbers(batches.held_out())
    assert "--batch" in refusal(raw)


def test_labels_follow_the_parts() -> None:
    source = [(images(20)[i : i + 4], torch.arange(i, i + 4)[:, None]) for i in range(0, 20, 4)]
    batches = Batches(source, IMAGE, chunk=4)
    for part, chunks in (("held_out", batches.held_out()), ("calibration", batches.calibration()), ("all", batches)):
        labels = batches.labels(part)  # type: ignore[arg-type]
        assert labels is not None
        assert labels.tolist() == numbers(iter(chunks))
    assert Batches([images(4), (images(4), torch.arange(4))], IMAGE).labels() is None


# Cutting and holding out


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=12),
    st.integers(1, 6),
    st.integers(2, 6),
    st.none() | st.integers(1, 40),
)
def test_every_sample_is_in_one_part(lengths: list[int], chunk: int, holdout: int, size: int | None) -> None:
    edges = np.cumsum([0, *lengths])
    every = images(int(edges[-1]))
    batches = Batches([every[a:b] for a, b in pairwise(edges)], IMAGE, chunk=chunk, holdout=holdout, size=size)
    total = len(every) if size is None else min(size, len(every))
    gathered, held = numbers(batches.calibration()), numbers(batches.held_out())
    assert numbers(iter(batches)) == list(range(total))
    assert max(sizes(iter(batches))) <= chunk
    if total > 1:
        assert sorted(gathered + held) == list(range(total))
        assert gathered
        assert held
    else:
        assert gathered == held == [0]
        assert any("measured on it too" in note for note in batches.notes)
    assert batches.samples == total


def test_every_nth_chunk_is_held_out() -> None:
    batches = Batches(images(100), IMAGE, chunk=10, holdout=5)
    assert numbers(batches.held_out()) == [*range(40, 50), *range(90, 100)]
    few = Batches(images(64), IMAGE)
    assert numbers(few.held_out()) == list(range(51, 64))


def test_inputs_of_other_batch_sizes_stay_whole() -> None:
    example = (IMAGE, torch.zeros(1, 4))
    batches = Batches([(images(40), torch.zeros(1, 4))] * 2, example, chunk=8)
    assert sizes(batches.calibration()) == sizes(batches.held_out()) == [40]
    scalar = Batches([(images(40), torch.tensor(2.0))], (IMAGE, torch.tensor(1.0)), chunk=8)
    assert sizes(iter(scalar)) == [8, 8, 8, 8, 8]


def test_fewer_samples_than_asked_for_are_noted() -> None:
    batches = Batches(images(10), IMAGE, size=16)
    list(batches)
    assert batches.notes == ("16 calibration samples were asked for, and there are 10",)


# Passes


def test_a_generator_is_taken_no_further_than_needed() -> None:
    taken: list[int] = []

    def endless() -> Iterator[Tensor]:
        while True:
            taken.append(len(taken))
            yield images(4)

    batches = Batches(endless(), IMAGE, size=10)
    assert sizes(iter(batches)) == [4, 4, 2]
    list(batches.held_out())
    assert batches.samples == 10
    assert len(taken) == 3


def test_what_can_be_iterated_again_is_not_kept() -> None:
    class Source:
        passes = 0

        def __iter__(self) -> Iterator[Tensor]:
            self.passes += 1
            yield from (images(4), images(4))

    source = Source()
    batches = Batches(source, IMAGE)
    for _ in range(3):
        list(batches.calibration())
    assert source.passes == 3


@pytest.mark.parametrize("given_generator", [False, True])
@pytest.mark.parametrize("batch_size", [4, None])
def test_a_shuffling_loader_gets_one_order(batch_size: int | None, given_generator: bool) -> None:
    generator = torch.Generator().manual_seed(7) if given_generator else None
    data = TensorDataset(images(40)) if batch_size else _Batched(40)
    loader = DataLoader(data, batch_size=batch_size, shuffle=True, generator=generator)
    state, own = torch.get_rng_state(), generator.get_state() if generator else torch.empty(0)
    batches = Batches(loader, IMAGE, chunk=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert generator is None or torch.equal(generator.get_state(), own)
    first = numbers(iter(batches))
    assert first == numbers(iter(batches)) == numbers(iter(Batches(loader, IMAGE)))
    assert first != sorted(first)
    assert sorted(first) == list(range(40))
    assert sorted(numbers(batches.calibration()) + numbers(batches.held_out())) == list(range(40))
    some = Batches(loader, IMAGE, size=6, chunk=4)
    assert len(numbers(iter(some))) == some.samples == 6


class _Batched(Dataset[Tensor]):
    """A dataset that makes its own batches, of one."""

    def __init__(self, n: int) -> None:
        self.images = images(n)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> Tensor:
        return self.images[place][None]


def test_a_streaming_dataset_in_a_loader() -> None:
    class Stream(IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            yield from images(6)

    batches = Batches(DataLoader(Stream(), batch_size=4), IMAGE)
    assert batches.samples == 6
    assert numbers(iter(batches)) == list(range(6))


def test_a_mapped_array_is_read_in_parts(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", images(50).numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    batches = Batches(mapped, IMAGE, chunk=8)
    assert numbers(iter(batches)) == list(range(50))


# Casting


def test_inputs_come_in_the_dtype_of_the_example() -> None:
    source = [images(4).double(), images(4).half(), images(4).bfloat16(), images(4).numpy().astype(">f8")]
    for batch in source:
        assert all(args[0].dtype is torch.float32 for args, _ in Batches([batch], IMAGE))
    assert all(args[0].dtype is torch.bfloat16 for args, _ in Batches([images(4)], IMAGE.bfloat16()))
    assert all(args[0].dtype is torch.float64 for args, _ in Batches([images(4)], IMAGE.double()))
    tokens = torch.zeros(1, 7, dtype=torch.int64)
    assert all(args[0].dtype is torch.int64 for args, _ in Batches([np.zeros((4, 7), np.uint8)], tokens))
    assert all(args[0].device.type == "cpu" for args, _ in Batches([images(4)], IMAGE.to("meta")))


# Refusals

REFUSED: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "dims": (lambda: [images(4), images(4)[0]], ["batch 1", "float32 N×3×H×W", "float32 3×8×8", "x[None]"]),
    "channels": (lambda: [images(4)[:, :1]], ["batch 0", "N×3×H×W", "4×1×8×8"]),
    "last": (lambda: [images(4).permute(0, 2, 3, 1)], ["channels come last", "permute(0, 3, 1, 2)"]),
    "bytes": (lambda: [images(4).to(torch.uint8)], ["float32 1×3×8×8", "uint8 4×3×8×8", "--preprocess"]),
    "bool": (lambda: [images(4) > 2], ["another dtype", "bool 4×3×8×8"]),
    "strings": (lambda: [np.array([["a"]])], ["dtype that torch does not know"]),
    "nothing": (list, ["are empty"]),
    "used": (lambda: iter([]), ["gone through already"]),
    "empty batches": (lambda: [images(4)[:0]] * 2, ["are empty"]),
    "a number": (lambda: [3], ["batch 0", "not what the model takes", "int"]),
    "path": (lambda: "images.npy", ["not an iterable of batches", "'images.npy'"]),
    "none": (lambda: None, ["not an iterable of batches", "NoneType"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    make, said = REFUSED[name]
    text = refusal(make())
    for part in said:
        assert part in text


@pytest.mark.parametrize(("value", "what"), [(float("nan"), "NaN"), (float("inf"), "Inf")])
def test_values_that_are_none_are_named(value: float, what: str) -> None:
    bad = images(40).clone()
    bad[37, 1, 2, 3] = value
    assert f"{what} in image 37 of batch 1" in refusal([images(4), bad])
    assert "as float16" in refusal([images(4) * 1e9], IMAGE.half())
    assert "sample 2 of batch 0" in refusal([torch.tensor([[0.0], [0.0], [value]])], torch.zeros(1, 1))


def test_bytes_as_floats_are_noted() -> None:
    batches = Batches([torch.randint(0, 256, (4, 3, 8, 8)).float()], IMAGE)
    list(batches)
    assert "whole numbers up to 2" in batches.notes[0]
    same = Batches([torch.randint(0, 256, (4, 3, 8, 8)).float()], 255 * IMAGE)
    list(same)
    assert not same.notes


def test_an_error_of_the_source_says_at_which_batch() -> None:
    def broken() -> Iterator[Tensor]:
        yield images(4)
        raise OSError("the disk is gone")

    batches = Batches(broken(), IMAGE)
    with pytest.raises(UsageError, match="batch 1 of the calibration inputs cannot be read") as caught:
        list(batches)
    assert "the disk is gone" in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("settings", [{"size": 0}, {"chunk": 0}, {"holdout": 0}, {"size": 2.5}, {"holdout": -1}])
def test_settings_that_make_no_sense(settings: dict[str, Any]) -> None:
    assert f"{next(iter(settings))} of the calibration inputs must be" in refusal(images(4), **settings)


# The fingerprint


def test_the_fingerprint_is_of_the_content() -> None:
    def of(source: Any, **settings: Any) -> str:
        return Batches(source, settings.pop("example", IMAGE), **settings).fingerprint

    same = of(images(40))
    assert (
        same == of([images(40)]) == of(images(40).double().numpy()) == of(iter([images(40)]), example=IMAGE.to("meta"))
    )
    assert len(same) == 64
    other = images(40).clone()
    other[39, 2, 7, 7] += 1e-4
    for different in (
        of(other),
        of(images(39)),
        of(images(40), size=8),
        of(images(40), chunk=8),
        of(images(40), holdout=20),
    ):
        assert different != same
    assert of(images(40), example=IMAGE.bfloat16()) != same


def test_a_missing_dim_is_named_only_where_it_is_the_one() -> None:
    def hint(batch: torch.Tensor, example: torch.Tensor) -> str | None:
        with pytest.raises(UsageError) as caught:
            list(Batches([batch], example))
        return caught.value.hint

    assert "x[None]" in str(hint(images(4)[0], IMAGE))
    assert hint(images(4)[:, 0], IMAGE) is None
    assert "x[:, None]" in str(hint(images(4)[:, 0], IMAGE[:, :1]))
