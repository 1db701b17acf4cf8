"""Runs a check over every model of torchvision and timm: resumable, in several processes, one JSON line per model.

A *check* is a module-level function ``check(built) -> dict`` of JSON data. `sweep` calls it for every candidate in
worker processes, appends each result to a JSONL file as it comes, and skips what that file already holds, so that a
sweep which was stopped goes on where it was. A check that raises, hangs or takes its process down is a result too:
``{"error": …}``.

Two sweeps may share the work and the file: ``PWREWRITE_ZOO_SHARD=0/2`` takes every second candidate, and
``1/2`` the others.
"""

from __future__ import annotations

import gc
import json
import os
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

RESULTS = Path(os.environ.get("PWREWRITE_ZOO", Path(__file__).parents[2] / ".zoo"))
"""Folder of the results; set ``PWREWRITE_ZOO`` to keep them elsewhere."""

REAL_LIMIT = 800_000_000
"""Parameters above which a model is not built with real weights."""

_RSS_LIMIT = 4 << 30
"""Bytes of resident memory above which a worker is replaced by a fresh one."""


@dataclass(frozen=True)
class Candidate:
    """One model of a zoo."""

    library: str
    name: str

    @property
    def key(self) -> str:
        return f"{self.library}:{self.name}"


@dataclass
class Built:
    """A candidate with weights (on ``meta`` where the constructor allows) and the inputs that it takes."""

    candidate: Candidate
    model: nn.Module
    inputs: tuple[Any, ...]
    why_real: str = ""

    @property
    def meta(self) -> bool:
        return not self.why_real


Check = Callable[[Built], dict[str, Any]]


def candidates() -> list[Candidate]:
    """Every model of both zoos; torchvision's quantized ones are left out."""
    import timm
    import torchvision

    names = [n for n in torchvision.models.list_models() if not n.startswith("quantized_")]
    return [Candidate("torchvision", n) for n in names] + [Candidate("timm", n) for n in timm.list_models()]


def build(candidate: Candidate, *, real: bool = False) -> Built:
    """Builds a model in evaluation mode, on meta unless ``real`` is asked for or its constructor needs values."""
    if candidate.library == "examples":
        return _example(candidate)
    why = "asked" if real else ""
    if not real:
        try:
            with torch.device("meta"):
                model = _construct(candidate)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"[:200]
    if why:
        torch.manual_seed(0)
        model = _construct(candidate)
    inputs = _inputs(candidate, model)
    if not why:
        inputs = _to_meta(inputs)
    return Built(candidate, model.eval(), inputs, why)


def _example(candidate: Candidate) -> Built:
    """A model of ``examples``, with its own inputs."""
    from pwrewrite import load_target

    loaded = load_target(str(Path(__file__).parents[2] / "examples" / f"{candidate.name}.py"))
    args = (loaded.example_inputs,) if isinstance(loaded.example_inputs, Tensor) else tuple(loaded.example_inputs)
    return Built(candidate, loaded.model.eval(), args, "an example")


def _construct(candidate: Candidate) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if candidate.library == "timm":
            import timm

            return timm.create_model(candidate.name, pretrained=False)
        import torchvision

        builder = torchvision.models.get_model_builder(candidate.name)
        kwargs: dict[str, Any] = {"weights": None}
        if "detection" in builder.__module__ or "segmentation" in builder.__module__:
            kwargs["weights_backbone"] = None
        if candidate.name in ("googlenet", "inception_v3"):
            kwargs["init_weights"] = False
        return builder(**kwargs)


