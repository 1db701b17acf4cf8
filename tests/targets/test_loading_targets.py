"""Targets: every form that leads to a model, and what is said about each that does not."""

import inspect
import pickle
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from pwrewrite.core.errors import PwrewriteError, TargetError, TargetNotFound, UsageError
from pwrewrite.core.numbers import parse_arg
from pwrewrite.targets import load_target, parse_target, resolve_model, user_code as user_code_module

HEAD = "import torch\nfrom torch import nn\n"
NET = """
class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
    def forward(self, x):
        return self.conv(x)
"""


@pytest.fixture(autouse=True)
def clean_interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Targets stay on sys.path and in sys.modules for good; one test's must not reach the next."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(user_code_module, "_target_roots", [])
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("pwrewrite_target_", "ld_", "ldp", "ldbad")):
            del sys.modules[name]


def write(folder: Path, name: str, text: str, head: str = HEAD) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head + textwrap.dedent(text))
    return str(path)


def refusal(target: str, kind: type[PwrewriteError] = TargetError, **args: object) -> str:
    """The message of the error that a target leads to."""
    with pytest.raises(kind) as caught:
        resolve_model(target, args)
    assert caught.value.exit_code == 2
    return str(caught.value)


# What a target may be


def test_an_instance_named_model_comes_first(tmp_path: Path) -> None:
    file = write(tmp_path, "m.py", NET + "def build_model():\n    return nn.Linear(1, 1)\nmodel = Net(7)\n")
    model, info = resolve_model(file)
    assert model.conv.out_channels == 7
    assert (info.kind, info.name, info.place) == ("file", None, file)
    assert not model.training


@pytest.mark.parametrize("name", ["build_model", "model", "get_model", "create_model"])
def test_then_a_function_without_arguments(tmp_path: Path, name: str) -> None:
    file = write(tmp_path, "m.py", NET + f"class Other(Net): pass\ndef {name}(width=9):\n    return Net(width)\n")
    assert resolve_model(file)[0].conv.out_channels == 9
    assert resolve_model(file, {"width": 2})[0].conv.out_channels == 2


def test_a_function_may_need_what_arg_gives(tmp_path: Path) -> None:
    file = write(tmp_path, "m.py", NET + "def build_model(width):\n    return Net(width)\n")
    assert resolve_model(file, {"width": 5})[0].conv.out_channels == 5
    assert resolve_model(file)[0].conv.out_channels == 4, "without it, the class is the obvious model"


def test_an_imported_factory_that_needs_arguments_is_not_the_files_own(tmp_path: Path) -> None:
    file = write(tmp_path, "m.py", "from timm import create_model\n" + NET)
    assert type(resolve_model(file)[0]).__name__ == "Net"


def test_then_the_only_class(tmp_path: Path) -> None:
    file = write(tmp_path, "m.py", "from torch.nn import Conv2d, Sequential\n" + NET)
    assert type(resolve_model(file)[0]).__name__ == "Net"
    assert resolve_model(file, {"width": 8})[0].conv.out_channels == 8


NEEDS = NET.replace("width=4", "width")


@pytest.mark.parametrize(
    "function",
    [
        "def small():\n    return Net(3)\n",
        "def small(width=3):\n    net = Net(width)\n    net.eval()\n    return net\n",
        "def small():\n    return Net(width=3).eval()\n",
        "def small() -> 'nn.Module':\n    made = [Net(3)]\n    return made[0]\n",
    ],
)
def test_then_the_only_function_that_returns_a_model(tmp_path: Path, function: str) -> None:
    others = "def main():\n    raise SystemExit('called')\ndef train(model):\n    return model\n"
    own = "def _part():\n    return Net(2)\n"
    model, info = resolve_model(write(tmp_path, "m.py", NEEDS + others + own + function))
    assert model.conv.out_channels == 3
    assert any("took small()" in note for note in info.notes)


def test_a_file_may_only_call_what_it_imports(tmp_path: Path) -> None:
    text = "import torchvision\ndef net():\n    return torchvision.models.resnet18(weights=None)\n"
    assert type(resolve_model(write(tmp_path, "m.py", text))[0]).__name__ == "ResNet"


