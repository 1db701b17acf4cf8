"""Example inputs: the grammar of ``--input``, binding to ``forward``, and what is assumed without one."""

import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn

from pwrewrite.core.errors import InputError, TargetError
from pwrewrite.targets import describe_inputs, load_target, parse_input, resolve_inputs


class One(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return x


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, image: Tensor, mask: Tensor, *, t: Tensor, scale: Tensor | None = None) -> Tensor:
        return image


class Anything(nn.Module):
    def forward(self, *args: Tensor, **kwargs: Tensor) -> None:
        return None


def refusal(model: nn.Module, *specs: str) -> str:
    with pytest.raises(InputError) as caught:
        resolve_inputs(model, None, specs)
    assert caught.value.exit_code == 2
    assert isinstance(caught.value, ValueError)
    return str(caught.value)


def shapes(inputs: object) -> list[tuple[object, ...]]:
    return [(tuple(d["shape"]), d["dtype"], *([d["name"]] if "name" in d else [])) for d in describe_inputs(inputs)]


# The grammar

DTYPES = ["float32", "float16", "bfloat16", "float64", "int64", "int32", "int8", "uint8", "bool", "complex64"]
NAMES = st.text("abcdefgxyz_", min_size=1, max_size=8).filter(str.isidentifier)


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=6), st.none() | st.sampled_from(DTYPES), st.none() | NAMES)
def test_every_spec_comes_back(shape: list[int], dtype: str | None, name: str | None) -> None:
    text = (f"{name}=" if name else "") + "x".join(map(str, shape)) + (f":{dtype}" if dtype else "")
    spec = parse_input(text)
    assert spec.shape == tuple(shape)
    assert spec.dtype is (getattr(torch, dtype) if dtype else None)
    assert spec.name == name


MALFORMED = ["", "1x", "x3", "1x3y4", "1,,3", "(1,3", "()", "1 3", "a b=1x3", "=1x3", "x=", "1.5x3", ":int64", "1x3="]


@pytest.mark.parametrize("text", MALFORMED)
def test_malformed_specs(text: str) -> None:
    with pytest.raises(InputError, match="cannot read --input") as caught:
        parse_input(text)
    assert "--input 1x3x224x224" in str(caught.value)


@pytest.mark.parametrize("text", ["1,3,224,224", "(1, 3, 224, 224)", "[1,3,224,224]", "1*3*224*224"])
def test_a_shape_may_be_written_as_python_prints_it(text: str) -> None:
    assert parse_input(text).shape == (1, 3, 224, 224)
    spec = parse_input(f"mask={text}:bool")
    assert (spec.shape, spec.dtype, spec.name) == ((1, 3, 224, 224), torch.bool, "mask")
    assert parse_input("(5,)").shape == (5,)


@pytest.mark.parametrize("text", ["0x3", "1x-3x4", "x=1x0"])
def test_sizes_must_be_positive(text: str) -> None:
    with pytest.raises(InputError, match="sizes of 1 or more"):
        parse_input(text)


def test_dtypes_have_their_usual_names() -> None:
    usual = [("fp16", torch.float16), ("bf16", torch.bfloat16), ("half", torch.float16), ("torch.int8", torch.int8)]
    for name, dtype in usual:
        assert parse_input(f"1:{name}").dtype is dtype
    with pytest.raises(InputError, match=r"did you mean .*float32"):
        parse_input("1x3:flaot32")
    for name in ("quint8", "", "Tensor"):
        with pytest.raises(InputError, match="unknown dtype"):
            parse_input(f"1:{name}")


# Making and binding


def test_the_values_are_seeded_and_the_global_state_stays() -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    (a, b, i, flag), _ = resolve_inputs(Anything(), None, ["2x3", "2x3", "50:int64", "50:bool"])
    (again, *_), _ = resolve_inputs(Anything(), None, ["2x3"])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(a, again)
    assert not torch.equal(a, b)
    assert i.unique().tolist() == [0, 1]
    assert flag.dtype is torch.bool


@pytest.mark.parametrize("dtype", [*DTYPES, "uint16", "uint64", "float8_e4m3fn", "complex128"])
def test_every_dtype_can_be_made(dtype: str) -> None:
    (tensor,), _ = resolve_inputs(Anything(), None, [f"2x3:{dtype}"])
    assert tensor.dtype is getattr(torch, dtype)


def test_the_models_own_dtype_is_the_default() -> None:
    model = One(nn.Conv2d(3, 4, 3)).to(torch.bfloat16)
    assert resolve_inputs(model, None, ["1x3x8x8"])[0][0].dtype is torch.bfloat16
    assert resolve_inputs(model, None)[0][0].dtype is torch.bfloat16


def test_inputs_are_on_the_cpu_whatever_the_default_device() -> None:
    with torch.device("meta"):
        model = One(nn.Conv2d(3, 4, 3))
        for specs in ([], ["1x3x8x8"], ["1x3x8x8:int64"], ["1x3:float64"]):
            assert resolve_inputs(model, None, specs)[0][0].device.type == "cpu"


def test_positional_and_named_inputs() -> None:
    model = Several()
    inputs, notes = resolve_inputs(model, None, ["1x3x8x8", "t=1:int64", "1x8x8:bool"])
    assert notes == ()
    assert shapes(inputs) == [((1, 3, 8, 8), "float32", "image"), ((1,), "int64", "t"), ((1, 8, 8), "bool", "mask")]
    assert shapes(resolve_inputs(One(), None, ["2x3"])[0]) == [((2, 3), "float32")]
    assert shapes(resolve_inputs(Anything(), None, ["y=1"])[0]) == [((1,), "float32", "y")]


