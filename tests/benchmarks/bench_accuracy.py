"""What a rewrite under a budget costs in accuracy, with nothing trained, and what each ingredient of the planner gives.

    python tests/benchmarks/bench_accuracy.py [--parts resnet20 ablation recovery mobile digits unet] [--quick]

* ``resnet20``: ResNet-20 on CIFAR-10, at 70, 50 and 40% of its MACs, for every sensitivity and refit, with every form
  and with 1×1 forms alone. ``ablation``: the ingredients one by one, at half of the MACs. Both need the shared data
  (``resnet20.safetensors``, ``calibration.npz``, ``test.npz``) in ``shared/cifar10`` beside the checkout, or in
  ``$PWREWRITE_SHARED/cifar10``, and are skipped where there is none.
* ``recovery``: the same at 50, 40 and 30%, trained to its original on the calibration images, shifted and mirrored, for
  five minutes each.
* ``mobile``: inverted residuals of 0.85 M parameters, trained here to the predictions of that ResNet-20 on its
  calibration images (some 10 minutes; the weights are kept in the cache), at 70 and 50%: with every form, and with
  those that change one layer each. Needs the shared data, too.
* ``digits``: a small network trained here on scikit-learn's digits.
* ``unet``: the U-Net of ``examples``, an eighth as wide, trained here to segment shapes that are drawn here; by its
  mean intersection over union.

Everything is chosen and fitted on unlabelled calibration inputs; four fifths of them are used, the rest is held out for
the agreement and the loss (KL divergence, or half the squared relative error) in the tables. The test images are scored
once per row. The change of the metric comes with a 95% interval, from a bootstrap over the test images in which both
models see the same ones. What meets or misses a goal is, per budget, the row with the best agreement (the least loss,
where nothing agrees), chosen without a look at the test images.

Statistics are cached in a folder of this run only: none are from an earlier one.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pwrewrite
from pwrewrite.core.files import cache_folder
from pwrewrite.core.options import Budget
from pwrewrite.edit.apply import carry_out
from pwrewrite.planning.budget import budgets_of
from pwrewrite.planning.fit_steps import fit_steps
from pwrewrite.planning.outputs import compare
from pwrewrite.planning.planner import Choice, Planner
from pwrewrite.planning.refit import Target, refit as fit

GOALS = {("all", 0.7): -0.2, ("all", 0.5): -1.0, ("all", 0.4): -2.5, ("1x1", 0.5): -2.0}
"""Points of top-1 of the ResNet-20, by forms and share of the MACs."""
RECOVERED = {0.5: -0.3, 0.4: -0.6, 0.3: -1.5}
"""The same after five minutes of training, with every form."""
MOBILE = {("all", 0.7): -0.5, ("all", 0.5): -2.0}
"""Points of top-1 of the inverted residuals."""

ROOT = Path(__file__).resolve().parents[2]
ALL, POINTWISE = ("all",), ("1x1",)
SINGLE = ("bottleneck", "reduce", "expand", "spatial", "depthwise", "pair")
PARTS = ("resnet20", "ablation", "recovery", "mobile", "digits", "unet")
DRAWS = 4000


# ------------------------------------------------------------------------------------------------------ measuring


@dataclass
class Metric:
    """A metric of sums over test images, so that it can be had for every resampling of them.

    Attributes:
        name: What it is.
        tally: Model to what each image adds, ``(images, terms)``.
        value: Sums ``(…, terms)`` and how many images they are of, to the metric.
    """

    name: str
    tally: Callable[[nn.Module], np.ndarray]
    value: Callable[[np.ndarray, int], np.ndarray]

    def change(self, before: np.ndarray, after: np.ndarray) -> tuple[float, float, float]:
        """The change, and a paired 95% interval of it."""
        count = len(before)
        draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=DRAWS)
        moved = self.value(draws @ after, count) - self.value(draws @ before, count)
        low, high = np.percentile(moved, [2.5, 97.5])
        return self.of(after) - self.of(before), float(low), float(high)

    def of(self, tally: np.ndarray) -> float:
        return float(self.value(tally.sum(0), len(tally)))


@dataclass
class Subject:
    """A trained model and its data."""

    model: nn.Module
    calibration: Tensor
    metric: Metric
    before: np.ndarray

    @classmethod
    def of(cls, model: nn.Module, calibration: Tensor, metric: Metric) -> Subject:
        subject = cls(model.eval(), calibration, metric, metric.tally(model))
        params = sum(p.numel() for p in model.parameters())
        print(
            f"{params:,} parameters, {metric.name} {100 * metric.of(subject.before):.2f}% "
            f"on {len(subject.before):,} test images; {len(calibration):,} calibration images"
        )
        return subject

    def planner(self, forms: Sequence[str], sensitivity: str, refit: str, size: int | None = None) -> Planner:
        settings = Budget(forms=tuple(forms), sensitivity=sensitivity, refit=refit)
        return Planner(self.model, self.calibration[:1], self.calibration, settings, size=size)


@dataclass
class Row:
    """One rewritten model."""

    label: str
    share: float
    change: tuple[float, float, float]
    agreement: float | None
    loss: float
    predicted: float
    forms: Counter[str]
    seconds: float

    @property
    def merit(self) -> tuple[float, float]:
        """What rows are chosen by, on held-out calibration images."""
        return (0.0 if self.agreement is None else self.agreement, -self.loss)

    def line(self, width: int) -> str:
        agreement = "      –" if self.agreement is None else f"{100 * self.agreement:6.2f}%"
        points, low, high = (100 * value for value in self.change)
        forms = ", ".join(f"{form} {count}" for form, count in self.forms.most_common())
        return (
            f"{self.label:{width}} {100 * self.share:6.1f}%  {points:+7.2f}  [{low:+7.2f}, {high:+7.2f}]  {agreement}"
            f"  {self.loss:8.3g}  {self.predicted:9.3g}  {self.seconds:5.0f}  {forms}"
        )


def head(width: int) -> None:
    print(
        f"\n{'':{width}} {'MACs':>7}  {'change':>7}  {'95% interval':^18}  {'agrees':>7}  {'loss':>8}  {'predicted':>9}"
        f"  {'s':>5}  forms"
    )


def measured(
    subject: Subject, planner: Planner, choice: Choice, refit: str, label: str, *, held_out: Planner | None = None
) -> Row:
    """Carries out a choice, fits and scores it; ``refit`` may also be ``own``, full but for the residuals."""
    start = time.perf_counter()
    model = carry_out(planner.model, choice.plan, decomposer=planner.decomposer).model
    if refit == "own":
        fit_own(planner, model, choice)
    else:
        fitter = copy.copy(planner)
        fitter.settings = replace(planner.settings, refit=refit)
        fitter.refit(model, choice.plan)
    seconds = time.perf_counter() - start
    batches = (held_out or planner).batches
    assert batches is not None
    found = compare(planner.model, model, batches.held_out())
    return Row(
        label,
        choice.costs["macs"] / planner.original["macs"],
        subject.metric.change(subject.before, subject.metric.tally(model)),
        found.agreement,
        found.loss,
        choice.loss,
        Counter(op.settings.get("form", op.action) for op in choice.plan.ops),
        seconds,
    )


def fit_own(planner: Planner, model: nn.Module, choice: Choice) -> None:
    """The full refit of each layer to its own output, whatever has gone wrong on the other side of its sum."""
    assert planner.batches is not None
    specs = planner.replaceable.specs
    steps = fit_steps(planner.captured, model, choice.plan, specs, planner.statistics)
    alone = [replace(step, residual=None) if isinstance(step, Target) else step for step in steps]
    fit(planner.model, model, alone, planner.batches.calibration())


def share(ratio: float) -> str:
    return f"{100 * ratio:.0f}%"


def sweep(
    subject: Subject, forms: Sequence[str], ratios: Sequence[float], ways: Sequence[tuple[str, str]]
) -> dict[float, list[Row]]:
    """A table of sensitivities and refits over budgets: one planner for those that centre alike."""
    rows: dict[float, list[Row]] = {ratio: [] for ratio in ratios}
    print(f"\nforms: {', '.join(forms)}")
    head(28)
    planners: dict[tuple[str, bool], Planner] = {}
    for ratio in ratios:
        for sensitivity, refit in ways:
            key = (sensitivity, refit != "none" and sensitivity != "weights")  # the weights' own norm has no means
            if key not in planners:
                planners[key] = subject.planner(forms, sensitivity, "full" if refit != "none" else "none")
            planner = planners[key]
            label = f"{share(ratio):>4}  {sensitivity:12} {refit}"
            row = measured(subject, planner, planner.choose(budgets_of({"macs": ratio})), refit, label)
            rows[ratio].append(row)
            print(row.line(28), flush=True)
    for note in dict.fromkeys(note for planner in planners.values() for note in planner.notes):
        print(f"note: {note}")
    return rows


def verdicts(name: str, rows: dict[float, list[Row]], goals: Mapping[tuple[str, float], float] | None = None) -> None:
    """Says what was chosen per budget on held-out images, and whether it meets its goal where there is one."""
    print("\nchosen on held-out calibration images:")
    for ratio, those in rows.items():
        best = max(those, key=lambda row: row.merit)
        points, low, high = (100 * value for value in best.change)
        goal = (goals or {}).get((name, ratio))
        verdict = ""
        if goal is not None:
            where = "contains it" if low <= goal <= high else "lies above it" if low > goal else "lies below it"
            verdict = f"; goal {goal:+.1f}: {'met' if points >= goal else 'MISSED'} (the interval {where})"
        print(f"  {share(ratio)} {name}: {' '.join(best.label.split()[1:])}, {points:+.2f} points{verdict}", flush=True)


def accuracy(images: Tensor, labels: Tensor, batch: int = 256) -> Metric:
    """Top-1 accuracy."""

    def tally(model: nn.Module) -> np.ndarray:
        with torch.no_grad():
            right = [model(x).argmax(1) == y for x, y in zip(images.split(batch), labels.split(batch))]
        return torch.cat(right).double().numpy()[:, None]

    return Metric("top-1", tally, lambda sums, count: sums[..., 0] / count)


def overlap(images: Tensor, masks: Tensor, classes: int, batch: int = 32) -> Metric:
    """Intersection over union, the mean over the classes but the background."""

    def tally(model: nn.Module) -> np.ndarray:
        rows = []
        with torch.no_grad():
            for x, mask in zip(images.split(batch), masks.split(batch)):
                found = F.one_hot(model(x).argmax(1), classes)[..., 1:].flatten(1, 2)
                meant = F.one_hot(mask, classes)[..., 1:].flatten(1, 2)
                both = (found * meant).sum(1)
                rows.append(torch.cat([both, found.sum(1) + meant.sum(1) - both], 1))
        return torch.cat(rows).double().numpy()

    def value(sums: np.ndarray, count: int) -> np.ndarray:
        both, either = np.split(sums, 2, axis=-1)
        return (both / np.maximum(either, 1)).mean(-1)

    return Metric("mean IoU", tally, value)


# ------------------------------------------------------------------------------------------------------ ResNet-20


class Block(nn.Module):
    """3×3 → 3×3, plus the input; where the shape changes, every other pixel of it, padded with zero channels."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.pad = out_channels // 4 if stride > 1 else 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.pad:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


