"""The options of the library, each declared once: which model, which layers and passes, which budget, which proof.

`pwrewrite.core.declaring` says how. Nothing here imports torch, since ``pwrewrite --help`` reads these records.
"""
# ruff: noqa: RUF009 (`option` makes a dataclass field)

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .declaring import documented, option, path
from .names import ENGINE_NAMES, EXPORT_NAMES, FORM_NAMES, JOINT_FORM_NAMES
from .numbers import (
    Time,
    parse_arg,
    parse_count,
    parse_error,
    parse_increase,
    parse_share,
    parse_size,
    parse_time,
    parse_width,
)

if TYPE_CHECKING:
    from .plan import Plan

Width = int | float
"""A width, or the part of the channels that it is."""

MODEL, PASSES, BUDGET, PROOF = "Model and inputs", "What is rewritten", "Budget and calibration", "Verification"
LIMITS, RECOVERY = "Limits", "Recovery"
"""The panels in which the help of a command shows options."""

_of_model, _of_passes, _of_budget, _of_proof = (partial(option, panel=p) for p in (MODEL, PASSES, BUDGET, PROOF))
_of_recovery = partial(option, None, panel=RECOVERY)
_seed = partial(_of_model, 0, "Seed of what is drawn: weights, samples.", "--seed N", least=0)
_calibration = partial(
    _of_budget,
    None,
    "A few hundred unlabelled inputs: .npy, .npz, .safetensors, a folder of images, or file.py:NAME, an iterable of "
    "batches.",
    "--calibration DATA",
)
_batch = partial(
    _of_budget,
    None,
    "Function from a batch as --calibration gives it to the model's inputs, or to (inputs, labels).",
    "--batch file.py:NAME",
)
_preprocess = partial(
    _of_budget,
    None,
    "Function from a batch of arrays, or an image, to what the model takes.",
    "--preprocess file.py:NAME",
)
engine_option = partial(
    option,
    None,
    f"Where latencies are measured: {', '.join(ENGINE_NAMES)}, or auto, the fastest of them for this model. "
    r"[dim]\[default: torch, with the model as it is][/]",
    "--engine NAME",
    choices=(*ENGINE_NAMES, "auto"),
)
_calibration_size = partial(_of_budget, None, "Use at most so many inputs.", "--calibration-size N", least=1)


@documented
@dataclass(frozen=True)
class TargetOptions:
    """A target and how it is opened; Python takes ``args`` as a dict and ``inputs`` as a list of texts."""

    target: str = option(
        MISSING,
        "[bold]model.py[/], [bold]model.py:NAME[/], [bold]package.module:NAME[/], [bold]torchvision:NAME[/], "
        "[bold]timm:NAME[/] or a [bold]folder[/] that rewrite saved.",
    )
    args: Mapping[str, object] = _of_model(
        {}, "Argument for what makes the model; repeatable.", "--arg K=V", read=parse_arg, gather=dict
    )
    weights: Path | None = _of_model(
        None, "Checkpoint to fill in (.safetensors, .pt, .pth), read safely.", "--weights FILE", read=path
    )
    weights_lenient: bool = _of_model(False, "Accept a checkpoint that fits in part.", "--weights-lenient")
    inputs: Sequence[str] = _of_model(
        (),
        "Example input such as 1x3x224x224, 1x77:int64 or mask=1x1x64x64; repeatable. "
        "Without it: taken from the file, the folder, the zoo or the first layer.",
        "--input SHAPE",
    )
    base: str | None = _of_model(None, "For a saved folder: the model that it was rewritten from.", "--model TARGET")
    trust_target: bool = _of_model(
        False, "For a saved folder: import the model that its plan names, which runs that code.", "--trust-target"
    )
    seed: int = _seed()


