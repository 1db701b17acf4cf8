"""Rows of the layer table: order, shares, hotspots, and what could be done with each."""

import pytest
import torch
from torch import Tensor, nn

from pwrewrite.analysis import analyze_capture
from pwrewrite.analysis.hotspots import squeeze
from pwrewrite.capturing import capture
from pwrewrite.core.errors import UsageError
from pwrewrite.core.plan import Skip, SkipReason


class Mixed(nn.Module):
    """One layer of each kind: 16 channels on 8 × 8."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Conv2d(16, 16, 3, padding=1)
        self.tall = nn.Conv2d(16, 16, (3, 1), padding=(1, 0))
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.pointwise = nn.Conv2d(16, 16, 1)
        self.up = nn.ConvTranspose2d(16, 16, 2, stride=2)
        self.tiny = nn.Conv2d(16, 1, 3, padding=1)
        self.linear = nn.Linear(1, 4)
        self.unused = nn.Conv2d(16, 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.grouped(self.tall(self.dense(self.dense(x)))))
        return self.linear(self.tiny(self.up(self.pointwise(x))).mean((2, 3)))


@pytest.fixture(scope="module")
def analysis():
    return analyze_capture(capture(Mixed(), torch.zeros(2, 16, 8, 8)))


@pytest.fixture(scope="module")
def rows(analysis):
    return {report.layer.path: report for report in analysis.layers}


def test_largest_first_and_shares_add_up(analysis) -> None:
    macs = [report.layer.macs for report in analysis.layers]
    assert macs == sorted(macs, reverse=True)
    assert [report.layer.path for report in analysis.layers][:2] == ["dense", "grouped"]
    assert sum(report.share for report in analysis.layers) == pytest.approx(1.0)
    assert analysis.layers[-1].cumulative == pytest.approx(1.0)
    running = 0.0
    for report in analysis.layers:
        running += report.share
        assert report.cumulative == pytest.approx(running)


def test_hotspots_are_dense_and_spatial(analysis, rows) -> None:
    assert {report.layer.path for report in analysis.hotspots} == {"dense", "tall", "grouped", "up", "tiny"}
    assert not rows["unused"].hotspot


def test_the_share_of_a_hotspot_can_be_chosen() -> None:
    made = capture(Mixed(), torch.zeros(2, 16, 8, 8))
    few = analyze_capture(made, hotspot_share=0.2)
    assert [report.layer.path for report in few.hotspots] == ["dense"]
    for wrong in (-0.1, 1.5):
        with pytest.raises(UsageError, match="hotspot share"):
            analyze_capture(made, hotspot_share=wrong)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("depthwise", SkipReason.DEPTHWISE),
        ("pointwise", SkipReason.POINTWISE),
        ("linear", SkipReason.POINTWISE),
        ("unused", SkipReason.NOT_CALLED),
    ],
)
def test_refusals(rows, path: str, reason: SkipReason) -> None:
    report = rows[path]
    assert report.skip is not None
    assert report.skip.reason == reason
    assert report.skip.path == path
    assert report.break_even is None


def test_too_small_to_gain() -> None:
    made = capture(nn.Sequential(nn.Conv2d(1, 1, 3)), torch.zeros(1, 1, 8, 8))
    found = squeeze(made, made.layers[0])
    assert isinstance(found, Skip)
    assert found.reason == SkipReason.TOO_SMALL
    assert "even a bottleneck of rank 1" in found.detail


def test_what_may_not_be_touched_has_no_break_even() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3))
    model[0].register_forward_hook(lambda *_: None)
    (report,) = analyze_capture(capture(model, torch.zeros(1, 16, 8, 8))).layers
    assert report.skip is not None
    assert report.skip.reason == SkipReason.HOOKS
    assert report.break_even is None
    assert report.hotspot


def test_half_width(rows) -> None:
    half = rows["dense"].break_even
    # two calls, batch 2, 64 positions: 16·8 + 8·8·9 + 8·16 per position; the bias of the layer stays
    assert half.half_macs == 2 * 2 * 64 * (128 + 576 + 128)
    assert half.half_params == 128 + 576 + 128 + 16
    grouped = rows["grouped"].break_even  # 2 groups of 8 → 4 → 4 → 8
    assert grouped.half_params == 2 * (8 * 4 + 4 * 4 * 9 + 4 * 8) + 16
    up = rows["up"].break_even  # reduce and core at 8 × 8, expand at 16 × 16
    assert up.half_macs == 2 * (64 * 128 + 64 * 8 * 8 * 4 + 256 * 128)


def test_ranks_of_groups_are_totals(rows) -> None:
    found = rows["grouped"].break_even
    assert found.params_rank_in % 2 == found.params_rank_out % 2 == 0
    assert 0 < found.macs_rank_in < 16


def test_a_gain_in_one_measure_only() -> None:
    # the input is 16 times larger than the output, so that no reduction pays in MACs
    (report,) = analyze_capture(capture(nn.Conv2d(16, 2, 2, stride=4), torch.zeros(1, 16, 32, 32))).layers
    assert report.skip is None
    assert (report.break_even.macs_rank_in, report.break_even.macs_rank_out) == (0, 0)
    assert report.break_even.params_rank_in > 0


def test_activation_bytes_and_receptive_field(rows) -> None:
    assert rows["dense"].activation_bytes == 2 * 4 * 2 * 16 * 64
    assert rows["dense"].receptive_field == (3, 3)  # of its first call
    assert rows["tall"].receptive_field == (7, 5)
    assert rows["linear"].receptive_field == (8, 8)
    assert rows["unused"].receptive_field is None
    assert rows["unused"].bound == ""


def test_equal_layers_stay_in_graph_order() -> None:
    model = nn.Sequential(*[nn.Conv2d(4, 4, 3, padding=1) for _ in range(5)])
    analysis = analyze_capture(capture(model, torch.zeros(1, 4, 8, 8)))
    assert [report.layer.path for report in analysis.layers] == ["0", "1", "2", "3", "4"]


def test_a_model_without_any_layer() -> None:
    analysis = analyze_capture(capture(nn.ReLU(), torch.zeros(1, 4)))
    assert analysis.layers == analysis.hotspots == ()
    assert analysis.macs == 0
