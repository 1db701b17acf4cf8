"""The report of a rewrite in each form: in order, to width, and with nothing in a model read as markup."""

import json
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.cells import cell_len

from pwrewrite.core.plan import Edit, Op, Plan, Skip, SkipReason
from pwrewrite.core.verification import Check, Verification
from pwrewrite.report import markdown, rewrite, rewrite_rows as rows
from pwrewrite.report.readme import readme
from pwrewrite.report.records import BudgetReport, EditRow, Report
from pwrewrite.report.terminal import text as text_of

Golden = Callable[[str, str], None]
NASTY = ("a.[bold red]x[/].y", "p|q`r``s", "new\nline\x1b[31m")


def edit(path: str, form: str, widths: dict[str, int], error: float | None, **more: object) -> EditRow:
    used = list(widths.values())
    init = "weights" if error is not None else "fresh"
    op = Op("factorize", path, f"insert-{form}", {"form": form, "widths": widths, "init": init})
    made = Edit(op, "module", form, used[0], used[-1], 36_864, 13_312, error, **more)  # type: ignore[arg-type]
    return EditRow(made, 115_605_504, 41_746_432)


PROOF = Verification(
    (
        Check("shapes (static)", True, "1×1000 float32"),
        Check("numerics (eval)", True, "relative error 4.78e-01; the largest output agrees on 3 of 9 samples"),
        Check("cost", True, "4,709,806 parameters and 709,699,584 MACs, recounted"),
    ),
    0.478,
    1 / 3,
    None,
    ("no other batch sizes could be tried",),
    samples=9,
)


def report(paths: tuple[str, ...] = ("layer1.0.conv1", "layer1.0.conv2", "stem"), **changes: object) -> Report:
    one, two, three = paths
    made = Report(
        "net.py",
        {"params": 11_689_512, "macs": 1_814_073_344, "flops": 3_628_146_688, "weight_bytes": 46_796_608,
         "activation_bytes": 32_921_504, "peak_activation_bytes": 7_024_640},
        {"params": 4_709_806, "macs": 709_699_584, "flops": 1_419_399_168, "weight_bytes": 18_877_784,
         "activation_bytes": 41_300_896, "peak_activation_bytes": 7_024_640},
        (
            edit(one, "bottleneck", {"rank_in": 32, "rank_out": 64}, 0.7316),
            edit(two, "bottleneck", {"rank_in": 64, "rank_out": 64}, 3.2e-7, exact="both"),
            edit(three, "reduce", {"rank_in": 2}, None),
        ),
        (
            Skip("layer2.0.shortcut", SkipReason.POINTWISE, "a 1×1 convolution; factorize-pointwise is for these"),
            Skip("layer3.0.shortcut", SkipReason.POINTWISE, "a 1×1 convolution; factorize-pointwise is for these"),
            Skip("layer4.conv", SkipReason.HOOKS, "has a forward hook, which would be lost; remove it and put it back"),
        ),
        PROOF,
        ("output 0: 1×416×28×28 → 1×256×28×28",),
        ("the weights are random",),
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [100, 80])
def test_table(same_as_golden: Golden, width: int) -> None:
    same_as_golden(f"rewrite_{width}.txt", text_of(rewrite.page(report()), width))


def test_different_reasons_of_one_kind_are_not_told_of_all() -> None:
    skips = [Skip(path, SkipReason.NO_GAIN, f"at {width} it would grow") for path, width in (("b", 8), ("a", 4))]
    line = text_of(rewrite.page(report(skips=tuple(skips))))
    assert "2  no-gain  a, b: each for its own; a: at 4 it would grow" in line


def test_table_of_everything(same_as_golden: Golden) -> None:
    same_as_golden("rewrite_all.txt", text_of(rewrite.page(report(), everything=True)))


def test_plan(same_as_golden: Golden) -> None:
    same_as_golden(
        "rewrite_plan.txt", text_of(rewrite.page(report(verification=None, output_changes=()), planned=True))
    )


def test_markdown(same_as_golden: Golden) -> None:
    same_as_golden("rewrite.md", markdown(rewrite.page(report())))


@pytest.mark.parametrize("width", [100, 80, 60])
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize(
    "names",
    [("a", "b", "c"), tuple(f"{'x' * 150}.{i}" for i in range(3)), tuple(f"{'宽' * 60}.{i}" for i in range(3)), NASTY],
    ids=["short", "long", "wide", "nasty"],
)
def test_no_line_is_wider_than_asked(names: tuple[str, ...], everything: bool, width: int) -> None:
    made = report(names, target="t" * 300, notes=("n" * 250,))
    made = replace(made, skips=tuple(replace(skip, path=name) for skip, name in zip(made.skips, names, strict=True)))
    text = text_of(rewrite.page(made, everything=everything), width)
    assert max(map(cell_len, text.splitlines())) <= width
    assert "\x1b" not in text


def test_the_order_is_saving_proof_layers_rest() -> None:
    for text in (text_of(rewrite.page(report())), markdown(rewrite.page(report()))):
        places = [text.index(word) for word in ("parameters", "Structure", "Layers", "Left as they are", "random")]
        assert places == sorted(places)


