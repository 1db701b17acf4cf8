"""`freeze`: a model without Python between its kernels, for shapes that come again and again.

At batch 1 a mobile network spends as much time between its kernels as in them: with cold caches, each call of a module
costs some 50 µs. A `Frozen` model runs as one traced function, in which oneDNN's graph interface takes the convolutions
with what follows them. It is a module around the model; the model stays as it is, and computes wherever the function
may not: with gradients, in training, for other dtypes, for whoever traces, exports, compiles or counts, and after its
weights have changed until the next function is made.

A function is made from one run, so it is right only where the model's code does the same for the same shapes. That is
not assumed: a capture of shapes alone shows whether the code asks for values, and a model that does stays as it is; so
does one that writes to its own buffers. Then the function's outputs are compared with the model's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .capture import Inputs, capture, split_inputs
from .capture.nested import map_tensors, tensors_of
from .errors import CaptureError, InputError, RefusedError, first_line
from .fused import PointwiseActivation, graphs
from .fused.kernels import CPU_DTYPES, unwatched
from .fused.known import hooked

_compiling: Any = torch.compiler.is_compiling
_Key = tuple[torch.Size, ...]
_SHAPES = 2
"""Shapes for which functions are kept; each has its own packed copy of the weights."""
_TOLERANCE = 1e-4
"""Relative distance between model and function: a deep network's own rounding is up to 2e-5."""


def freeze(model: nn.Module, example_inputs: Inputs | None = None) -> Frozen:
    """Wraps a model so that it runs as one function without Python, where that is right.

    Best after `pwrewrite.fuse`; another model gains too, less. The function for a shape is made in the third call with
    that shape, or here, and takes about as long as a hundred small runs (seconds for a large model). For at most two
    shapes at a time; each holds a packed copy of the weights, and other shapes run as before.

    Args:
        model: A model in evaluation mode with float32 weights on the CPU; it is held, not copied.
        example_inputs: A tensor or a tuple of positional tensors for which the function is made at once.

    Returns:
        A module that takes and returns what the model does. Its ``state_dict`` is the model's under ``model.``.

    Raises:
        RefusedError: If the model is in training mode, elsewhere or of another dtype, or cannot be a function for
            ``example_inputs``; says why.
        InputError: If ``example_inputs`` are not positional tensors.
    """
    if any(module.training for module in model.modules()):
        raise RefusedError("the model is in training mode", hint="call model.eval() first")
    if torch.float32 not in CPU_DTYPES or not graphs.FUSER:
        raise RefusedError("this build of torch has no oneDNN graphs", hint="the fused model runs without")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if (
            not tensor.is_cpu
            or (tensor.is_floating_point() and tensor.dtype is not torch.float32)
            or tensor.is_complex()
        ):
            raise RefusedError(
                "only float32 weights on the CPU can be frozen", where=name, got=f"{tensor.dtype} on {tensor.device}"
            )
    made = Frozen(model)
    if example_inputs is not None:
        inputs, named = split_inputs(example_inputs)
        if named or not inputs or any(type(x) is not Tensor for x in inputs):
            raise InputError("a frozen model takes positional tensors", expected="a tensor or a tuple of tensors")
        reason = made.make(*inputs)
        if reason is not None:
            raise RefusedError("the model cannot be frozen for these inputs", got=reason)
    return made


