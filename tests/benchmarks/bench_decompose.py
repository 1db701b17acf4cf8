"""Tucker-2 of every k×k kernel of VGG-16 and ResNet-50, at half rank, against tensorly's ``partial_tucker``.

    python tests/benchmarks/bench_decompose.py [--kernels random decaying model] [--repeats 3] [--threads 2]

Both get the same float32 kernels, ranks and threads, in one process, taking turns. A time is the best of the repeats;
an error is computed here from the factors, in float64, for both. Kernels:

* ``random``: normal, as PyTorch initialises these networks. All singular values are alike: the hardest case for HOOI.
* ``decaying``: singular values that fall like ``rank ** -0.7`` on both channel axes, as those of trained kernels do.
* ``model``: the weights that ``--weights`` (a state dict read with ``weights_only=True``) holds, for a trained
  network at hand.

Goals: the error at most 0.1% (relative) above tensorly's, and 20 times its speed over each network (10 times is the
floor). Exits with 1 when the floor or the error is missed, and with 0 and a reason when tensorly is not installed.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pwrewrite.decompose import Tucker2, tucker2

Shape = tuple[int, int, int, int]
Factors = tuple[Tensor, Tensor, Tensor]  # (out, rank_out), (rank_out, rank_in, kH, kW), (in, rank_in)

VGG16: list[Shape] = [
    (out, inner, 3, 3)
    for inner, out in zip(
        (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512),
        (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512),
    )
]
RESNET50: list[Shape] = [(64, 3, 7, 7)] + [
    (width, width, 3, 3) for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)) for _ in range(blocks)
]
NETWORKS = {"vgg16": VGG16, "resnet50": RESNET50}
GOAL, FLOOR, SLACK = 20.0, 10.0, 1.001


@dataclass
class Row:
    """One shape: seconds and errors of both."""

    shape: Shape
    ours: float
    theirs: float
    our_error: float
    their_error: float
    hosvd: float
    hosvd_error: float


def main() -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=["random", "decaying", "model"], default=["random", "decaying"])
    parser.add_argument("--weights", type=Path, help="a state dict, for --kernels model")
    parser.add_argument("--ratio", type=float, default=0.5, help="rank / channels on both sides")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: seconds of this process, for a machine that others use too; give it --threads 1",
    )
    parser.add_argument("--sweeps", type=int, default=5)
    parser.add_argument("--tolerance", type=float, default=4e-4)
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    options = parser.parse_args()
    try:
        import tensorly
        from tensorly.decomposition import partial_tucker
    except ImportError as problem:
        print(f"skipped: tensorly is not installed ({problem}); pip install 'pwrewrite[bench]'")
        return 0
    tensorly.set_backend("pytorch")
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    versions = f"torch {torch.__version__}, tensorly {tensorly.__version__}"
    print(f"{versions}, {options.threads} threads, {options.clock} time, float32")

    def theirs(kernel: Tensor, rank_out: int, rank_in: int) -> Factors:
        (core, (out, inner)), _ = partial_tucker(kernel, rank=[rank_out, rank_in], modes=[0, 1])
        return out, core, inner

    passed = True
    for kind in options.kernels:
        rows = {shape: measure(shape, kernel, options, theirs) for shape, kernel in suite(kind, options)}
        for name, shapes in NETWORKS.items() if kind != "model" else [("model", list(rows))]:
            passed &= report(f"{name}, {kind} kernels", Counter(shapes), rows, options.markdown)
    return 0 if passed else 1


def suite(kind: str, options: argparse.Namespace) -> Iterator[tuple[Shape, Tensor]]:
    """One kernel per distinct shape."""
    if kind == "model":
        if options.weights is None:
            sys.exit("--kernels model needs --weights")
        state = torch.load(options.weights, weights_only=True, map_location="cpu")
        found = {tuple(w.shape): w for w in state.values() if w.dim() == 4 and max(w.shape[2:]) > 1}
        yield from ((shape, kernel.float()) for shape, kernel in found.items())
        return
    for shape in sorted({*VGG16, *RESNET50}):
        generator = torch.Generator().manual_seed(0)
        yield shape, random_kernel(shape, generator) if kind == "random" else decaying_kernel(shape, generator)


def random_kernel(shape: Shape, generator: torch.Generator) -> Tensor:
    """He initialisation."""
    return torch.randn(shape, generator=generator) * math.sqrt(2 / math.prod(shape[1:]))


def decaying_kernel(shape: Shape, generator: torch.Generator, power: float = 0.7) -> Tensor:
    """Singular values like ``rank ** -power`` on both channel axes, in random bases."""
    out, inner, *_ = shape
    kernel = torch.randn(shape, generator=generator)
    kernel *= torch.arange(1, out + 1)[:, None, None, None] ** -power
    kernel *= torch.arange(1, inner + 1)[:, None, None] ** -power
    left = torch.linalg.qr(torch.randn(out, out, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(inner, inner, generator=generator))[0]
    return torch.einsum("ao,oikl,ib->abkl", left, kernel, right).contiguous()


def measure(
    shape: Shape, kernel: Tensor, options: argparse.Namespace, theirs: Callable[[Tensor, int, int], Factors]
) -> Row:
    """Both on one kernel, taking turns; the best time of each."""
    rank_out, rank_in = (max(1, round(options.ratio * channels)) for channels in shape[:2])
    ranks = {"rank_in": rank_in, "rank_out": rank_out}
    settings = {"sweeps": options.sweeps, "tolerance": options.tolerance}
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    tucker2(kernel, **ranks)  # warm: the first call of a LAPACK routine is slow
    times: dict[str, list[float]] = {"ours": [], "hosvd": [], "theirs": []}
    errors: dict[str, float] = {}
    runs: dict[str, Callable[[], Factors | Tucker2]] = {
        "ours": lambda: tucker2(kernel, **ranks, **settings),
        "hosvd": lambda: tucker2(kernel, **ranks, method="hosvd"),
        "theirs": lambda: theirs(kernel, rank_out, rank_in),
    }
    for _ in range(options.repeats):
        for name, run in runs.items():
            start = clock()
            result = run()
            times[name].append(clock() - start)
            if name not in errors:
                out, core, inner = (
                    result if isinstance(result, tuple) else (result.expand, result.core, result.reduce.T)
                )
                rebuilt = torch.einsum("abkl,oa,ib->oikl", core.double(), out.double(), inner.double())
                errors[name] = float((kernel.double() - rebuilt).norm() / kernel.double().norm())
    best = {name: min(values) for name, values in times.items()}
    return Row(shape, best["ours"], best["theirs"], errors["ours"], errors["theirs"], best["hosvd"], errors["hosvd"])


def report(title: str, counts: Counter[Shape], rows: dict[Shape, Row], markdown: bool) -> bool:
    """Prints a table; says whether the error and the floor of the speed are met."""
    head = ["kernel", "times", "ours ms", "tensorly ms", "ratio", "error", "tensorly", "above", "HOSVD ms", "error"]
    lines = []
    for shape, count in sorted(counts.items()):
        row = rows[shape]
        lines.append(
            [
                "×".join(map(str, shape)),
                str(count),
                f"{1e3 * row.ours:.2f}",
                f"{1e3 * row.theirs:.1f}",
                f"{row.theirs / row.ours:.1f}",
                f"{row.our_error:.5f}",
                f"{row.their_error:.5f}",
                f"{100 * (row.our_error / row.their_error - 1):+.3f}%",
                f"{1e3 * row.hosvd:.2f}",
                f"{row.hosvd_error:.5f}",
            ]
        )
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    print(f"\n{'### ' if markdown else ''}{title}\n")
    for number, line in enumerate([head, *lines]):
        cells = [cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths))]
        print("| " + " | ".join(cells) + " |" if markdown else "  ".join(cells))
        if markdown and not number:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    ours = sum(rows[shape].ours * count for shape, count in counts.items())
    theirs = sum(rows[shape].theirs * count for shape, count in counts.items())
    median = statistics.median(rows[shape].theirs / rows[shape].ours for shape in counts.elements())
    worst = max(rows[shape].our_error / rows[shape].their_error for shape in counts)
    ratio = theirs / ours
    print(
        f"\ntotal {ours:.3f} s against {theirs:.3f} s: {ratio:.1f} times as fast (goal {GOAL:.0f}, floor {FLOOR:.0f}); "
        f"median kernel {median:.1f}; worst error {100 * (worst - 1):+.3f}% of tensorly's (at most +0.1%)"
    )
    return ratio >= FLOOR and worst <= SLACK


if __name__ == "__main__":
    sys.exit(main())
