"""What a person asks of the passes, as passes: ``--pass``, ``--rank``, ``--set``, … of the command line.

`Choices` holds what was asked, checks that it makes sense as a whole before any model is built, and makes the passes.
`SetLayers` is the pass behind ``--set PATH=FORM:WIDTH``: it gives single layers (or patterns of them) a form of their
own and leaves the choice of eligibility, costs and settings to the pass of that form.

The order is: projections first (they change the channels of the layers behind them), then the passes as given, on
everything that no ``--set`` names, then the layers that are named.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from fnmatch import fnmatchcase
from inspect import signature
from typing import Any

from ..capturing.records import Capture, Layer
from ..core.errors import RefusedError, UsageError
from ..core.plan import Edit, Op, Skip, SkipReason
from ..forms import FORMS
from ..passes import (
    ALL,
    FactorizeLinear,
    FactorizePointwise,
    FactorizeSpatial,
    InsertBottleneck,
    InsertExpansion,
    InsertReduction,
    LayerPass,
    Pass,
    ProjectBranch,
    Proposal,
    SeparateDepthwise,
)

Width = int | float

FORM_PASSES: dict[str, tuple[type[LayerPass], ...]] = {
    "bottleneck": (InsertBottleneck,),
    "reduce": (InsertReduction,),
    "expand": (InsertExpansion,),
    "spatial": (FactorizeSpatial,),
    "depthwise": (SeparateDepthwise,),
    "pair": (FactorizePointwise, FactorizeLinear),
}
"""The forms that ``--set`` gives to layers, and the passes that know them."""

DEFAULT_SHARE = 0.01
"""Least part of the MACs where neither a pass nor a layer is named."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One ``--set``.

    Attributes:
        text: As it was given.
        path: A path or pattern.
        form: One of `FORM_PASSES`, ``project`` or ``keep``.
        widths: Its widths; none for ``keep``, and for the others where the form's default is meant.
    """

    text: str
    path: str
    form: str
    widths: tuple[Width, ...] = ()

    def names(self, layer: Layer) -> bool:
        """Whether it is about a layer."""
        return any(fnmatchcase(path, self.path) for path in (layer.path, *layer.aliases))


def parse_width(text: str, what: str) -> Width:
    """Reads ``32`` as a width and ``0.5`` or ``50%`` as a ratio.

    Args:
        text: What was typed.
        what: The name of the setting, for the error.

    Raises:
        UsageError: If it is neither, or out of range.
    """
    expected = "a width from 1 such as 32, or a ratio above 0 and up to 1 such as 0.5 or 50%"
    stripped = text.strip()
    try:
        value: Width
        if re.fullmatch(r"[+-]?[0-9]+", stripped):
            value = int(stripped)
            good = value >= 1
        else:
            value = float(stripped[:-1]) / 100 if stripped.endswith("%") else float(stripped)
            good = 0 < value <= 1
    except ValueError:
        raise UsageError(f"{what} is neither a width nor a ratio", expected=expected, got=repr(text)) from None
    if not good:
        raise UsageError(f"{what} is out of range", expected=expected, got=repr(text))
    return value


def parse_set(text: str) -> Setting:
    """Reads one ``--set``: ``PATH=FORM:WIDTH[,WIDTH]`` or ``PATH=keep``.

    Raises:
        UsageError: If it is none, or the form does not take these widths.
    """
    path, equals, rest = text.partition("=")
    form, colon, widths_text = (part.strip() for part in rest.partition(":"))
    known = (*FORM_PASSES, "project", "keep")
    if not equals or not form:
        raise UsageError(
            f"cannot read --set {text!r}",
            expected="PATH=FORM:WIDTH[,WIDTH] or PATH=keep",
            hint="--set b3=reduce:96, --set 'layer3.*.conv2=bottleneck:0.5', --set fc=keep",
        )
    if form not in known:
        near = get_close_matches(form, known, n=1)
        raise UsageError(
            f"--set {text!r} names an unknown form {form!r}",
            expected=", ".join(known),
            hint=f"did you mean {near[0]}?" if near else None,
        )
    what = f"a width in --set {text!r}"
    widths = tuple(parse_width(part, what) for part in widths_text.split(",")) if colon else ()
    names = () if form == "keep" else ("channels",) if form == "project" else FORMS[form]
    if len(widths) not in ({1, len(names)} if names else {0}):
        raise UsageError(
            f"--set {text!r} gives {len(widths)} widths",
            expected=f"{form}:{','.join(name.upper() for name in names)}" if names else "keep without a width",
        )
    if form == "project" and not isinstance(widths[0], int):
        raise UsageError(f"--set {text!r} gives a ratio", expected="the channels of the projection, an integer")
    return Setting(text, path.strip(), form, widths)


@dataclass(frozen=True)
class Choices:
    """What was asked of the passes.

    Attributes:
        passes: Names of passes, in order.
        settings: What single layers become.
        rank: Width or ratio for the passes.
        rank_in: The same for the input side, over ``rank``.
        rank_out: The same for the output side.
        energy: Part of ``‖W‖²`` to keep, instead of ``rank``.
        vbmf: Whether ranks are chosen by EVBMF instead.
        include: Patterns on paths; all layers where empty.
        exclude: Patterns on paths that are left.
        min_share: Least part of the MACs; None for the default.
        multiple: What computed widths are rounded to; None for the default.
        allow_growth: Whether results that cost more are taken.
        replan: Whether parts of earlier rewrites are looked at.
        init: ``weights`` or ``fresh``.
        norm: With ``fresh``.
        activation: With ``fresh``.
        allow_output_change: Whether an output's shape may change.
    """

    passes: tuple[str, ...] = ()
    settings: tuple[Setting, ...] = ()
    rank: Width | None = None
    rank_in: Width | None = None
    rank_out: Width | None = None
    energy: float | None = None
    vbmf: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    min_share: float | None = None
    multiple: int | None = None
    allow_growth: bool = False
    replan: bool = False
    init: str = "weights"
    norm: str | None = None
    activation: str | None = None
    allow_output_change: bool = False

    @property
    def given(self) -> tuple[str, ...]:
        """Names of the options that differ from their defaults."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) != f.default)

    def build(self) -> list[Pass]:
        """The passes, in the order in which they run.

        Raises:
            UsageError: If what was asked makes no sense.
        """
        self._check()
        projects = [s for s in self.settings if s.form == "project"]
        layers = [s for s in self.settings if s.form != "project"]
        built: list[Pass] = [self._project(s) for s in projects]
        names = self.passes or (() if self.settings else ("insert-bottleneck",))
        exclude = (*self.exclude, *(s.path for s in layers))
        for i, name in enumerate(names):
            kind = _kind(name)
            if not issubclass(kind, LayerPass):
                built.append(_plain(kind, self.include, exclude))
                continue
            common = self._common()
            if i == 0:  # checks that the patterns match; later ones may find their layer already replaced
                common |= {"include": self.include, "exclude": exclude}
            else:
                common["select"] = _selecting(self.include, exclude)
            share = self.min_share if self.min_share is not None else 0.0 if self.passes else DEFAULT_SHARE
            built.append(kind(self._rank(kind), energy=self.energy, vbmf=self.vbmf, min_share=share, **common))
        if layers:
            built.append(SetLayers(layers, self._common()))
        return built

    def _check(self) -> None:
        of_passes = {"rank", "rank_in", "rank_out", "energy", "vbmf", "include", "exclude", "min_share"}
        idle = [name for name in self.given if name in of_passes]
        if idle and self.settings and not self.passes:
            raise UsageError(
                f"--{idle[0].replace('_', '-')} goes with --pass; --set does only what it says",
                hint="give the width in --set, or name a --pass for the other layers",
            )
        named = [_kind(name) for name in self.passes]
        kinds = [kind for kind in named if issubclass(kind, LayerPass)]
        if not named and not self.settings:
            kinds = [InsertBottleneck]
        if named and not kinds and (unused := [name for name in idle if name not in ("include", "exclude")]):
            raise UsageError(f"--{unused[0].replace('_', '-')} means nothing to {', '.join(k.name for k in named)}")
        for name in ("rank_in", "rank_out"):
            if getattr(self, name) is not None and not any(name in FORMS[kind.form] for kind in kinds):
                raise UsageError(
                    f"none of the passes has a {name.replace('_', '-')}",
                    got=", ".join(kind.name for kind in kinds),
                    expected="insert-bottleneck, insert-reduction or insert-expansion",
                )
        for name in ("energy", "vbmf"):
            if name in self.given and any(n in self.given for n in ("rank_in", "rank_out")):
                raise UsageError(f"--{name} and --rank-in or --rank-out exclude each other")
        if self.multiple is not None and self.multiple < 1:
            raise UsageError("--multiple is out of range", expected="1 or more", got=str(self.multiple))
        for kind in kinds:  # ranges and combinations are the passes' own to check
            kind(
                self._rank(kind), energy=self.energy, vbmf=self.vbmf, min_share=self.min_share or 0.0, **self._common()
            )

    def _common(self) -> dict[str, Any]:
        names = ("multiple", "allow_growth", "replan", "init", "norm", "activation")
        return {name: getattr(self, name) for name in names}

    def _rank(self, kind: type[LayerPass]) -> Any:
        """What to give a pass as its rank; None for its default."""
        given = {"rank_in": self.rank_in, "rank_out": self.rank_out}
        names = FORMS[kind.form]
        if all(given.get(name) is None for name in names):
            return self.rank
        other = kind.default_rank if self.rank is None else self.rank
        ranks = tuple(other if given.get(name) is None else given[name] for name in names)
        return ranks if len(ranks) > 1 else ranks[0]

    def _project(self, setting: Setting) -> Pass:
        return ProjectBranch(
            include=[setting.path],
            channels=int(setting.widths[0]),
            init=self.init,
            allow_output_change=self.allow_output_change,
            allow_growth=self.allow_growth,
            replan=self.replan,
        )


