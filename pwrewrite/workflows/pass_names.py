"""Passes by name, with settings that they share, and a form for single layers: `passes_of` makes the passes.

`SetLayers` is the pass behind ``PATH=FORM:WIDTH``: it gives single layers (or patterns of them) a form of their own and
leaves the choice of eligibility, costs and settings to the pass of that form.

The order is: projections and narrowed layers first (they change the channels of the layers behind them), then the
passes as given, on everything that no ``PATH=FORM`` names, then the layers that are named.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from inspect import signature
from typing import Any, cast

from ..capturing.records import Capture, Layer
from ..core.declaring import changed, flag_of
from ..core.errors import RefusedError, UsageError, shortened
from ..core.numbers import parse_width
from ..core.options import LayerOptions, PassOptions, Width
from ..core.plan import Edit, Op, Skip, SkipReason
from ..core.text import did_you_mean
from ..forms import FORMS
from ..passes import ALL, FORM_PASSES, InsertBottleneck, LayerPass, Narrow, Pass, ProjectBranch, Proposal

DEFAULT_SHARE = 0.01
"""Least part of the MACs where neither a pass nor a layer is named."""

_COMMON = ("multiple", "allow_growth", "replan", "init", "norm", "activation")
"""Options that every pass for single layers takes."""

_OF_PASSES = ("rank", "rank_in", "rank_out", "energy", "vbmf", "include", "exclude", "min_share", "min_gain")
"""Options that say nothing to a layer's own form."""


@dataclass(frozen=True, slots=True)
class LayerForm:
    """One ``PATH=FORM:WIDTH``.

    Attributes:
        text: As it was given.
        path: A path or pattern.
        form: One of `FORM_PASSES`, ``project``, ``narrow`` or ``keep``.
        widths: Its widths; none for ``keep``, and for the others where the form's default is meant.
    """

    text: str
    path: str
    form: str
    widths: tuple[Width, ...] = ()

    @property
    def rank(self) -> Width | tuple[Width, ...]:
        """The widths as a pass takes them."""
        return self.widths if len(self.widths) > 1 else self.widths[0]

    def names(self, layer: Layer) -> bool:
        """Whether it is about a layer."""
        return any(fnmatchcase(path, self.path) for path in (layer.path, *layer.aliases))


def parse_set(text: str) -> LayerForm:
    """Reads one ``--set``: ``PATH=FORM:WIDTH[,WIDTH]`` or ``PATH=keep``, with as many widths as the form takes."""
    path, equals, rest = text.partition("=")
    form, colon, widths_text = (part.strip() for part in rest.partition(":"))
    known = (*FORM_PASSES, "project", "narrow", "keep")
    if not equals or not form:
        raise UsageError(
            f"cannot read --set {text!r}",
            expected="PATH=FORM:WIDTH[,WIDTH] or PATH=keep",
            hint="--set b3=reduce:96, --set 'layer3.*.conv2=bottleneck:0.5', --set fc=keep",
        )
    if form not in known:
        hint = did_you_mean(known, form)
        raise UsageError(f"--set {text!r} names an unknown form {form!r}", expected=", ".join(known), hint=hint)
    what = f"a width in --set {text!r}"
    widths = tuple(parse_width(part, what) for part in widths_text.split(",")) if colon else ()
    names = () if form == "keep" else ("channels",) if form in ("project", "narrow") else FORMS[form].widths
    if len(widths) not in ({1, len(names)} if names else {0}):
        raise UsageError(
            f"--set {text!r} gives {len(widths)} widths",
            expected=f"{form}:{','.join(name.upper() for name in names)}" if names else "keep without a width",
        )
    if form == "project" and not isinstance(widths[0], int):
        raise UsageError(f"--set {text!r} gives a ratio", expected="the channels of the projection, an integer")
    return LayerForm(text, path.strip(), form, widths)


def passes_of(options: PassOptions, allow_output_change: bool = False) -> list[Pass]:
    """The passes that options name, in the order in which they run; a projection may change an output's shape where
    that is allowed.
    """
    forms = tuple(parse_set(each) if isinstance(each, str) else each for each in as_list(options.settings))
    chosen = [named_pass(each) for each in as_list(options.passes)] or ([] if forms else [InsertBottleneck])
    kinds = [kind for kind in chosen if isinstance(kind, type)]
    _check(options, forms, kinds)
    common: dict[str, Any] = {name: getattr(options, name) for name in _COMMON}
    layers = [form for form in forms if form.form not in ("project", "narrow")]
    include = as_list(options.include)
    exclude = (*as_list(options.exclude), *(form.path for form in forms if form.form != "project"))
    share = (0.0 if options.passes else DEFAULT_SHARE) if options.min_share is None else options.min_share
    passes: list[Pass] = [_projection(form, options, allow_output_change) for form in forms if form.form == "project"]
    passes += [
        Narrow(form.widths[0], include=[form.path], multiple=options.multiple, required=True)
        for form in forms
        if form.form == "narrow"
    ]
    for i, kind in enumerate(chosen):
        if isinstance(kind, Pass):
            passes.append(kind)
        elif not issubclass(kind, LayerPass):
            passes.append(_plain(kind, options, include, exclude))
        else:  # the first checks that the patterns match; later ones may find their layer already replaced
            which = {"include": include, "exclude": exclude} if i == 0 else {"select": _selecting(include, exclude)}
            passes.append(_layer_pass(kind, options, share, common | which))
    return [*passes, SetLayers(layers, common)] if layers else passes


