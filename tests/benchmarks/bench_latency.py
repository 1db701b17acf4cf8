"""What a latency budget really gives: planned, uniform and original models timed in turns, in one run.

    python tests/benchmarks/bench_latency.py [--models vgg16 resnet18 resnet50] [--batches 1 8] [--ratio 0.6]

Each model has random weights (times do not depend on them), channels_last, and as many threads as ``--threads`` says.
It is planned for ``latency=0.6`` by the weights' norm, with every form; beside it stands a bottleneck of half the width
in place of every k×k convolution. All three take turns; printed are medians and their ratios to the original.

``--losses`` compares predictions instead: what the same latency is said to cost with and without ``narrow`` and
``substitute``, by the models' own loss on ``--images`` images of noise, from the same times of layers.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import Counter

import torch
from torch import nn

TARGET = {("vgg16", 8): 0.7}
TAKEN_AWAY = ("narrow", "substitute")
LESS = 0.8


def filled(model: nn.Module) -> nn.Module:
    """A model whose new layers hold some numbers: an unfilled one could hold what is slow to compute with."""
    from pwrewrite.layers.factorized import Factorized

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Factorized):
                for parameter in module.parameters():
                    parameter.normal_(0, 0.02)
    return model


def row(name: str, batch: int, ratio: float, seconds: float) -> str:
    """Plans, builds and times one model."""
    import torchvision

    from pwrewrite.capturing import capture, info
    from pwrewrite.core.errors import RefusedError
    from pwrewrite.core.options import Budget
    from pwrewrite.edit.apply import carry_out
    from pwrewrite.engines.timing import time_models
    from pwrewrite.passes import InsertBottleneck
    from pwrewrite.planning.budget import budgets_of
    from pwrewrite.planning.planner import Planner
    from pwrewrite.workflows.steps import propose

    torch.manual_seed(0)
    model = getattr(torchvision.models, name)().eval().to(memory_format=torch.channels_last)
    x = torch.randn(batch, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    start = time.perf_counter()
    planner = Planner(model, x, None, Budget())
    before = time.perf_counter()
    try:
        choice = planner.choose(budgets_of({"latency": ratio}))
    except RefusedError as refused:
        return f"{name:10} {batch:3}  refused: {refused.message}; {refused.expected}"
    planned = filled(carry_out(model, choice.plan, fill=False).model)
    captured = capture(model, x)
    uniform = filled(carry_out(model, propose(captured, [InsertBottleneck(0.5)]), fill=False).model)
    end = time.perf_counter()
    first, second, third = (t.seconds for t in time_models([model, planned, uniform], (x,), {}, seconds=seconds))
    macs = [sum(info(n).cost.macs for n in capture(one, x).graph.nodes) for one in (model, planned, uniform)]
    forms = Counter(op.settings.get("form", op.action) for op in choice.plan.ops)
    limit = TARGET.get((name, batch), 1.0)
    verdict = "met" if second / first <= limit else "MISSED"
    return (
        f"{name:10} {batch:3}  {1000 * first:8.1f} {1000 * second:8.1f} {1000 * third:8.1f}   "
        f"{second / first:5.2f} {macs[1] / macs[0]:6.2f}   {third / first:5.2f} {macs[2] / macs[0]:6.2f}   "
        f"{verdict} (≤ {limit})  {dict(forms)}  planned in {before - start:.0f} s + {end - before:.0f} s of timing"
    )


def losses(name: str, batch: int, ratio: float, images: int) -> str:
    """Plans a model for a latency with and without the forms that take channels and modules away."""
    import torchvision

    from pwrewrite.core.errors import RefusedError
    from pwrewrite.core.names import FORM_NAMES, JOINT_FORM_NAMES
    from pwrewrite.core.options import Budget
    from pwrewrite.planning.budget import budgets_of
    from pwrewrite.planning.planner import Planner

    torch.manual_seed(0)
    model = getattr(torchvision.models, name)().eval().to(memory_format=torch.channels_last)
    x = torch.randn(batch, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    calibration = torch.randn(images, 3, 224, 224).split(16)
    forms = (*FORM_NAMES, *JOINT_FORM_NAMES)
    cells, results = list[str](), list[float]()
    for chosen in (tuple(form for form in forms if form not in TAKEN_AWAY), forms):
        start = time.perf_counter()
        try:
            choice = Planner(model, x, calibration, Budget(forms=chosen)).choose(budgets_of({"latency": ratio}))
            used = dict(Counter(op.settings.get("form", op.action) for op in choice.plan.ops))
            cells.append(f"{choice.loss:9.3g} {used} in {time.perf_counter() - start:.0f} s")
            results.append(choice.loss)
        except RefusedError as refused:
            cells.append(f"refused: {refused.message}; {refused.expected}")
    if len(results) == 2:
        share = results[1] / results[0]
        cells.append(f"{share:.2f} of the loss: {'met' if share <= LESS else 'MISSED'} (≤ {LESS})")
    return "\n    ".join([f"{name:12} {batch:3}", *cells])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vgg16", "resnet18", "resnet50"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--ratio", type=float, default=0.6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="about how long the models are timed")
    parser.add_argument("--losses", action="store_true", help="compare predicted losses, with and without forms")
    parser.add_argument("--images", type=int, default=64, help="of the calibration for --losses")
    parser.add_argument("--keep-cache", action="store_true", help="use and keep earlier timings of layers")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.keep_cache:
        os.environ["PWREWRITE_CACHE"] = "off"
    if args.losses:
        with tempfile.TemporaryDirectory() as cache:
            os.environ["PWREWRITE_CACHE"] = cache
            for name in args.models:
                for batch in args.batches:
                    print(losses(name, batch, args.ratio, args.images), flush=True)
        return
    print(f"latency={args.ratio}, {args.threads} threads, channels_last, torch {torch.__version__}; ms, medians")
    print(f"{'model':10} {'n':>3}  {'original':>8} {'planned':>8} {'uniform':>8}   ratio   MACs   ratio   MACs")
    for name in args.models:
        for batch in args.batches:
            print(row(name, batch, args.ratio, args.seconds), flush=True)


if __name__ == "__main__":
    main()
