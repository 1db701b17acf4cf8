"""One of the examples, exported, and by hand all of them and torchvision's: every variant agrees in every format."""

from __future__ import annotations

import pytest

from .exporting import check_export, exportable, summary
from .harness import RESULTS, Candidate, build, sweep


def test_sample() -> None:
    row = check_export(build(Candidate("examples", "attention")))
    assert row["passed"], row


@pytest.mark.zoo
@pytest.mark.timeout(0)
def test_every_model() -> None:
    rows = sweep(check_export, RESULTS / "export.jsonl", only=exportable(), timeout=1800)
    print("\n" + summary(rows))
    assert not [key for key, row in rows.items() if "error" in row or not row.get("passed", True)]