def as_list(values: object) -> tuple[Any, ...]:
    """Several values; a single one, a text above all, counts as one of them."""
    return tuple(values) if isinstance(values, Sequence) and not isinstance(values, str) else (values,)


def named_pass(name: object, kinds: Sequence[type[Pass]] | None = None) -> type[Pass] | Pass:
    """A pass, or the class of this name among ``kinds`` (all by default)."""
    if isinstance(name, Pass) or (isinstance(name, type) and issubclass(name, Pass)):
        _check_named(name)
        return name
    by_name: dict[str, type[Pass]] = {kind.name: kind for kind in kinds or ALL}
    kind = by_name.get(name) if isinstance(name, str) else None
    if kind is ProjectBranch:
        raise UsageError(f"{name} needs to know the branch and the width", hint="--set 'PATH=project:32'")
    if kind is not None:
        return kind
    if not isinstance(name, str):
        raise UsageError(
            "this is no pass",
            expected="a pass such as InsertBottleneck(0.5), or the name of one",
            got=shortened(repr(name), 80),
        )
    hint = did_you_mean(by_name, name, n=2)
    raise UsageError(f"there is no pass {name!r}", expected=", ".join(by_name), hint=hint)


def _check_named(each: type[Pass] | Pass) -> None:
    """Raises `UsageError` for a pass of the user's own that has no name."""
    name, kind = getattr(each, "name", None), each if isinstance(each, type) else type(each)
    if isinstance(name, str) and name:
        return
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", kind.__name__).lower()
    raise UsageError(
        "a pass without a name, which plans and reports call it by",
        where=kind.__qualname__,
        expected="a text in the class",
        got=None if name is None else shortened(repr(name), 80),
        hint=f'name = "{words}" in class {kind.__name__}',
    )


def _check(options: PassOptions, forms: Sequence[LayerForm], kinds: Sequence[type[Pass]]) -> None:
    """Refuses options that would do nothing, before any model is built."""
    idle = [name for name in changed(options) if name in _OF_PASSES]
    flag = flag_of(PassOptions, idle[0]) if idle else ""
    if idle and forms and not options.passes:
        raise UsageError(
            f"{flag} goes with --pass; --set does only what it says",
            hint="give the width in --set, or name a --pass for the other layers",
        )
    layer_kinds = [kind for kind in kinds if issubclass(kind, LayerPass)]
    taken = {name for kind in kinds for name in signature(kind).parameters}
    unused = [name for name in idle if name not in ("include", "exclude", *taken)]
    if unused and options.passes and not layer_kinds:
        names = ", ".join(kind.name for kind in kinds) or "passes that are made already"
        raise UsageError(f"{flag_of(PassOptions, unused[0])} means nothing to {names}")
    ranks = [name for name in ("rank_in", "rank_out") if getattr(options, name) is not None]
    for name in ranks:
        if not any(name in kind.form.widths for kind in layer_kinds):
            raise UsageError(
                f"none of the passes has a {name.replace('_', '-')}",
                got=", ".join(kind.name for kind in layer_kinds),
                expected="insert-bottleneck, insert-reduction or insert-expansion",
            )
    if ranks and (options.energy is not None or options.vbmf):
        flag = "--vbmf" if options.energy is None else "--energy"
        raise UsageError(f"{flag} and --rank-in or --rank-out exclude each other")
    if options.multiple is not None and options.multiple < 1:
        raise UsageError("--multiple is out of range", expected="1 or more", got=str(options.multiple))
    for kind in layer_kinds:  # ranges and combinations are the passes' own to check
        _layer_pass(kind, options, options.min_share or 0.0, {name: getattr(options, name) for name in _COMMON})


def _layer_pass(kind: type[LayerPass], options: PassOptions, share: float, more: Mapping[str, Any]) -> LayerPass:
    return kind(
        _rank(kind, options),
        energy=options.energy,
        vbmf=options.vbmf,
        min_share=share,
        min_gain=options.min_gain,
        **more,
    )


