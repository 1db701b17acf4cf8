"""Which class of a file is its model, and that a constructor may look at its weights: the same by every way in."""

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import pwrewrite
from pwrewrite.core.errors import TargetError
from pwrewrite.targets import TargetOptions, load_target, open_target, user_code as user_code_module

FILE = """
import numpy as np, torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
    def forward(self, x): return self.conv(x)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.head = Block(), nn.Conv2d(3, 16, 3)
        {line}
    def forward(self, x): return self.head(self.block(x))

example_inputs = torch.zeros(1, 3, 8, 8)
"""

READS = [
    "if self.head.weight.std() > 1: raise ValueError('bad init')",
    "print(float(self.head.weight.norm()))",
    "self.norm = float(np.linalg.norm(self.head.weight.detach().numpy()))",
    "self.head.weight.data = torch.from_numpy(np.random.rand(16, 3, 3, 3).astype('float32'))",
    "self.head.weight.detach().numpy()[:] = 1",
    "self.list = self.head.weight.tolist()",
    "self.traced = [torch.jit.trace(nn.Conv2d(3, 3, 1), torch.zeros(1, 3, 4, 4))]",
    "self.out = self.head(torch.zeros(1, 3, 4, 4)).sum().item()",
    "assert self.head.weight.device == torch.zeros(1).device",
    "nn.init.orthogonal_(self.head.weight)",
]


@pytest.fixture(autouse=True)
def clean_interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(user_code_module, "_target_roots", [])
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("pwrewrite_target_", "tc_")):
            del sys.modules[name]


def write(folder: Path, text: str, name: str = "m.py") -> str:
    (folder / name).write_text(textwrap.dedent(text))
    return str(folder / name)


@pytest.mark.parametrize("line", READS)
@pytest.mark.filterwarnings("ignore")
def test_a_constructor_may_look_at_its_weights(tmp_path: Path, line: str) -> None:
    file = write(tmp_path, FILE.format(line=line))
    for loaded in (load_target(file, empty=True), load_target(file), open_target(TargetOptions(file))):
        assert type(loaded.model).__name__ == "Net"
    assert pwrewrite.analyze_target(file).macs == 81 * 64 + 432 * 36
    assert pwrewrite.analyze_target(file + ":Net").params == 84 + 448


@pytest.mark.parametrize("empty", [True, False])
def test_only_the_real_error_is_told(tmp_path: Path, empty: bool) -> None:
    file = write(tmp_path, FILE.format(line="raise ValueError(f'width of {float(self.head.weight.sum()) * 0 + 7}')"))
    for target in (file, file + ":Net"):
        with pytest.raises(TargetError, match=r"class Net in .* raised ValueError: width of 7.0") as caught:
            load_target(target, empty=empty)
        assert "m.py, line 15" in str(caught.value)
        assert "meta" not in str(caught.value)


@pytest.mark.parametrize("empty", [True, False])
def test_a_class_that_fails_before_its_parts_are_made_is_still_a_candidate(tmp_path: Path, empty: bool) -> None:
    text = FILE.format(line="pass").replace("super().__init__()\n        self.block", "1 / 0\n        self.block")
    with pytest.raises(TargetError, match="several models: Block, Net") as caught:
        load_target(write(tmp_path, text), empty=empty)
    assert "Net raised ZeroDivisionError" in str(caught.value)


def test_a_class_that_only_serves_as_a_base_may_fail(tmp_path: Path) -> None:
    text = """
    from torch import nn
    class Base(nn.Module):
        def __init__(self):
            super().__init__()
            self.build()
        def build(self): raise NotImplementedError
        def forward(self, x): return self.conv(x)
    class Net(Base):
        def build(self): self.conv = nn.Conv2d(3, 4, 3)
    """
    assert type(load_target(write(tmp_path, text), empty=True).model).__name__ == "Net"