@documented
@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """Which layers are rewritten."""

    include: Sequence[str] = _of_passes((), "Only these layers, such as 'layer3.*'; repeatable.", "--include PATTERN")
    exclude: Sequence[str] = _of_passes((), "Not these layers; repeatable.", "--exclude PATTERN")
    multiple: int | None = _of_passes(
        None,
        r"What computed widths are rounded to. [dim]\[default: 8 from 64 channels on, else 1][/]",
        "--multiple N",
        least=1,
    )
    replan: bool = _of_passes(False, "Also rewrite layers that an earlier rewrite made.", "--replan")


@documented
@dataclass(frozen=True)
class PassOptions(LayerOptions):
    """Passes by name, and their settings.

    Shares are floats up to 1 in Python, and widths integers, or floats for parts of the channels. ``min_share`` is 1%
    where neither passes nor layers are named, else 0.
    """

    passes: Sequence[object] = _of_passes(
        (),
        "Pass to run, see `pwrewrite passes`; repeatable, in order. Without --pass, --set and --plan: "
        "insert-bottleneck on layers with at least 1% of the MACs.",
        "--pass",
        "--passes NAME",
        split=True,
    )
    settings: Sequence[str] = _of_passes(
        (),
        "A form for one layer (or pattern), over --pass; repeatable: b3=reduce:96, 'layer4.*=bottleneck:64,32', "
        f"pool=project:32, conv1=narrow:0.5, fc=keep. Forms: {', '.join(FORM_NAMES)}, project, narrow, keep.",
        "--set PATH=FORM:W",
    )
    rank: Width | None = _of_passes(
        None,
        r"Width of the new layers: 32, or 0.5 or 50% of the channels. [dim]\[default: the pass's own][/]",
        "--rank R",
        read=parse_width,
    )
    rank_in: Width | None = _of_passes(None, "The same, of the reduction only.", "--rank-in R", read=parse_width)
    rank_out: Width | None = _of_passes(None, "The same, of the expansion only.", "--rank-out R", read=parse_width)
    energy: float | None = _of_passes(
        None, "Instead of --rank: part of ‖W‖² to keep, 0.95 or 95%.", "--energy SHARE", read=parse_share
    )
    vbmf: bool = _of_passes(False, "Instead of --rank: ranks by empirical variational Bayes.", "--vbmf")
    min_share: float | None = _of_passes(
        None, "Only layers with this part of the MACs.", "--min-share SHARE", read=parse_share
    )
    min_gain: float | None = _of_passes(
        None,
        r"Leave layers whose rewrite saves less of their MACs. [dim]\[default: 10%, 0 with a --rank like 32][/]",
        "--min-gain SHARE",
        read=parse_share,
    )
    allow_growth: bool = _of_passes(False, "Also where it costs more than it saves.", "--allow-growth")
    init: str = _of_passes(
        "weights",
        "New layers from the old weights, or fresh ones that are to be trained.",
        "--init",
        choices=("weights", "fresh"),
    )
    norm: str | None = _of_passes(
        None, "With --init fresh: norm after every new layer but the last: batch_norm, instance_norm.", "--norm NAME"
    )
    activation: str | None = _of_passes(None, "With --init fresh: activation there, such as relu.", "--activation NAME")


@documented
@dataclass(frozen=True, kw_only=True)
class RecoverOptions:
    """How a rewritten model is trained, with its original as the teacher; ``augment`` may be a function itself."""

    recover: Time | str | None = _of_recovery(
        "Train the result to the original on --calibration so long: 5m, 90s, 1h, or 3epochs, which is reproducible.",
        "--recover TIME",
        read=parse_time,
    )
    recover_batch: int | None = _of_recovery(
        r"Inputs in a step. [dim]\[default: as many as calibrate together, up to 32][/]", "--recover-batch N", least=1
    )
    recover_rate: float | None = _of_recovery(
        r"Largest learning rate. [dim]\[default: 0.003, 0.001 where no blocks can be compared][/]",
        "--recover-rate R",
        read=parse_error,
    )
    recover_device: str | None = _of_recovery(
        r"Device to train on, such as cuda. [dim]\[default: where the model is][/]", "--recover-device DEVICE"
    )
    augment: str | Callable[..., object] | None = _of_recovery(
        "What is done to the inputs of each step: shift, flip (and shift), none, or file.py:NAME, a function of the "
        r"model's inputs. [dim]\[default: shift for images][/]",
        "--augment NAME",
    )


