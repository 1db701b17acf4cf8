"""Other tools' totals from a capture: exact against what the tools themselves said, recorded and live."""

from __future__ import annotations

import copy
import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import peers
from benchmarks.quirks import SHAPE, Calls, quirks

from pwrewrite.analysis.conventions import TOOLS, Count, count, explain
from pwrewrite.capturing import Capture, capture
from pwrewrite.core.errors import UsageError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "conventions.json").read_text())
QUICK = (
    "torchvision:resnet50",
    "torchvision:googlenet",
    "torchvision:mobilenet_v3_small",
    "torchvision:shufflenet_v2_x1_0",
    "torchvision:convnext_tiny",
    "timm:nf_regnet_b0",
    "timm:bat_resnext26ts",
    "timm:edgenext_xx_small",
    "examples:unet",
)
QUIRKS = quirks()


@cache
def captured(target: str) -> Capture:
    return capture(peers.skeleton(target), torch.empty(peers.shape(target), device="meta"))


def check(counts: tuple[Count, ...], figures: dict[str, Any]) -> None:
    """Totals as the tools say, and rows that add up."""
    for found in counts:
        said = figures[found.tool]
        if said is None:
            assert found.caveats
        else:
            assert found.total == said, f"{found.tool}: {[str(row) for row in found.rows]}"
        assert sum(row.counted for row in found.rows) == found.total
        assert sum(row.ours for row in found.rows) == found.ours
        assert sum(row.difference for row in found.reasons) == found.difference == found.total - found.ours


@pytest.mark.parametrize("target", QUICK)
def test_totals_are_those_the_tools_gave(target: str) -> None:
    if not target.startswith("examples"):
        pytest.importorskip(target.partition(":")[0], reason="the models' package is not installed")
    counts = explain(captured(target))
    assert not any(found.caveats for found in counts)
    check(counts, GOLDEN["models"][target])


@pytest.mark.parametrize("name", QUIRKS)
def test_every_way_in_which_the_tools_differ(name: str) -> None:
    check(explain(capture(QUIRKS[name], torch.zeros(SHAPE))), GOLDEN["quirks"][name])


def test_golden_file_covers_the_models() -> None:
    assert set(GOLDEN["models"]) == set(peers.MODELS)
    assert set(GOLDEN["quirks"]) == set(QUIRKS)


def test_resnet50_is_explained_to_the_last_digit() -> None:
    pytest.importorskip("torchvision", reason="the models' package is not installed")
    torch_, fvcore, thop, ptflops, torchinfo = explain(captured("torchvision:resnet50"))
    assert (torch_.total, torch_.difference, torch_.reasons) == (4_089_184_256, 0, ())
    assert (fvcore.total, fvcore.unit) == (4_111_512_576, "flops")
    assert [str(row) for row in fvcore.reasons] == [
        "+22,227,968 batch norm, 2 per element",
        "+100,352 adaptive avg pool2d, 1 per input element",
    ]
    assert [str(row) for row in thop.reasons] == [
        "+44,455,936 batch norm, 4 per element",
        "+102,400 adaptive avg pool2d, its window + 1 per output element",
    ]
    assert [str(row) for row in ptflops.reasons] == [
        "+22,227,968 batch norm, 2 per element",
        "+9,608,704 relu, 1 per element",
        "+9,608,704 relu, again in F.relu, 1 per input element",
        "+802,816 max pool2d, 1 per input element",
        "+802,816 max pool2d, again in F.max_pool2d, 1 per input element",
        "+100,352 adaptive avg pool2d, 1 per input element",
        "+100,352 adaptive avg pool2d, again in F.adaptive_avg_pool2d, 1 per input element",
        "+1,000 linear bias, 1 per output element",
    ]
    assert [str(row) for row in torchinfo.reasons] == [
        "+26,560 batch norm, each weight counted once per batch item",
        "+26,560 batch norm bias, 1 per batch item and channel",
        "+1,000 linear bias, 1 per batch item and channel",
    ]


def test_functions_and_transposed_convolutions_are_named() -> None:
    x = torch.zeros(SHAPE)
    subclass, functional, transposed = (capture(QUIRKS[n], x) for n in ("subclass", "functional", "transposed"))
    for tool in ("thop", "ptflops"):
        (row,) = count(subclass, tool).reasons
        assert str(row) == "-112,896 conv2d, class StandardConv2d has no hook: counted as 0"
        (row,) = count(functional, tool).reasons
        assert str(row) == "-147,456 conv2d, class WeightNet has no hook: counted as 0"
        assert count(functional, tool).total == 0
    row = count(transposed, "torchinfo").reasons[0]
    assert str(row) == "+239,904 conv_transpose2d, transposed, counted at output resolution"


