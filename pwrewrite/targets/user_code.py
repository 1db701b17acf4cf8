"""Runs a user's own Python as ``python model.py`` would, and says clearly where it went wrong.

As there, the file's folder is in front on ``sys.path`` and ``sys.argv`` is the file alone. Otherwise ``__name__`` is a
unique name and never ``__main__``, prints go to stderr, and a changed working directory is changed back.

The folder stays on ``sys.path``, since a forward may import a sibling lazily. Siblings of the same name that a target
from another folder imported are dropped from ``sys.modules`` first; so are those that were imported with empty weights
when the same file is then wanted for real.

A file inside a package is imported by its dotted name from the package's root. If it imports relatively, the root comes
first on ``sys.path`` and its own folder last: a ``types.py`` in it must not shadow the standard library.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, ModuleType

from torch import nn

from ..core import files
from ..core.errors import PwrewriteError, TargetError, TargetNotFound
from ..core.text import did_you_mean, nearest
from .empty import real_weights, weights_are_empty

#: What the names of modules begin with that files are imported as.
_MODULE = "pwrewrite_target_"

#: Folders that targets have put on ``sys.path``, in the order they came.
_target_roots: list[Path] = []

#: Modules in these folders that were imported while weights were empty.
_imported_empty: set[str] = set()

_FORMS = "a target is model.py, model.py:NAME, package.module:NAME, torchvision:NAME or timm:NAME"

#: The folder of this package, whose frames say nothing about the user's code.
_OURS = Path(__file__).resolve().parent.parent


def suggest_files(path: Path, suffixes: tuple[str, ...], only_near: bool = False) -> str | None:
    """A hint that names the files nearest to a missing one, or (unless ``only_near``) what the folder has instead."""
    folder = path.parent
    try:
        if not folder.is_dir():
            return f"the folder {folder} does not exist either"
        names = sorted(p.name for p in folder.iterdir() if p.name.endswith(suffixes))
    except OSError:
        return None
    if near := nearest(path.name, names, n=5):
        return f"did you mean {', '.join(str(folder / name) for name in near)}?"
    if only_near or not names:
        return None
    return f"{folder} has {', '.join(names[:5])}" + (", …" if len(names) > 5 else "")


@contextlib.contextmanager
def running_user_code(what: str, origin: Path | None, hint: str | None = None) -> Iterator[None]:
    """While a user's code runs: ``sys.argv`` is the file alone, prints go to stderr, and whatever it raises is told.

    ``what`` runs, as the subject of a sentence (``class Net in model.py``); ``origin`` is the user's file, so that an
    error names the line; ``hint`` says what to try where the caller knows better. A `TargetError` tells of whatever was
    raised, even what is no ``Exception``; Ctrl-C passes through.
    """
    argv, sys.argv = sys.argv, [str(origin or what)]
    try:
        with files.same_directory(), contextlib.redirect_stdout(sys.stderr):
            yield
    except (PwrewriteError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        raise _user_error(error, what, origin, hint) from error
    finally:
        sys.argv = argv


def raised_in_user_code(error: BaseException) -> TargetError | None:
    """The error to tell for an exception that nobody expected, if the user's own code raised it; else None."""
    file = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return _user_error(error, "the model's code", file) if _is_in(file, _target_roots) else None


def _locate(error: BaseException, origin: Path | None) -> str | None:
    """``file, line N: source`` of the deepest frame in the user's file, else in its folder; None without."""
    if origin is None:
        return None
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not Path(f.filename).is_relative_to(_OURS)]
    own = [f for f in frames if f.filename == str(origin)]
    near = [f for f in frames if Path(f.filename).is_relative_to(origin.parent) and "site-packages" not in f.filename]
    lines = [f"{f.filename}, line {f.lineno}" + (f": {f.line}" if f.line else "") for f in own or near]
    return lines[-1] if lines else None