def _kind(name: str) -> type[Pass]:
    by_name: dict[str, type[Pass]] = {kind.name: kind for kind in ALL}
    kind = by_name.get(name)
    if kind is ProjectBranch:
        raise UsageError(f"{name} needs to know the branch and the width", hint="--set 'PATH=project:32'")
    if kind is not None:
        return kind
    near = get_close_matches(name, by_name, n=2)
    raise UsageError(
        f"there is no pass {name!r}",
        expected=", ".join(by_name),
        hint=f"did you mean {' or '.join(near)}?" if near else None,
    )


def _plain(kind: type[Pass], include: Sequence[str], exclude: Sequence[str]) -> Pass:
    """A pass without widths; the patterns go to it where it takes any."""
    takes = signature(kind).parameters
    patterns = {"include": include, "exclude": exclude}
    given = {name: value for name, value in patterns.items() if value}
    if not set(given) <= set(takes):
        raise UsageError(f"{kind.name} takes no --{next(name for name in given if name not in takes)}")
    make: Callable[..., Pass] = kind
    return make(**given)


def _selecting(include: Sequence[str], exclude: Sequence[str]) -> Callable[[Layer], bool]:
    def select(layer: Layer) -> bool:
        paths = (layer.path, *layer.aliases)
        wanted = not include or any(fnmatchcase(path, p) for path in paths for p in include)
        return wanted and not any(fnmatchcase(path, p) for path in paths for p in exclude)

    return select


