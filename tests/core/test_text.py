"""What comes from models, plans and exceptions is safe to show."""

import pytest
from hypothesis import given, strategies as st

from pwrewrite.core.errors import PwrewriteError, first_line, shortened
from pwrewrite.core.text import LONGEST, plain

NASTY = ["\x1b[31mred", "\x1b]0;title\x07", "a\rb", "\x9b2J", "\u202egnp.exe", "\x00", "\x7f", "\ud800"]


@pytest.mark.parametrize("text", NASTY)
def test_control_characters_are_spelt_out(text: str) -> None:
    assert plain(text).isprintable()
    assert plain(plain(text)) == plain(text)
    error = PwrewriteError(text, where=text, expected=text, got=text, hint=text)
    assert {c for c in str(error) if not c.isprintable()} <= {"\n"}
    assert shortened(text).isprintable()
    assert first_line(ValueError(text)).isprintable()


def test_what_people_write_stays() -> None:
    for text in ("模型.残差块", "3×3 → µs", "a b", "é"):
        assert plain(text) == text
    assert plain("two\nlines\tof", lines=True) == "two\nlines\tof"
    assert plain("two\nlines") == "two\\nlines"


@given(st.text(max_size=50), st.integers(0, 3 * LONGEST))
def test_length_is_bounded(text: str, more: int) -> None:
    assert len(plain("x" * more + text)) <= LONGEST + 3 + 10 * len(text)
    error = PwrewriteError("m" * 10**6, got="g" * 10**6)
    assert len(str(error)) < 3 * LONGEST
    assert str(error).startswith("mmm")
    assert len(first_line(ValueError("v" * 10**6))) < 300