def _inputs(candidate: Candidate, model: Any) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)

    def image(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    if candidate.library == "timm":
        return (image(1, *model.pretrained_cfg["input_size"]),)
    family = type(model).__module__.split(".")[2]
    if family == "detection":
        return ([image(3, 320, 320)],)
    if family == "optical_flow":
        return image(1, 3, 128, 128), image(1, 3, 128, 128)
    if family == "segmentation":
        return (image(1, 3, 520, 520),)
    own = getattr(model, "image_size", None)
    size = (own, own) if own else _crop(candidate.name)
    if family == "video":
        return (image(1, 3, 16, *size),)
    return (image(1, 3, *size),)


def _crop(name: str) -> tuple[int, int]:
    import torchvision

    transforms = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    size = list(transforms.crop_size)
    return (size[0], size[-1])


def _to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    return type(value)(_to_meta(v) for v in value)


# ------------------------------------------------------------------------------------------------------ sweep


def results(path: Path) -> dict[str, dict[str, Any]]:
    """The results so far by candidate key; of several lines for one candidate the last counts."""
    if not path.exists():
        return {}
    rows = (json.loads(line) for line in path.read_text().splitlines() if line.strip())
    return {row["key"]: row for row in rows}


def sweep(
    check: Check,
    path: Path,
    *,
    only: Iterable[Candidate] | None = None,
    jobs: int | None = None,
    timeout: float = 600.0,
    retry_errors: bool = False,
) -> dict[str, dict[str, Any]]:
    """Checks every candidate that ``path`` has no result for.

    Args:
        check: A module-level function; it runs in other processes.
        path: JSONL file that results are appended to.
        only: Candidates; all by default.
        jobs: Worker processes; two by default, one in a shard.
        timeout: Seconds for one model, building included.
        retry_errors: Whether candidates whose result is an error are checked again.

    Returns:
        All results by candidate key.
    """
    done = results(path)
    part, of = shard()
    wanted = list(candidates() if only is None else only)[part::of]
    todo = [c for c in wanted if c.key not in done or (retry_errors and "error" in done[c.key])]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:  # a line is one write, which another shard's cannot fall into

        def keep(row: dict[str, Any]) -> None:
            file.write((json.dumps(row) + "\n").encode())

        _Pool(check, jobs or (2 if of == 1 else 1), timeout).run(todo, keep)
    return results(path)


def shard() -> tuple[int, int]:
    """Which part of the candidates is this process's, and how many parts there are: ``PWREWRITE_ZOO_SHARD``."""
    part, _, of = os.environ.get("PWREWRITE_ZOO_SHARD", "0/1").partition("/")
    if not 0 <= int(part) < int(of):
        raise ValueError(f"PWREWRITE_ZOO_SHARD is {part}/{of}, expected such as 0/2 or 1/2")
    return int(part), int(of)


class _Pool:
    """Worker processes that are replaced when they die, hang or grow."""

    def __init__(self, check: Check, jobs: int, timeout: float) -> None:
        self.check, self.jobs, self.timeout = check, jobs, timeout
        self.context = get_context("spawn")

    def run(self, todo: Sequence[Candidate], keep: Callable[[dict[str, Any]], None]) -> None:
        queue = list(reversed(todo))
        busy: dict[Connection, tuple[Any, Candidate, float]] = {}
        idle = [self._start() for _ in range(min(self.jobs, len(queue)))]
        try:
            while queue or busy:
                while queue and idle:
                    process, pipe = idle.pop()
                    candidate = queue.pop()
                    pipe.send(candidate)
                    busy[pipe] = (process, candidate, time.monotonic() + self.timeout)
                ready = wait(list(busy), timeout=5.0)
                for pipe in list(busy):
                    process, candidate, deadline = busy[pipe]
                    if pipe in ready:
                        row, healthy = self._receive(pipe, candidate)
                    elif time.monotonic() > deadline:
                        row, healthy = {"error": f"timeout after {self.timeout:.0f} s"}, False
                    else:
                        continue
                    del busy[pipe]
                    keep({"key": candidate.key, **row})
                    if not healthy:
                        process.kill()
                        process.join()
                    if healthy or queue:
                        idle.append((process, pipe) if healthy else self._start())
        finally:
            for process, _ in idle:
                process.terminate()
            for process, _, _ in busy.values():
                process.kill()

    def _start(self) -> tuple[Any, Connection]:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=_work, args=(theirs, self.check), daemon=True)
        process.start()
        theirs.close()
        return process, ours

    @staticmethod
    def _receive(pipe: Connection, candidate: Candidate) -> tuple[dict[str, Any], bool]:
        try:
            row, rss = pipe.recv()
        except EOFError:
            return {"error": "the process died"}, False
        return row, rss < _RSS_LIMIT


def _work(pipe: Connection, check: Check) -> None:
    torch.set_num_threads(1)
    while True:
        candidate = pipe.recv()
        start = time.perf_counter()
        try:
            built = build(candidate)
            build_s = time.perf_counter() - start
            row = {"build_s": round(build_s, 3), "why_real": built.why_real, **check(built)}
            del built
        except Exception as error:
            row = {"error": f"{type(error).__name__}: {error}"[:600], "trace": traceback.format_exc()[-3000:]}
        gc.collect()
        pipe.send((row, _rss()))


def _rss() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