def test_functions_of_larger_modules_are_named() -> None:
    class Larger(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(8, 8, 1, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.conv2d(x, self.conv.weight)

    for tool in ("thop", "ptflops", "torchinfo"):
        (row,) = count(capture(Larger(), torch.zeros(SHAPE)), tool).reasons
        assert str(row) == "-32,768 conv2d, called as a function: counted as 0"


def test_one_tool_is_the_same_as_in_all() -> None:
    found = capture(QUIRKS["patched"], torch.zeros(SHAPE))
    assert tuple(count(found, tool) for tool in TOOLS) == explain(found)


def test_unknown_tool_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"torch, fvcore, thop, ptflops, torchinfo"):
        count(capture(QUIRKS["pools"], torch.zeros(SHAPE)), "calflops")


def test_what_is_not_reproduced_is_told() -> None:
    class Mixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = torch.nn.GRU(8, 8)
            self.attention = torch.nn.MultiheadAttention(8, 2)

        def forward(self, x: torch.Tensor) -> Any:
            y, _ = self.rnn(x)
            return self.attention(y, y, y)[0]

    found = {c.tool: c.caveats for c in explain(capture(Mixed(), torch.zeros(4, 2, 8)))}
    assert found["torch"] == found["torchinfo"] == ()
    assert "recurrent" in found["thop"][0]
    assert "MultiheadAttention" in found["fvcore"][0]
    assert len(found["ptflops"]) == 2


def deformable(*, mask: bool) -> tuple[torch.nn.Module, Any]:
    ops = pytest.importorskip("torchvision.ops", reason="deformable convolution is torchvision's")

    class Deformable(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.offset = torch.nn.Conv2d(8, 18, 3, padding=1)
            self.mask = torch.nn.Conv2d(8, 9, 3, padding=1)
            self.conv = ops.DeformConv2d(8, 4, 3, padding=1, bias=not mask)

        def forward(self, x: torch.Tensor) -> Any:
            return self.conv(x, self.offset(x), self.mask(x)) if mask else self.conv(x, self.offset(x))

    return Deformable().eval(), torch.zeros(SHAPE)


@pytest.mark.parametrize(("mask", "total"), [(False, 466_432), (True, 635_904)])
def test_deformable_convolutions_under_ptflops(mask: bool, total: int) -> None:
    model, x = deformable(mask=mask)
    counted = count(capture(model, x), "ptflops")
    assert (counted.total, counted.caveats) == (total, ())  # as ptflops 0.7.5 says


@pytest.mark.parametrize(
    ("module", "told"),
    [
        (torch.nn.LPPool2d(2, 2), "inside F.lp_pool2d"),
        (torch.nn.LocalResponseNorm(2), "inside F.local_response_norm"),
        (torch.nn.Softmin(1), None),
    ],
)
def test_what_a_tool_counts_inside_a_function_is_told(module: torch.nn.Module, told: str | None) -> None:
    counted = count(capture(module, torch.zeros(SHAPE)), "ptflops")
    assert any(told in caveat for caveat in counted.caveats) if told else not counted.caveats or counted.total == 0


def test_a_call_that_cannot_be_told_from_another_is_said_so() -> None:
    pool = Calls(lambda x: torch.nn.functional.max_pool2d(x, 2, return_indices=True)[0])
    (caveat,) = count(capture(pool, torch.zeros(SHAPE)), "ptflops").caveats
    assert "which of them was called is not known" in caveat


def test_a_module_bound_or_patched_after_import_does_not_matter() -> None:
    """The convention is that of an untouched model: counting twice gives the same and leaves no trace."""
    model = copy.deepcopy(QUIRKS["shared"])
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    first, second = (explain(capture(model, torch.zeros(SHAPE))) for _ in range(2))
    assert first == second
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


@pytest.mark.bench
@pytest.mark.timeout(600)
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("target", peers.MODELS)
def test_totals_are_those_the_tools_give(target: str, tool: str) -> None:
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"{tool} is not installed (it is in the extra bench)")
    if not target.startswith("examples"):
        pytest.importorskip(target.partition(":")[0], reason="the models' package is not installed")
    said = peers.total(tool, peers.build(target), torch.rand(peers.shape(target)))
    assert count(captured(target), tool).total == said
