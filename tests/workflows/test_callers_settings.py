"""What a caller has set for torch changes no result, and no call changes what a caller has set."""

from __future__ import annotations

import ast
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pwrewrite

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
BATCHES = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(1)).split(8)
FACTORIES = {"arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm",
             "tensor", "zeros"}  # fmt: skip
GIVEN = {"inputs.py", "recover.py"}
"""Files that make tensors of what stands for an input, which go where the caller's own would go."""


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    ).eval()  # fmt: skip


class float64:
    """`torch.set_default_dtype` for a while."""

    def __enter__(self) -> None:
        torch.set_default_dtype(torch.float64)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(torch.float32)


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": partial(torch.autocast, "cpu", dtype=torch.bfloat16),
    "default device": partial(torch.device, "meta"),
    "default dtype": float64,
    "inference mode": torch.inference_mode,
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_the_caller_change_no_result(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PWREWRITE_CACHE", "off")
    model = net()
    calls: list[Callable[[], nn.Module]] = [
        lambda: pwrewrite.rewrite(model, X, budget={"macs": 0.6}, calibration=BATCHES).model,
        lambda: pwrewrite.rewrite(model, X, ["insert-bottleneck", "narrow"], rank=0.5).model,
        lambda: pwrewrite.fuse(model, X, thorough=False).model,
        lambda: pwrewrite.recover(model, rewritten, BATCHES, "1epochs", augment="flip").model,
    ]
    rewritten = calls[1]()
    if setting == "default device":
        calls.pop()  # torch's own AveragedModel counts on that device, and meta has no numbers
    for call in calls:
        plain = call()
        with SETTINGS[setting]():
            other = call()
        for (name, value), own in zip(plain.state_dict().items(), other.state_dict().values(), strict=True):
            assert value.shape == own.shape
            assert value.dtype == own.dtype
            assert setting == "default dtype" or torch.equal(value, own), name  # noise is drawn in it
            assert not own.is_inference()
    with SETTINGS[setting]():
        assert not pwrewrite.freeze(model, X).refused


def test_factories_say_their_device() -> None:
    """A caller's default device would move what is made without one, and generators are on the CPU."""
    root = Path(pwrewrite.__file__).parent
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(ast.Attribute(ast.Name("torch"), name), _, keywords) if name in FACTORIES:
                    said = any(keyword.arg == "device" for keyword in keywords)
                    assert said or path.name in GIVEN, f"{path.relative_to(root)}:{node.lineno} torch.{name}"


def test_imports_draw_no_random_number() -> None:
    code = "import random, pwrewrite; s = random.getstate(); pwrewrite.rewrite; str(pwrewrite.Plan()); "
    run = [sys.executable, "-c", code + "assert s == random.getstate()"]
    assert subprocess.run(run, check=False, cwd=Path(pwrewrite.__file__).parents[1]).returncode == 0


def test_calls_from_several_threads_do_not_meet() -> None:
    call, model = nn.Module.__call__, net()
    with ThreadPoolExecutor(3) as pool:
        made = [pool.submit(pwrewrite.fuse, net(), X, thorough=False) for _ in range(2)]
        made += [pool.submit(pwrewrite.rewrite, model, X, budget={"macs": 0.6}, thorough=False) for _ in range(2)]
        reports = [each.result().report for each in made]
    assert nn.Module.__call__ is call
    assert [report.after for report in reports[::2]] == [report.after for report in reports[1::2]]
    assert all(report.passed and report.edits for report in reports)


def test_results_can_be_pickled_and_copied() -> None:
    model = net()
    rewritten, analysis = pwrewrite.rewrite(model, X, rank=0.5, thorough=False), pwrewrite.analyze(model, X)
    made = pwrewrite.make_plan(model, X, rank=0.5)
    for result in (analysis, rewritten.report, rewritten, made, pwrewrite.check(model, X, max_macs="1G")):
        for copied in (pickle.loads(pickle.dumps(result)), deepcopy(result)):
            assert str(copied) == str(result)
            assert len(copied.to_html()) == len(result.to_html())
