"""`freeze`: a model without Python between its kernels, for shapes that come again and again.

At batch 1 a mobile network spends as much time between its kernels as in them: with cold caches, each call of a module
costs some 50 µs. A `Frozen` model runs as one traced function, in which oneDNN's graph interface takes the convolutions
with what follows them (`pwrewrite.layers.tracing`). The model computes wherever the function may not: with gradients,
in training, for other dtypes, for whoever traces, exports, compiles or counts, and after its weights have changed until
the next function is made.

A function is made from one run, so it is right only where the model's code does the same for the same shapes. That is
not assumed: a capture of shapes alone shows whether the code asks for values, and a model that does stays as it is; so
does one that writes to its own buffers or attributes at every run, or draws random numbers. What it makes on first use
(anchors, position tables) it makes on a copy, before the function. Then the function's outputs are compared with the
model's.

What is not the same: 4-D outputs are in channels_last where the fuser leaves them so. Inputs that hold NaN or Inf run
through the model itself; where NaN arises inside, ReLU, ReLU6, clamps and max-pools may give a number for it, and a
max-pool a finite one for a map that is all ``-inf``, unless ``keep_nan`` is on. What the model's code reads besides
tensors (numbers, flags, the time) is as it was when the function was made.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..capturing import Inputs, capture, split_inputs, value_need
from ..core.errors import CaptureError, InputError, RefusedError, first_line
from ..core.modes import plain_modes
from ..core.nested import map_tensors, tensors_of
from ..core.subjects import check_model
from ..layers import tracing
from ..layers.comparing import Function, alike, outputs_of
from ..layers.kernels import CPU_DTYPES, enabled, unwatched
from ..layers.packing import Compiled, Pool
from ..layers.partitions import CALLS
from .held_tensors import Held, TrialCopy, held_tensors, obstacle
from .timing import time_in_turns

_compiling = torch.compiler.is_compiling
_global_hooks: Callable[[], bool] = torch.nn.modules.module._has_any_global_hook
_Key = tuple[torch.Size, ...]
_SHAPES = 2
"""Shapes for which a model has functions."""
_FAILURES = 8
"""Shapes for which no function could be made, after which no call tries another."""
_TRIES = (CALLS, 8 * CALLS, 64 * CALLS)
"""Calls with a shape in which a function is tried: again later, since the reason against it may be gone."""
_TOLERANCE = 1e-4
"""Relative distance between model and function: a deep network's own rounding is up to 2e-5."""
_SLOWER, _OVERHEAD = 1.5, 2e-4
"""A function that takes this many times as long as the model, and so many seconds more, is none."""
_TIMED = (0.05, 0.2, 0.8)
"""Seconds that both are timed for, and again where the function seems slower: the machine may have been busy."""

FUNCTIONS = Pool(256 * 2**20)
"""Models as functions."""


@plain_modes()
def freeze(model: nn.Module, example_inputs: Inputs | None = None, *, keep_nan: bool = False) -> Frozen:
    """Wraps a model so that it runs as one function without Python, where that is right.

    Best after `pwrewrite.fuse`; another model gains too, less. The function for a shape is made in the third call with
    that shape, or here, and takes about as long as a hundred small runs (seconds for a large model). For at most two
    shapes at a time; each holds a packed copy of the weights (256 MiB for all models together, or one copy), and other
    shapes run as before.

    Args:
        model: A model in evaluation mode with float32 weights on the CPU; it is held, not copied.
        example_inputs: A tensor or a tuple of positional tensors for which the function is made at once.
        keep_nan: Whether NaN that arises inside the model stays NaN, too, which takes 3 to 11% more time, since ReLU,
            clamps and max-pools then run behind the compiled kernels. NaN and Inf in the inputs always give what the
            model gives.

    Returns:
        A module that takes and returns what the model does. Its ``state_dict`` is the model's under ``model.``.

    Raises:
        RefusedError: If the model is in training mode, elsewhere or of another dtype, or cannot be a function for
            ``example_inputs``; says why.
        InputError: If ``example_inputs`` are not positional tensors.
    """
    check_model(model)
    training = next((name or "the model" for name, module in model.named_modules() if module.training), None)
    if training is not None:
        raise RefusedError("the model is in training mode", where=training, hint="call model.eval() first")
    if torch.float32 not in CPU_DTYPES or not tracing.FUSER:
        raise RefusedError("this build of torch has no oneDNN graphs", hint="the fused model runs without")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        other = tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype is not torch.float32)
        if other or not tensor.is_cpu:
            got = f"{tensor.dtype} on {tensor.device}"
            raise RefusedError("only float32 weights on the CPU can be frozen", where=name, got=got)
        if tensor.is_inference() and isinstance(tensor, nn.Parameter):  # torch counts no changes of it, nor trains it
            hint = "freeze copy.deepcopy(model), copied outside of inference mode, or what fuse returns"
            raise RefusedError("a parameter was made in inference mode", where=name, hint=hint)
    frozen = Frozen(model, keep_nan)
    if example_inputs is not None:
        inputs, named = split_inputs(example_inputs)
        if named or not inputs or any(type(x) is not Tensor for x in inputs):
            given = f"{', '.join(named)} by name" if named else None
            expected = "a tensor or a tuple of tensors, in the order of forward"
            raise InputError("a frozen model takes positional tensors", expected=expected, got=given)
        reason = frozen.make(*inputs)
        if reason is not None:
            raise RefusedError("the model cannot be frozen for these inputs", got=reason)
    return frozen