class SetLayers(Pass):
    """Gives named layers a form of their own, and leaves others alone.

    Args:
        settings: What each becomes; a later one overrides an earlier one on layers that both name.
        common: Settings for the passes of the forms.
    """

    name = "set"
    summary = "the form and widths that are named for each layer"

    def __init__(self, settings: Sequence[Setting], common: dict[str, Any]) -> None:
        self.settings = tuple(settings)
        self.passes = {
            setting: [kind(self._rank(setting), include=[setting.path], **common) for kind in FORM_PASSES[setting.form]]
            for setting in settings
            if setting.form != "keep"
        }

    @staticmethod
    def _rank(setting: Setting) -> Any:
        return setting.widths if len(setting.widths) > 1 else setting.widths[0]

    def propose(self, capture: Capture) -> list[Proposal]:
        """See `Pass.propose`."""
        owners = {id(layer): setting for setting in self.settings for layer in capture.layers if setting.names(layer)}
        proposals: list[Proposal] = []
        for setting in self.settings:
            if not any(setting.names(layer) for layer in capture.layers):
                InsertBottleneck(include=[setting.path]).propose(capture)  # raises, and names near paths
            meant = {layer.path: layer for layer in capture.layers if owners.get(id(layer)) is setting}
            if setting.form == "keep":
                proposals += [Skip(path, SkipReason.EXCLUDED, "kept by --set") for path in meant]
                continue
            found = [p for one in self.passes[setting] for p in one.propose(capture) if p.path in meant]
            told = {p.path for p in found}
            proposals += found
            proposals += [
                Skip(path, SkipReason.WRONG_FORM, f"{setting.form} is not for a {layer.op}; pair is for linear maps")
                for path, layer in meant.items()
                if path not in told
            ]
        done = {p.path for p in proposals if isinstance(p, Op)}
        others = (one for one in capture.layers if one.spec is not None and id(one) not in owners)
        return [
            *(p for p in proposals if isinstance(p, Op) or p.path not in done),
            *(Skip(one.path, SkipReason.EXCLUDED, "not named by --set") for one in others),
        ]


def check_settings(settings: Sequence[Setting], edits: Sequence[Edit], skips: Sequence[Skip]) -> None:
    """Refuses a result in which what was named layer by layer was not done.

    Args:
        settings: What was asked.
        edits: What was done.
        skips: What was not, and why.

    Raises:
        RefusedError: If nothing was done for a setting.
    """
    done = [path for edit in edits for path in (edit.path, *edit.aliases)]
    for setting in settings:
        if setting.form == "keep" or any(fnmatchcase(path, setting.path) for path in done):
            continue
        why = next((skip for skip in skips if fnmatchcase(skip.path, setting.path)), None)
        raise RefusedError(
            f"--set {setting.text!r} could not be done",
            where=why.path if why else None,
            got=f"{why.reason}: {why.detail}" if why else "no layer of this name was rewritten",
        )
