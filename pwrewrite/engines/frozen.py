"""`freeze`: a model without Python between its kernels, for shapes that come again and again.

At batch 1 a mobile network spends as much time between its kernels as in them: with cold caches, each call of a module
costs some 50 µs. A `Frozen` model runs as one traced function, in which oneDNN's graph interface takes the convolutions
with what follows them. It is a module around the model; the model stays as it is, and computes wherever the function
may not: with gradients, in training, for other dtypes, for whoever traces, exports, compiles or counts, and after its
weights have changed until the next function is made.

A function is made from one run, so it is right only where the model's code does the same for the same shapes. That is
not assumed: a capture of shapes alone shows whether the code asks for values, and a model that does stays as it is; so
does one that writes to its own buffers or attributes, or draws random numbers. Then the function's outputs are compared
with the model's.

What is not the same: 4-D outputs are in channels_last where the fuser leaves them so. As in oneDNN's kernels, ReLU,
ReLU6, clamps and max-pools may give a number for NaN, and a max-pool a finite one for a map that is all ``-inf``. What
the model's code reads besides tensors (numbers, flags, the time) is as it was when the function was made.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..capturing import Inputs, capture, split_inputs
from ..core.errors import CaptureError, InputError, RefusedError, first_line
from ..core.nested import map_tensors, tensors_of
from ..layers import PointwiseActivation
from ..layers import partitions as graphs
from ..layers.kernels import CPU_DTYPES, unwatched
from ..layers.known import hooked

_compiling: Any = torch.compiler.is_compiling
_global_hooks: Any = torch.nn.modules.module._has_any_global_hook
_Key = tuple[torch.Size, ...]
_SHAPES = 2
"""Shapes for which functions are kept; each has its own packed copy of the weights."""
_FAILURES = 8
"""Shapes for which no function could be made, after which no call tries another."""
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

    Weights that are changed or replaced are seen at once, and so are other tensors that the model holds. Seen only
    after ``train()``, ``eval()`` or ``reset()`` are modules and hooks that are replaced or added, other attributes that
    are set, and writes that move no version counter: through ``weight.data``, through NumPy, or by optimizers with
    ``fused=True``. Several threads may call it; while one makes a function, oneDNN's graph fusion is on for what other
    threads give to TorchScript.

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
        self.refused: dict[_Key, str] = {}

    @property
    def shapes(self) -> list[tuple[torch.Size, ...]]:
        """The shapes of inputs that run as a function."""
        return list(self._made)

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
                return model(*inputs)
        key = tuple(x.shape for x in inputs)
        found = self._made.get(key)
        if found is None:
            return self._counted(key, inputs)
        if found.settings != _settings() or not torch._C._get_mkldnn_enabled():
            return model(*inputs)
        if not _unchanged(found.facts):
            self.reset()
            return model(*inputs)
        return found(*(_formatted(x, strides) for x, strides in zip(inputs, found.strides)))

    def _counted(self, key: _Key, inputs: tuple[Any, ...]) -> Any:
        """Runs the model; where that was the last call before a function pays, makes one."""
        out = self.model(*inputs)
        if len(self._calls) >= 64:
            self._calls.clear()
        self._calls[key] = count = self._calls.get(key, 0) + 1
        tried = key in self.refused or len(self.refused) >= _FAILURES
        if count == graphs.CALLS and len(self._made) < _SHAPES and not tried:
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
        kept, refused = self._made, self.refused  # those of now: another thread may reset() meanwhile
        made = self._function(inputs)
        if isinstance(made, str):
            refused[key] = made
            return made
        refused.pop(key, None)
        kept[key] = made
        for old in list(kept)[:-_SHAPES]:
            kept.pop(old, None)
        return None

    def _function(self, inputs: tuple[Tensor, ...]) -> _Function | str:
        """The model as a function for inputs of these shapes, or why it cannot be one."""
        if any(x.dtype is not torch.float32 or not x.is_cpu or not x.numel() for x in inputs) or not inputs:
            return "inputs are float32 tensors on the CPU"
        reason = _obstacle(self.model)
        facts = [] if reason else _facts(self.model)
        if reason or isinstance(facts, str):
            return reason or str(facts)
        with torch.inference_mode(False), torch.no_grad():
            given = tuple(torch.empty(x.shape, memory_format=_format(x)).copy_(x) for x in inputs)
            try:
                capture(self.model, given, values="meta")
            except CaptureError as error:
                return f"the model's code needs values: {first_line(error)}"
            # Buffers are copies, so that what a model writes to its own reaches none of them.
            memo: dict[int, Any] = {
                id(t): nn.Parameter(t.detach(), requires_grad=False) for t in self.model.parameters()
            }
            memo |= {id(t): t.detach().clone() for t in self.model.buffers()}
            before = [(t, t._version) for t in memo.values()]
            try:
                runner: Any = copy.deepcopy(self.model, memo)
            except Exception as error:  # of attributes such as locks
                return f"it cannot be copied: {first_line(error)}"
            for t in memo.get(id(memo), ()):  # what was copied, wherever it was found
                if isinstance(t, Tensor):
                    if t.is_inference():
                        return "it holds tensors made in inference mode"
                    facts.append(_fact({"": t}, "", t))
            attributes = _attributes(runner)
            structure: Any = None  # of what the last run returned

            def run(*tensors: Tensor) -> tuple[Tensor, ...] | Tensor:
                nonlocal structure
                structure = runner(*tensors)
                return structure if isinstance(structure, Tensor) else tuple(tensors_of(structure))

            try:
                right = tensors_of(run(*given))
                other = tensors_of(run(*(x.contiguous() for x in given)))
            except Exception as error:
                return f"it does not run: {first_line(error)}"
            held = {t.untyped_storage().data_ptr() for t in (*given, *(t for t, _ in before))}
            if not right or any(type(t) is not Tensor or t.untyped_storage().data_ptr() in held for t in right):
                return "it returns no plain tensors, or a view of an input or a weight"
            found = graphs.traced(run, given, _TOLERANCE)
            now = {id(t) for t in (*runner.parameters(), *runner.buffers())}
            written = any(t._version != version or id(t) not in now for t, version in before)
            if written or any(x._version > 1 for x in given):
                return "it writes to its own buffers or its inputs"
            if isinstance(found, str):
                return found
            if not graphs.alike(other, right, _TOLERANCE):
                return "its values depend on the memory format of its inputs"
            if not _as_before(attributes, _attributes(runner)) or not _unchanged(facts):
                return "it sets attributes of its own"
            made, first, _ = found
            second = made(*given)
            second = (second,) if isinstance(second, Tensor) else second
        memory = [(a.untyped_storage().data_ptr(), b.untyped_storage().data_ptr()) for a, b in zip(first, second)]
        empty = torch.empty(0)
        template = None if isinstance(structure, Tensor) else map_tensors(structure, lambda _: empty)
        return _Function(
            made,
            template,
            frozenset(i for i, (a, b) in enumerate(memory) if a == b),
            facts,
            [x.stride() for x in given],
        )

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


_TRANSIENT = ("_made", "_calls", "refused")
_Fact = tuple[dict[str, Any], str, Tensor, int, int]
"""Where a tensor is held, its name there, the tensor, its version, and the address of its values."""


class _Function:
    """A model as a function of tensors, for one shape.

    Args:
        run: What computes the output tensors.
        template: What the model returns, with anything in place of each tensor; None for one tensor.
        constant: Positions of outputs that are the same tensor in each call; who calls gets copies.
        facts: What the model held.
        strides: Those of the inputs for which it was made.

    Attributes:
        settings: Settings of torch for which it was made.
    """

    __slots__ = ("_constant", "_run", "_template", "facts", "settings", "strides")

    def __init__(
        self,
        run: Callable[..., Any],
        template: Any,
        constant: frozenset[int],
        facts: list[_Fact],
        strides: list[tuple[int, ...]],
    ) -> None:
        self._run, self._template, self._constant = run, template, constant
        self.facts, self.strides, self.settings = facts, strides, _settings()

    def __call__(self, *inputs: Tensor) -> Any:
        out = self._run(*inputs)
        if self._constant:
            if isinstance(out, Tensor):
                return self._rebuilt(out.clone())
            out = [t.clone() if i in self._constant else t for i, t in enumerate(out)]
        return self._rebuilt(out)

    def _rebuilt(self, out: Any) -> Any:
        if self._template is None:
            return out
        tensors = iter((out,) if isinstance(out, Tensor) else out)
        return map_tensors(self._template, lambda _: next(tensors))


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


def _obstacle(model: nn.Module) -> str | None:
    """What a model's modules have that no function could; None where there is nothing."""
    if _global_hooks():
        return "there are hooks for all modules"
    for path, module in model.named_modules():
        activation = module.activation if isinstance(module, PointwiseActivation) else None
        if module.training:
            return f"{path or 'the model'} is in training mode"
        if hooked(module):
            return f"{path or 'the model'} has hooks"
        own = vars(module).get("forward")
        if own is not None and getattr(own, "__self__", None) is not module:  # a copy of it may run this very module
            return f"{path or 'the model'} has a forward() of its own"
        if activation == "gelu_tanh" or (isinstance(module, nn.GELU) and module.approximate != "none"):
            return f"{path}: the fuser takes the tanh approximation of GELU for GELU itself"
        if isinstance(module, (nn.RNNBase, torch.jit.ScriptModule)):
            return f"{path or 'the model'} is a {type(module).__name__}"
    return None


