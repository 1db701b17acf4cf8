"""What every command has in common."""

import io
import os
import re
import signal
import time
import warnings
from collections.abc import Callable

import pytest
import typer

from pwrewrite.cli.progress import Work, progressing
from pwrewrite.cli.running import handled, interruptible, quiet
from pwrewrite.core.collector import no_collection
from pwrewrite.core.errors import GateError, PwrewriteError, UsageError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UsageError("no", expected="a", got="b", hint="c"), 2, "error: no\n  expected: a\n  got: b\n  try: c\n"),
        (GateError("too much"), 1, "error: too much\n"),
        (PwrewriteError("odd", where="here"), 2, "error: odd\n  where: here\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (BrokenPipeError(32, "Broken pipe"), 141, ""),
        (KeyError("x"), 1, "internal error: KeyError: 'x' (run with --debug; please report)\n"),
        (MemoryError(), 1, "internal error: MemoryError (run with --debug; please report)\n"),
        (typer.Exit(5), 5, ""),
    ],
)  # fmt: skip
def test_exceptions_become_words_and_codes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, said: str
) -> None:
    monkeypatch.delenv("PWREWRITE_DEBUG", raising=False)
    monkeypatch.setattr("pwrewrite.cli.running._silence_stdout", lambda: None)
    with pytest.raises(typer.Exit) as left, handled(debug=False):
        raise error
    assert left.value.exit_code == code
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(("no_color", "red"), [("", True), ("1", False)])
def test_red_only_where_a_person_looks(monkeypatch: pytest.MonkeyPatch, no_color: str, red: bool) -> None:
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    monkeypatch.setenv("NO_COLOR", no_color)
    with pytest.raises(typer.Exit), handled(debug=False):
        raise UsageError("no")
    assert terminal.getvalue() == ("\x1b[1;31merror:\x1b[0m no\n" if red else "error: no\n")


def swallow(what: type[BaseException]) -> None:
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    except what:
        pass


def swallow_and_fail() -> None:
    swallow(KeyboardInterrupt)
    raise ImportError("half imported")


@pytest.mark.parametrize("body", [lambda: swallow(KeyboardInterrupt), lambda: swallow(ValueError), swallow_and_fail])
def test_ctrl_c_counts_even_where_it_is_swallowed(body: Callable[[], None]) -> None:
    usual = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), interruptible():
            body()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, usual)


def test_other_errors_pass() -> None:
    with pytest.raises(ValueError, match="mine"), interruptible():
        raise ValueError("mine")
    with interruptible():
        pass


def test_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with quiet(debug=False):
            print("to the other side")
            warnings.warn("unheard", stacklevel=1)
        with pytest.raises(UserWarning), quiet(debug=True):
            warnings.warn("heard", stacklevel=1)
    assert capsys.readouterr() == ("", "to the other side\n")


def test_the_collector_is_put_back() -> None:
    import gc

    assert gc.isenabled()
    with no_collection():
        assert not gc.isenabled()
        with no_collection():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_bar_after_a_moment_and_no_trace_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    with progressing(after=0.0) as say:
        say("x" * 100, None)
        deadline = time.monotonic() + 10
        while "…xxx" not in terminal.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "…xxx" in terminal.getvalue()
    assert terminal.getvalue().endswith("\x1b[2K")


def test_nothing_is_shown_when_it_is_quick_or_unwanted(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal, options in ((Terminal(), {}), (io.StringIO(), {}), (io.StringIO(), {"lines": False, "every": 0.01})):
        monkeypatch.setattr("sys.stderr", terminal)
        with progressing(**options) as say:
            say("calibrating", 0.5)
            time.sleep(0.05)
        assert terminal.getvalue() == ""


def test_lines_where_nobody_is_watching(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", file := io.StringIO())
    with progressing(every=0.01) as say:
        say("calibrating", 0.5)
        deadline = time.monotonic() + 10
        while file.getvalue().count("\n") < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    lines = r"(… starting \(0% done, 0 s\)\n)*(… calibrating \(\d+% done, 0 s\)\n)+"
    assert re.fullmatch(lines, file.getvalue())
    monkeypatch.setattr("sys.stderr", file := io.StringIO())
    with progressing(steps=True) as say:
        for what in ("loading", "capturing", "capturing", "verifying"):
            say(what, None)
    assert file.getvalue() == "0 s: loading\n0 s: capturing\n0 s: verifying\n"


def test_one_measure_over_all_steps() -> None:
    work = Work()
    done = []
    for what, share in (
        ("loading", None), ("capturing", None), ("unfuse-layers: proposing", None),
        ("calibrating", 0.0), ("calibrating", 0.5), ("looking at a", 0.0),
        ("rewriting a", 0.5), ("fitting a", 0.0), ("calibrating", 0.1), ("verifying: training", None),
        ("measuring on held-out inputs", None), ("saving", None),
    ):  # fmt: skip
        work.go_on(what, share)
        done.append(work.done)
    assert done == sorted(done)
    assert done[0] == 0
    assert 0.3 < done[7] < 0.8
    assert done[-1] > 0.95
    work.began = time.monotonic() - 60
    assert re.fullmatch(r"60 s, about \d s left", work.times())
    passes = Work()
    for what in ("loading", "capturing", "insert-bottleneck: proposing"):
        passes.go_on(what, None)
    assert passes.done < 0.1  # what is left out is no part of the whole


def test_every_stage_has_a_measure_of_its_own() -> None:
    work, done = Work(), []
    for what, share in (
        ("rewrite 1/3 · calibrating", 0.5), ("rewrite 1/3 · verifying", None),
        ("export 2/3 · torch.export", None), ("export 2/3 · onnx: writing", 0.0), ("export 2/3 · pt2: writing", 0.5),
        ("measure 3/3 · timing both models", None),
    ):  # fmt: skip
        work.go_on(what, share)
        done.append((work.stage, round(work.done, 2)))
    assert [stage for stage, _ in done] == ["rewrite 1/3"] * 2 + ["export 2/3"] * 3 + ["measure 3/3"]
    assert done[1][1] > 0.4 > done[2][1]
    assert done[2][1] < done[3][1] < done[4][1] < 1
    assert done[5][1] == 0


def test_a_bar_for_every_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    with progressing(after=0.0) as say:
        for what in ("rewrite 1/2 · verifying", "fuse 2/2 · verifying"):
            say(what, None)
            deadline = time.monotonic() + 10
            while what not in terminal.getvalue() and time.monotonic() < deadline:
                time.sleep(0.01)
        last = terminal.getvalue().rpartition("rewrite 1/2")[2]
        assert "fuse 2/2 · verifying" in last


def test_what_c_code_prints_goes_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    import os

    from pwrewrite.cli.running import quiet

    with quiet(debug=False):
        os.write(1, b"from a solver\n")
    os.write(1, b"a report\n")
    found = capfd.readouterr()
    assert found.out == "a report\n"
    assert "from a solver" in found.err