def test_blocks_in_a_plain_list_or_thrown_away_are_blocks(tmp_path: Path) -> None:
    text = FILE.format(line="self.others = [Other()]; Probe()")
    for name in ("Other", "Probe"):
        text += f"class {name}(nn.Module):\n    def forward(self, x): return x\n"
    assert type(load_target(write(tmp_path, text)).model).__name__ == "Net"


def test_a_module_level_model_is_real_when_it_is_wanted_for_real(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "from torch import nn\nnet = nn.Conv2d(3, 4, 3)\n", "tc_sibling.py")
    file = write(tmp_path, "from tc_sibling import net\nmodel = net\n")
    assert load_target(file, empty=True).model.weight.is_meta
    assert not load_target(file).model.weight.is_meta, "not the sibling's, which was imported empty"
    assert not load_target("tc_sibling:net", empty=True).model.weight.is_meta, "a module is imported once, for all"


@pytest.mark.parametrize("where", ["import", "constructor", "example_inputs"])
def test_a_model_may_change_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    go = f"__import__('os').chdir({str(tmp_path / 'elsewhere')!r})"
    text = FILE.format(line=go if where == "constructor" else "pass")
    if where == "import":
        text = go + "\n" + text
    if where == "example_inputs":
        text += f"def example_inputs():\n    {go}\n    return torch.zeros(1, 3, 8, 8)\n"
    torch.save(load_target(write(tmp_path, text)).model.state_dict(), tmp_path / "w.pt")
    load_target("m.py", weights=Path("w.pt"))
    assert Path.cwd() == tmp_path


@pytest.mark.parametrize("error", ["class Stop(BaseException): pass\nraise Stop('no')", "import sys; sys.exit(5)"])
def test_whatever_a_file_raises_is_told(tmp_path: Path, error: str) -> None:
    with pytest.raises(TargetError, match=r"Stop: no|sys.exit\(5\)"):
        load_target(write(tmp_path, error))
    with pytest.raises(TargetError, match=r"nested|recursion|parser"):
        load_target(write(tmp_path, "x = " + "(" * 5000 + ")" * 5000, "n.py"))


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("net.pt2", "an exported program"),
        ("net.onnx", "an ONNX model"),
        ("gone.onnx", "no such file"),
        ("gone.pt2", "no such file"),
        ("gone.pth", "no such file"),
        ("net.tflite", "not a Python file"),
        ("pipe.py", "not a regular file"),
    ],
)
def test_files_that_are_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("net.pt2", "net.onnx", "net.tflite"):
        Path(name).write_bytes(b"x")
    __import__("os").mkfifo("pipe.py")
    with pytest.raises(TargetError, match=said) as caught:
        load_target(target)
    assert "timm:" not in (caught.value.hint or "")


def test_lazy_modules_by_every_way(tmp_path: Path) -> None:
    text = """
    import torch
    from torch import nn
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.second = nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.LazyConv2d(8, 3)
            self.head = nn.LazyLinear(4)
        def forward(self, x): return self.head(self.second(self.norm(self.first(x)).relu()).mean((2, 3)))
    example_inputs = torch.zeros(2, 3, 8, 8)
    """
    file = write(tmp_path, text)
    assert pwrewrite.analyze_target(file).params == 224 + 16 + 584 + 36
    loaded = load_target(file)
    result = pwrewrite.rewrite(loaded, what=[pwrewrite.passes.InsertReduction(0.5)])
    assert loaded.model.first.has_uninitialized_params()
    assert result.edits
    result.save(tmp_path / "out", unverified=True)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = result.model(x)
        assert torch.equal(pwrewrite.load(tmp_path / "out", load_target(file).model)(x), expected)
        assert torch.equal(load_target(str(tmp_path / "out"), base=file).model(x), expected)
    assert pwrewrite.fuse(load_target(file).model.eval(), x, verify=False).edits
    lazy = load_target(file).model
    assert pwrewrite.verify(lazy, pwrewrite.load(tmp_path / "out", lazy), x, thorough=False).checks
    assert lazy.first.has_uninitialized_params()