def test_of_several_functions_that_return_models_one_must_be_named(tmp_path: Path) -> None:
    text = NEEDS + "def small():\n    return Net(3)\ndef large():\n    return Net(9)\n"
    file = write(tmp_path, "m.py", text)
    with pytest.raises(TargetError, match=r"several models: small\(\), large\(\)") as caught:
        resolve_model(file)
    assert f"{file}:small or {file}:large" in str(caught.value)
    assert resolve_model(f"{file}:large")[0].conv.out_channels == 9
    assert resolve_model(file, {"width": 5})[0].conv.out_channels == 5, "the class takes it"


def test_building_blocks_and_base_classes_are_no_candidates(tmp_path: Path) -> None:
    text = """
    class Base(nn.Module):
        def extra(self): return 1
    class Act(Base):
        def forward(self, x): return x.relu()
    class Block(Base):
        def __init__(self):
            super().__init__()
            self.conv, self.act = nn.Conv2d(3, 3, 3), Act()
        def forward(self, x): return self.act(self.conv(x))
    class Net(Base):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(Block(), Block())
        def forward(self, x): return self.body(x)
    """
    assert type(resolve_model(write(tmp_path, "m.py", text))[0]).__name__ == "Net"


def test_classes_that_do_not_build_on_meta_are_built_for_real_to_look_inside(tmp_path: Path) -> None:
    text = """
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.rates = [float(r) for r in torch.linspace(0, 1, 3)]
        def forward(self, x): return x
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()
        def forward(self, x): return self.block(x)
    """
    assert type(resolve_model(write(tmp_path, "m.py", text))[0]).__name__ == "Net"


def test_taking_a_class_over_one_that_needs_arguments_is_told(tmp_path: Path) -> None:
    text = NET + "class Big(Net):\n    def __init__(self, depth):\n        super().__init__()\n"
    model, info = resolve_model(write(tmp_path, "m.py", text))
    assert type(model).__name__ == "Net"
    assert "unlike Big (needs depth)" in info.notes[0]


def test_a_name_may_be_a_class_a_function_an_instance_or_dotted(tmp_path: Path) -> None:
    text = """
    net = Net(5)
    def tiny(): return Net(1)
    class Zoo:
        @staticmethod
        def large(): return Net(64)
    """
    file = write(tmp_path, "m.py", NET + textwrap.dedent(text))
    names = ("Net", "net", "tiny", "Zoo.large")
    widths = {name: resolve_model(f"{file}:{name}")[0].conv.out_channels for name in names}
    assert widths == {"Net": 4, "net": 5, "tiny": 1, "Zoo.large": 64}


def test_a_module_is_imported_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "ldpkg/__init__.py", "")
    write(tmp_path, "ldpkg/net.py", NET)
    monkeypatch.chdir(tmp_path)
    model, info = resolve_model("ldpkg.net:Net", {"width": 6})
    assert model.conv.out_channels == 6
    assert (info.kind, info.place, info.name) == ("module", "ldpkg.net", "Net")


def test_compiled_and_parallel_wrappers_are_taken_off(tmp_path: Path) -> None:
    file = write(tmp_path, "m.py", NET + "model = nn.DataParallel(Net())\n")
    loaded = load_target(file)
    assert type(loaded.model).__name__ == "Net"
    assert loaded.notes[0] == "unwrapped DataParallel around Net"


def test_a_graph_module_is_a_model(tmp_path: Path) -> None:
    file = write(tmp_path, "m.py", "import torch.fx\n" + NET + "model = torch.fx.symbolic_trace(Net())\n")
    assert isinstance(resolve_model(file)[0], torch.fx.GraphModule)


def test_everything_builds_on_meta_when_the_caller_says_so(tmp_path: Path) -> None:
    file = write(tmp_path, "m.py", NET)
    with torch.device("meta"):
        loaded = load_target(file)
    assert loaded.model.conv.weight.is_meta
    assert loaded.example_inputs[0].device.type == "cpu"