def _facts(model: nn.Module) -> list[_Fact] | str:
    """The tensors that a model's modules hold, as they are now; or which of them is no plain one on the CPU."""
    facts: list[_Fact] = []
    for path, module in model.named_modules():
        for held in (module._parameters, module._buffers, vars(module)):
            for name, tensor in held.items():
                if not isinstance(tensor, Tensor):
                    continue
                if type(tensor) not in (Tensor, nn.Parameter) or not tensor.is_cpu or tensor.is_inference():
                    return f"{path}.{name} is no plain tensor on the CPU"
                facts.append(_fact(held, name, tensor))
    return facts


def _fact(held: dict[str, Any], name: str, tensor: Tensor) -> _Fact:
    return held, name, tensor, tensor._version, tensor.data_ptr()


def _unchanged(facts: list[_Fact]) -> bool:
    """Whether every tensor is the one that it was, with the same values."""
    for held, name, tensor, version, pointer in facts:
        if held.get(name) is not tensor or tensor._version != version or tensor.data_ptr() != pointer:
            return False
    return True


def _attributes(model: nn.Module) -> list[Any]:
    """What a model's modules hold, directly or in a container; but not the caches of layers of this package."""
    found: list[Any] = []
    for module in model.modules():
        if isinstance(module, (PointwiseActivation, Frozen)):
            continue
        for value in vars(module).values():
            found.append(value)
            if isinstance(value, dict):
                found += value.values()
            elif isinstance(value, (list, tuple, set)):
                found += value
    return found


def _as_before(before: list[Any], now: list[Any]) -> bool:
    """Whether two lists hold the same objects, or equal ones of the plainest types."""
    if len(before) != len(now):
        return False
    for a, b in zip(before, now):
        if a is not b and (type(a) is not type(b) or type(a) not in _PLAINEST or a != b):
            return False
    return True


_PLAINEST = (int, float, bool, str, torch.Size)
