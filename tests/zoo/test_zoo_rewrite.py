"""Full-rank bottlenecks all over the zoo: a sample in the ordinary tests, all of it with ``-m zoo``."""

from __future__ import annotations

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("timm")

from .harness import RESULTS, Candidate, build, sweep
from .rewrites import check_rewrite, order, rewrite_summary

SAMPLE = {
    "torchvision:shufflenet_v2_x0_5": 1,
    "torchvision:squeezenet1_1": 9,
    "timm:resnet14t": 7,
    "timm:convnext_atto": 4,
    "timm:vit_tiny_patch16_224": 1,
    "timm:ghostnet_050": 1,
}
"""Model to the dense k×k convolutions that it has."""


@pytest.mark.parametrize("key", SAMPLE)
@pytest.mark.filterwarnings("ignore")
def test_a_sample_stays_the_same_at_full_rank(key: str) -> None:
    library, _, name = key.partition(":")
    row = check_rewrite(build(Candidate(library, name)))
    assert row["failures"] == []
    assert row["passed"]
    assert row["exact"]
    assert row["edits"] == SAMPLE[key]


@pytest.mark.zoo
@pytest.mark.timeout(0)
def test_whole_zoo_stays_the_same_at_full_rank() -> None:
    rows = sweep(check_rewrite, RESULTS / "rewrite.jsonl", only=order())
    print("\n" + rewrite_summary(rows))
    assert not [key for key, row in rows.items() if "error" in row]
    assert not [key for key, row in rows.items() if not row.get("passed", True)]