class Frozen(nn.Module):
    """A model that runs as one function where that is right; see `freeze`.

    Modules that are replaced or given hooks later are seen only after ``train()``, ``eval()`` or ``reset()``; weights
    that are changed or replaced are seen at once.

    Args:
        model: The model, in evaluation mode.

    Attributes:
        model: The model.
        refused: Why there is no function, by the shapes of the inputs for which it was tried.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self.reset()

    def reset(self) -> None:
        """Forgets the functions made so far."""
        self._made: dict[_Key, _Function] = {}
        self._calls: dict[_Key, int] = {}
        self._facts: list[_Fact] = []
        self.refused: dict[_Key, str] = {}

    @property
    def shapes(self) -> list[tuple[torch.Size, ...]]:
        """The shapes of inputs that run as a function."""
        return list(self._made)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Runs the model."""
        if named or self.training or torch.is_grad_enabled() or _compiling() or not unwatched():
            return self.model(*inputs, **named)
        for x in inputs:
            if type(x) is not Tensor or x.dtype is not torch.float32 or not x.is_cpu or x.layout is not torch.strided:
                return self.model(*inputs)
        key = tuple(x.shape for x in inputs)
        found = self._made.get(key)
        if found is None:
            return self._counted(key, inputs)
        if found.threads != torch.get_num_threads() or not torch._C._get_mkldnn_enabled():
            return self.model(*inputs)
        if not self._unchanged():
            self.reset()
            return self.model(*inputs)
        return found(*(_formatted(x) for x in inputs))

    def _counted(self, key: _Key, inputs: tuple[Any, ...]) -> Any:
        """Runs the model; where that was the last call before a function pays, makes one."""
        out = self.model(*inputs)
        if len(self._calls) >= 64:
            self._calls.clear()
        self._calls[key] = count = self._calls.get(key, 0) + 1
        if count == graphs.CALLS and len(self._made) < _SHAPES:
            self.make(*inputs)
        return out

    def make(self, *inputs: Tensor) -> str | None:
        """Makes the function for inputs of these shapes.

        Args:
            *inputs: float32 tensors on the CPU; only their shapes and values are used, they are not kept.

        Returns:
            Why there is none; None where there is.
        """
        key = tuple(x.shape for x in inputs)
        if self._made and not self._unchanged():
            self.reset()
        made = self._function(inputs)
        if isinstance(made, str):
            self.refused[key] = made
            return made
        self._made[key] = made
        while len(self._made) > _SHAPES:
            del self._made[next(iter(self._made))]
        return None

    def _function(self, inputs: tuple[Tensor, ...]) -> _Function | str:
        """The model as a function for inputs of these shapes, or why it cannot be one."""
        if any(x.dtype is not torch.float32 or not x.is_cpu or not x.numel() for x in inputs) or not inputs:
            return "inputs are float32 tensors on the CPU"
        facts: list[_Fact] = []
        for path, module in self.model.named_modules():
            activation = module.activation if isinstance(module, PointwiseActivation) else None
            if hooked(module):
                return f"{path or 'the model'} has hooks"
            if activation == "gelu_tanh" or (isinstance(module, nn.GELU) and module.approximate != "none"):
                return f"{path}: the fuser takes the tanh approximation of GELU for GELU itself"
            if isinstance(module, (nn.RNNBase, torch.jit.ScriptModule)):
                return f"{path or 'the model'} is a {type(module).__name__}"
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is None:
                        continue
                    if type(tensor) not in (Tensor, nn.Parameter) or not tensor.is_cpu or tensor.is_inference():
                        return f"{path}.{name} is no plain tensor on the CPU"
                    facts.append((held, name, tensor, tensor._version, tensor.data_ptr()))
        with torch.inference_mode(False), torch.no_grad():
            given = tuple(_formatted(x.detach().clone()) for x in inputs)
            try:
                capture(self.model, given, values="meta")
            except CaptureError as error:
                return f"the model's code needs values: {first_line(error)}"
            # Buffers are copies, so that what a model writes to its own reaches none of them.
            memo: dict[int, Tensor] = {
                id(t): nn.Parameter(t.detach(), requires_grad=False) for t in self.model.parameters()
            }
            memo |= {id(t): t.detach().clone() for t in self.model.buffers()}
            before = [(t, t._version) for t in memo.values()]
            runner: Any = copy.deepcopy(self.model, memo)
            structure: Any = None  # of what the last run returned

            def run(*tensors: Tensor) -> tuple[Tensor, ...] | Tensor:
                nonlocal structure
                structure = runner(*tensors)
                return structure if isinstance(structure, Tensor) else tuple(tensors_of(structure))

            try:
                right = tensors_of(run(*given))
            except Exception as error:
                return f"it does not run: {first_line(error)}"
            held = {t.untyped_storage().data_ptr() for t in (*given, *(t for t, _ in before))}
            if not right or any(type(t) is not Tensor or t.untyped_storage().data_ptr() in held for t in right):
                return "it returns no plain tensors, or a view of an input or a weight"
            found = graphs.traced(run, given, _TOLERANCE)
            now = {id(t) for t in (*runner.parameters(), *runner.buffers())}
        written = any(t._version != version or id(t) not in now for t, version in before)
        if written or any(x._version for x in given):
            return "it writes to its own buffers or its inputs"
        if isinstance(found, str):
            return found
        self._facts = facts
        empty = torch.empty(0)
        template = None if isinstance(structure, Tensor) else map_tensors(structure, lambda _: empty)
        return _Function(found[0], template, torch.get_num_threads())

    def _unchanged(self) -> bool:
        """Whether every parameter and buffer is the tensor that it was, with the same values."""
        for held, name, tensor, version, pointer in self._facts:
            if held.get(name) is not tensor or tensor._version != version or tensor.data_ptr() != pointer:
                return False
        return True

    def train(self, mode: bool = True) -> Frozen:
        """As ever; also forgets the functions."""
        self.reset()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.reset()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the functions."""
        return {name: value for name, value in self.__dict__.items() if name not in _TRANSIENT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.reset()


_TRANSIENT = ("_made", "_calls", "_facts", "refused")
_Fact = tuple[dict[str, Any], str, Tensor, int, int]


class _Function:
    """A model as a function of tensors, for one shape.

    Args:
        run: What computes the output tensors.
        template: What the model returns, with anything in place of each tensor; None for one tensor.
        threads: The number of threads for which it was made.
    """

    __slots__ = ("_run", "_template", "threads")

    def __init__(self, run: Callable[..., Any], template: Any, threads: int) -> None:
        self._run, self._template, self.threads = run, template, threads

    def __call__(self, *inputs: Tensor) -> Any:
        out = self._run(*inputs)
        if self._template is None:
            return out
        tensors = iter(out)
        return map_tensors(self._template, lambda _: next(tensors))


def _formatted(x: Tensor) -> Tensor:
    """A tensor in the memory format that functions are made for."""
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format)
