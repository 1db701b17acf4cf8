"""Fusing a model: exact passes that make it faster, proven like a rewrite: `fuse`.

The passes run in order, each on the model as the ones before left it: what does nothing in evaluation goes, norms go
into the layers before them, branches and neighbours merge, layers take over the activations and additions behind them,
and the convolutions compute in channels_last. `DEFAULT` lists them.

Proven in three ways: by `pwrewrite.verify` as any rewrite; without gradients, where the fused kernels run, against the
original in float64, from which the fused model may be at most twice as far as the original itself; and by a real run
after the change of the memory format. That is taken back where the model's own code does not survive it (``x.view(n,
-1)`` on a map in channels_last), and where the proof fails with it: torch's group norm, for one, may be ten times less
exact in that format.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..capturing import Inputs, split_inputs
from ..capturing.records import Capture, info
from ..core.declaring import from_keywords, refuse_unknown
from ..core.errors import RefusedError, first_line
from ..core.modes import plain_modes
from ..core.nested import deep_copy, map_tensors, tensors_of
from ..core.numbers import plural
from ..core.options import Proof
from ..core.plan import Plan, SkipReason
from ..core.verification import Check, Verification
from ..edit.swap import copy_of
from ..layers import PointwiseActivation
from ..layers.kernels import LOSES_NAN, in_channels_last
from ..passes import FUSING, FusePointwiseActivation, Pass
from ..passes.channels_last import ChannelsLast
from ..passes.fold_batch_norm import FoldBatchNorm
from ..passes.merge_pointwise import MergePointwise
from ..report.records import FusingReport
from ..verifying.numerics import relative_difference
from ..verifying.rounding import noisy_copy
from .pass_names import as_list, named_pass
from .rewrite import Rewritten, verified
from .steps import Progress, Run, State, join_names, propose, silent
from .subject import Subject, check_editable, loaded_of, plan_from_original, with_notes_of

DEFAULT = FUSING


@dataclass(frozen=True, repr=False)
class Fused(Rewritten):
    """The result of fusing: that of a rewrite, and what it saves.

    Attributes:
        before: Nodes, kernels and bytes moved, before.
        after: The same, after.
    """

    before: Mapping[str, int] = field(default_factory=dict)
    after: Mapping[str, int] = field(default_factory=dict)


_REPEATED = (FoldBatchNorm, MergePointwise)
"""Passes that go on until nothing is left: three in a row are two pairs, and a layer may lie between two norms."""

_TRIES = 4
"""At most this many inputs, or copies of a model that decides by values, that errors are taken from."""

_REFERENCE = "float64 reference (fused kernels)"

_REFERENCE_LIMIT = 300_000_000
"""Parameters above which no copy in float64 is made."""


@plain_modes()
def fuse(
    model: Subject,
    example_inputs: Inputs | None = None,
    passes: Sequence[Pass | str] | None = None,
    *,
    keep_nan: bool | None = None,
    target: str | None = None,
    progress: Progress | None = None,
    **options: object,
) -> Fused:
    """Makes a model faster without changing what it computes in evaluation.

    NaN and Inf: the fused kernels of ReLU, ReLU6, hardtanh and hardsigmoid return a number for NaN. Where it costs less
    than 2% of the time, as far as the maps of the example inputs tell, these activations run behind the kernel, and NaN
    stays NaN, as it always does with gradients; elsewhere a note in the report says that it may become a number. GELU's
    kernel returns NaN for Inf.

    Args:
        model: A module in evaluation mode, of real floating-point weights on one device, or what `pwrewrite.
            load_target` gives; stays as it is.
        example_inputs: A tensor, a tuple of positional inputs or a dict of keyword ones; a loaded model has its own.
        passes: What is done, in order; those of `DEFAULT` where left out.
        keep_nan: Whether NaN always stays NaN, whatever that costs (up to 8% of the time, on large maps), or need not;
            where left out, as said above. Passes that are given as objects say it themselves.
        target: Name for the report.
        progress: Called at each step with what is being done and how much of it is done.
        **options: Fields of `pwrewrite.Proof`: ``verify``, ``thorough``, ….

    Returns:
        The fused copy with its plan, which leads from the original model of a target, and report. Whether verification
        passed is ``report.passed``.

    Raises:
        RefusedError: If the model is in training mode and a pass is exact in evaluation only, or its weights are
            complex, quantized or on several devices.
        CaptureError: If the model does not run on the inputs.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    >>> fused = fuse(model, torch.randn(1, 3, 8, 8))
    >>> fused.report.passed, fused.before["kernels"], fused.after["kernels"]
    (True, 3, 1)
    """
    asked = from_keywords(Proof, options)
    refuse_unknown("fuse", options, Proof)
    loaded = loaded_of(model, example_inputs)
    check_editable(loaded.model)
    model, example_inputs, target = loaded.model, loaded.example_inputs, target or loaded.target or None
    kinds = DEFAULT if passes is None else [named_pass(each, DEFAULT) for each in as_list(passes)]
    fusing = FusePointwiseActivation(keep_nan=keep_nan)
    chosen = [fusing if k is FusePointwiseActivation else k() if isinstance(k, type) else k for k in kinds]
    _check(model, chosen)
    run = Run(model, example_inputs, progress or silent)
    last: tuple[State, Plan] | None = None  # before a change of the memory format, where the last pass made one
    for each in chosen:
        run.say(f"{each.name}: proposing", None)
        plan = propose(run.state.captured, [each])
        last = None
        if isinstance(each, ChannelsLast):
            before = run.state
            run.state = _surviving(run, plan)
            last = (before, plan) if len(run.state.rows) > len(before.rows) else None
            continue
        done = len(run.state.rows)
        run.step(plan)
        while isinstance(each, _REPEATED) and len(run.state.rows) > done:
            done = len(run.state.rows)
            run.step(propose(run.state.captured, [each]))
    proof = _verified(run, asked) if asked.verify else None
    if last is not None and proof is not None and not proof.passed:
        state, plan = last
        failed = proof.failures[0]
        detail = f"verification failed in it, {failed.name}: {failed.detail}"
        run.state = state.skipping(plan, SkipReason.BROKE_MODEL, detail)
        proof = _verified(run, asked)
    costs = traffic(run.first), traffic(run.state.captured)
    report = run.report(*run.analyses(target), target, proof)
    report = replace(report, fusing=FusingReport(*costs), notes=(*report.notes, *_nan_notes(run.state.model)))
    edits = tuple(row.edit for row in run.state.rows)
    plan, names = plan_from_original(loaded, run.finished(target)), join_names(loaded.names, run.state.names)
    return Fused(run.result(), plan, with_notes_of(loaded, report), edits, names, *costs)


def _nan_notes(model: nn.Module) -> list[str]:
    """What becomes of NaN in a fused model, where it is not kept."""
    losing = sum(
        isinstance(m, PointwiseActivation) and m.activation in LOSES_NAN and not m.keep_nan for m in model.modules()
    )
    if not losing:
        return []
    return [
        f"NaN may become a number behind the ReLU-like activations of {plural(losing, 'fused layer')}: keeping it "
        "costs more than 2% of the time on maps this large (--keep-nan, keep_nan=True)"
    ]


def _check(model: nn.Module, passes: Sequence[Pass]) -> None:
    """Refuses models that cannot be fused rightly."""
    devices, early = dict[str, str](), "fuse the model before it is quantized"
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        owner = model.get_submodule(name.rpartition(".")[0])
        if tensor.dtype.is_complex and type(owner).__module__.startswith("torch.nn."):
            raise RefusedError("complex weights cannot be fused", where=name, got=str(tensor.dtype))
        if tensor.is_quantized:
            raise RefusedError("quantized weights cannot be fused", where=name, got=str(tensor.dtype), hint=early)
        devices.setdefault(str(tensor.device), name)
    for name, module in model.named_modules():
        kind = type(module).__module__
        if type(module).__name__.endswith("FloatFunctional"):  # what is quantized later, and computes in floats
            continue
        if kind.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized")):
            raise RefusedError("quantized layers cannot be fused", where=name, got=type(module).__name__, hint=early)
    inexact = [each.name for each in passes if each.exact == "eval"]
    training = next((name or "the model" for name, module in model.named_modules() if module.training), None)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if inexact and training is not None and any(module.training for module in (model, *norms)):
        raise RefusedError(
            "the model is in training mode, in which batch norms cannot be folded",
            where=training,
            hint=f"call model.eval() first, or leave out {', '.join(inexact)}",
        )
    if len(devices) > 1:
        shown = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise RefusedError("the weights are on several devices", got=shown, hint="move the model to one")


def _surviving(run: Run, plan: Plan) -> State:
    """What carrying out a plan comes to: only skips where the model does not run with real values any more."""
    tried = run.tried(plan)
    if not plan.ops or any(t.is_meta for t in (*tried.model.parameters(), *tried.model.buffers())):
        return tried
    try:
        outputs_of(tried.model, run.inputs)
    except Exception as error:
        detail = f"the model's own code does not survive it: {first_line(error)}"
        return run.state.skipping(plan, SkipReason.BROKE_MODEL, detail)
    return tried


def traffic(captured: Capture) -> dict[str, int]:
    """What a model has to do beside its MACs, from shapes alone: ``nodes`` of the graph that compute, ``kernels`` (a
    fused layer is one) and ``bytes_moved`` by them.

    A view moves nothing; a fused layer reads its inputs and weights and writes its output once.
    """
    modules = dict(captured.model.named_modules(remove_duplicate=False))
    nodes = kernels = moved = 0
    open_layer: tuple[str, set[fx.Node]] = ("", set())
    for node in captured.graph.nodes:
        facts = info(node)
        size = facts.cost.read_bytes + facts.cost.write_bytes
        if node.op not in ("call_module", "call_function", "call_method") or not size:
            continue
        if facts.op in ("identity", "dropout"):
            continue
        nodes += 1
        fused = isinstance(modules.get(facts.path), PointwiseActivation)
        if fused and open_layer[0] == facts.path and any(n in open_layer[1] for n in node.all_input_nodes):
            open_layer[1].add(node)
            others = [n for n in node.all_input_nodes if n not in open_layer[1]]
            moved += sum(spec.nbytes for n in others for spec in info(n).outputs)
            continue
        open_layer = (facts.path if fused else "", {node})
        kernels += 1
        moved += size
    return {"nodes": nodes, "kernels": kernels, "bytes_moved": moved}


# ------------------------------------------------------------------------------------------------------- proof


def _verified(run: Run, proof: Proof) -> Verification:
    result = verified(run, run.analyses(None)[0], proof)
    run.say("verifying: against float64", None)
    by_value = run.first.coverage.values == "real"
    check = reference_check(run.first.model, run.state.model, run.inputs, by_value=by_value)
    return result if check is None else replace(result, checks=(*result.checks, check))


def reference_check(model: nn.Module, fused: nn.Module, inputs: Inputs, *, by_value: bool = False) -> Check | None:
    """Compares a fused model, without gradients, with the original in float64, on inputs of these shapes.

    Where the fused model is further off than allowed, the inputs are also moved along the last axis, and the root mean
    square over all counts: the error on one input is that on a few outputs, which vary. What one rounding does to the
    outputs of code that decides ``by_value``, as detectors do when they choose boxes, is a matter of luck, so the
    original is then also tried with its weights moved by one rounding, in its memory format and in channels_last, and
    the worst of its errors counts.

    None where no values can be compared: weights on meta, a model that cannot run in float64, outputs of which rounding
    alone changes the order or number.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if any(t.is_meta for t in tensors) or sum(t.numel() for t in tensors) > _REFERENCE_LIMIT:
        return None
    drawn = drawn_inputs(inputs)
    errors: list[tuple[float, float]] = []
    for turn in range(1 if by_value else _TRIES):
        given = map_tensors(drawn, partial(_rolled, turn=turn))
        try:
            exact = _run(copy_of(model).double(), map_tensors(given, _doubled))
            first = outputs_of(model, given)
        except Exception:
            break
        try:
            second = outputs_of(fused, given)
        except Exception as error:
            return Check(_REFERENCE, False, f"the fused model does not run: {first_line(error)}")
        if not [t.shape for t in first] == [t.shape for t in exact] == [t.shape for t in second]:
            break
        errors.append((_distance(first, exact), _distance(second, exact)))
        largest = max((t.dtype for t in first), key=lambda d: torch.finfo(d).eps, default=torch.float32)
        floor = 4 * torch.finfo(largest).eps
        if largest == torch.float64:  # the original is its own reference, so what rounding does is not measured
            floor *= 8 * math.sqrt(max(1, sum(hasattr(m, "weight") for m in model.modules())))
        own, ours = (math.hypot(*found) / len(errors) ** 0.5 for found in zip(*errors))
        if ours <= 2 * own + floor:
            break
    if not errors:
        return None
    unmeasured = largest == torch.float64 and ours > 2 * own + floor
    for seed in range(_TRIES if by_value or unmeasured else 0):
        copied = noisy_copy(model, torch.finfo(largest).eps / 2, seed)
        try:
            moved = _run(in_channels_last(copied) if seed % 2 else copied, drawn)
        except RuntimeError:  # the model's own code does not survive that memory format
            continue
        same = [t.shape for t in moved] == [t.shape for t in exact]
        own = max(own, _distance(moved, exact) if same else math.inf)
    if not own < 0.05:
        return None  # another order of results, or no finite ones
    over = f" over {len(errors)} inputs" if len(errors) > 1 else ""
    detail = f"relative error {ours:.2g} to float64{over}, {own:.2g} before"
    return Check(_REFERENCE, ours <= 2 * own + floor, detail)


