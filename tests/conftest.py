"""What holds for all tests: workers that run side by side share the cores, and so do the processes that they start."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from functools import cache

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported, and handed on to subprocesses
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))


@pytest.fixture(scope="session", autouse=True)
def short_timings() -> Iterator[None]:
    """What is timed to be reported is timed for hundredths of a second; how times are taken is the same."""
    from pwrewrite.engines import choosing, exporting, timing
    from pwrewrite.planning import latency
    from pwrewrite.workflows import end_to_end, fuse_timing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(end_to_end, "_SECONDS", (0.05, 0.1))
        patch.setattr(timing, "_SECONDS", 0.1)
        patch.setattr(latency, "_SECONDS_EACH", 0.03)
        patch.setattr(choosing, "_SECONDS", 0.02)
        patch.setattr(exporting, "SECONDS", 0.02)
        patch.setattr(fuse_timing, "_SECONDS", 0.02)
        yield


@pytest.fixture(scope="session", autouse=True)
def onnxscript_read_once() -> Iterator[None]:
    """Every export to ONNX parses the source of all of onnxscript's operations anew, which is most of its time."""
    with pytest.MonkeyPatch.context() as patch:
        with suppress(ImportError):
            from torch.onnx._internal._lazy_import import _LazyModule, onnxscript_apis

            if isinstance(onnxscript_apis, _LazyModule):  # which stays unloaded until something is exported
                read = cache(lambda: onnxscript_apis.__getattr__("get_torchlib_ops")())
                patch.setitem(vars(onnxscript_apis), "get_torchlib_ops", read)
        yield


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Workers keep to their half of the files, whose models they share, until one has nothing left to do."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getoption("dist") == "load" else None
