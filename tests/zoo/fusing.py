"""What the sweep of `fuse` checks of a model, with a matcher of its own for what could have been fused and was not.

The matcher knows nothing of the passes: it sees the calls of the *fused* model through a `TorchFunctionMode` on real
tensors, and remembers by identity which tensor came straight out of a convolution, and how often each was read. What it
calls fusible is a batch norm or an activation with a kernel that reads such a tensor, where nothing else does.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pwrewrite.core.errors import PwrewriteError
from pwrewrite.core.nested import tensors_of
from pwrewrite.core.verification import Check, Verification
from pwrewrite.engines.frozen import freeze
from pwrewrite.layers import PointwiseActivation
from pwrewrite.workflows.fuse import Fused, _distance, fuse

from .harness import Built, _construct, build
from .rewrites import shrink_transform

LIMIT = 100_000_000
CHAOTIC = 1e-4
"""Error of a float32 model above which rounding is amplified a thousandfold, as with untrained weights it may be."""
FROZEN = 1e-4
"""Relative distance that a frozen model's outputs may have from those of the model, or twice the model's own error."""

ACTIVATIONS = frozenset(
    {"relu", "relu_", "relu6", "silu", "gelu", "hardswish", "hardsigmoid", "sigmoid", "tanh", "leaky_relu", "hardtanh"}
)
ADDS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})
LAYERS = frozenset({"conv1d", "conv2d", "conv3d", "linear"})


class Matcher(TorchFunctionMode):
    """Finds a norm or activation that is the only reader of a layer's output, and more of the kind.

    Also a norm whose only reader is a layer that pads with nothing, and a ReLU behind an addition of which one operand
    is a layer's output that nothing else reads.

    Attributes:
        left: Name of an operation to how often it could have been fused.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[Tensor, str]] = {}
        self.reads: Counter[int] = Counter()
        self.after: list[tuple[tuple[int, ...], str]] = []
        self.held: list[Tensor] = []
        self.sums: dict[int, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        tensors = [a for a in args if isinstance(a, Tensor)]
        if name not in ("__get__", "size", "dim", "__set__"):
            for t in tensors:
                self.reads[id(t)] += 1
        if FUSED.depth == 0 and tensors:
            self._look(name, tensors, args, kwargs or {})
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.held.append(out)  # so that no identity is used twice
            if name in LAYERS:
                self.made[id(out)] = (out, "layer")
            elif FUSED.depth == 0:
                self._note(name, tensors, out)
        return out

    def _look(self, name: str, tensors: list[Tensor], args: Any, kwargs: Any) -> None:
        """Whether a call could have been fused with what made its input."""
        key = id(tensors[0])
        kind = self.made.get(key, (None, ""))[1]
        if kind == "layer" and (name in ACTIVATIONS or name == "batch_norm"):
            self.after.append(((key,), name))
        elif kind == "add" and name in ("relu", "relu_"):
            self.after.append(((key, self.sums[key]), "add+relu"))
        elif kind == "norm" and name in LAYERS:
            padding = args[4] if len(args) > 4 else kwargs.get("padding", 0)
            sides = padding if isinstance(padding, (tuple, list)) else [padding]
            pads = name != "linear" and any(sides)  # a name of a padding, too
            if not pads and (name != "linear" or tensors[0].dim() == 2):
                self.after.append(((key,), "batch_norm before"))

    def _note(self, name: str, tensors: list[Tensor], out: Tensor) -> None:
        """Remembers norms with statistics, and sums that a layer's kernel could have made."""
        if name == "batch_norm" and len(tensors) > 2:
            self.made[id(out)] = (out, "norm")
        if name not in ADDS or len(tensors) != 2 or any(t.shape != out.shape or t.dim() != 4 for t in tensors):
            return
        layers = [id(t) for t in tensors if self.made.get(id(t), (None, ""))[1] == "layer"]
        if len(layers) == 1 and tensors[0] is not tensors[1]:
            if any(out is t for t in tensors):  # in place: the same tensor from here on
                if id(out) != layers[0] or self.reads[id(out)] != 1:
                    return
                self.reads[id(out)] = 0
            self.made[id(out)] = (out, "add")
            self.sums[id(out)] = layers[0]

    @property
    def left(self) -> Counter[str]:
        return Counter(name for keys, name in self.after if all(self.reads[key] == 1 for key in keys))


class FUSED:
    """How deep in fused layers the run is."""

    depth = 0


def unfused(model: nn.Module, inputs: tuple[Any, ...]) -> Counter[str]:
    """Norms and activations that a run of a model could have had fused."""
    runner = copy.deepcopy(model).eval()

    def enter(module: nn.Module, args: Any) -> None:
        FUSED.depth += 1

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        FUSED.depth -= 1

    for module in runner.modules():
        if isinstance(module, PointwiseActivation):
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)
    matcher = Matcher()
    with torch.no_grad(), matcher:
        runner(*inputs)
    return matcher.left


