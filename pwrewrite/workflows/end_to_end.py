"""The times of the original and of the model that a plan led to, and whether they meet a limit on latency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..capturing import split_inputs
from ..core.errors import RefusedError
from ..core.names import ENGINE_NAMES
from ..core.options import Budget
from ..engines.choosing import time_everywhere
from ..engines.engine import Ran
from ..engines.timing import NOISY, Timing, time_models
from ..planning.allocator import Choice
from ..planning.budget import Limit
from ..planning.latency import MEASURED
from ..planning.planner import Planner
from ..report.records import BudgetReport
from .steps import Run

_SECONDS = (4.0, 8.0, 8.0)
"""How long both models are timed, and how long again, and once more, where a limit seems missed."""


@dataclass(frozen=True)
class _BothTimed:
    """The times of the original and of a model that a plan led to, and what ran it."""

    model: nn.Module
    before: Timing
    after: Timing
    ran: Ran

    @property
    def share(self) -> float:
        """The second time as a share of the first."""
        return self.after.seconds / self.before.seconds

    def meets(self, limit: Limit) -> bool:
        """Whether a limit on latency is met, as far as times can be told apart."""
        return self.after.seconds <= limit.absolute(self.before.seconds) * MEASURED


class EndToEnd:
    """Times a run's first model and what the run has come to, once for each model; the limits may be on latency."""

    def __init__(self, run: Run, budget: Budget, limits: Sequence[Limit]) -> None:
        self._run, self._budget, self._limits = run, budget, limits
        self.limit = next((limit for limit in limits if limit.kind == "latency"), None)
        self._times: _BothTimed | None = None

    def forget(self) -> None:
        """Times the model anew when next asked, since it was changed."""
        self._times = None

    def met(self, planner: Planner) -> bool:
        """Whether the model meets the limit on latency, if there is one, as measured."""
        return self.limit is None or self._both(planner).meets(self.limit)

    def promised(self, planner: Planner, choice: Choice) -> bool:
        """Whether a choice meets the limit on latency, if there is one, as timed for its plan."""
        before = planner.original.get("latency")
        return self.limit is None or before is None or choice.costs["latency"] <= self.limit.absolute(before) * MEASURED

    def tighter(self, planner: Planner, missed: Choice) -> Choice | None:
        """A plan with a smaller promise than one that was carried out and missed its latency, if there is one."""
        reached = self._both(planner).share
        try:
            choice = planner.tighter(self._limits, missed, reached)
        except RefusedError:  # the error that says what was reached in the end says more
            return None
        if choice.plan.ops == missed.plan.ops:
            return None
        planner.notes.append(f"carried out, a first plan took {reached:.2f} of the time: planned again for less")
        return choice

    def report(self, planner: Planner, result: BudgetReport, notes: list[str]) -> BudgetReport:
        """A report with both times, and those in the other engines where one was asked for; what to know of them."""
        timed, threads = self._both(planner), self._budget.threads
        before, after = timed.before, timed.after
        result = replace(
            result,
            latency=(before.seconds, after.seconds),
            spread=max(before.spread, after.spread),
            threads=threads or torch.get_num_threads(),
        )
        if self._budget.engine is not None:
            self._run.say("timing both models in the other engines", None)
            args, kwargs = split_inputs(self._run.inputs)
            others = [name for name in ENGINE_NAMES if name != planner.engine[0].name]
            beside = time_everywhere((self._run.first.model, timed.model), args, kwargs, others, threads)
            notes += beside.notes
            result = replace(result, engine=str(timed.ran), engines=beside.seconds)
        if after.seconds > before.seconds:
            notes.append("the rewritten model is slower than the original: keep the original, or give it more room")
        if result.spread > NOISY:
            notes.append(
                f"this machine is noisy: times of one model are {result.spread:.0%} apart; measure again with less "
                "running beside"
            )
        return result

    def _both(self, planner: Planner) -> _BothTimed:
        """Times both models in the planner's engine; for longer where a limit seems missed."""
        model = self._run.state.model
        if self._times is not None and self._times.model is model:
            return self._times
        args, kwargs = split_inputs(self._run.inputs)
        threads = self._budget.threads
        self._run.say("timing both models", None)
        engine, session = planner.engine
        sessions = [
            session if each is planner.model else engine.session(each, args, kwargs, threads)
            for each in (self._run.first.model, model)
        ]
        for seconds in _SECONDS:
            before, after = time_models(sessions, args, kwargs, seconds=seconds, threads=threads)
            self._times = _BothTimed(model, before, after, sessions[1].ran)
            if self.limit is None or self._times.meets(self.limit):
                break
        assert self._times is not None
        return self._times