@pytest.mark.parametrize(
    ("target", "kind", "place", "name"),
    [
        ("torchvision:resnet50", "torchvision", "", "resnet50"),
        ("timm:vit_base.augreg", "timm", "", "vit_base.augreg"),
        ("no/such/file.py", "file", "no/such/file.py", None),
        ("no/such/file.py:Net", "file", "no/such/file.py", "Net"),
        ("C:/models/file.py:Net", "file", "C:/models/file.py", "Net"),
        ("C:\\work\\file.py", "file", "C:\\work\\file.py", None),
        ("pkg.mod:Zoo.net", "module", "pkg.mod", "Zoo.net"),
    ],
)
def test_the_forms_of_a_target(target: str, kind: str, place: str, name: str | None) -> None:
    info = parse_target(target)
    assert (info.kind, info.place, info.name) == (kind, place, name)


def test_empty_weights_leave_everything_but_parameters_real(tmp_path: Path) -> None:
    text = """
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            widths = [int(w) for w in torch.linspace(3, 5, 3)]  # fails when everything is on meta
            shared = nn.Parameter(torch.ones(2))
            shared.tag = "kept"
            self.first, self.second = shared, shared
            self.conv = nn.Conv2d(*widths[:2], 3)
            self.twin = nn.Conv2d(*widths[:2], 3)
            self.twin.weight = self.conv.weight
            self.conv.bias.requires_grad_(False)
            self.norm = nn.BatchNorm2d(4)
        def forward(self, x): return self.norm(self.conv(x))
    """
    file = write(tmp_path, "m.py", text)
    model = load_target(file, empty=True).model
    assert all(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())
    assert model.first is model.second
    assert model.first.tag == "kept"
    assert model.conv.weight is model.twin.weight
    assert not model.conv.bias.requires_grad
    assert not resolve_model(file)[0].conv.weight.is_meta, "and it ends"
    with pytest.raises(TargetError, match="Net"), torch.device("meta"):
        load_target(file)


def test_a_model_that_does_not_bear_empty_weights_is_built_for_real(tmp_path: Path) -> None:
    file = write(tmp_path, "m.py", NET + "model = Net()\nmodel.scale = model.conv.weight.sum().item()\n")
    assert not load_target(file, empty=True).model.conv.weight.is_meta


def test_a_file_that_fails_whatever_the_weights_runs_once(tmp_path: Path) -> None:
    file = write(
        tmp_path, "m.py", "open('ran', 'a').write('once ')\nraise ValueError\n".replace("ran", f"{tmp_path}/ran")
    )
    with pytest.raises(TargetError):
        load_target(file, empty=True)
    assert (tmp_path / "ran").read_text() == "once "


# The file behaves as under `python model.py`


def test_siblings_import_also_later(tmp_path: Path) -> None:
    write(tmp_path, "ld_blocks.py", "def act(): return nn.ReLU()\n")
    write(tmp_path, "ld_late.py", "def late(x): return x + 1\n")
    text = """
    from ld_blocks import act
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = act()
        def forward(self, x):
            from ld_late import late
            return late(self.act(x))
    """
    model, _ = resolve_model(write(tmp_path, "m.py", text))
    assert model(torch.zeros(1)) == 1
    assert sys.path[0] == str(tmp_path.resolve())


def test_siblings_of_the_same_name_do_not_mix_between_targets(tmp_path: Path) -> None:
    for folder, width in (("a", 1), ("b", 2)):
        write(tmp_path / folder, "ld_sizes.py", f"WIDTH = {width}\n")
        write(tmp_path / folder, "m.py", "from ld_sizes import WIDTH\nmodel = nn.Conv2d(3, WIDTH, 1)\n")
    widths = [resolve_model(str(tmp_path / f / "m.py"))[0].out_channels for f in ("a", "b", "a")]
    assert widths == [1, 2, 1]


