"""What planning costs: ``python tests/benchmarks/bench_plan.py [--model resnet50] [--images 256] [--threads 2]``.

The unit is one forward of all calibration images through the model, measured in the same run. A plan for half of the
MACs, by the images' own loss and with every form, may take three of them and 30 seconds, and 4 GiB of memory at its
peak; a frontier of 25 points, from the statistics that the plan has left in the cache, 15 seconds. The model has random
weights and the images are noise, which changes what is chosen but not what is computed. The cache is one of this run.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time

import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50", help="a torchvision classifier")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--points", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["PWREWRITE_CACHE"] = cache
        run(args)


def run(args: argparse.Namespace) -> None:
    """Measures and prints."""
    import torchvision

    import pwrewrite
    from pwrewrite.workflows.plan import frontier

    torch.manual_seed(0)
    model = torchvision.models.get_model(args.model, weights=None).eval()
    images = torch.randn(args.images, 3, args.size, args.size)
    batches = list(images.split(args.batch))
    with torch.inference_mode():
        model(batches[0])
        start = time.perf_counter()
        for batch in batches:
            model(batch)
        forward = time.perf_counter() - start
    print(f"{args.model}, {args.images} images at {args.size}, {args.threads} threads, torch {torch.__version__}")
    print(f"one forward of them      {forward:7.1f} s    {_peak():5.2f} GiB at the peak so far")
    started: list[tuple[float, str]] = []
    start = time.perf_counter()
    plan = pwrewrite.plan(
        model,
        batches[0][:1],
        {"macs": 0.5},
        batches,
        progress=lambda text, share: started.append((time.perf_counter(), text)),
    )
    planned, peak = time.perf_counter() - start, _peak()
    limit = 3 * forward + 30
    print(f"a plan for half the MACs {planned:7.1f} s    {peak:5.2f} GiB", end="    ")
    print(f"goal {limit:.1f} s {_verdict(planned <= limit)}, 4 GiB {_verdict(peak <= 4)}; {len(plan.ops)} ops")
    for (at, text), after in zip(started, [*(t for t, _ in started[1:]), start + planned]):
        if after - at > 1:
            print(f"    {after - at:7.1f} s  {text}")
    start = time.perf_counter()
    curve = frontier(model, batches[0][:1], pwrewrite.Budget({}, calibration=batches), points=args.points)
    seconds = time.perf_counter() - start
    print(f"{len(curve.points)} points               {seconds:7.1f} s    {_peak():5.2f} GiB", end="    ")
    print(f"goal 15.0 s {_verdict(seconds <= 15)}")


def _peak() -> float:
    """The most memory that this process has held, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _verdict(met: bool) -> str:
    return "met" if met else "MISSED"


if __name__ == "__main__":
    main()