def test_inputs_that_forward_does_not_take() -> None:
    model = Several()
    assert "also needs mask, t" in refusal(model, "1x3x8x8")
    assert "--input mask=SHAPE[:DTYPE] --input t=SHAPE[:DTYPE]" in refusal(model, "1x3x8x8")
    unknown = refusal(model, "1x3x8x8", "maks=1")
    assert "takes no input maks" in unknown
    assert "image, mask, t, scale" in unknown
    assert "did you mean mask?" in unknown
    assert "takes 2 positional inputs, and 3 were given" in refusal(model, "1", "1", "1", "t=1")
    assert "more than once" in refusal(model, "t=1", "t=2")
    assert "twice: by name and by position" in refusal(model, "1", "1", "image=1", "t=1")
    assert "cannot be bound to names" in refusal(Anything(), "1", "y=1")


def test_too_large_an_input() -> None:
    assert "cannot make an input of" in refusal(One(), "1000000x1000000x1000000")


# Without --input


@pytest.mark.parametrize(
    ("layers", "shape", "source"),
    [
        ([nn.Conv2d(5, 4, 3)], (1, 5, 224, 224), "first convolution"),
        ([nn.Conv1d(5, 4, 3)], (1, 5, 1024), "first convolution"),
        ([nn.Conv3d(5, 4, 3)], (1, 5, 16, 112, 112), "first convolution"),
        ([nn.ConvTranspose2d(100, 4, 3)], (1, 100, 1, 1), "first convolution"),
        ([nn.Linear(10, 20), nn.ConvTranspose2d(20, 4, 3)], (1, 10), "first linear"),
        ([nn.Linear(10, 20)], (1, 10), "first linear"),
    ],
)
def test_the_first_layer_tells(layers: list[nn.Module], shape: tuple[int, ...], source: str) -> None:
    inputs, notes = resolve_inputs(One(*layers), None)
    assert shapes(inputs) == [(shape, "float32")]
    assert notes[0].startswith("no input given: assumed " + "x".join(map(str, shape)))
    assert source in notes[0]


def test_when_nothing_tells() -> None:
    assert "no convolution and no linear layer" in refusal(One(nn.ReLU()))
    assert "--input 1x3x224x224" in refusal(One(nn.ReLU()))
    assert "an embedding, of indices" in refusal(One(nn.Embedding(9, 4), nn.Conv1d(4, 4, 3)))
    assert "is lazy" in refusal(One(nn.LazyConv2d(4, 3)))
    assert "--input 1x3x1024, with" in refusal(One(nn.LazyConv1d(4, 3)))
    several = refusal(Several())
    assert "needs 3 inputs, image, mask, t" in several
    assert "--input image=SHAPE[:DTYPE] --input mask=" in several


# From the file


def target(folder: Path, text: str) -> str:
    head = """
    import torch
    from torch import nn
    model = nn.Conv2d(3, 4, 3)
    """
    (folder / "m.py").write_text(textwrap.dedent(head) + textwrap.dedent(text))
    return str(folder / "m.py")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("example_inputs = torch.zeros(1, 3, 9, 9)", [((1, 3, 9, 9), "float32")]),
        ("example_inputs = (torch.zeros(1), torch.zeros(2).int())", [((1,), "float32"), ((2,), "int32")]),
        ("example_inputs = [torch.zeros(1)]", [((1,), "float32")]),
        ("example_inputs = {'x': torch.zeros(1)}", [((1,), "float32", "x")]),
        ("def example_inputs(): return ([torch.zeros(3, 5, 5)],)", [((3, 5, 5), "float32")]),
        ("def example_inputs(): print('x'); return torch.zeros(4)", [((4,), "float32")]),
    ],
)
def test_the_files_own_example_inputs(
    tmp_path: Path, text: str, wanted: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load_target(target(tmp_path, text))
    assert isinstance(loaded.example_inputs, (tuple, dict))
    assert shapes(loaded.example_inputs) == wanted
    assert loaded.notes == ()
    assert capsys.readouterr().out == ""
    told = load_target(target(tmp_path, text), inputs=["1x3x8x8"])
    assert shapes(told.example_inputs) == [((1, 3, 8, 8), "float32")]


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("example_inputs = 3", ["is not usable", "got: an int"]),
        ("example_inputs = {1: torch.zeros(1)}", ["is not usable"]),
        ("def example_inputs(): return 1 / 0", ["ZeroDivisionError", "m.py, line 5"]),
        ("def example_inputs(n): return n", ["raised TypeError", "without arguments"]),
    ],
)
def test_example_inputs_that_are_not_usable(tmp_path: Path, text: str, phrases: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        load_target(target(tmp_path, text))
    for phrase in phrases:
        assert phrase in str(caught.value)


def test_load_target_needs_no_inputs_when_told_so(tmp_path: Path) -> None:
    file = target(tmp_path, "model = nn.ReLU()")
    assert load_target(file, need_inputs=False).example_inputs == ()
    with pytest.raises(InputError):
        load_target(file)


def test_malformed_inputs_are_refused_before_the_file_runs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read --input"):
        load_target(target(tmp_path, "1 / 0"), inputs=["1;3"])
    with pytest.raises(TargetError):
        load_target(target(tmp_path, "1 / 0"), inputs=["1x3"])


def test_describe_inputs_walks_nested_structures() -> None:
    inputs = {"a": torch.zeros(1, 2), "b": [{"c": torch.zeros(3, dtype=torch.int64)}, 7, None]}
    assert describe_inputs(inputs) == [
        {"shape": [1, 2], "dtype": "float32", "name": "a"},
        {"shape": [3], "dtype": "int64", "name": "b.c"},
    ]
    assert describe_inputs(torch.zeros(2)) == [{"shape": [2], "dtype": "float32"}]
    assert describe_inputs(()) == []