def test_a_file_in_a_package_may_import_relatively_or_plainly(tmp_path: Path) -> None:
    write(tmp_path, "ldp/__init__.py", "")
    write(tmp_path, "ldp/sub/__init__.py", "")
    write(tmp_path, "ldp/sizes.py", "WIDTH = 3\n")
    write(tmp_path, "ldp/sub/types.py", "DEPTH = 2\n")  # would break Python if it shadowed the standard library's
    text = "from ..sizes import WIDTH\nfrom .types import DEPTH\nmodel = nn.Conv2d(WIDTH, DEPTH, 1)\n"
    relative = write(tmp_path, "ldp/sub/m.py", text)
    plain = write(tmp_path, "ldp/n.py", "from sizes import WIDTH\nmodel = nn.Conv2d(WIDTH, 1, 1)\n")
    model, info = resolve_model(relative)
    assert (model.in_channels, model.out_channels) == (3, 2)
    assert info.module is not None
    assert info.module.__name__ == "ldp.sub.m"
    assert sys.path[0] == str(tmp_path.resolve())
    assert sys.path[-1] == str((tmp_path / "ldp/sub").resolve())
    assert resolve_model(plain)[0].in_channels == 3


def test_the_script_part_does_not_run_and_the_module_is_registered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = """
    import dataclasses, sys
    @dataclasses.dataclass
    class Config:
        width: "int" = 3
    print("hello", sys.argv)
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = Config()
            self.conv = nn.Conv2d(3, self.config.width, 1)
        def forward(self, x): return self.conv(x)
    if __name__ == "__main__":
        raise RuntimeError("the script ran")
    """
    monkeypatch.setattr(sys, "argv", ["pwrewrite", "analyze", "m.py"])
    file = write(tmp_path, "m.py", text)
    model, _ = resolve_model(file)
    assert sys.modules[type(model).__module__].Net is type(model)
    assert type(pickle.loads(pickle.dumps(model))) is type(model)
    assert "class Net" in inspect.getsource(type(model))
    said = capsys.readouterr()
    assert said.out == "", "stdout is the tool's own"
    assert said.err == f"hello ['{file}']\n"
    assert sys.argv == ["pwrewrite", "analyze", "m.py"]
    assert not (tmp_path / "__pycache__").exists()
    again, _ = resolve_model(file)
    assert type(again).__module__ != type(model).__module__, "each load is a module of its own"


def test_an_edited_file_is_read_again(tmp_path: Path) -> None:
    for width in (1, 2):
        assert resolve_model(write(tmp_path, "m.py", f"model = nn.Conv2d(3, {width}, 1)\n"))[0].out_channels == width


# Bad input


def test_no_such_file(tmp_path: Path) -> None:
    write(tmp_path, "resnet.py", NET)
    message = refusal(str(tmp_path / "resnt.py"), TargetNotFound)
    assert "no such file" in message
    assert f"did you mean {tmp_path / 'resnet.py'}" in message
    with pytest.raises(FileNotFoundError):
        resolve_model(str(tmp_path / "resnt.py:Net"))
    assert "does not exist either" in refusal(str(tmp_path / "nowhere" / "m.py"), TargetNotFound)
    assert "no such file" in refusal("some/where/else", TargetNotFound)


def test_a_bare_word_is_told_what_it_could_have_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = refusal("resnet50", TargetNotFound)
    for form in ("torchvision:resnet50", "timm:resnet50", "resnet50.py"):
        assert form in message
    assert "the target is empty" in refusal(" ")


def test_a_folder(tmp_path: Path) -> None:
    write(tmp_path, "net.py", NET)
    message = refusal(str(tmp_path))
    assert "a folder without a plan.json" in message
    assert str(tmp_path / "net.py") in message
    (tmp_path / "plan.json").write_text("{}")
    assert "is a saved rewrite" in refusal(str(tmp_path))


def test_a_file_that_is_no_python(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "nul.py").write_bytes(b"x = 1\0")
    assert "--weights" in refusal(str(tmp_path / "w.safetensors"))
    assert "not a Python file" in refusal(str(tmp_path / "notes.txt"))
    assert "null bytes" in refusal(str(tmp_path / "nul.py"))