def _rolled(t: Tensor, turn: int) -> Tensor:
    """The same values, moved along the last axis: other inputs of the same kind."""
    return t.roll(turn * t.shape[-1] // _TRIES, -1) if turn and t.dim() and t.is_floating_point() else t


def drawn_inputs(inputs: Inputs) -> Any:
    """Example inputs with values: random ones where they are constant or on meta."""
    generator = torch.Generator().manual_seed(0)

    def draw(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return torch.zeros(t.shape, dtype=t.dtype, device="cpu") if t.is_meta else t
        if not t.is_meta and t.numel() and not bool((t == t.flatten()[0]).all()):
            return t
        device = "cpu" if t.is_meta else t.device
        return torch.rand(t.shape, generator=generator, device="cpu").to(device, t.dtype)

    return map_tensors(inputs, draw)


def _doubled(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def outputs_of(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The output tensors of a copy of a model in evaluation mode, on copies of inputs, without gradients."""
    return _run(deep_copy(model), inputs)


def _run(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The same of a model that may change."""
    args, kwargs = split_inputs(map_tensors(inputs, lambda t: t.clone()))
    model.eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out = model(*args, **kwargs)
    if not tensors_of(out) and hasattr(out, "__dict__"):
        out = vars(out)
    return [t for t in tensors_of(out) if t.is_floating_point()]


def _distance(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """``‖y − ŷ‖ / ‖y‖`` of the worst tensor."""
    return max(
        (relative_difference(a, b) if bool(b.any()) else float(a.double().norm()) for a, b in zip(found, exact)),
        default=0.0,
    )
