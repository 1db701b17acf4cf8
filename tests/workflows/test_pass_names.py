"""What is asked of the passes, as passes: order, defaults, and what each setting reaches."""

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from pwrewrite.capturing import Capture, capture
from pwrewrite.core.errors import UsageError
from pwrewrite.core.numbers import parse_width
from pwrewrite.core.options import PassOptions
from pwrewrite.core.plan import Op, Skip
from pwrewrite.forms import FORMS
from pwrewrite.passes import FORM_PASSES, InsertBottleneck, InsertReduction, LayerPass, Pass, ProjectBranch, Proposal
from pwrewrite.workflows.pass_names import SetLayers, parse_set, passes_of


@pytest.mark.parametrize(
    ("text", "width"), [("32", 32), (" 7 ", 7), ("0.5", 0.5), ("50%", 0.5), ("1.0", 1.0), ("1", 1)]
)
def test_widths_are_integers_and_ratios_are_not(text: str, width: float) -> None:
    found = parse_width(text, "--rank")
    assert found == width
    assert type(found) is type(width)


@pytest.mark.parametrize("text", ["0", "-1", "0.0", "1.5", "120%", "x", "", "nan", "1e3"])
def test_what_is_no_width(text: str) -> None:
    with pytest.raises(UsageError, match="--rank"):
        parse_width(text, "--rank")


def test_every_form_can_be_set() -> None:
    assert set(FORM_PASSES) == set(FORMS)
    for form, names in ((name, form.widths) for name, form in FORMS.items()):
        text = f"a.b={form}:{','.join('4' for _ in names)}"
        assert parse_set(text).widths == (4,) * len(names)
    assert parse_set("x=bottleneck:0.5").widths == (0.5,)
    assert parse_set("=reduce:3").path == ""  # the model itself


def test_without_anything_it_is_a_bottleneck_on_what_costs() -> None:
    (one,) = passes_of(PassOptions())
    assert isinstance(one, InsertBottleneck)
    assert one.min_share == 0.01
    (named,) = passes_of(PassOptions(passes=("insert-bottleneck",)))
    assert isinstance(named, LayerPass)
    assert named.min_share == 0.0


def test_the_order_is_projections_passes_layers() -> None:
    settings = ("a=reduce:3", "pool=project:8", "b=keep")
    built = passes_of(PassOptions(passes=("insert-bottleneck", "insert-reduction"), settings=settings, rank_in=4))
    assert [type(one) for one in built] == [ProjectBranch, InsertBottleneck, InsertReduction, SetLayers]
    bottleneck, reduction = built[1], built[2]
    assert isinstance(bottleneck, LayerPass)
    assert isinstance(reduction, LayerPass)
    assert bottleneck.ranks == {"rank_in": 4, "rank_out": 0.5}
    assert reduction.ranks == {"rank_in": 4}
    assert bottleneck.exclude == ("a", "b")


def test_later_settings_override_earlier_ones() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    settings = [parse_set(text) for text in ("*=reduce:2", "1=expand:3", "2=keep")]
    found = SetLayers(settings, {}).propose(capture(model, torch.zeros(1, 8, 9, 9)))
    assert {p.path: p.settings["form"] for p in found if isinstance(p, Op)} == {"0": "reduce", "1": "expand"}
    assert [p.path for p in found if isinstance(p, Skip)] == ["2"]


def test_options_that_would_do_nothing_are_refused() -> None:
    keep = ("a=keep",)
    for idle in ({"rank": 4}, {"energy": 0.9}, {"vbmf": True}, {"include": ("a",)}, {"min_share": 0.1}):
        with pytest.raises(UsageError, match="goes with --pass"):
            passes_of(PassOptions(settings=keep, **idle))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="none of the passes has a rank-out"):
        passes_of(PassOptions(passes=("insert-reduction",), rank_out=4))
    with pytest.raises(UsageError, match="--multiple"):
        passes_of(PassOptions(multiple=0))


class Plain(Pass):
    """A pass without widths."""

    name = "plain"
    summary = "nothing"
    exact = "both"

    def __init__(self, include: Sequence[str] = ()) -> None:
        self.include = tuple(include)

    def propose(self, capture: Capture) -> list[Proposal]:
        return []


def test_passes_without_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pwrewrite.workflows.pass_names.ALL", (Plain, InsertBottleneck))
    (plain,) = passes_of(PassOptions(passes=("plain",), include=("a",)))
    assert isinstance(plain, Plain)
    assert plain.include == ("a",)
    assert len(passes_of(PassOptions(passes=("plain", "insert-bottleneck"), rank=4))) == 2
    with pytest.raises(UsageError, match="--rank means nothing to plain"):
        passes_of(PassOptions(passes=("plain",), rank=4))
    with pytest.raises(UsageError, match="plain takes no --exclude"):
        passes_of(PassOptions(passes=("plain",), exclude=("a",)))