def test_failures_come_first_and_name_the_place() -> None:
    checks = (*PROOF.checks, Check("gradients", False, "stem.weight gets none"))
    failed = Verification(checks, 0.5, None, "stem")
    assert rows.verdict(failed) == "FAILED: 1 of 4 checks, from stem on"
    page = rewrite.verification_page(failed, ("one", "two"))
    text = text_of(page)
    assert text.startswith("one\nagainst two\n")
    assert re.search("Structure .*\n✗  gradients", text)
    assert "✗ | gradients" in markdown(page)


def test_only_the_largest_savings_are_shown_unless_all_are_asked_for() -> None:
    many = tuple(edit(f"layer{i}", "reduce", {"rank_in": 4}, 0.5) for i in range(30))
    text = text_of(rewrite.page(report(edits=many)))
    assert "… and 10 more that save less (--all)" in text
    assert "layer29" in text_of(rewrite.page(report(edits=many), everything=True))


def test_changes_and_errors_in_words() -> None:
    assert [rows.change(*pair) for pair in ((100, 50), (100, 100), (0, 5), (10**6, 10**6 - 1), (3, 4))] == [
        "-50.0%", "0%", "new", "<-0.1%", "+33.3%",
    ]  # fmt: skip
    assert [rows.error_text(e) for e in (None, 0.0, 0.4321, 1.0, 3.2e-7)] == ["–", "0.000", "0.432", "1.000", "3e-07"]


def test_json_is_the_schema(same_as_golden: Golden) -> None:
    data = json.loads(report().to_json())
    assert data == report().to_dict()
    assert data["delta"]["params"] == data["after"]["params"] - data["before"]["params"]
    assert data["edits"][0]["rank_in"] == 32
    assert data["skipped"][0] == {
        "path": "layer2.0.shortcut", "reason": "pointwise",
        "detail": "a 1×1 convolution; factorize-pointwise is for these",
    }  # fmt: skip


def test_the_readme_shouts_where_nothing_is_proven() -> None:
    plan = Plan(model={"class": "net.Net", "target": "net.py", "args": {"width": 3}})
    assert "Warning" not in readme(report(), plan, "out")
    assert "args={'width': 3}" in readme(report(), plan, "out")
    assert "WAS NOT VERIFIED" in readme(report(verification=None), plan, "out")
    failed = replace(PROOF, checks=(Check("cost", False, "off"),))
    assert "FAILED VERIFICATION" in readme(report(verification=failed), plan, "out")
    assert "..." in readme(report(), Plan(), "out")


MOVED = "changed: relative error 0.478 · same prediction"
NUMERICS = Check("numerics (eval)", False, "relative error 0.5, allowed 0.1")


@pytest.mark.parametrize(
    ("proof", "told", "good"),
    [
        (Verification((), 0.478, 1 / 3, samples=9),
         f"{MOVED} for 3 of 9 inputs (33.3%) · no limit set (--max-error)", None),
        (Verification((), 0.478, 0.0, samples=9, max_error=0.5),
         f"{MOVED} for 0 of 9 inputs (0.0%) · within the limit of 0.5", True),
        (Verification((NUMERICS,), 5.0, max_error=0.1),
         "changed: relative error 5.000 · above the limit of 0.1", False),
        (Verification((), 3e-7, 1.0, samples=1, exact=True),
         "the same up to rounding: relative error 3e-07 · same prediction for 1 of 1 input (100.0%)", True),
        (Verification((NUMERICS,), 0.5, exact=True), "changed: relative error 0.500", False),
        (Verification((), 0.0), "the same up to rounding: relative error 0.000", True),
        (Verification(()), "not compared", None),
    ],
)  # fmt: skip
def test_the_outputs_have_a_verdict_of_their_own(proof: Verification, told: str, good: bool | None) -> None:
    assert rows.outputs_text(proof) == (told, good)


def test_a_changed_model_is_not_called_proven() -> None:
    text = text_of(rewrite.page(report()))
    assert "Proof" not in text
    assert "passed" not in text.partition("Structure")[0]
    assert text.splitlines()[1].endswith("; same prediction for 3 of 9 inputs")  # in the headline
    assert "Proof  NOT VERIFIED" in text_of(rewrite.page(report(verification=None)))


def test_the_error_column_is_explained() -> None:
    assert "error: how far a layer's weights moved" in text_of(rewrite.page(report()))
    assert "| weight error |" in markdown(rewrite.page(report()))
    fresh = tuple(row for row in report().edits if row.edit.relative_error is None)
    assert "error:" not in text_of(rewrite.page(report(edits=fresh)))


def test_a_predicted_loss_says_in_its_own_row_where_it_says_nothing() -> None:
    def row(samples: int, *notes: str) -> str:
        sensitivity = "loss" if samples else "weights"
        budget = BudgetReport({"macs": "0.5"}, {}, sensitivity, "full", samples, predicted=0.1)
        shown = text_of(rewrite.page(report(budget=budget, notes=notes)), 200)
        return next(line for line in shown.splitlines() if line.startswith("predicted loss"))

    random = "no --weights: the weights are those that the model's code makes (seed 0)"
    assert row(8).endswith("0.1 (KL divergence in nats)")
    assert row(8, random).endswith("0.1 (KL divergence in nats; random weights: says nothing about a trained model)")
    assert row(0).endswith("; not calibrated: says nothing about the outputs)")
    assert "random weights" in row(0, random)
