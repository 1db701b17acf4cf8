"""Many forwards of a model at once, all stopped at the same layer: what one needs to fit a layer to what reaches it.

Fitting layers in order wants, for each, what the layers before it, already fitted, make of *all* the calibration
inputs. Here every chunk of them has a forward of its own, in a thread that serves as a coroutine: it stops at a layer
that is waited for, with its live activations on its own stack, and goes on when it is told to. One pass of the data
through the model serves all layers, whatever code the model is made of. Only one thread runs at a time. Activations
that are too many for memory wait on disk (`pwrewrite.planning.spill`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..core.files import same_directory
from ..core.nested import Args, Kwargs
from .running import Chunk
from .spill import Spill

_CURRENT: ContextVar[Forward | None] = ContextVar("forward", default=None)
"""The forward that runs in this thread."""


class _Ended(BaseException):
    """Thrown into a forward that is not wanted any more."""


class Forward:
    """One forward of a model on one chunk, run stop by stop in a context.

    ``seed`` is of the random numbers that the model draws on the CPU; forwards do not disturb each other's.

    Attributes:
        path: The layer it has reached; None when it is finished or has not begun.
        value: That layer's input where it was stopped before it, its output where it was stopped behind it.
        finished: Whether it is at its end.
        recorded: Tensors recorded in passing, by path and side.
    """

    def __init__(self, model: nn.Module, chunk: Chunk, watching: AbstractContextManager[object], seed: int) -> None:
        self._model, self._chunk, self._watching = model, chunk, watching
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._ended = self.finished = False
        self.recorded: dict[tuple[str, str], Tensor] = {}
        self.path: str | None = None
        self.value = torch.empty(0, device="cpu")
        self._threads = torch.get_num_threads()
        self._random = torch.Generator().manual_seed(seed).get_state()
        cuda = any(parameter.is_cuda for parameter in model.parameters())
        self._device = torch.cuda.current_device() if cuda else None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def advance(self) -> None:
        """Runs to the next stop, or to the end; raises what the model raised."""
        if self.finished:
            return
        self._leave()
        self._go.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error

    def advance_to(self, path: str) -> bool:
        """Runs to a layer, past other stops; whether it reached it."""
        while not self.finished and self.path != path:
            self.advance()
        return self.path is not None

    def end(self) -> None:
        """Gives the forward up, and all that it holds."""
        if not self.finished:
            self._ended = True
            self._go.release()
            self._back.acquire()
        self._thread.join()
        self.recorded.clear()
        self._chunk = (), {}

    def stop(self, path: str, value: Tensor) -> None:
        """Called from within, by a hook: stands still until told to go on."""
        self.path, self.value = path, value
        del value
        self._random = torch.get_rng_state()
        self._back.release()
        self._go.acquire()
        if self._ended:
            raise _Ended
        torch.set_rng_state(self._random)

    def _leave(self) -> None:
        self.path, self.value = None, torch.empty(0, device="cpu")

    def _run(self) -> None:
        self._go.acquire()
        try:
            if self._ended:
                return
            torch.set_num_threads(self._threads)
            torch.set_rng_state(self._random)
            if self._device is not None:
                torch.cuda.set_device(self._device)
            _CURRENT.set(self)
            args, kwargs = self._chunk
            with same_directory(), torch.no_grad(), self._watching:
                self._model(*args, **kwargs)
        except _Ended:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._leave()
            self.finished = True
            self._back.release()


class Lockstep:
    """Forwards of one model on several chunks; a context manager that ends them and takes its hooks off.

    Args:
        before: Paths of modules before which to stop, with the input.
        behind: Paths of modules behind which to stop, with the output.
        record: Path and ``input`` or ``output`` of modules whose tensor is put into `Forward.recorded` in passing.
        spill: Keeps their activations under their places among the chunks; they are in memory where None.
    """

    def __init__(
        self,
        model: nn.Module,
        chunks: Sequence[Chunk],
        *,
        before: Sequence[str] = (),
        behind: Sequence[str] = (),
        record: Collection[tuple[str, str]] = (),
        spill: Spill | None = None,
    ) -> None:
        # Recording comes first, since a stop at the same place comes after it.
        places = [(path, side, False) for path, side in record]
        places += [(path, "input", True) for path in before] + [(path, "output", True) for path in behind]
        self._handles = [self._hook(model.get_submodule(path), path, side, stops) for path, side, stops in places]
        watching = [nullcontext() if spill is None else spill.watch(number) for number in range(len(chunks))]
        self.forwards = [Forward(model, chunk, watching[number], number) for number, chunk in enumerate(chunks)]

    def _hook(self, module: nn.Module, path: str, side: str, stops: bool) -> RemovableHandle:
        def hook(module: nn.Module, args: Args, kwargs: Kwargs, *output: Tensor) -> None:
            forward = _CURRENT.get()
            if forward is None or forward not in self.forwards:
                return
            value: Tensor = output[0] if output else args[0] if args else kwargs["input"]
            if stops:
                forward.stop(path, value)
            else:
                forward.recorded[path, side] = value

        register: Callable[..., RemovableHandle]
        register = module.register_forward_pre_hook if side == "input" else module.register_forward_hook
        return register(hook, with_kwargs=True)

    def __enter__(self) -> Lockstep:
        return self

    def __exit__(self, *error: object) -> None:
        for forward in self.forwards:
            forward.end()
        for handle in self._handles:
            handle.remove()