def _user_error(error: BaseException, what: str, origin: Path | None, hint: str | None = None) -> TargetError:
    """The error that a person can act on for an exception that left the user's code."""
    match error:
        case SyntaxError():
            return _syntax_error(error)
        case SystemExit():
            message = f"{what} calls sys.exit({error.code!r})"
            hint = 'put the part that is a script under if __name__ == "__main__": and raise errors elsewhere'
        case ModuleNotFoundError(name=str(name)):
            message, top = f"{what} imports {name!r}, which cannot be found", name.partition(".")[0]
            own = f"if {top!r} is code of your own, put the folder it lies in on PYTHONPATH"
            hint = hint or f"pip install {top}; or, {own}"
        case ImportError():
            message = f"{what} has an import that fails: {error}"
            if "no known parent package" in str(error):
                why = "the folder has no __init__.py, so it is no package"
                hint = f"{why}: add one, or import the sibling by its plain name"
        case _:
            message = f"{what} raised {type(error).__name__}" + (f": {error}" if str(error) else "")
    return TargetError(message, where=_locate(error, origin), hint=hint)


def _syntax_error(error: SyntaxError) -> TargetError:
    """The error for a file that does not parse, with its line and a caret under the column."""
    line = f", line {error.lineno}" if error.lineno else ""
    source = "".join(traceback.format_exception_only(error)[1:-1] if line else ())
    return TargetError(f"syntax error in {error.filename}{line}: {error.msg}\n{source}".rstrip())


def class_name(value: object) -> str:
    """The qualified class of a value; under the name of the user's file, where that was imported under one of ours."""
    kind = type(value)
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    ours = file is not None and kind.__module__.startswith(_MODULE)
    return f"{Path(str(file)).stem if ours else kind.__module__}.{kind.__qualname__}"


def what_there_is(module: ModuleType) -> str:
    """The classes, functions and models that a module offers, to choose from."""
    offers: list[str] = []
    for name, value in vars(module).items():
        if isinstance(value, nn.Module):
            offers.append(f"{name} (an instance of {type(value).__name__})")
        elif getattr(value, "__module__", None) == module.__name__ and inspect.isclass(value):
            offers.append(f"class {name}")
        elif getattr(value, "__module__", None) == module.__name__ and inspect.isfunction(value):
            offers.append(f"{name}()")
    offers = [offer for offer in offers if not offer.removeprefix("class ").startswith("_")]
    shown = ", ".join(offers[:12]) + (", …" if len(offers) > 12 else "")
    return shown or "a file that defines no class, no function and no model"


def find_named(text: str) -> tuple[object, ModuleType, str]:
    """What ``file.py:NAME`` or ``package.module:NAME`` names, its module, and the file or module as the text has it.

    A `TargetError` says that there is no such name, file or module, or that the import fails.
    """
    place, _, name = text.rpartition(":")
    in_file = place.endswith(".py") or Path(place).is_file()
    module = import_file(Path(place)) if in_file else import_module(place)
    value: object = module
    for part in name.split("."):
        if not hasattr(value, part):
            hint = did_you_mean([n for n in vars(module) if not n.startswith("_")], name, n=3)
            raise TargetError(f"{place} has no {name!r}", got=what_there_is(module), hint=hint)
        value = getattr(value, part)
    return value, module, place


def origin_of(module: ModuleType) -> Path | None:
    """The file of a module; None for one without."""
    file = getattr(module, "__file__", None)
    return Path(file) if file else None


def import_file(path: Path) -> ModuleType:
    """Imports a user's file and registers it in ``sys.modules``.

    Raises `TargetNotFound`, or `TargetError` for one that cannot be read or parsed, or raised while it ran.
    """
    if not path.exists():
        raise TargetNotFound(f"no such file: {path}", hint=suggest_files(path, (".py",)))
    absolute = path.resolve()
    try:
        source = files.read_bytes(absolute)
        tree = ast.parse(source, str(absolute))
        code = compile(source, str(absolute), "exec", dont_inherit=True)
    except OSError as error:
        raise TargetError(f"cannot read {path}: {error.strerror}") from error
    except SyntaxError as error:
        raise _syntax_error(error) from error
    except (ValueError, RecursionError, MemoryError) as error:  # null bytes, on the older interpreters; deep nesting
        raise TargetError(f"{path} is not Python source: {error}") from error

    root, dotted = _package_of(absolute)
    relative = any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree))
    first, last = ([root], [absolute.parent]) if dotted and relative else ([absolute.parent, root], [])
    with _on_path(first, last), running_user_code(str(path), absolute):
        return _import_dotted(dotted, absolute) if dotted else _execute(absolute, code)