def test_a_syntax_error_shows_its_line_and_column(tmp_path: Path) -> None:
    file = write(tmp_path, "m.py", "x = 1\ndef f(:\n    pass\n", head="")
    message = refusal(file)
    lines = message.splitlines()
    assert f"syntax error in {Path(file).resolve()}, line 2" in lines[0]
    assert lines[1].strip() == "def f(:"
    assert lines[2].strip() == "^"
    assert lines[2].index("^") == lines[1].index("(") + 1


def test_a_syntax_error_in_a_sibling_names_the_sibling(tmp_path: Path) -> None:
    write(tmp_path, "ld_broken.py", "def f(:\n", head="")
    message = refusal(write(tmp_path, "m.py", "import ld_broken\n"))
    assert "ld_broken.py, line 1" in message
    assert "def f(:" in message


def test_a_missing_import_names_the_package_and_the_line(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, "m.py", "\nimport ld_no_such.thing\n"))
    assert "imports 'ld_no_such'" in message
    assert "m.py, line 4: import ld_no_such.thing" in message
    assert "pip install ld_no_such" in message
    assert "cannot import name 'nothing_here'" in refusal(write(tmp_path, "n.py", "from torch import nothing_here\n"))
    assert "no __init__.py" in refusal(write(tmp_path, "r.py", "from .blocks import x\n"))


def test_any_other_exception_is_shown_with_its_line_and_kept(tmp_path: Path) -> None:
    file = write(tmp_path, "m.py", "def build_model():\n    return 1 / 0\n")
    with pytest.raises(TargetError) as caught:
        resolve_model(file)
    message = str(caught.value)
    assert "build_model() in" in message
    assert "ZeroDivisionError: division by zero" in message
    assert "m.py, line 4: return 1 / 0" in message
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    at_import = refusal(write(tmp_path, "n.py", "def f():\n    {}['key']\nf()\n"))
    assert "KeyError: 'key'" in at_import
    assert "n.py, line 4" in at_import


def test_a_failed_import_leaves_no_trace(tmp_path: Path) -> None:
    path, modules = list(sys.path), set(sys.modules)
    refusal(write(tmp_path, "m.py", "raise ValueError('no')\n"))
    assert sys.path == path
    assert set(sys.modules) == modules


def test_a_file_that_exits(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, "m.py", "import sys\nsys.exit(3)\n"))
    assert "calls sys.exit(3)" in message
    assert "__main__" in message


def test_ctrl_c_passes_through(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        resolve_model(write(tmp_path, "m.py", "raise KeyboardInterrupt\n"))


def test_no_model(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, "m.py", "net = nn.ReLU()\ndef f(): pass\n"))
    assert "no model in" in message
    assert "net (an instance of ReLU), f()" in message
    assert "defines no class" in refusal(write(tmp_path, "n.py", ""))


def test_several_models_are_listed(tmp_path: Path) -> None:
    odd = "class Odd(nn.Module):\n    def __init__(self): 1 / 0\n    def forward(self, x): pass\n"
    file = write(tmp_path, "m.py", NET + "class Small(Net): pass\n" + odd)
    message = refusal(file)
    assert "has several models: Net, Small" in message
    assert "Odd raised ZeroDivisionError: division by zero" in message
    assert f"{file}:Net" in message


def test_a_constructor_that_needs_arguments(tmp_path: Path) -> None:
    text = """
class Net(nn.Module):
    def __init__(self, width, depth, act="relu"):
        super().__init__()
    def forward(self, x): return x
"""
    message = refusal(write(tmp_path, "m.py", text))
    assert "class Net" in message
    assert "needs the arguments width, depth" in message
    assert "--arg width=VALUE --arg depth=VALUE" in message
    assert "needs the argument depth" in refusal(write(tmp_path, "m.py", text), width=3)
    two = refusal(write(tmp_path, "n.py", text + text.replace("Net", "Big").replace("depth", "size")))
    assert "Net (needs width, depth)" in two
    assert "Big (needs width, size)" in two
    function = refusal(write(tmp_path, "f.py", "def get_model(width): pass\n"))
    assert "get_model()" in function
    assert "needs the argument width" in function