class Frozen(nn.Module):
    """A model that runs as one function where that is right; see `freeze`.

    Weights that are changed or replaced are seen at once, and so are other tensors that the model holds, but for those
    that its own forward makes on first use. Seen only after ``train()``, ``eval()`` or ``reset()`` are modules and
    hooks that are replaced or added, other attributes that are set, and writes that move no version counter: through
    ``weight.data``, through NumPy, in inference mode, or by optimizers with ``fused=True``. Several threads may call
    it; while one makes a function, oneDNN's graph fusion is on for what other threads give to TorchScript.

    Attributes:
        compiled: The functions by the shapes of the inputs.
        refused: Why there is no function, by the shapes of the inputs for which it was tried.
    """

    def __init__(self, model: nn.Module, keep_nan: bool = False) -> None:
        super().__init__()
        self.model = model
        self.keep_nan = keep_nan
        self.training = model.training
        self.reset()

    def reset(self) -> None:
        """Forgets the functions made so far."""
        self.compiled: dict[_Key, _Function] = {}
        self._calls: dict[_Key, int] = {}
        self._tries: dict[_Key, int] = {}
        self._written: set[tuple[int, str]] = set()  # tensors that the model's own forward was seen to replace
        self.refused: dict[_Key, str] = {}

    @property
    def shapes(self) -> list[tuple[torch.Size, ...]]:
        """The shapes of inputs that run as a function."""
        return list(self.compiled)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Runs the model."""
        model = self.model
        if named or self.training or torch.is_grad_enabled() or _compiling() or not unwatched() or _global_hooks():
            return model(*inputs, **named)
        if model.training:  # by its own train(): weights may then change in ways that are not seen
            self.reset()
            return model(*inputs)
        for x in inputs:
            if type(x) is not Tensor or x.dtype is not torch.float32 or not x.is_cpu or x.layout is not torch.strided:
                return self._without(inputs)
        key = tuple(x.shape for x in inputs)
        function = self.compiled.get(key)
        if function is None:
            return self._counted(key, inputs)
        if function.settings != _settings() or not enabled():
            return model(*inputs)
        if not self.keep_nan and not all(math.isfinite(float(x.sum())) for x in inputs):
            return self._watched(inputs)
        if not all(held.unchanged() for held in function.held):
            return self._checked(function, inputs)
        function.used = time.monotonic()
        return function(*inputs)

    def _without(self, inputs: tuple[Any, ...]) -> Any:
        """Runs the model on what no function takes; says so where nothing else is said."""
        if not self.refused:
            self.refused[tuple(x.shape for x in inputs if isinstance(x, Tensor))] = _unfit(inputs) or ""
        return self.model(*inputs)

    def _counted(self, key: _Key, inputs: tuple[Any, ...]) -> Any:
        """Runs the model; where that was the last call before a function pays, makes one."""
        out = self._watched(inputs)
        if len(self._calls) >= 64:
            self._calls.clear()
        self._calls[key] = count = self._calls.get(key, 0) + 1
        tries = self._tries.get(key, 0)
        full = len(self.compiled) >= _SHAPES or (not tries and len(self.refused) >= _FAILURES)
        if not full and tries < len(_TRIES) and count == _TRIES[tries]:
            self._tries[key] = tries + 1
            self.make(*inputs)
        return out

    def _watched(self, inputs: tuple[Any, ...]) -> Any:
        """Runs the model, and takes note of tensors that it puts in place of others: caches for other shapes."""
        held = [held for function in self.compiled.values() for held in function.held if held.unchanged()]
        out = self.model(*inputs)
        self._written |= {each.key for each in held if not each.unchanged()}
        return out

    def _checked(self, function: _Function, inputs: tuple[Any, ...]) -> Any:
        """Runs the model, some of whose tensors have changed.

        The function stays where only what the model's own forward writes has changed and it gives the same as the
        model; what that was is watched no more.
        """
        changed = {held.key for held in function.held if not held.unchanged()}
        out = self._watched(inputs)
        tensors = tensors_of(out)
        if changed <= self._written and alike(tensors_of(function(*inputs)), tensors, _TOLERANCE):
            function.held = [held for held in function.held if held.key not in changed]
        else:
            self.reset()
        return out

    def make(self, *inputs: Tensor) -> str | None:
        """Makes the function for inputs of these shapes, which are not kept; why there is none, None where there is."""
        key = tuple(x.shape for x in inputs)
        compiled, refused = self.compiled, self.refused  # those of now: another thread may reset() meanwhile
        with tracing.making():
            function = self._function(inputs)
        if isinstance(function, str):
            refused[key] = function
            return function
        refused.pop(key, None)
        if compiled is not self.compiled or not FUNCTIONS.admit(self, key, function):
            return "other models' functions are in use and fill the memory that is set apart for them"
        for old in list(compiled)[:-_SHAPES]:
            compiled.pop(old, None)
        return None

    def _function(self, inputs: tuple[Tensor, ...]) -> _Function | str:
        """The model as a function for inputs of these shapes, or why it cannot be one."""
        if (unfit := _unfit(inputs)) is not None:
            return unfit
        reason = "there are hooks for all modules" if _global_hooks() else obstacle(self.model)
        held = [] if reason else held_tensors(self.model)
        if reason or isinstance(held, str):
            return reason or str(held)
        given = tuple(torch.empty_like(x, memory_format=_format(x)).copy_(x) for x in inputs)
        try:
            capture(self.model, given, values="meta")
        except CaptureError as error:
            failure = error.__cause__
            why = value_need(failure) if isinstance(failure, Exception) else first_line(error)
            return f"the model's code needs values: {why}"
        try:
            trial = TrialCopy(self.model, held)
        except Exception as error:  # of attributes such as locks
            return f"it cannot be copied: {first_line(error)}"
        try:
            first = outputs_of(trial.run(*given))  # makes what the model makes on first use
            trial.settle()
            right = outputs_of(trial.run(*given))
            other = outputs_of(trial.run(*(x.contiguous() for x in given)))
        except Exception as error:
            return f"it does not run: {first_line(error)}"
        if not right or trial.shares_memory(right, given):
            return "it returns no plain tensors, or a view of an input or a weight"
        if any(x._version > 1 for x in given):
            return "it writes to its own buffers or its inputs"
        if not trial.as_settled() or not alike(first, right, _TOLERANCE):
            return trial.difference()
        result = tracing.traced(trial.run, given, _TOLERANCE, keep_nan=self.keep_nan)
        if not trial.as_settled():
            return trial.difference()
        if isinstance(result, str):
            return _UNSTABLE if result == tracing.OTHER_VALUES and _unstable(trial.run, given, right) else result
        timed = [partial(run, *given) for run in (trial.run, result.run)]
        for seconds in _TIMED:
            before, after = time_in_turns(timed, given[0].device, turns=(2, 20), seconds=seconds)
            if after.seconds <= _SLOWER * before.seconds + _OVERHEAD:
                break
        else:
            times = after.seconds / before.seconds
            return f"as one function it takes {times:.1f} times as long, by kernels that oneDNN has for it"
        if not alike(other, right, _TOLERANCE):
            return (
                _UNSTABLE
                if _unstable(trial.run, given, right)
                else "its values depend on the memory format of its inputs"
            )
        watched = [*(each for each in held if each.key not in trial.replaced), *trial.found]
        if not all(each.unchanged() for each in watched):
            return "its tensors changed while the function was made"
        runs = zip(result.outputs, outputs_of(result.run(*given)))
        same = [len({t.untyped_storage().data_ptr() for t in pair}) == 1 for pair in runs]
        constant = frozenset(i for i, is_same in enumerate(same) if is_same)
        nbytes = sum(p.nbytes for p in self.model.parameters())
        form = _Form(trial.template(), constant, [x.stride() for x in given])
        return _Function(result.run, torch.get_num_threads(), nbytes, form=form, held=watched, settings=_settings())

    def train(self, mode: bool = True) -> Frozen:
        """As ever; also forgets the functions."""
        self.reset()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Frozen:
        self.reset()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the functions."""
        return {name: value for name, value in self.__dict__.items() if name not in _TRANSIENT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"keep_nan": False, **state})  # type: ignore[no-untyped-call]
        self.reset()


