"""Examples in docstrings run, and the names that a newcomer tries first have one."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from types import ModuleType

import pytest

import pwrewrite

MODULES = sorted(m.name for m in pkgutil.walk_packages(pwrewrite.__path__, "pwrewrite.") if "__main__" not in m.name)


def examples_in(module: ModuleType) -> list[doctest.DocTest]:
    return [test for test in doctest.DocTestFinder(exclude_empty=True).find(module) if test.examples]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    said: list[str] = []
    for test in examples_in(importlib.import_module(name)):
        runner.run(test, out=said.append)
    assert not runner.failures, "".join(said)


@pytest.mark.parametrize("name", ["analyze", "capture", "fuse", "graph", "rewrite", "unfuse", "verify"])
def test_what_a_newcomer_tries_first_has_an_example(name: str) -> None:
    assert ">>>" in (getattr(pwrewrite, name).__doc__ or "")
