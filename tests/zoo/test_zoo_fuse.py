"""A sample of the zoos, fused: equal outputs, and nothing left that could have been fused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from .fusing import check_fuse, summary
from .harness import RESULTS, Candidate, build, sweep

SAMPLE = (
    "torchvision:resnet18",
    "torchvision:mobilenet_v3_small",
    "torchvision:googlenet",
    "timm:tf_efficientnet_b0",
    "timm:mobilevit_xxs",
    "timm:dla34",
    "timm:hrnet_w18_small",
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", SAMPLE)
def test_sample(name: str) -> None:
    library, model = name.split(":")
    pytest.importorskip(library, reason="the extra 'zoo' is not installed")
    row = check_fuse(build(Candidate(library, model)))
    assert row["passed"], row["detail"]
    assert "relative error" in row["detail"]
    assert not row["fusible"]
    assert not [reason for reason in row["left"] if not reason.startswith("not-behind-layer: it follows add")]


@pytest.mark.zoo
@pytest.mark.timeout(0)
def test_every_model() -> None:
    rows = sweep(check_fuse, RESULTS / "fuse.jsonl")
    print("\n" + summary(rows))
    assert not [key for key, row in rows.items() if "error" in row or not row.get("passed", True)]