def check_fuse(built: Built) -> dict[str, Any]:
    """Fuses a model, verifies it, and freezes the result."""
    params = sum(p.numel() for p in built.model.parameters())
    if params > LIMIT:
        return {"skipped": f"{params:,} parameters"}
    if built.meta:
        built = build(built.candidate, real=True)
    _prepare(built.model)
    inputs = _smaller(built)
    start = time.perf_counter()
    done = fuse(built.model, inputs, thorough=False)
    seconds = time.perf_counter() - start
    proof, reference = _proof(done)
    if not proof.passed and reference is not None and _own(reference.detail) > CHAOTIC:
        # Rounding alone moves this model's output by so much that twice as much is chance: once more, other weights.
        torch.manual_seed(1)
        other = _construct(built.candidate).eval()
        _prepare(other)
        done = fuse(other, inputs, thorough=False)
        proof, reference = _proof(done)
    row: dict[str, Any] = {
        "input": [list(t.shape) for t in inputs if isinstance(t, Tensor)],
        "fuse_s": round(seconds, 2),
        "done": dict(Counter(edit.op.action for edit in done.edits)),
        "left": dict(Counter(f"{skip.reason}: {_kind(skip.detail)}" for skip in done.plan.skips)),
        "kernels": [done.before["kernels"], done.after["kernels"]],
        "detail": "not compared" if reference is None else reference.detail,
        "failures": [f"{check.name}: {check.detail}"[:300] for check in proof.failures],
        **_freeze(done.model, inputs),
    }
    allowed = max(FROZEN, 0.0 if reference is None else 2 * _own(reference.detail))
    row["passed"] = proof.passed and row.get("frozen_error", 0.0) <= allowed
    try:
        row["fusible"] = dict(unfused(done.model, inputs))
    except Exception as error:
        row["fusible_error"] = f"{type(error).__name__}: {error}"[:200]
    return row


def _prepare(model: nn.Module) -> None:
    """Makes a model one that mistakes show in, on small inputs."""
    _liven(model)
    shrink_transform(model)


def _proof(done: Fused) -> tuple[Verification, Check | None]:
    """What verification said, and of that the comparison with float64, where there is one."""
    proof = done.report.verification
    assert proof is not None
    return proof, next((check for check in proof.checks if check.name.startswith("float64 reference")), None)


def _freeze(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Any]:
    """Whether `freeze` takes a fused model, and how far its outputs are from the model's on other values."""
    start = time.perf_counter()
    try:
        frozen = freeze(model, inputs)
    except PwrewriteError as refusal:
        return {"frozen": False, "not_frozen": refusal.got or refusal.message}
    seconds = round(time.perf_counter() - start, 2)
    generator = torch.Generator().manual_seed(3)
    others = [torch.rand(t.shape, generator=generator) for t in inputs]
    with torch.no_grad():
        wanted, found = (tensors_of(one(*(t.clone() for t in others))) for one in (model, frozen))
    if not frozen.shapes or [t.shape for t in wanted] != [t.shape for t in found]:
        raise AssertionError("the frozen model forgot its function, or returns something else")
    error = _distance(found, wanted)
    return {"frozen": True, "frozen_error": error, "freeze_s": seconds}


def _own(detail: str) -> float:
    """The error of the original, from the detail of a check."""
    return float(detail.rpartition(", ")[2].split()[0])


def _kind(detail: str) -> str:
    """A reason without the path in it."""
    return " ".join(word for word in detail.split() if "." not in word.strip(",.;") and "_" not in word)[:80]


def _smaller(built: Built) -> tuple[Any, ...]:
    """A smaller image where the model takes one."""
    inputs = built.inputs
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or inputs[0].dim() != 4 or inputs[0].shape[-1] <= 128:
        return inputs
    small = inputs[0][:, :, :128, :128].contiguous()
    try:
        with torch.no_grad():
            copy.deepcopy(built.model)(small)
    except Exception:
        return inputs
    return (small,)


def _liven(model: nn.Module) -> None:
    """Statistics that a fold must not ignore."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        if isinstance(mean, Tensor) and isinstance(var, Tensor):
            mean.copy_(torch.rand(mean.shape, generator=generator) * 0.2 - 0.1)
            var.copy_(torch.rand(var.shape, generator=generator) * 0.5 + 0.75)


def summary(rows: dict[str, dict[str, Any]]) -> str:
    """The figures of a sweep, then what failed or was left though it could be fused."""
    good = {k: r for k, r in rows.items() if "error" not in r and "skipped" not in r}
    done: Counter[str] = Counter()
    left: Counter[str] = Counter()
    for r in good.values():
        done.update(r["done"])
        left.update(r["left"])
    lines = [
        f"{len(rows)} models, {len(good)} fused, {sum('skipped' in r for r in rows.values())} too large, "
        f"{sum('error' in r for r in rows.values())} errors, {sum(not r['passed'] for r in good.values())} different, "
        f"{sum(r['detail'] == 'not compared' for r in good.values())} not compared, "
        f"{sum(bool(r.get('fusible')) for r in good.values())} with something fusible left, "
        f"{sum(r['frozen'] for r in good.values())} frozen",
        f"done: {dict(done)}",
    ]
    not_frozen = Counter(_kind(r["not_frozen"]) for r in good.values() if not r["frozen"])
    lines += [f"not frozen {n:6} {reason}" for reason, n in not_frozen.most_common()]
    lines += [f"left {n:6} {reason}" for reason, n in left.most_common()]
    for key, r in sorted(rows.items()):
        if "error" in r:
            lines.append(f"{key}: {r['error'].splitlines()[0][:200]}")
        elif "skipped" not in r and (not r["passed"] or r.get("fusible")):
            wrong = "" if r["passed"] else f"{r['failures']} frozen {r.get('frozen_error')}"
            lines.append(f"{key}: {wrong} fusible {r.get('fusible')}"[:400])
    return "\n".join(lines)
