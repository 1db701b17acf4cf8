"""Every model of torchvision and timm: a sample in the ordinary tests, all of them with ``-m zoo``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("timm")

from . import harness
from .checks import check_capture, check_replay, shortfall, summary
from .harness import RESULTS, Built, Candidate, build, candidates, results, sweep

SAMPLE = """
torchvision:alexnet torchvision:densenet121 torchvision:googlenet torchvision:shufflenet_v2_x0_5 torchvision:swin_v2_t
torchvision:maxvit_t torchvision:regnet_y_400mf torchvision:lraspp_mobilenet_v3_large torchvision:r2plus1d_18
torchvision:swin3d_t torchvision:ssdlite320_mobilenet_v3_large torchvision:raft_small torchvision:vit_b_32
timm:resnetv2_50x1_bit timm:tf_efficientnet_b0 timm:botnet26t_256 timm:lambda_resnet26t
timm:cait_xxs24_224 timm:mobilevitv2_050 timm:edgenext_xx_small timm:volo_d1_224 timm:resnest14d timm:hrnet_w18_small
timm:eva02_tiny_patch14_224 timm:tiny_vit_5m_224
""".split()  # noqa: SIM905

EXECUTED = """
torchvision:googlenet torchvision:shufflenet_v2_x0_5 timm:botnet26t_256 timm:mobilevitv2_050 timm:lambda_resnet26t
timm:xcit_nano_12_p16_224 timm:hrnet_w18_small torchvision:ssdlite320_mobilenet_v3_large
""".split()  # noqa: SIM905


def candidate(key: str) -> Candidate:
    library, _, name = key.partition(":")
    return Candidate(library, name)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("key", SAMPLE)
@pytest.mark.filterwarnings("ignore")
def test_a_sample_is_whole_and_counted_to_the_last_digit(key: str) -> None:
    row = check_capture(build(candidate(key)))
    assert shortfall(row) == ""
    assert row["unpriced"] == []
    assert row["node_params"] <= row["params"]
    assert row["in_graph"] == row["convolutions"] or row["notes"] or key == "torchvision:googlenet"


@pytest.mark.parametrize("key", EXECUTED)
@pytest.mark.filterwarnings("ignore")
def test_a_captured_graph_computes_what_the_model_does(key: str) -> None:
    assert check_replay(build(candidate(key)))["replay"] == "equal"


@pytest.mark.zoo
@pytest.mark.timeout(0)
def test_whole_zoo() -> None:
    rows = sweep(check_capture, RESULTS / "capture.jsonl")
    print("\n" + summary(rows))
    assert set(rows) >= {c.key for c in candidates()}
    assert not [key for key, row in rows.items() if "error" in row]
    assert sum(row["capture"] == "whole" for row in rows.values()) >= 0.98 * len(rows)
    assert not [key for key, row in rows.items() if shortfall(row)]


# ------------------------------------------------------------------------------------------------ the harness


def check_name(built: Built) -> dict[str, Any]:
    if built.candidate.name == "squeezenet1_0":
        raise ValueError("on purpose")
    return {"seen": built.candidate.name, "meta": built.meta}


def die(built: Built) -> dict[str, Any]:
    import os

    os._exit(3)


def hang(built: Built) -> dict[str, Any]:
    import time

    time.sleep(60)
    return {}


FEW = [Candidate("torchvision", "squeezenet1_0"), Candidate("torchvision", "squeezenet1_1")]


def test_a_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "few.jsonl"
    path.write_text(json.dumps({"key": "torchvision:alexnet", "seen": "before"}) + "\n")
    rows = sweep(check_name, path, only=[Candidate("torchvision", "alexnet"), *FEW], jobs=1)
    assert rows == results(path)
    assert rows["torchvision:alexnet"] == {"key": "torchvision:alexnet", "seen": "before"}
    assert rows["torchvision:squeezenet1_1"]["seen"] == "squeezenet1_1"
    assert rows["torchvision:squeezenet1_1"]["meta"]
    assert rows["torchvision:squeezenet1_0"]["error"] == "ValueError: on purpose"
    assert len(path.read_text().splitlines()) == 3


def test_a_sweep_outlives_its_workers(tmp_path: Path) -> None:
    rows = sweep(die, tmp_path / "die.jsonl", only=FEW[:1], jobs=1)
    assert rows[FEW[0].key]["error"] == "the process died"


def test_a_sweep_does_not_wait_for_ever(tmp_path: Path) -> None:
    rows = sweep(hang, tmp_path / "hang.jsonl", only=FEW[:1], jobs=1, timeout=1)
    assert "timeout" in rows[FEW[0].key]["error"]


def test_shards_share_the_work_and_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "few.jsonl"
    monkeypatch.setenv("PWREWRITE_ZOO_SHARD", "1/2")
    assert set(sweep(check_name, path, only=FEW)) == {"torchvision:squeezenet1_1"}
    monkeypatch.setenv("PWREWRITE_ZOO_SHARD", "0/2")
    assert set(sweep(check_name, path, only=FEW)) == {c.key for c in FEW}
    assert len(path.read_text().splitlines()) == 2
    monkeypatch.setenv("PWREWRITE_ZOO_SHARD", "2/2")
    with pytest.raises(ValueError, match="expected such as 0/2"):
        sweep(check_name, path, only=FEW)


def test_candidates_are_both_zoos_without_the_quantized() -> None:
    found = candidates()
    assert len(found) > 1400
    assert not [c for c in found if "quantized" in c.name]
    assert harness.RESULTS.name
