"""How fast an analysis is: ``python tests/benchmarks/bench_analyze.py [--rounds N] [--only peers|scaling|command]``.

Three questions, each with its goal: how long `pwrewrite.analyze` takes beside the peers, whether it grows with the
number of layers, and what the whole command costs beside a bare script that imports torch and builds the model. Peers
count what they count by running the model, we by reading its shapes. Imports are apart: each tool has run once, on a
tiny model, before the clock starts. Each figure is the median of rounds in which every tool runs once, in an order
that rotates. Peers that are not installed (they are in the extra ``bench``) are left out, and the table says so.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import peers
import torch
from torch import nn

import pwrewrite

MODELS = {
    "resnet50": (224, 3.0),
    "efficientnet_v2_l": (480, 3.0),
    "resnet152": (224, 3.0),
    "vgg16": (224, 3.0),
    "densenet201": (224, None),
}
"""Model to input size and how many times faster than the fastest peer it should be; None: no goal."""

PACKAGES = {"torch": "torch", "fvcore": "fvcore", "torchinfo": "torchinfo", "ptflops": "ptflops", "thop": "thop"}
RIVALS = ("fvcore", "torchinfo", "ptflops", "thop")
OURS = "pwrewrite"


class Time(NamedTuple):
    """Seconds of one run: on the wall, and of processor time, child processes included, which a busy machine spares."""

    wall: float
    cpu: float


def timed(run: Callable[[], object]) -> Time:
    """The time of one run, without the garbage of the one before."""
    gc.collect()
    began, children, own = time.perf_counter(), _children(), time.process_time()
    run()
    return Time(time.perf_counter() - began, time.process_time() - own + _children() - children)


def _children() -> float:
    times = os.times()
    return times.children_user + times.children_system


def interleaved(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Time]:
    """Median times of each run over rounds in which all take turns."""
    times: dict[str, list[Time]] = {name: [] for name in runs}
    names = list(runs)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(timed(runs[name]))
    return {name: Time(median(t.wall for t in ts), median(t.cpu for t in ts)) for name, ts in times.items()}


def verdict(met: bool | None) -> str:
    return "" if met is None else "met" if met else "MISSED"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, ["-" * width for width in widths], *rows):
        print("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))))
    print(flush=True)


def tiny() -> tuple[nn.Module, torch.Tensor]:
    """A model that makes a tool import whatever it needs."""
    return nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), torch.rand(1, 3, 8, 8)


def bench_peers(rounds: int) -> bool:
    present = [tool for tool in peers.TOTALS if peers.version(PACKAGES[tool]) is not None]
    for tool in peers.TOTALS:
        if tool not in present:
            print(f"{tool} is left out: not installed (it is in the extra bench)")
    for tool in present:
        peers.total(tool, *tiny())
    rows, fine = [], True
    for name, (size, goal) in MODELS.items():
        model, x = peers.build(f"torchvision:{name}"), torch.rand(1, 3, size, size)
        spare = copy.deepcopy(model) if "thop" in present else model  # thop leaves buffers behind
        runs = {OURS: partial(pwrewrite.analyze, model, x)}
        for tool in present:
            runs[tool] = partial(peers.total, tool, spare if tool == "thop" else model, x)
        found = {name: taken.wall for name, taken in interleaved(runs, rounds).items()}
        rivals = {tool: found[tool] for tool in RIVALS if tool in found}
        fastest = min(rivals, key=rivals.__getitem__) if rivals else ""
        ratio = rivals[fastest] / found[OURS] if rivals else 0.0
        met = None if goal is None or not rivals else ratio >= goal
        fine &= met is not False
        figures = [f"{found[tool]:.3f}" if tool in found else "–" for tool in (OURS, *peers.TOTALS)]
        ratio_text = f"{ratio:.1f}× {fastest}" if rivals else "–"
        rows.append([f"{name} @{size}", *figures, ratio_text, f"≥ {goal:g}×" if goal else "", verdict(met)])
    print(f"Seconds for one model, median of {rounds} rounds")
    table(
        ["model", OURS, *("FlopCounterMode" if t == "torch" else t for t in peers.TOTALS), "faster than", "goal", ""],
        rows,
    )
    return fine


def bench_scaling(rounds: int) -> bool:
    def chain(length: int) -> nn.Module:
        with torch.device("meta"):
            return nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(length)))

    x = torch.empty(1, 8, 16, 16, device="meta")
    models = {length: chain(length) for length in (1_000, 10_000)}
    found = interleaved({str(n): partial(pwrewrite.analyze, model, x) for n, model in models.items()}, rounds)
    short, long = found["1000"], found["10000"]
    ratio = long.cpu / short.cpu
    print("A chain of convolutions; the ratio is that of processor times")
    rows = [
        ["1,000", f"{short.wall:.3f}", f"{short.cpu:.3f}", "", "", ""],
        ["10,000", f"{long.wall:.3f}", f"{long.cpu:.3f}", f"{ratio:.1f}×", "≤ 12×", verdict(ratio <= 12)],
    ]
    table(["layers", "seconds", "CPU s", "ratio", "goal", ""], rows)
    return ratio <= 12


def command(*arguments: str) -> list[str]:
    """The installed command, or the module where it is not on the path of this interpreter."""
    script = Path(sys.executable).with_name("pwrewrite")
    return [str(script), *arguments] if script.exists() else [sys.executable, "-m", "pwrewrite", *arguments]


def process(arguments: Sequence[str]) -> None:
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def bench_command(rounds: int) -> bool:
    helped = interleaved({"help": partial(process, command("--help"))}, max(rounds, 5))["help"]
    imports = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pwrewrite", "--help"], capture_output=True, text=True, check=True
    ).stderr
    torch_free = not any(line.rpartition("|")[2].strip() == "torch" for line in imports.splitlines())
    met = helped.wall < 0.25 and torch_free
    note = "no torch" if torch_free else "TORCH"
    rows = [["pwrewrite --help", f"{helped.wall:.3f}", f"{helped.cpu:.3f}", note, "< 0.25 s", verdict(met)]]
    example = str(peers.EXAMPLES / "resnet50.py")
    file_script = f"import runpy, torch\nrunpy.run_path({example!r})['build_model']()"
    bare = {
        "torchvision:resnet50": "import torch, torchvision\ntorchvision.models.resnet50(weights=None)",
        example: file_script,
    }
    fine = met
    for target, script in bare.items():
        runs = {
            "bare": partial(process, [sys.executable, "-c", script]),
            "command": partial(process, command("analyze", target)),
        }
        found = interleaved(runs, rounds)
        script_time, ours = found["bare"], found["command"]
        ratio = ours.wall / script_time.wall
        fine &= ratio <= 1.25
        name = target if ":" in target else Path(target).name
        goal = ("≤ 1.25×", verdict(ratio <= 1.25))
        rows += [
            [f"a script that builds {name}", f"{script_time.wall:.3f}", f"{script_time.cpu:.3f}", "", "", ""],
            [f"pwrewrite analyze {name}", f"{ours.wall:.3f}", f"{ours.cpu:.3f}", f"{ratio:.2f}×", *goal],
        ]
    print(f"Whole processes, median of {rounds} rounds")
    table(["command", "seconds", "CPU s", "", "goal", ""], rows)
    return fine


def main() -> None:
    parser = argparse.ArgumentParser(description="How fast an analysis is.")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of which the median is taken")
    parser.add_argument("--only", choices=("peers", "scaling", "command"), help="one of the three parts")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a goal is missed")
    wanted = parser.parse_args()
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores, {threads} threads\n")
    pwrewrite.analyze(*tiny())
    parts = {"peers": bench_peers, "scaling": bench_scaling, "command": bench_command}
    fine = [part(wanted.rounds) for name, part in parts.items() if wanted.only in (None, name)]
    if wanted.check and not all(fine):
        sys.exit(1)


if __name__ == "__main__":
    main()