def _rank(kind: type[LayerPass], options: PassOptions) -> Any:
    """What to give a pass as its rank; None for its default."""
    own = {"rank_in": options.rank_in, "rank_out": options.rank_out}
    names = kind.form.widths
    if all(own.get(name) is None for name in names):
        return options.rank
    other = kind.default_rank if options.rank is None else options.rank
    ranks = tuple(other if own.get(name) is None else own[name] for name in names)
    return ranks if len(ranks) > 1 else ranks[0]


def _projection(form: LayerForm, options: PassOptions, allow_output_change: bool) -> Pass:
    return ProjectBranch(
        include=[form.path],
        channels=int(form.widths[0]),
        init=options.init,
        allow_output_change=allow_output_change,
        allow_growth=options.allow_growth,
        replan=options.replan,
    )


def _plain(kind: type[Pass], options: PassOptions, include: Sequence[str], exclude: Sequence[str]) -> Pass:
    """A pass that is not for single layers; patterns and other options go to it where it takes them."""
    takes = signature(kind).parameters
    patterns = {name: value for name, value in (("include", include), ("exclude", exclude)) if value}
    if unknown := [name for name in patterns if name not in takes]:
        raise UsageError(f"{kind.name} takes no {flag_of(LayerOptions, unknown[0])}")
    given = {name: getattr(options, name) for name in changed(options) if name in takes}
    make: Callable[..., Pass] = kind
    return make(**given | patterns)


def _selecting(include: Sequence[str], exclude: Sequence[str]) -> Callable[[Layer], bool]:
    def select(layer: Layer) -> bool:
        paths = (layer.path, *layer.aliases)
        wanted = not include or any(fnmatchcase(path, p) for path in paths for p in include)
        return wanted and not any(fnmatchcase(path, p) for path in paths for p in exclude)

    return select


class SetLayers(Pass):
    """Gives named layers a form of their own, and leaves others alone; of ``forms``, a later one overrides an earlier
    one on layers that both name.
    """

    name = "set"
    summary = "the form and widths that are named for each layer"

    def __init__(self, forms: Sequence[LayerForm], common: Mapping[str, Any]) -> None:
        self.forms = tuple(forms)
        self.passes = {
            form: [
                kind(cast("Any", form.rank), include=[form.path], min_gain=0.0, **common)
                for kind in FORM_PASSES[form.form]
            ]
            for form in forms
            if form.form != "keep"
        }

    def propose(self, capture: Capture) -> list[Proposal]:
        """See `Pass.propose`."""
        owners = {id(layer): form for form in self.forms for layer in capture.layers if form.names(layer)}
        proposals: list[Proposal] = []
        for form in self.forms:
            if not any(form.names(layer) for layer in capture.layers):
                InsertBottleneck(include=[form.path]).propose(capture)  # raises, and names near paths
            layers = {layer.path: layer for layer in capture.layers if owners.get(id(layer)) is form}
            if form.form == "keep":
                proposals += [Skip(path, SkipReason.EXCLUDED, "kept by --set") for path in layers]
                continue
            proposed = [p for each in self.passes[form] for p in each.propose(capture) if p.path in layers]
            answered = {p.path for p in proposed}
            proposals += proposed
            proposals += [
                Skip(path, SkipReason.WRONG_FORM, f"{form.form} is not for a {layer.op}; pair is for linear maps")
                for path, layer in layers.items()
                if path not in answered
            ]
        done = {p.path for p in proposals if isinstance(p, Op)}
        others = (layer for layer in capture.layers if layer.spec is not None and id(layer) not in owners)
        return [
            *(p for p in proposals if isinstance(p, Op) or p.path not in done),
            *(Skip(layer.path, SkipReason.EXCLUDED, "not named by --set") for layer in others),
        ]


def check_forms(passes: Sequence[Pass], edits: Sequence[Edit], skips: Sequence[Skip]) -> None:
    """Raises `RefusedError` for a result in which what was named layer by layer was not done."""
    done = [path for edit in edits for path in (edit.path, *edit.aliases)]
    done += [each["path"] for edit in edits if edit.method == "narrow" for each in edit.op.settings["producers"]]
    wanted = [(form.path, form.text) for each in passes if isinstance(each, SetLayers) for form in each.forms]
    wanted = [(path, text) for path, text in wanted if not text.endswith("keep")]
    wanted += [(p, f"{p}=project") for each in passes if isinstance(each, ProjectBranch) for p in each.include]
    wanted += [
        (p, f"{p}=narrow") for each in passes if isinstance(each, Narrow) and each.required for p in each.include
    ]
    for pattern, text in wanted:
        if any(fnmatchcase(path, pattern) for path in done):
            continue
        why = next((skip for skip in skips if fnmatchcase(skip.path, pattern)), None)
        raise RefusedError(
            f"--set {text!r} could not be done",
            where=why.path if why else None,
            got=f"{why.reason}: {why.detail}" if why else "no layer of this name was rewritten",
        )
