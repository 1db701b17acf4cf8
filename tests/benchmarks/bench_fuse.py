"""Latency of fused models against plain torch, torch's own tools and onnxruntime, all in one run.

::

    python tests/benchmarks/bench_fuse.py [--models resnet50,timm:mobilenetv4_conv_small] [--batches 1,8] [--compile]
                                          [--threads 2] [--seconds 3] [--json FILE]

``fused`` is the module that `pwrewrite.fuse` returns, ``frozen`` the same under `pwrewrite.freeze`, which is held to
the floors. Each figure is the median of runs that take turns: every round runs each way once, so that a slow moment of
the machine meets all of them. ``best`` is the fastest round, which noise touches least. onnxruntime gets the unfused
model, exported to ONNX, which it fuses itself; ``--compile`` adds ``torch.compile`` with frozen weights (minutes). On a
busy machine ``--threads 1 --cpu-time`` still tells the ways apart, since time spent waiting for a core does not count.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MODELS = [
    "resnet50",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "googlenet",
    "vgg16",
    "resnet18",
    "squeezenet1_1",
    "densenet121",
    "shufflenet_v2_x1_0",
    "regnet_y_400mf",
    "inception_v3",
    "mnasnet1_0",
    "convnext_tiny",
    "timm:mobilenetv4_conv_small",
    "timm:repvgg_a0",
]

Run = Callable[[], Any]


def floors(name: str, batch: int) -> dict[str, float]:
    """Most that our model may take, in times of each other way."""
    strict = name in ("resnet50", "mobilenet_v2", "vgg16")
    found = {"channels_last": 1.0, "optimize_for_inference": 1.0, "onnxruntime": 1.0 if strict else 1.4}
    if batch > 1 and strict:
        found["onnxruntime"] = 1.25
    if name == "resnet50":
        found["eager"] = 1 / 1.7
    if "mobilenet" in name:
        found["eager"] = 1 / 3
    return found


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name.startswith("timm:"):
            import timm

            return timm.create_model(name[5:]).eval()
        import torchvision

        extra = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
        return torchvision.models.get_model(name, **extra).eval()


def ways(model: nn.Module, x: Tensor, *, compiled: bool) -> dict[str, Run]:
    """Every way to run a model, ready to be called."""
    from pwrewrite.engines.frozen import freeze
    from pwrewrite.workflows.fuse import fuse

    last = x.contiguous(memory_format=torch.channels_last)
    formatted = copy.deepcopy(model).to(memory_format=torch.channels_last)
    fused = fuse(model, x, verify=False).model
    found: dict[str, Run] = {
        "eager": lambda: model(x),
        "channels_last": lambda: formatted(last),
        "fused": lambda: fused(x),
    }
    if hasattr(torch._C, "_jit_set_llga_enabled"):
        frozen = freeze(fused, x)
        found["frozen"] = lambda: frozen(x)
    for name, make in (("optimize_for_inference", _optimized), ("onnxruntime", _onnx)):
        try:
            found[name] = make(model, x)
        except Exception as error:
            print(f"  {name}: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
    if compiled:
        import torch._inductor.config as config

        config.freezing = True
        run = torch.compile(copy.deepcopy(model))
        found["compile"] = lambda: run(x)
    return found


def _optimized(model: nn.Module, x: Tensor) -> Run:
    from torch.fx.experimental.optimization import optimize_for_inference

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = optimize_for_inference(copy.deepcopy(model))
        made(x)  # it cannot run every model
    return lambda: made(x)


def _onnx(model: nn.Module, x: Tensor) -> Run:
    import onnxruntime

    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(copy.deepcopy(model), (x,), file, dynamo=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


def measure(runs: dict[str, Run], seconds: float, clock: Callable[[], float]) -> dict[str, tuple[float, float]]:
    """Median and best seconds of each way, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        for run in runs.values():
            for _ in range(4):
                run()
        end = time.perf_counter() + seconds * len(runs)
        while time.perf_counter() < end or len(times["eager"]) < 5:
            for name, run in runs.items():
                start = clock()
                run()
                times[name].append(clock() - start)
    return {name: (statistics.median(found), min(found)) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cpu-time", action="store_true", help="seconds of this process's CPUs, not of the clock")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    rows: list[dict[str, Any]] = []
    for name in options.models.split(","):
        model = build(name)
        size = 299 if name == "inception_v3" else 224
        for batch in map(int, options.batches.split(",")):
            x = torch.rand(batch, 3, size, size)
            found = measure(ways(model, x, compiled=options.compile), options.seconds, clock)
            row = {"model": name, "batch": batch, **{k: {"median": m, "best": b} for k, (m, b) in found.items()}}
            rows.append(row)
            ours = found.get("frozen", found["fused"])[0]
            cells = [f"{way} {m * 1e3:.1f} ({b * 1e3:.1f})" for way, (m, b) in found.items()]
            ratios = [f"{way} ×{m / ours:.2f}" for way, (m, _) in found.items() if way != "frozen"]
            print(f"{name:28} {batch:2} | ms, median (best): {', '.join(cells)} | as fast as {', '.join(ratios)}")
            for way, allowed in floors(name, batch).items():
                if way in found and ours > found[way][0] * allowed:
                    print(f"{'':31} MISS: {ours / found[way][0]:.2f} × {way}, floor {allowed:.2f}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
