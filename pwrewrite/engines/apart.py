"""What was exported, run in a process that has torch and cannot import pwrewrite.

Torch takes seconds to import. So one process imports it, and what else a format names, and forks for every run, which
sees nothing of the runs before. It computes nothing itself: no thread and no lock of a computation is there to be lost
by forking. It ends with this process, which closes its input. Where forking is not safe (macOS, Windows), every run
takes a process from the start.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock

import torch

from ..core.errors import RefusedError
from ..core.numbers import plural
from . import exporting
from .exporting import Call, Program, Run

_SERVER = """
import contextlib, importlib, json, os, statistics, sys, time, traceback
sys.modules["pwrewrite"] = None
import torch

def flat(value, path=""):
    if isinstance(value, torch.Tensor):
        return {path: value.clone()}
    if isinstance(value, dict):
        items = [(f"[{key!r}]", item) for key, item in value.items()]
    elif hasattr(value, "_fields"):
        items = [(f".{key}", getattr(value, key)) for key in value._fields]
    elif isinstance(value, (tuple, list)):
        items = [(f"[{i}]", item) for i, item in enumerate(value)]
    else:
        items = [(f".{key}", item) for key, item in getattr(value, "__dict__", {}).items()]
    return {p: t for key, item in items for p, t in flat(item, path + key).items()}

def run(scratch, folder, load, threads, seconds):
    for stream, path in enumerate((os.devnull, os.devnull, f"{scratch}/errors")):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), stream)
    os.chdir(folder)
    sys.path.insert(0, ".")
    torch.set_num_threads(threads)
    calls, names = torch.load(f"{scratch}/calls", weights_only=True), {"torch": torch}
    with torch.no_grad():
        exec(load, names)
        model = names["model"]
        outputs = [flat(model(*args, **kwargs)) for args, kwargs in calls]
        (args, kwargs), times = calls[0], []
        while not times or (len(times) < 50 and sum(times) < seconds):
            start = time.perf_counter()
            model(*args, **kwargs)
            times.append(time.perf_counter() - start)
    torch.save((outputs, statistics.median(times)), f"{scratch}/results")

answers = os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what imports print is no answer
for line in sys.stdin:
    imports, *settings = json.loads(line)
    with contextlib.suppress(ImportError):
        for name in imports:
            importlib.import_module(name)
    child = os.fork() if sys.platform == "linux" else 0
    if not child:
        code = 1
        try:
            run(*settings)
            code = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)
"""


class _Server:
    """The process, while it lives, and the one that started it, whose forks cannot share it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._owner, self._lock = 0, Lock()
        atexit.register(self._end)

    def run(self, *job: object) -> int:
        """The exit code of a job."""
        with self._lock:
            if self._owner != os.getpid() or self._process is None or self._process.poll() is not None:
                command, pipe = [sys.executable, "-P", "-W", "ignore", "-c", _SERVER], subprocess.PIPE
                self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
                self._owner = os.getpid()
            process, self._process = self._process, None  # not asked again if this is interrupted
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            self._process = process
            return int(answer) if answer else process.wait()

    def _end(self) -> None:
        if self._process is not None and self._owner == os.getpid():
            self._process.communicate()


_server = _Server()


def run_apart(load: str, program: Program, folder: Path, calls: Sequence[Call], imports: Sequence[str] = ()) -> Run:
    """Runs what was written in a process of its own, which has torch and cannot import pwrewrite.

    ``load`` is Python that makes ``model`` from the files in the folder, ``imports`` names modules that it will need,
    imported once for all runs. Raises `RefusedError` where it does not run there.
    """
    threads = torch.get_num_threads()
    with TemporaryDirectory() as scratch:
        torch.save(list(calls), f"{scratch}/calls")
        code = _server.run(imports, scratch, str(folder.absolute()), load, threads, exporting.SECONDS)
        if code:
            errors = Path(scratch, "errors")
            lines = errors.read_text(errors="replace").strip().splitlines() if errors.exists() else []
            raise RefusedError("it does not run in a process of its own", got=(lines or [f"exit code {code}"])[-1])
        outputs, seconds = torch.load(f"{scratch}/results", weights_only=True)
    names = list(program.outputs.values())
    named = [{program.outputs.get(path, path): t for path, t in each.items()} for each in outputs]
    # Classes that became plain containers have other paths, and the same order.
    ordered = [dict(zip(names, each.values())) if len(each) == len(names) else each for each in named]
    named = [each if set(each) == set(names) else other for each, other in zip(named, ordered)]
    return Run(named, seconds, f"torch {torch.__version__}, CPU, {plural(threads, 'thread')}")