@documented
@dataclass(frozen=True)
class Budget(LayerOptions, RecoverOptions):
    """What the result may cost, and how layers, forms and widths are chosen so that the least is lost.

    Attributes:
        limits: Kind to limit, ``{"macs": 0.5, "params": "12M"}``, where floats up to 1 are parts of the original; the
            same as ``macs=0.5`` texts; or a single number, which limits the MACs.
        calibration: Any iterable of batches, or what names one; without it the weights' own errors are a poorer guide.
        batch: A function, or what names one, as ``preprocess`` and ``metric``.
        plan: A plan that has chosen already: only its weights are calibrated.
        metric_name: What reports call the metric; the name of its function where empty.
        first: Passes that run before anything is planned.
    """

    limits: Mapping[str, object] | Sequence[object] | float = _of_budget(
        (),
        "Instead of passes: what the result may cost, of the original or absolute: macs=0.5, params=12M, "
        "bytes=40MiB, latency=8ms; repeatable. Layers, forms and widths are chosen so that the least is lost.",
        "--budget KIND=LIMIT",
    )
    calibration: str | Iterable[object] | None = _calibration()
    batch: str | Callable[..., object] | None = _batch()
    preprocess: str | None = _preprocess()
    calibration_size: int | None = _calibration_size()
    forms: Sequence[str] = _of_budget(
        ("all",),
        "What layers may become: all, 1x1 (forms that add 1×1 layers only) or some of "
        f"{', '.join((*FORM_NAMES, *JOINT_FORM_NAMES))}. "
        r"[dim]\[default: all][/]",
        "--forms NAMES",
        split=True,
    )
    sensitivity: str | None = _of_budget(
        None,
        r"In what norm an error counts. [dim]\[default: loss, or weights without --calibration][/]",
        "--sensitivity",
        choices=("loss", "activations", "weights"),
    )
    refit: str | None = _of_budget(
        None,
        "What is fitted to the original on the calibration inputs: everything, biases and norms, or nothing. "
        r"[dim]\[default: full][/]",
        "--refit",
        choices=("full", "bias", "none"),
    )
    max_layer_error: float | None = _of_budget(
        None,
        "Largest relative error of one layer, in the norm of --sensitivity: 0.3 or 30%.",
        "--max-layer-error E",
        read=parse_share,
    )
    outputs: str | None = _of_budget(
        None,
        r"What the model's outputs are; class scores are compared as predictions. [dim]\[default: by their values][/]",
        "--outputs",
        choices=("logits", "probabilities", "values"),
    )
    gate: str | None = _of_budget(
        None,
        "Use only candidates that are measured to be faster than the layer on this device.",
        "--gate",
        choices=("latency",),
    )
    engine: str | None = engine_option(panel=BUDGET)
    threads: int | None = _of_budget(
        None, r"Threads while latencies are measured. [dim]\[default: as torch has them][/]", "--threads N", least=1
    )
    best_effort: bool = _of_budget(
        False, "Take the nearest result where a limit is missed, as measured in the end.", "--best-effort"
    )
    bake: bool = _of_budget(
        False, "Bake parametrized, weight-normed and standardised weights into plain ones first.", "--bake"
    )
    metric: str | Callable[..., float] | None = _of_budget(
        None, "Function of a model, larger is better; reported before and after.", "--metric file.py:NAME"
    )
    labels: Path | None = _of_budget(
        None,
        "Class of each calibration input (.npy, .npz, .txt, .csv, .safetensors): accuracy on those held out.",
        "--labels FILE",
        read=path,
    )
    max_drop: float | None = _of_budget(
        None,
        "With --metric: the smallest model whose metric falls by no more than that: 0.01 or 1%.",
        "--max-drop D",
        read=parse_error,
    )
    seed: int = _seed()
    plan: Plan | None = None
    metric_name: str = ""
    first: Sequence[Any] = ()


