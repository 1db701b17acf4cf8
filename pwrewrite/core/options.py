"""Options, declared once: records whose fields carry their default, their help and how they are typed.

The Python calls take these records, or their fields as keywords. The command line is made from them (`pwrewrite.cli.
bridge`), so that a new option is one field here. Nothing in this file imports torch: ``pwrewrite --help`` reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UsageError
from .numbers import parse_error, parse_arg, parse_share, parse_width

if TYPE_CHECKING:
    from .plan import Plan

MODEL, PASSES, BUDGET, PROOF = "Model and inputs", "What is rewritten", "Budget and calibration", "Proof"
"""The panels in which the help of a command shows options."""

Width = int | float
"""A width, or the part of the channels that it is."""


@dataclass(frozen=True, slots=True)
class Typed:
    """How an option is typed on the command line.

    Attributes:
        help: What it does, in a sentence.
        flags: Its spellings, the usual one first; none for an argument without a flag.
        panel: The part of the help that shows it.
        metavar: What stands for its value in the help.
        read: Makes the value of a text and the flag's name, which an error mentions; None to take the text.
        choices: The values there are; none where any text is taken.
        least: Smallest value of a whole number; None where it is no number.
        gather: Makes the value of an option that may be given several times of all its values; None for a single one.
        split: Whether one text may hold several values with commas between.
    """

    help: str
    flags: tuple[str, ...] = ()
    panel: str | None = None
    metavar: str | None = None
    read: Callable[[str, str], object] | None = None
    choices: tuple[str, ...] = ()
    least: int | None = None
    gather: Callable[[Iterable[Any]], object] | None = None
    split: bool = False


def path(text: str, what: str) -> Path:
    """Reads a path."""
    return Path(text)


def option(default: Any, help: str, *flags: str, **typed: Any) -> Any:
    """A field of a record that is also an option of the command.

    Args:
        default: Its value where it is not given; `dataclasses.MISSING` where it must be.
        help: See `Typed`, as all others.
        *flags: See `Typed`.
        **typed: See `Typed`.
    """
    if isinstance(default, tuple):
        typed.setdefault("gather", tuple)
    metadata = {"typed": Typed(help, flags, **typed)}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


def typed_fields(record: type) -> Iterator[tuple[Field[Any], Typed]]:
    """The fields of a record that can be typed, in order."""
    for each in fields(record):
        if "typed" in each.metadata:
            yield each, each.metadata["typed"]


def default_of(each: Field[Any]) -> Any:
    """The default of a field."""
    return each.default if each.default_factory is MISSING else each.default_factory()


def flag_of(record: type, name: str) -> str:
    """The usual spelling of an option."""
    return next((t.flags[0] for each, t in typed_fields(record) if each.name == name and t.flags), name)


def given(record: Any, *others: type) -> list[str]:
    """Names of the options of a record that differ from their defaults, without those that other records have too."""
    shared = {each.name for other in others for each in fields(other)}
    return [f.name for f in fields(record) if f.name not in shared and getattr(record, f.name) != default_of(f)]


def from_keywords[T](record: type[T], options: dict[str, Any]) -> T:
    """A record of those keywords that it has; takes them out of ``options``."""
    return record(**{each.name: options.pop(each.name) for each in fields(record) if each.name in options})  # type: ignore[call-overload, arg-type]


def refuse_unknown(function: str, options: Mapping[str, object], *records: type) -> None:
    """Refuses keywords that are no option.

    Raises:
        UsageError: If there are any; it names what is near.
    """
    known = [each.name for record in records for each in fields(record)]
    for name in options:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else None
        raise UsageError(f"{function}() has no option {name!r}", expected=", ".join(dict.fromkeys(known)), hint=hint)


@dataclass(frozen=True)
class TargetOptions:
    """A target and how it is opened.

    Attributes:
        target: ``model.py``, ``model.py:NAME``, ``package.module:NAME``, ``torchvision:NAME``, ``timm:NAME`` or a
            saved folder.
        args: Arguments of whatever makes the (original) model, by name.
        weights: A checkpoint; without one the model keeps the weights it is made with. Not for a folder, which holds
            its own.
        weights_lenient: Accept a checkpoint that fits in part.
        inputs: Example inputs, ``[NAME=]SHAPE[:DTYPE]`` each; without them they are found or guessed, and a note says
            so.
        base: For a folder: the target of the original model.
        trust_target: For a folder: whether the target that its plan records may be imported, which runs its code.
        seed: What the random state is set to while the model is made.
    """

    target: str = option(
        MISSING,
        "[bold]model.py[/], [bold]model.py:NAME[/], [bold]package.module:NAME[/], [bold]torchvision:NAME[/], "
        "[bold]timm:NAME[/] or a [bold]folder[/] that rewrite saved.",
    )
    args: Mapping[str, object] = option(
        {},
        "Argument for what makes the model; repeatable.",
        "--arg",
        panel=MODEL,
        metavar="K=V",
        read=parse_arg,
        gather=dict,
    )
    weights: Path | None = option(
        None,
        "Checkpoint to fill in (.safetensors, .pt, .pth), read safely.",
        "--weights",
        panel=MODEL,
        metavar="FILE",
        read=path,
    )
    weights_lenient: bool = option(
        False, "Accept a checkpoint that fits in part.", "--weights-lenient", panel=MODEL
    )
    inputs: Sequence[str] = option(
        (),
        "Example input such as 1x3x224x224, 1x77:int64 or mask=1x1x64x64; repeatable. "
        "Without it: what the file, the folder, the zoo or the first layer tells.",
        "--input",
        panel=MODEL,
        metavar="SHAPE",
    )
    base: str | None = option(
        None, "For a saved folder: the model that it was rewritten from.", "--model", panel=MODEL, metavar="TARGET"
    )
    trust_target: bool = option(
        False,
        "For a saved folder: import the model that its plan names, which runs that code.",
        "--trust-target",
        panel=MODEL,
    )
    seed: int = option(
        0, "Seed of weights that the model draws.", "--seed", panel=MODEL, metavar="N", least=0
    )


@dataclass(frozen=True)
class LayerOptions:
    """Which layers are rewritten.

    Attributes:
        include: Patterns on paths; all layers where empty.
        exclude: Patterns on paths of layers that stay as they are.
        multiple: What computed widths are rounded to; None for 8 from 64 channels on, else 1.
        replan: Whether what an earlier rewrite put in is looked at too.
    """

    include: Sequence[str] = option(
        (), "Only these layers, such as 'layer3.*'; repeatable.", "--include", panel=PASSES, metavar="PATTERN"
    )
    exclude: Sequence[str] = option((), "Not these layers; repeatable.", "--exclude", panel=PASSES, metavar="PATTERN")
    multiple: int | None = option(
        None,
        r"What computed widths are rounded to. [dim]\[default: 8 from 64 channels on, else 1][/]",
        "--multiple",
        panel=PASSES,
        metavar="N",
        least=1,
    )
    replan: bool = option(False, "Also inside what an earlier rewrite put in.", "--replan", panel=PASSES)


@dataclass(frozen=True)
class PassOptions(LayerOptions):
    """Passes by name, and their settings.

    Attributes:
        passes: Names of passes, in order; ``insert-bottleneck`` where neither these nor ``settings`` are given.
        settings: A form for single layers: ``PATH=FORM:WIDTH[,WIDTH]`` or ``PATH=keep`` each.
        rank: Width or ratio for every pass.
        rank_in: The same, of the reduction only.
        rank_out: The same, of the expansion only.
        energy: Part of ‖W‖² to keep, instead of widths.
        vbmf: Ranks by empirical variational Bayes, instead of widths.
        min_share: Least part of the MACs; 1% where neither passes nor layers are named, 0 otherwise.
        allow_growth: Rewrite also where that costs more.
        init: ``weights`` or ``fresh``.
        norm: With ``fresh``: the norm behind every new layer but the last.
        activation: With ``fresh``: the activation there.
    """

    passes: Sequence[Any] = option(
        (),
        "Pass to run, see `pwrewrite passes`; repeatable, in order. Without --pass, --set and --plan: "
        "insert-bottleneck on layers with at least 1% of the MACs.",
        "--pass",
        "--passes",
        panel=PASSES,
        metavar="NAME",
        split=True,
    )
    settings: Sequence[str] = option(
        (),
        "A form for one layer (or pattern), over --pass; repeatable: b3=reduce:96, 'layer4.*=bottleneck:64,32', "
        "pool=project:32, fc=keep. Forms: bottleneck, reduce, expand, spatial, depthwise, pair, project, keep.",
        "--set",
        panel=PASSES,
        metavar="PATH=FORM:W",
    )
    rank: Width | None = option(
        None,
        r"Width of the new layers: 32, or 0.5 or 50% of the channels. [dim]\[default: the pass's own][/]",
        "--rank",
        panel=PASSES,
        metavar="R",
        read=parse_width,
    )
    rank_in: Width | None = option(
        None, "The same, of the reduction only.", "--rank-in", panel=PASSES, metavar="R", read=parse_width
    )
    rank_out: Width | None = option(
        None, "The same, of the expansion only.", "--rank-out", panel=PASSES, metavar="R", read=parse_width
    )
    energy: float | None = option(
        None,
        "Instead of --rank: part of ‖W‖² to keep, 0.95 or 95%.",
        "--energy",
        panel=PASSES,
        metavar="SHARE",
        read=parse_share,
    )
    vbmf: bool = option(False, "Instead of --rank: ranks by empirical variational Bayes.", "--vbmf", panel=PASSES)
    min_share: float | None = option(
        None, "Only layers with this part of the MACs.", "--min-share", panel=PASSES, metavar="SHARE", read=parse_share
    )
    allow_growth: bool = option(False, "Also where it costs more than it saves.", "--allow-growth", panel=PASSES)
    init: str = option(
        "weights",
        "New layers from the old weights, or fresh ones that are to be trained.",
        "--init",
        panel=PASSES,
        choices=("weights", "fresh"),
    )
    norm: str | None = option(
        None,
        "With --init fresh: norm after every new layer but the last: batch_norm, instance_norm.",
        "--norm",
        panel=PASSES,
        metavar="NAME",
    )
    activation: str | None = option(
        None, "With --init fresh: activation there, such as relu.", "--activation", panel=PASSES, metavar="NAME"
    )


@dataclass(frozen=True)
class Budget(LayerOptions):
    """What the result may cost, and how layers, forms and widths are chosen so that the least is lost.

    Attributes:
        limits: Kind to limit, ``{"macs": 0.5, "params": "12M"}``, where floats up to 1 are parts of the original; the
            same as ``macs=0.5`` texts; or a single number, which limits the MACs.
        calibration: A few hundred unlabelled inputs: any iterable of batches, or what names one: a file, a folder of
            images, ``file.py:NAME``. Without it the weights' own errors count, which is a much poorer guide.
        preprocess: ``file.py:NAME`` of a function from a stored batch, or an image, to what the model takes.
        calibration_size: Use at most so many calibration inputs.
        forms: Forms to choose from: ``all``, ``1x1``, or some of `pwrewrite.forms.FORMS`.
        sensitivity: ``loss``, ``activations`` or ``weights``: in what norm an error counts; the best that the
            calibration allows by default.
        refit: ``full`` fits the factors, biases and norms to the original on the calibration inputs, ``bias`` the last
            two alone, ``none`` nothing.
        max_layer_error: Largest relative error of one layer, in the norm of ``sensitivity``.
        gate: ``latency`` to use only what is measured to be faster than the layer on this device.
        metric: Called with a model, larger is better, or ``file.py:NAME`` of such a function; measured before and
            after.
        labels: File with the class of each calibration input.
        max_drop: With a metric and in place of limits: how much it may fall.
        seed: Of everything that is drawn.
        plan: A plan that has chosen already: only its weights are calibrated.
    """

    limits: Mapping[str, object] | Sequence[Any] | float = option(
        (),
        "Instead of passes: what the result may cost, of the original or absolute: macs=0.5, params=12M, "
        "bytes=40MiB, latency=8ms; repeatable. Layers, forms and widths are chosen so that the least is lost.",
        "--budget",
        panel=BUDGET,
        metavar="KIND=LIMIT",
    )
    calibration: str | Iterable[Any] | None = option(
        None,
        "A few hundred unlabelled inputs: .npy, .npz, .safetensors, a folder of images, or file.py:NAME, an "
        "iterable of batches.",
        "--calibration",
        panel=BUDGET,
        metavar="DATA",
    )
    preprocess: str | None = option(
        None,
        "Function from a batch of arrays, or an image, to what the model takes.",
        "--preprocess",
        panel=BUDGET,
        metavar="file.py:NAME",
    )
    calibration_size: int | None = option(
        None, "Use at most so many inputs.", "--calibration-size", panel=BUDGET, metavar="N", least=1
    )
    forms: Sequence[str] = option(
        ("all",),
        r"What layers may become: all, 1x1 (reduce, expand, bottleneck, pair) or a list of forms. "
        r"[dim]\[default: all][/]",
        "--forms",
        panel=BUDGET,
        metavar="NAMES",
        split=True,
    )
    sensitivity: str | None = option(
        None,
        r"In what norm an error counts. [dim]\[default: loss, or weights without --calibration][/]",
        "--sensitivity",
        panel=BUDGET,
        choices=("loss", "activations", "weights"),
    )
    refit: str = option(
        "full",
        "What is fitted to the original on the calibration inputs: everything, biases and norms, or nothing.",
        "--refit",
        panel=BUDGET,
        choices=("full", "bias", "none"),
    )
    max_layer_error: float | None = option(
        None,
        "Largest relative error of one layer, in the norm of --sensitivity: 0.3 or 30%.",
        "--max-layer-error",
        panel=BUDGET,
        metavar="E",
        read=parse_share,
    )
    gate: str | None = option(
        None,
        "Use only candidates that are measured to be faster than the layer on this device.",
        "--gate",
        panel=BUDGET,
        choices=("latency",),
    )
    metric: str | Callable[[Any], float] | None = option(
        None,
        "Function of a model, larger is better; told before and after.",
        "--metric",
        panel=BUDGET,
        metavar="file.py:NAME",
    )
    labels: Path | None = option(
        None,
        "Class of each calibration input (.npy, .npz, .txt, .csv, .safetensors): accuracy on those held out.",
        "--labels",
        panel=BUDGET,
        metavar="FILE",
        read=path,
    )
    max_drop: float | None = option(
        None,
        "With --metric: the smallest model whose metric falls by no more than that: 0.01, or 1% for the same.",
        "--max-drop",
        panel=BUDGET,
        metavar="D",
        read=parse_error,
    )
    seed: int = 0
    plan: Plan | None = None


@dataclass(frozen=True)
class Proof:
    """Whether and how the result is verified.

    Attributes:
        verify: Whether to verify it.
        thorough: Whether at several batch and spatial sizes, in train mode, with gradients and reloading.
        max_error: Largest relative output error that passes; None for any.
        allow_output_change: Whether an output may change its shape, which the report then tells.
    """

    verify: bool = option(
        True, "Leave the verification out; then nothing is saved without --save-unverified.", "--no-verify", panel=PROOF
    )
    thorough: bool = True
    max_error: float | None = option(
        None,
        "Fail if the relative output error is larger: 0.1 or 10%.",
        "--max-error",
        panel=PROOF,
        metavar="E",
        read=parse_error,
    )
    allow_output_change: bool = option(
        False, "An output may change its shape; the report tells.", "--allow-output-change", panel=PROOF
    )