class ResNet20(nn.Module):
    """He et al. 2015 (arXiv:1512.03385), section 4.2, with shortcuts without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, 1)
        self.layer2 = self._stage(16, 32, 2)
        self.layer3 = self._stage(32, 64, 2)
        self.linear = nn.Linear(64, 10)

    def _stage(self, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
        rest = [Block(out_channels, out_channels, 1) for _ in range(2)]
        return nn.Sequential(Block(in_channels, out_channels, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def shared_folder() -> Path | None:
    named = os.environ.get("PWREWRITE_SHARED")
    folder = (Path(named) if named else Path(__file__).resolve().parents[3] / "shared") / "cifar10"
    return folder if (folder / "resnet20.safetensors").exists() else None


def resnet20(folder: Path, quick: bool) -> Subject:
    def prepared(images: np.ndarray) -> Tensor:
        x = torch.from_numpy(images).float().div(255).permute(0, 3, 1, 2)
        mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
        return ((x - mean) / deviation).contiguous()

    model = ResNet20()
    model.load_state_dict(load_file(folder / "resnet20.safetensors"), strict=False)  # without the norms' counters
    calibration = prepared(np.load(folder / "calibration.npz")["images"])
    test = np.load(folder / "test.npz")
    metric = accuracy(prepared(test["images"]), torch.from_numpy(test["labels"]).long())
    subject = Subject.of(model, calibration[:512] if quick else calibration, metric)
    if abs(metric.of(subject.before) - 0.8823) > 5e-4:
        raise SystemExit("the model or its input is built wrongly: it must score 88.23%")
    return subject


def run_resnet20(subject: Subject, quick: bool) -> None:
    ratios = (0.5,) if quick else (0.7, 0.5, 0.4)
    ways = [(s, r) for s in ("weights", "activations", "loss") for r in ("none", "bias", "full")]
    for forms in (ALL, POINTWISE):
        rows = sweep(subject, forms, ratios, [("weights", "none"), ("loss", "full")] if quick else ways)
        verdicts(forms[0], rows, GOALS)


def run_ablation(subject: Subject, quick: bool) -> None:
    """The ingredients one by one, at half of the MACs."""
    budgets = budgets_of({"macs": 0.5})
    print("\nAblation at 50% of the MACs; each line adds one thing to the line above it, or changes it")
    head(46)

    def show(planner: Planner, refit: str, label: str, held_out: Planner | None = None) -> None:
        print(measured(subject, planner, planner.choose(budgets), refit, label, held_out=held_out).line(46), flush=True)

    show(subject.planner(("expand",), "weights", "none"), "none", "weights, expand, no refit")
    show(subject.planner(("expand",), "activations", "none"), "none", "activations")
    show(subject.planner(("expand",), "loss", "none"), "none", "loss")
    planner = subject.planner(("expand",), "loss", "full")
    show(planner, "bias", "biases and norms refitted, means left to them")
    show(planner, "own", "factors refitted")
    show(planner, "full", "what is wrong with the other side of sums too")
    for forms, label in (
        (("expand", "reduce"), "forms: expand, reduce"),
        (("expand", "reduce", "bottleneck"), "forms: expand, reduce, bottleneck"),
        (("expand", "reduce", "spatial"), "forms: expand, reduce, spatial"),
    ):
        show(subject.planner(forms, "loss", "full"), "full", label)
    planner = subject.planner(ALL, "loss", "full")
    show(planner, "full", f"forms: all ({planner.batches.samples:,} images)" if planner.batches else "forms: all")
    show(planner, "own", "  without what is wrong with the other side")
    show(planner, "bias", "  biases and norms only")
    for size in (128,) if quick else (256, 1024):
        show(subject.planner(ALL, "loss", "full", size), "full", f"  from {size:,} images", planner)


def run_recovery(subject: Subject, quick: bool) -> None:
    """Plan, rewrite, refit and five minutes of training, as a user has them in one call."""
    print("\nwith every form, trained to the original on the calibration images")
    for ratio in (0.5,) if quick else (0.5, 0.4, 0.3):
        start = time.perf_counter()
        budget = Budget(
            {"macs": ratio}, calibration=subject.calibration, recover="20s" if quick else "5m", augment="flip"
        )
        result = pwrewrite.rewrite(subject.model, subject.calibration[:1], budget, verify=False)
        assert result.report.budget is not None
        recovery = result.report.budget.recovery
        assert recovery is not None
        change = subject.metric.change(subject.before, subject.metric.tally(result.model.eval()))
        points, low, high = (100 * value for value in change)
        goal = RECOVERED[ratio]
        print(
            f"{share(ratio):>4}  {points:+.2f} points [{low:+.2f}, {high:+.2f}]; held-out loss {recovery.before:.3g} → "
            f"{recovery.after:.3g} in {recovery.epochs:.1f} epochs, {recovery.seconds:.0f} s of "
            f"{time.perf_counter() - start:.0f}; goal {goal:+.1f}: {'met' if points >= goal else 'MISSED'}",
            flush=True,
        )


# ---------------------------------------------------------------------------------------------- inverted residuals


class Inverted(nn.Module):
    """1×1 → depthwise 3×3 → 1×1, plus the input where the shape stays (Sandler et al. 2018, MobileNetV2)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        layers: list[nn.Module] = []
        if expansion > 1:
            layers += [nn.Conv2d(in_channels, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU6()]
        layers += [nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False), nn.BatchNorm2d(inner)]
        layers += [nn.ReLU6(), nn.Conv2d(inner, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)]
        self.layers = nn.Sequential(*layers)
        self.adds = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.adds else y


