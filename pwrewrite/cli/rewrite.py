"""``pwrewrite rewrite``: bottlenecks in place of expensive layers, verified and saved."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.options import Budget, PassOptions, Proof, TargetOptions
from .options import Carried, Detailed, Saved
from .running import working
from .showing import show, tell

if TYPE_CHECKING:
    from ..report.records import Report
    from ..workflows.plan import Planned
    from ..workflows.rewrite import Rewritten


def rewrite(
    target: TargetOptions,
    passes: PassOptions,
    budget: Budget,
    proof: Proof,
    carried: Carried,
    saved: Saved,
    reported: Detailed,
) -> None:
    """Puts smaller layers in place of expensive ones, [bold]verifies[/] what should not change, and saves.

    [dim]pwrewrite rewrite model.py --weights w.pt --pass insert-bottleneck --rank 0.5 --out DIR[/]

    [dim]pwrewrite rewrite model.py --weights w.pt --budget macs=0.5 --calibration images.npy --out DIR[/]

    [dim]pwrewrite rewrite torchvision:resnet50 --dry-run[/]
    """
    with working(reported) as progress:
        from ..core.errors import UsageError
        from ..core.plan import Plan
        from ..core.processes import rank
        from ..targets import open_target
        from ..workflows.plan import make_plan
        from ..workflows.rewrite import check_rewritten, rewrite
        from ..workflows.what import what_of

        if not proof.verify and proof.max_error is not None:
            raise UsageError("--no-verify and --max-error exclude each other")
        if not carried.dry_run:
            check_saving(proof, saved)
        check_place_of(saved)
        plan = Plan.read(carried.plan) if carried.plan is not None else None
        what = what_of(passes, budget, plan, proof.allow_output_change)
        progress("loading", None)
        loaded = open_target(target)
        if carried.dry_run:
            planned = make_plan(loaded, None, what, progress=progress)
        else:
            result = rewrite(loaded, None, what, proof=proof, progress=progress)
            check_rewritten(result, what, target.target)
        if rank():  # the first process of several reports and saves
            return
    if carried.dry_run:
        show_planned(planned, reported)
        tell("nothing was done: this is a dry run", reported)
        return
    show_report(result.report, reported)
    save(result, saved, reported)


def check_saving(proof: Proof, saved: Saved) -> None:
    """Refuses to save what is not verified, where nothing says that this is meant."""
    from ..core.errors import UsageError

    if not proof.verify and saved.out is not None and not saved.save_unverified:
        raise UsageError("--no-verify saves nothing", hint="add --save-unverified, or leave --no-verify or --out out")


def check_place_of(saved: Saved) -> None:
    """Refuses a folder that cannot be written, before any work."""
    from ..targets.storage import check_place

    if saved.out is not None:
        check_place(saved.out, force=saved.force)


def show_planned(planned: Planned, reported: Detailed) -> None:
    """Shows a plan that was not carried out."""
    from ..report import web
    from ..report.rewrite import page

    words = page(planned.report, everything=reported.everything, planned=True)
    html = lambda: web.report(planned.report, words, planned=True)
    show(reported, words, json=planned.plan.to_json, html=html)


def show_report(report: Report, reported: Detailed) -> None:
    """Shows what was done to a model."""
    from ..report import fused, rewrite, web

    words = (rewrite if report.fusing is None else fused).page(report, everything=reported.everything)
    show(reported, words, json=report.to_json, html=lambda: web.report(report, words))


def save(result: Rewritten, saved: Saved, reported: Detailed) -> None:
    """Saves a result where it was asked for and may be, and says what became of it; raises `VerificationError` if the
    verification failed, saved or not.
    """
    from ..workflows.rewrite import unverified_error

    failed = result.report.verification is not None and not result.report.passed
    if saved.out is None:
        tell("nothing was saved: give --out DIR", reported)
    elif not failed or saved.save_unverified:
        with working(reported) as progress:
            progress("saving", None)
            result.save(saved.out, force=saved.force, unverified=saved.save_unverified)
        tell(f"saved in {saved.out}" + ("" if result.report.passed else ", UNVERIFIED"), reported)
    else:
        tell("nothing was saved", reported)
    if failed:
        raise unverified_error(result.report)