_TRANSIENT = ("compiled", "_calls", "_tries", "_written", "refused")


@dataclass(frozen=True)
class _Form:
    """How a function takes its inputs and gives its outputs."""

    template: Any  # what the model returns, with anything in place of each tensor; None for one tensor
    constant: frozenset[int]  # positions of outputs that are the same tensor in each call; who calls gets copies
    strides: list[tuple[int, ...]]  # those of the inputs for which it was made


@dataclass(eq=False, kw_only=True)
class _Function(Compiled):
    """A model as a function of tensors, for one shape."""

    form: _Form
    held: list[Held]  # what the model held
    settings: tuple[int, torch.dtype]  # those of torch for which it was made

    def __call__(self, *inputs: Tensor) -> Any:
        form = self.form
        out = self.run(*(_formatted(x, strides) for x, strides in zip(inputs, form.strides)))
        if not form.constant and form.template is None:
            return out
        tensors = [t.clone() if i in form.constant else t for i, t in enumerate(outputs_of(out))]
        if form.template is None:
            return tensors[0]
        remaining = iter(tensors)
        return map_tensors(form.template, lambda _: next(remaining))


def _unfit(inputs: tuple[Any, ...]) -> str | None:
    """Why a function cannot take some inputs; None where it can."""
    given = "nothing" if not inputs else None
    for x in inputs:
        if type(x) is not Tensor or x.layout is not torch.strided:
            given = f"a {type(x).__name__}" + (f" of layout {x.layout}" if type(x) is Tensor else "")
        elif x.dtype is not torch.float32 or not x.is_cpu or not x.numel():
            given = f"a {'×'.join(map(str, x.shape))} tensor of {str(x.dtype).removeprefix('torch.')} on {x.device}"
        if given is not None:
            break
    return given and f"it is given {given}, and a function takes float32 tensors on the CPU only"


_UNSTABLE = (
    "rounding alone changes its outputs, as where code chooses the largest of values that hardly differ: "
    "whether a function is right cannot be told"
)


def _unstable(run: Function, inputs: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> bool:
    """Whether inputs that are moved by a few roundings give other outputs."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        noise = (torch.randn(x.shape, generator=generator, device="cpu") for x in inputs)
        if not alike(outputs_of(run(*(x + x * n * 2.0**-22 for x, n in zip(inputs, noise)))), right, _TOLERANCE):
            return True
    return False


def _settings() -> tuple[int, torch.dtype]:
    return torch.get_num_threads(), torch.get_default_dtype()


def _format(x: Tensor) -> torch.memory_format:
    """The memory format that functions are made for."""
    return torch.channels_last if x.dim() == 4 else torch.contiguous_format


def _formatted(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A tensor in the memory format, and with the strides, that a function was made for.

    The strides of dimensions of size 1 mean nothing, and a kernel that was made for others reads wrong values. Those of
    a negative view (the imaginary part of a conjugate) are the negated ones.
    """
    y = x.resolve_neg().contiguous(memory_format=_format(x))
    return y if y.stride() == strides else y.as_strided(y.shape, strides)