def test_an_unknown_argument_says_what_there_is(tmp_path: Path) -> None:
    file = write(tmp_path, "m.py", NET)
    message = refusal(f"{file}:Net", widht=3)
    assert "takes no argument widht" in message
    assert "width=4" in message
    assert "did you mean width?" in message
    assert "takes no argument widht" in refusal(file, widht=3)
    through = NET + "def build_model(**kwargs):\n    return Net(**kwargs)\n"
    deep = refusal(write(tmp_path, "k.py", through), widht=3)
    assert "takes no argument widht" in deep
    assert "width=4" in deep


def test_a_bad_value_names_the_arguments(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, "m.py", NET), width="wide")
    assert "class Net" in message
    assert "TypeError" in message
    assert "--arg width='wide'" in message


def test_an_instance_takes_no_arguments(tmp_path: Path) -> None:
    file = write(tmp_path, "m.py", NET + "model = Net()\n")
    assert "takes no --arg" in refusal(file, width=3)
    assert "takes no --arg" in refusal(f"{file}:model", width=3)


def test_a_name_that_is_not_there(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, "m.py", NET + "net = Net()\n") + ":Nett")
    assert "has no 'Nett'" in message
    assert "class Net, net (an instance of Net)" in message
    assert "did you mean" in message
    assert "no usable name" in refusal(write(tmp_path, "m.py", NET) + ":a b")


def test_a_name_of_the_wrong_kind(tmp_path: Path) -> None:
    file = write(tmp_path, "m.py", "x = 3\nclass Config: pass\ndef pair(): return nn.ReLU(), 1\ndef nothing(): pass\n")
    assert "got: an int" in refusal(f"{file}:x")
    assert "got: the class Config" in refusal(f"{file}:Config")
    assert "got: a tuple of ReLU, int" in refusal(f"{file}:pair")
    assert "got: None" in refusal(f"{file}:nothing")


def test_torchscript_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, "m.py", NET + "model = torch.jit.trace(Net(), torch.zeros(1, 3, 8, 8))\n")
    message = refusal(file)
    assert "TorchScript" in message
    assert "scripted from" in message


def test_a_module_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no module named 'ld_nothing'" in refusal("ld_nothing.at.all:Net", TargetNotFound)
    assert "did you mean torchvision" in refusal("torchvison:resnet50", TargetNotFound)
    write(tmp_path, "ldbad/__init__.py", "")
    write(tmp_path, "ldbad/net.py", "import ld_absent\n")
    message = refusal("ldbad.net:Net")
    assert "imports 'ld_absent'" in message
    assert "net.py, line 3" in message


def test_another_package_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "json/__init__.py", "")
    assert "already has another" in refusal(write(tmp_path, "json/decoder.py", NET))


# --arg


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("n=10", 10),
        ("n=-0.5", -0.5),
        ("n=None", None),
        ("n = [3, 4, 6, 3]", [3, 4, 6, 3]),
        ("n='a b'", "a b"),
        ("n=relu", "relu"),
        ("n=a=b", None),
        ("n=swish-6", "swish-6"),
        ("n=(1,2)", (1, 2)),
    ],
)
def test_arguments_are_literals_or_bare_words(text: str, value: object) -> None:
    if text == "n=a=b":
        with pytest.raises(UsageError):
            parse_arg(text)
        return
    assert parse_arg(text) == ("n", value)


@pytest.mark.parametrize("text", ["n", "=3", "1n=3", "n=", "n=[1, 2", "n=f(x)", "n=1 2"])
def test_a_malformed_argument(text: str) -> None:
    with pytest.raises(UsageError, match="--arg") as caught:
        parse_arg(text)
    assert "literal" in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_errors_are_the_builtins_a_caller_expects() -> None:
    assert issubclass(TargetError, ValueError)
    assert issubclass(TargetNotFound, FileNotFoundError)
    assert isinstance(nn.ReLU(), nn.Module)
