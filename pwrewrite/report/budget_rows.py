"""What a report says of a budget: a name, what was found, and whether it is as it should be, line by line."""

from __future__ import annotations

from ..core.numbers import duration, exact, percent, plural
from ..core.recovery import Recovery
from .records import BudgetReport

Line = tuple[str, str]

NORMS = {
    "loss": "by the change of the loss (input and gradient moments)",
    "activations": "by the change of each layer's outputs (input moments)",
    "weights": "by the change of each layer's weights",
}
_REFITS = {"full": "factors, biases and norms", "bias": "biases and norms", "none": "nothing"}


def caveat(random: bool, calibrated: bool) -> str:
    """What a predicted loss cannot say, after a semicolon; empty where it means what it says."""
    if random:
        return "; random weights: says nothing about a trained model"
    return "" if calibrated else "; not calibrated: says nothing about the outputs"


def lines(budget: BudgetReport, *, random: bool = False) -> list[Line]:
    """Name and text of each line; ``random`` where nobody trained the weights."""
    facts = [(kind, _limit(kind, text, budget)) for kind, text in budget.limits.items()]
    without = ", without calibration inputs" if budget.sensitivity == "weights" and not budget.held_out else ""
    gap = f", gap {percent(budget.gap)}" if budget.gap > 0 else ""
    facts.append(("chosen", NORMS[budget.sensitivity] + without + gap))
    if budget.samples:
        fitted = f"{_REFITS[budget.refit]} {'fitted' if budget.measured is not None else 'to be fitted'}"
        facts.append(("calibration", f"{plural(budget.samples, 'input')}; {fitted}"))
    facts += _losses(budget, random)
    facts += recovered(budget.recovery)
    facts += [
        (name, f"{before:.4g} → {after:.4g} ({after - before:+.3g})")
        for name, (before, after) in budget.metrics.items()
    ]
    if budget.latency is not None:
        before, after = budget.latency
        threads = f", {plural(budget.threads, 'thread')}" if budget.threads else ""
        how = f"{after / before:.2f}×, ±{percent(budget.spread)}{threads}"
        facts.append(("latency", f"{1000 * before:.3g} ms → {1000 * after:.3g} ms ({how})"))
        if budget.engine:
            facts.append(("engine", budget.engine))
        facts += [
            (f"in {name}", f"{1000 * b:.3g} ms → {1000 * a:.3g} ms ({a / b:.2f}×)")
            for name, (b, a) in budget.engines.items()
        ]
    return facts


def _limit(kind: str, text: str, budget: BudgetReport) -> str:
    reached = budget.reached.get(kind)
    return f"at most {text}" + (f"; {percent(reached)} of the original" if reached is not None else "")


def recovered(recovery: Recovery | None) -> list[Line]:
    """How the result was trained; nothing where it was not."""
    if recovery is None:
        return []
    epochs = f"{recovery.epochs:.3g} {'epoch' if recovery.epochs == 1 else 'epochs'}"
    steps = f"{plural(recovery.steps, 'step')}, {epochs}, in {duration(recovery.seconds)}"
    kept = f"kept as after {exact(recovery.kept)}" if recovery.kept else "kept as before"
    norms = "" if recovery.norms == "none" else f"; batch norms {recovery.norms}"
    labels = " and labels" if recovery.labelled else ""
    together = f"; {recovery.processes} processes" if recovery.processes > 1 else ""
    what = f"{plural(recovery.samples, 'input')}{labels}, {recovery.augment} augmentation, {recovery.precision}"
    return [
        ("recovery", f"held-out loss {recovery.before:.3g} → {recovery.after:.3g}; {steps}; {kept}"),
        ("trained on", f"{what}; {plural(recovery.blocks, 'block')}, then predictions{norms}{together}"),
    ]


def _losses(budget: BudgetReport, random: bool) -> list[Line]:
    unit = "KL divergence in nats" if budget.kind == "classes" else "half the squared relative output error"
    facts = []
    if budget.predicted is not None:
        what = unit if budget.sensitivity == "loss" else "sum of relative squared errors of the layers"
        facts.append(("predicted loss", f"{budget.predicted:.3g} ({what}{caveat(random, budget.samples > 0)})"))
    if budget.measured is not None:
        agreed = "" if budget.agreement is None else f"; same class for {percent(budget.agreement)}"
        held = f"{exact(budget.held_out)} held-out inputs"
        taken = f", outputs taken for {budget.outputs}" if budget.outputs in ("logits", "probabilities") else ""
        facts.append(("measured loss", f"{budget.measured:.3g} ({unit}{taken}) on {held}{agreed}"))
    return facts
