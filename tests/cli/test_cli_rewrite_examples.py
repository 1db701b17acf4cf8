"""Every example at half rank: rewritten, verified, saved, loaded in a new process, with the same outputs to the bit.

Bit-equal, because loading fills the same tensors into the same modules: nothing is decomposed again, so the same
kernels see the same numbers in the same order (with as many threads).
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pwrewrite
from pwrewrite.targets import TargetOptions, open_target

EXAMPLES = Path(__file__).parents[2] / "examples"
HALF: dict[str, Any] = {"passes": ["insert-bottleneck"], "rank": 0.5}

DIGEST = '''
import hashlib, torch

def leaves(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for key in value:
            yield from leaves(value[key])
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from leaves(item)

def digest(model, inputs):
    """Of the outputs on random inputs in the shapes of the example's, in eval mode."""
    torch.manual_seed(0)
    draw = lambda t: torch.rand(t.shape) if t.is_floating_point() else t
    made = [[draw(t) for t in x] if isinstance(x, list) else draw(x) for x in inputs]
    with torch.no_grad():
        found = list(leaves(model.eval()(*made)))
    text = b"".join(bytes(str(tuple(t.shape)), "ascii") + t.contiguous().numpy().tobytes() for t in found)
    return hashlib.sha256(text).hexdigest()
'''

LOAD = """
import sys, pwrewrite
from pwrewrite.targets import TargetOptions, open_target
opened = open_target(TargetOptions(sys.argv[1], trust_target=True))
print(digest(opened.model, opened.example_inputs))
"""

SMALL_DETECTOR = """
import importlib.util
spec = importlib.util.spec_from_file_location("mask_rcnn_example", {path!r})
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)

def build_model():
    model = example.build_model()
    model.transform.min_size = (128,)  # the default of 800 takes minutes
    return model

def example_inputs():
    (images,) = example.example_inputs()
    return ([images[0][:, :128, :128]],)
"""

#: Name to parameters after the rewrite.
QUICK = {"attention": 118_306, "inception_naive": 151_552, "inception_reduced": 84_224}
SLOW = {"googlenet": None, "mobilenet": 4_231_976, "resnet18": 4_709_806, "resnet50": None, "unet": 12_125_314,
        "vgg16": 129_003_304}  # fmt: skip


def digest_of(model: nn.Module, inputs: object) -> str:
    scope: dict[str, object] = {}
    exec(DIGEST, scope)
    return scope["digest"](model, inputs)  # type: ignore[operator, no-any-return]


def same_in_a_new_process(target: Path, folder: Path, params: int | None) -> None:
    result = pwrewrite.rewrite(open_target(TargetOptions(str(target))), **HALF)
    report = result.report
    assert report.passed, report.verification
    assert report.delta["params"] < 0
    assert report.delta["macs"] < 0
    if params is not None:
        assert report.after["params"] == params
    result.save(folder / "out")
    inputs = open_target(TargetOptions(str(target))).example_inputs
    done = subprocess.run(
        [sys.executable, "-c", DIGEST + LOAD, str(folder / "out")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == digest_of(result.model, inputs)


def test_every_example_is_rewritten_here() -> None:
    """Channel mixing has 1×1 convolutions only, nothing to put a bottleneck into; the README compresses the digits."""
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*QUICK, *SLOW, "mask_rcnn", "channel_mixing", "digits"}


@pytest.mark.parametrize("name", QUICK)
def test_quick_example(name: str, tmp_path: Path) -> None:
    same_in_a_new_process(EXAMPLES / f"{name}.py", tmp_path, QUICK[name])


@pytest.mark.zoo
@pytest.mark.parametrize("name", SLOW)
def test_slow_example(name: str, tmp_path: Path) -> None:
    same_in_a_new_process(EXAMPLES / f"{name}.py", tmp_path, SLOW[name])


@pytest.mark.zoo
def test_mask_rcnn(tmp_path: Path) -> None:
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    target = tmp_path / "detector.py"
    target.write_text(SMALL_DETECTOR.format(path=str(EXAMPLES / "mask_rcnn.py")))
    same_in_a_new_process(target, tmp_path, None)