def import_module(dotted: str) -> ModuleType:
    """Imports a module by name, with the working directory importable as under ``python``.

    Raises `TargetNotFound`, or `TargetError` for one that raised while it ran.
    """
    what = f"module {dotted}"
    with _on_path([Path.cwd()], []), running_user_code(what, None), real_weights():
        try:
            return importlib.import_module(dotted)
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and error.name and f"{dotted}.".startswith(f"{error.name}."):
                here = (p.stem for p in Path.cwd().iterdir() if p.suffix == ".py" or p.is_dir())
                near = did_you_mean(["torchvision", "timm", *here], dotted.partition(".")[0], n=3)
                hint = f"{near} ({_FORMS})" if near else _FORMS
                raise TargetNotFound(f"no module named {error.name!r}", hint=hint) from error
            frames = (Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__))
            theirs = (file for file in frames if file.is_absolute() and not file.is_relative_to(_OURS))
            origin = next((file for file in theirs if file.parent.name != "importlib"), None)
            raise _user_error(error, what, origin) from error


def _package_of(path: Path) -> tuple[Path, str | None]:
    """The folder to import a file from, and its dotted name when it lies inside a package."""
    parts = [] if path.name == "__init__.py" else [path.stem]
    folder = path.parent
    while (folder / "__init__.py").is_file() and folder.name.isidentifier() and folder != folder.parent:
        parts.insert(0, folder.name)
        folder = folder.parent
    inside = folder != path.parent and all(part.isidentifier() for part in parts)
    return (folder, ".".join(parts)) if inside else (path.parent, None)


def _import_dotted(dotted: str, path: Path) -> ModuleType:
    """Imports a package's file by its dotted name, and makes sure that it is that file."""
    module = importlib.import_module(dotted)
    file = origin_of(module)
    if file is None or file.resolve() != path:
        message = f"{path} is {dotted} by its folders, but Python already has another {dotted}"
        raise TargetError(message, got=str(file), hint="rename the package, or give the target as package.module:NAME")
    return module


def _execute(path: Path, code: CodeType) -> ModuleType:
    """Runs a file as a module of its own under a unique name, without writing a bytecode cache."""
    base = _MODULE + re.sub(r"\W", "_", path.stem)
    name, taken = base, 1
    while name in sys.modules:
        taken += 1
        name = f"{base}_{taken}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise TargetError(f"{path} is not a Python file", hint="a target file ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        exec(code, module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextlib.contextmanager
def _on_path(first: list[Path], last: list[Path]) -> Iterator[None]:
    """Puts folders on ``sys.path``, for good unless the import fails, and makes way for the modules in them."""
    saved, roots = list(sys.path), [*first, *last]
    for root in roots:
        _forget_namesakes(root)
    if not weights_are_empty():
        while _imported_empty:
            sys.modules.pop(_imported_empty.pop(), None)
    front = [str(p) for p in first]
    sys.path[:] = dict.fromkeys([*front, *sys.path, *map(str, last)])
    importlib.invalidate_caches()
    before = set(sys.modules)
    try:
        yield
    except BaseException:
        sys.path[:] = saved
        raise
    finally:
        if weights_are_empty():
            new = set(sys.modules) - before
            new = {name for name in new if not name.startswith(_MODULE)}
            _imported_empty.update(name for name in new if _is_in(origin_of(sys.modules[name]), roots))
    _target_roots.extend(root for root in roots if root not in _target_roots)


def _is_in(file: Path | None, roots: list[Path]) -> bool:
    """Whether a file lies in one of these folders, and in no installed package and not in this one."""
    if file is None or {"site-packages", "dist-packages"} & {*file.parts} or file.is_relative_to(_OURS):
        return False
    return any(file.is_relative_to(root) for root in roots)


def _forget_namesakes(root: Path) -> None:
    """Drops modules that an earlier target imported from elsewhere and that this folder has under the same name."""
    if not any(old != root for old in _target_roots):
        return
    here = {p.name if p.is_dir() else p.stem for p in root.iterdir() if p.suffix == ".py" or p.is_dir()}
    here -= {"pwrewrite", "torch", *sys.stdlib_module_names}
    for name, module in list(sys.modules.items()):
        file = origin_of(module) if name.partition(".")[0] in here else None
        if _is_in(file, _target_roots) and not _is_in(file, [root]):
            del sys.modules[name]