def mobile_network() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()]
    channels = 16
    for expansion, outer, count, stride in ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 3, 2), (6, 96, 2, 1)):
        for i in range(count):
            layers.append(Inverted(channels, outer, stride if i == 0 else 1, expansion))
            channels = outer
    layers += [Inverted(96, 160, 2, 6), Inverted(160, 160, 1, 6), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(160, 10))


def mobile(teacher: Subject, quick: bool, kept: Path | None) -> Subject:
    """Trained to the scores of a teacher, on its calibration images shifted and mirrored at random."""
    torch.manual_seed(0)
    model, images, generator = mobile_network(), teacher.calibration, torch.Generator().manual_seed(0)
    file = None if kept is None or quick else kept / "mobile-1.safetensors"
    if file is not None and file.exists():
        model.load_state_dict(load_file(file))
    else:
        steps, batch = (20, 64) if quick else (1000, 128)
        optimizer = torch.optim.Adam(model.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        start = time.perf_counter()
        for _ in range(steps):
            x = images[torch.randint(len(images), (batch,), generator=generator)]
            down, right = torch.randint(0, 9, (2,), generator=generator).tolist()
            x = F.pad(x, (4, 4, 4, 4))[:, :, down : down + 32, right : right + 32]
            x = x.flip(3) if bool(torch.rand((), generator=generator) < 0.5) else x
            with torch.no_grad():
                wanted = (teacher.model(x) / 2).softmax(1)
            optimizer.zero_grad()
            F.cross_entropy(model(x) / 2, wanted).backward()
            optimizer.step()
            schedule.step()
        print(f"trained for {steps} steps in {time.perf_counter() - start:.0f} s")
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(model.state_dict(), file)
    return Subject.of(model, images, teacher.metric)


def run_mobile(subject: Subject, quick: bool) -> None:
    for forms in (SINGLE, ALL):
        rows = sweep(subject, forms, (0.7,) if quick else (0.7, 0.5), [("loss", "full")])
        verdicts("all" if forms == ALL else "single layers", rows, MOBILE)


# --------------------------------------------------------------------------------------------------- trained here


def train(model: nn.Module, draw: Callable[[int], tuple[Tensor, Tensor]], steps: int, rate: float = 3e-3) -> nn.Module:
    """Adam with one cycle of the learning rate, on cross-entropy."""
    start = time.perf_counter()
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for step in range(steps):
        x, y = draw(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()
    print(f"trained for {steps} steps in {time.perf_counter() - start:.0f} s")
    return model.eval()


def digits(quick: bool) -> Subject | None:
    try:
        from sklearn.datasets import load_digits
    except ImportError as problem:
        print(f"skipped: scikit-learn is not installed ({problem})")
        return None
    data = load_digits()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(data.target), generator=generator)
    images = (torch.from_numpy(data.images).float()[order, None] - 5) / 6
    labels = torch.from_numpy(data.target).long()[order]
    kept = 1000

    def draw(step: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(kept, (64,), generator=generator)
        return images[chosen] + 0.3 * torch.randn(64, 1, 8, 8, generator=generator), labels[chosen]

    layers: list[nn.Module] = []
    for inner, outer, stride in ((1, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 64, 1)):
        layers += [nn.Conv2d(inner, outer, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outer), nn.ReLU()]
    torch.manual_seed(0)
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    train(model, draw, 100 if quick else 600)
    return Subject.of(model, images[:kept], accuracy(images[kept:], labels[kept:]))


def shapes(count: int, generator: torch.Generator, side: int = 48) -> tuple[Tensor, Tensor]:
    """Noisy images of discs, squares and crosses over each other, and masks of which is where."""
    line = torch.arange(side)
    images, masks = torch.zeros(count, side, side), torch.zeros(count, side, side, dtype=torch.long)
    for _ in range(4):
        y, x = ((line - torch.randint(5, side - 5, (count, 1), generator=generator)).abs() for _ in range(2))
        down, across = y[:, :, None], x[:, None, :]
        radius = 4 + 6 * torch.rand(count, 1, 1, generator=generator)
        kind = torch.randint(1, 4, (count, 1, 1), generator=generator)
        long, short = torch.maximum(down, across), torch.minimum(down, across)
        disc, square = down**2 + across**2 <= radius**2, long <= 0.85 * radius
        cross = (long <= radius) & (short <= 0.35 * radius)
        inside = torch.where(kind == 1, disc, torch.where(kind == 2, square, cross))
        level = 0.6 + 0.8 * torch.rand(count, 1, 1, generator=generator)
        images, masks = torch.where(inside, level, images), torch.where(inside, kind, masks)
    return (images + 0.4 * torch.randn(images.shape, generator=generator))[:, None], masks


def unet(quick: bool) -> Subject:
    spec = importlib.util.spec_from_file_location("unet", ROOT / "examples" / "unet.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = module.UNet(in_channels=1, num_classes=4, width=8)
    train(model, lambda step: shapes(16, generator), 40 if quick else 400)
    calibration, _ = shapes(256, generator)
    images, masks = shapes(100 if quick else 400, generator)
    return Subject.of(model, calibration, overlap(images, masks, 4))


def run_trained(subject: Subject, ratios: Sequence[float], quick: bool) -> None:
    ways = [("weights", "none"), ("loss", "none"), ("loss", "full")]
    for forms in (ALL,) if quick else (ALL, POINTWISE):
        verdicts(forms[0], sweep(subject, forms, ratios, ways))


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--quick", action="store_true", help="fewer rows, images and steps of training")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kept = cache_folder("benchmarks")
    print(f"torch {torch.__version__}, {options.threads} threads{', quick' if options.quick else ''}")
    print("change: points of the metric; loss: KL divergence or half the squared relative error, held out;")
    print("predicted: the same for the sensitivity loss, a sum of relative errors for others; s: rewrite and refit")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["PWREWRITE_CACHE"] = cache
        if {"resnet20", "ablation", "recovery", "mobile"} & set(options.parts):
            print("\n== ResNet-20, CIFAR-10")
            folder = shared_folder()
            if folder is None:
                print("skipped: there is no shared/cifar10 beside the checkout, nor in $PWREWRITE_SHARED")
            else:
                subject = resnet20(folder, options.quick)
                if "resnet20" in options.parts:
                    run_resnet20(subject, options.quick)
                if "ablation" in options.parts:
                    run_ablation(subject, options.quick)
                if "recovery" in options.parts:
                    run_recovery(subject, options.quick)
                if "mobile" in options.parts:
                    print("\n== Inverted residuals, CIFAR-10")
                    run_mobile(mobile(subject, options.quick, kept), options.quick)
        if "digits" in options.parts:
            print("\n== A small network, scikit-learn's digits")
            found = digits(options.quick)
            if found is not None:
                run_trained(found, (0.5,) if options.quick else (0.7, 0.5, 0.4), options.quick)
        if "unet" in options.parts:
            print("\n== U-Net, drawn shapes")
            run_trained(unet(options.quick), (0.5,) if options.quick else (0.7, 0.5), options.quick)


if __name__ == "__main__":
    main()
