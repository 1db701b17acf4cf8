"""Which engine serves a model, and what it takes in each: `choose` and `time_everywhere`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..core.errors import PwrewriteError, RefusedError
from ..core.names import ENGINE_NAMES
from ..core.nested import Args, Kwargs
from .engine import Engine, Ran, Session, engine_named
from .timing import Timing, time_models
from .torch_engine import PLAIN

_SECONDS = 2.0


@dataclass(frozen=True)
class Times:
    """What models take in several engines."""

    times: Mapping[str, Sequence[Timing]]  # engine to the time of every model
    ran: Mapping[str, Ran]
    notes: tuple[str, ...]  # which engines were left out, and why

    @property
    def fastest(self) -> str:
        """The engine in which the last model takes least."""
        return min(self.times, key=lambda name: self.times[name][-1].seconds)

    @property
    def seconds(self) -> dict[str, tuple[float, float]]:
        """Engine to the seconds of the first and the last model."""
        return {name: (each[0].seconds, each[-1].seconds) for name, each in self.times.items()}


def time_everywhere(
    models: Sequence[nn.Module],
    args: Args,
    kwargs: Kwargs,
    names: Sequence[str] = ENGINE_NAMES,
    threads: int | None = None,
) -> Times:
    """Times models in every engine that is there, all in turns; one that cannot run all of them is left out."""
    sessions, notes = dict[str, list[Session]](), list[str]()
    for engine in map(engine_named, names):
        try:
            sessions[engine.name] = [engine.session(model, args, kwargs, threads) for model in models]
        except PwrewriteError as error:
            notes.append(f"not measured in {engine.name}: {error.message}" + (f": {error.got}" if error.got else ""))
    if not sessions:
        return Times({}, {}, tuple(notes))
    every = [session for each in sessions.values() for session in each]
    timings = iter(time_models(every, args, kwargs, seconds=_SECONDS * len(sessions), threads=threads))
    times = {name: [next(timings) for _ in each] for name, each in sessions.items()}
    return Times(times, {name: each[-1].ran for name, each in sessions.items()}, tuple(notes))


def choose(name: str | None, model: nn.Module, args: Args, kwargs: Kwargs, threads: int | None = None) -> Engine:
    """The engine of a name; for ``auto`` the one in which the model is fastest, for None plain torch.

    Raises:
        UsageError: If there is no such engine, or it is not installed.
        RefusedError: If none runs the model.
    """
    if name is None:
        return PLAIN
    if name == "auto":
        times = time_everywhere([model], args, kwargs, threads=threads)
        if not times.times:
            raise RefusedError("no engine runs the model", got="; ".join(times.notes))
        name = times.fastest
    engine = engine_named(name)
    engine.require()
    return engine
