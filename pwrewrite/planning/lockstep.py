"""Many forwards of a model at once, all stopped at the same layer: what one needs to fit a layer to what reaches it.

Fitting layers in order wants, for each, what the layers before it, already fitted, make of *all* the calibration
inputs. Running the model anew for each layer would cost a forward per layer. Here every chunk of inputs has a forward
of its own, in a thread that serves as a coroutine: it runs until a layer that is waited for, stops there with its live
activations on its own stack, and goes on when it is told to. One pass of the data through the model serves all layers,
whatever Python code the model is made of. Only one thread runs at a time. Activations that are too many for memory wait
on disk (`pwrewrite.planning.spill`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .spill import Spill
from .statistics import Chunk


@dataclass
class Stop:
    """Where a forward stands.

    Attributes:
        path: The layer it has reached.
        value: The layer's input where it was stopped before it, its output where it was stopped behind it.
    """

    path: str
    value: Tensor


def _uses_cuda(model: nn.Module) -> bool:
    return any(parameter.is_cuda for parameter in model.parameters())


class _Ended(BaseException):
    """Thrown into a forward that is not wanted any more."""


class Forward:
    """One forward of a model on one chunk, run stop by stop.

    Args:
        model: The model, in the mode in which it is to run.
        chunk: Its inputs.
        owner: Knows where to stop.
        watching: A context in which it runs.

    Attributes:
        at: Where it stands; None when it is finished or has not begun.
        finished: Whether it is.
        kept: Tensors kept in passing, by path and side.
    """

    def __init__(
        self, model: nn.Module, chunk: Chunk, owner: Lockstep, watching: AbstractContextManager[object]
    ) -> None:
        self._model, self._chunk, self._owner, self._watching = model, chunk, owner, watching
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._ended = False
        self.at: Stop | None = None
        self.finished = False
        self.kept: dict[tuple[str, str], Tensor] = {}
        self._threads = torch.get_num_threads()
        self._device = torch.cuda.current_device() if _uses_cuda(model) else None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def advance(self) -> None:
        """Runs to the next stop, or to the end.

        Raises:
            Exception: What the model raised.
        """
        if self.finished:
            return
        self.at = None
        self._go.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error

    def advance_to(self, path: str) -> bool:
        """Runs to a layer, past other stops.

        Returns:
            Whether it reached it.
        """
        while not self.finished and (self.at is None or self.at.path != path):
            self.advance()
        return self.at is not None

    def end(self) -> None:
        """Gives the forward up, and all that it holds."""
        if not self.finished:
            self._ended = True
            self._go.release()
            self._back.acquire()
        self._thread.join()
        self.kept.clear()
        self._chunk = (), {}

    def stop(self, path: str, value: Tensor) -> None:
        """Called from within, by a hook: stands still until told to go on."""
        self.at = Stop(path, value)
        self._back.release()
        self._go.acquire()
        if self._ended:
            raise _Ended

    def _run(self) -> None:
        self._go.acquire()
        try:
            if self._ended:
                return
            torch.set_num_threads(self._threads)
            if self._device is not None:
                torch.cuda.set_device(self._device)
            self._owner.running.forward = self
            args, kwargs = self._chunk
            with torch.no_grad(), self._watching:
                self._model(*args, **kwargs)
        except _Ended:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.at, self.finished = None, True
            self._owner.running.forward = None
            self._back.release()


class Lockstep:
    """Forwards of one model on several chunks.

    Args:
        model: The model.
        chunks: The inputs.
        before: Paths of modules before which to stop, with the input.
        behind: Paths of modules behind which to stop, with the output.
        keep: Path and ``input`` or ``output`` of modules at which a tensor is kept in passing, without a stop; found
            in `Forward.kept`.
        spill: Keeps their activations; forward by forward under its place among the chunks. In memory where None.
    """

    def __init__(
        self,
        model: nn.Module,
        chunks: Sequence[Chunk],
        *,
        before: Sequence[str] = (),
        behind: Sequence[str] = (),
        keep: Collection[tuple[str, str]] = (),
        spill: Spill | None = None,
    ) -> None:
        self.running = threading.local()
        self._handles = []
        for path, side in keep:  # first, since a stop at the same place comes after it
            module = model.get_submodule(path)
            if side == "input":
                self._handles.append(module.register_forward_pre_hook(self._keep_input(path), with_kwargs=True))
            else:
                self._handles.append(module.register_forward_hook(self._keep_output(path)))
        for path in before:
            hook = self._before(path)
            self._handles.append(model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True))
        for path in behind:
            self._handles.append(model.get_submodule(path).register_forward_hook(self._behind(path)))
        self.forwards = [
            Forward(model, chunk, self, nullcontext() if spill is None else spill.watch(number))
            for number, chunk in enumerate(chunks)
        ]

    def _before(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            forward = getattr(self.running, "forward", None)
            if forward is not None:
                forward.stop(path, args[0] if args else kwargs["input"])

        return hook

    def _behind(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            forward = getattr(self.running, "forward", None)
            if forward is not None:
                forward.stop(path, output)

        return hook

    def _keep_input(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            forward = getattr(self.running, "forward", None)
            if forward is not None:
                forward.kept[path, "input"] = args[0] if args else kwargs["input"]

        return hook

    def _keep_output(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            forward = getattr(self.running, "forward", None)
            if forward is not None:
                forward.kept[path, "output"] = output

        return hook

    def close(self) -> None:
        """Ends all forwards and takes the hooks off."""
        for forward in self.forwards:
            forward.end()
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Lockstep:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
