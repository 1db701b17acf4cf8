"""What `import pwrewrite` offers, in whatever order its parts are imported."""

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import pwrewrite
from pwrewrite.core.declaring import typed_fields


def test_no_room_has_the_name_of_a_public_function() -> None:
    """Python binds an imported submodule to its package and would hide the function."""
    package = Path(pwrewrite.__file__).parent
    rooms = {p.stem for p in package.iterdir() if p.is_dir() or p.suffix == ".py"}
    assert rooms & set(pwrewrite.__all__) == {"decompose", "passes"}  # modules by design, never functions
    for name in ("decompose", "passes"):
        assert inspect.ismodule(getattr(pwrewrite, name))


def test_functions_stay_functions_whatever_was_imported_before() -> None:
    for module in pkgutil.walk_packages(pwrewrite.__path__, "pwrewrite."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in ("analyze", "apply", "capture", "freeze", "fuse", "graph", "load", "plan", "rewrite", "save", "verify"):
        assert inspect.isfunction(getattr(pwrewrite, name)), name


def test_every_public_name_is_there() -> None:
    assert {"analyze", "analyze_target", "capture", "graph", "__version__"} <= set(pwrewrite.__all__)
    source = ast.parse(Path(pwrewrite.__file__).read_text())
    (typed,) = [node for node in source.body if isinstance(node, ast.If)]
    imported = {name.asname for node in ast.walk(typed) if isinstance(node, ast.ImportFrom) for name in node.names}
    assert {*imported, "__version__"} == set(pwrewrite.__all__)  # what type checkers see is what there is
    for name in pwrewrite.__all__:
        assert getattr(pwrewrite, name) is not None
        assert name in dir(pwrewrite)
    for name in set(pwrewrite.__all__) - {"__version__"}:
        assert getattr(pwrewrite, name).__doc__


def test_what_is_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'analyse'"):
        pwrewrite.analyse  # noqa: B018
    with pytest.raises(ImportError):
        from pwrewrite import analyse  # noqa: F401


@pytest.mark.parametrize("name", ["Budget", "PassOptions", "Proof", "TargetOptions"])
def test_options_are_documented_as_on_the_command_line(name: str) -> None:
    record = getattr(pwrewrite, name)
    for each, typed in typed_fields(record):
        (line,) = [line for line in record.__doc__.splitlines() if line.startswith(f"    {each.name} (")]
        assert typed.help.split(r" [dim]\[")[0].split("[/]")[-1].strip() in line
        assert "[/]" not in line
