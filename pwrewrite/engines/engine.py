"""What an engine is: a runtime in which a model runs and is timed.

An engine makes a `Session` of a model and inputs, for their shapes; the session runs inputs of these shapes and says
what it runs on. Each is one file, ``NAME_engine.py``, that ends in ``ENGINE = Name()``, and an entry in
`pwrewrite.core.names.ENGINE_NAMES`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor, nn

from ..core.errors import PwrewriteError, RefusedError, UsageError, first_line
from ..core.names import ENGINE_NAMES
from ..core.nested import Args, Kwargs, tensors_of
from ..core.numbers import plural
from ..edit.actions.plain_layers import unfuse
from ..layers.factorized import Factorized
from .exporting import Installable, Program


@dataclass(frozen=True, slots=True)
class Ran:
    """What really runs."""

    engine: str
    version: str  # of the runtime
    provider: str  # the device or the runtime's provider for it
    precision: str
    threads: int

    def __str__(self) -> str:
        return f"{self.engine} {self.version}, {self.provider}, {self.precision}, {plural(self.threads, 'thread')}"


@dataclass(frozen=True)
class Session:
    """A model that is ready for inputs of some shapes."""

    run: Callable[..., object]  # for timing, between the entry and exit of ``held``, in `torch.no_grad`
    ran: Ran
    held: Callable[[], AbstractContextManager[object]] = nullcontext

    def __call__(self, *args: object, **kwargs: object) -> list[Tensor]:
        """Runs inputs and returns all output tensors, in order."""
        with torch.no_grad(), with_threads(self.ran.threads), self.held():
            return tensors_of(self.run(*args, **kwargs))


class Engine(Installable):
    """One runtime."""

    kind = "the engine "
    cpu = True  # whether it runs on the CPU only

    @property
    def version(self) -> str:
        """Of the runtime."""
        return torch.__version__

    def session(self, model: nn.Module, args: Args, kwargs: Kwargs, threads: int | None = None) -> Session:
        """A model as it runs here, in evaluation; stays as it is.

        Raises:
            UsageError: If the engine is not there.
            RefusedError: If it cannot run the model.
        """
        self.require()
        tensors = (*model.parameters(), *model.buffers())
        where = {t.device.type for t in tensors} or {"cpu"}
        if "meta" in where:
            raise RefusedError("a model without weights cannot be measured", hint="give weights")
        if self.cpu and where != {"cpu"}:
            raise RefusedError(f"the engine {self.name} runs on the CPU", got=f"a model on {', '.join(sorted(where))}")
        try:
            with with_threads(threads), torch.no_grad():
                return self._session(model, args, kwargs)
        except PwrewriteError:
            raise
        except Exception as error:  # of other people's exporters and runtimes, which raise anything
            raise RefusedError(f"the engine {self.name} does not run the model", got=first_line(error)) from error

    @abstractmethod
    def _session(self, model: nn.Module, args: Args, kwargs: Kwargs) -> Session:
        """As `session`, with torch's threads as they are to be."""

    def _ran(self, provider: str, precision: str) -> Ran:
        return Ran(self.name, self.version, provider, precision, torch.get_num_threads())


def engine_named(name: str) -> Engine:
    """The engine of a name; raises `UsageError` for another."""
    if name not in ENGINE_NAMES:
        raise UsageError(f"no engine {name!r}", expected=", ".join(ENGINE_NAMES))
    named: Engine = import_module(f"{__package__}.{name}_engine").ENGINE
    return named


def program_of(model: nn.Module, args: Args, kwargs: Kwargs) -> Program:
    """A copy of a model as it is exported for inputs of these very shapes."""
    plain = unfuse(model).cpu().eval().requires_grad_(False)
    outputs = tensors_of(plain(*args, **kwargs))
    names = tuple(f"input_{i}" for i in range(len(tensors_of((args, kwargs)))))
    return Program(
        plain, (args, kwargs), names, {str(i): f"output_{i}" for i in range(len(outputs))}, ({},) * len(names)
    )


def stages_of(model: nn.Module, args: Args, kwargs: Kwargs) -> list[nn.Module] | None:
    """A model that is no more than convolutions or linear maps in a row, on float32; None for any other.

    Such a graph, a layer or what could replace it, is written directly: exporting takes a hundred times as long.
    """
    stages = list(model.children()) if isinstance(model, Factorized) else [model]
    plain = all(
        type(stage) is nn.Linear
        or (
            type(stage) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
            and getattr(stage, "padding_mode", "") == "zeros"
            and not isinstance(getattr(stage, "padding", ""), str)
        )
        for stage in stages
    )
    if not plain or kwargs or len(args) != 1 or args[0].dtype is not torch.float32:
        return None
    return stages if all(p.dtype is torch.float32 for p in model.parameters()) else None


def precision_of(model: nn.Module) -> str:
    """The dtypes of a model's weights."""
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()}
    return "/".join(sorted(dtypes)) or "float32"


@contextmanager
def with_threads(threads: int | None) -> Iterator[None]:
    """With so many threads in torch; as they are where None."""
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        yield
    finally:
        if threads is not None:
            torch.set_num_threads(before)