@documented
@dataclass(frozen=True)
class Proof:
    """Whether and how the result is verified; ``thorough`` is at several sizes, in train mode and with gradients."""

    verify: bool = _of_proof(
        True, "Leave the verification out; then nothing is saved without --save-unverified.", "--no-verify"
    )
    thorough: bool = True
    max_error: float | None = _of_proof(
        None, "Fail if the relative output error is larger: 0.1 or 10%.", "--max-error E", read=parse_error
    )
    allow_output_change: bool = _of_proof(
        False, "An output may change its shape; the report says how.", "--allow-output-change"
    )


_of_limits = partial(option, None, panel=LIMITS)


@documented
@dataclass(frozen=True)
class GateOptions:
    """What a model may cost; against a baseline without `max_increase`: no more parameters and no more MACs."""

    max_params: int | None = _of_limits("Most parameters: 5M.", "--max-params N", read=parse_count)
    max_macs: int | None = _of_limits("Most MACs: 600M.", "--max-macs N", read=parse_count)
    max_weights: int | None = _of_limits("Most bytes of weights: 20MB.", "--max-weights SIZE", read=parse_size)
    max_peak_memory: int | None = _of_limits(
        "Most bytes of activations alive at one time: 20MB.", "--max-peak-memory SIZE", read=parse_size
    )
    baseline: str | None = _of_limits(
        "What the model may not outgrow: an analysis as JSON, or a target.", "--baseline FILE"
    )
    max_increase: Mapping[str, float] = option(
        {},
        "With --baseline, by how much: macs=2%, params=0, weights=5%, peak-memory=10%; repeatable. "
        r"[dim]\[default: macs=0 and params=0][/]",
        "--max-increase K=SHARE",
        panel=LIMITS,
        read=parse_increase,
        gather=dict,
    )
    warn_at: float | None = _of_limits("Warn from this part of a limit on: 90%.", "--warn-at SHARE", read=parse_share)
    strict: bool = option(False, "Fail if an operation has no cost formula.", "--strict", panel=LIMITS)


_of_export = partial(option, panel="Export")


@documented
@dataclass(frozen=True)
class ExportOptions:
    """What is exported, and what stays variable; Python takes ``to`` as a name or a list of them."""

    to: Sequence[str] = _of_export(
        ("onnx",), rf"Formats: {', '.join(EXPORT_NAMES)}. [dim]\[default: onnx][/]", "--to FORMATS", split=True
    )
    dynamic: Sequence[str] = _of_export(
        (),
        "A further axis of an input that may vary: x:2, or x:2=height; axes of one label vary together; repeatable.",
        "--dynamic INPUT:AXIS",
    )
    static: bool = _of_export(False, "Keep the batch size of the example inputs.", "--static")
    int8: bool = _of_export(
        False,
        "Also quantized, calibrated on --calibration: kept where it is measured to be faster, with the loss it costs.",
        "--int8",
    )
    calibration: str | Iterable[object] | None = _calibration()
    batch: str | Callable[..., object] | None = _batch()
    preprocess: str | None = _preprocess()
    calibration_size: int | None = _calibration_size()
    out: Path | None = _of_export(
        None, "Where to: the files that agree with the model and export.json.", "--out DIR", read=path
    )
    force: bool = _of_export(False, "Replace a folder that an earlier export wrote.", "--force")


@documented
@dataclass(frozen=True)
class CompressOptions:
    """What becomes of a compressed model."""

    export: Sequence[str] = _of_export(
        (), f"Formats to export it to as well: {', '.join(EXPORT_NAMES)}.", "--export FORMATS", split=True
    )
    out: Path | None = _of_export(
        None,
        "Where to: weights, plan, report, README, and exports in export/; whole or not at all.",
        "--out DIR",
        read=path,
    )
    force: bool = _of_export(False, "Replace a folder that an earlier compress wrote.", "--force")
