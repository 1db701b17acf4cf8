import pytest
from hypothesis import given, strategies as st

from pwrewrite.core.errors import UsageError
from pwrewrite.core.numbers import count, dims, duration, exact, parse_count, parse_share, percent, plural, size


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1_000, "1.00 k"),
        (25_557_032, "25.6 M"),
        (4_089_184_256, "4.09 G"),
        (999_499, "999 k"),
        (999_500, "1.00 M"),
        (999_999_999, "1.00 G"),
        (9_994, "9.99 k"),
        (9_996, "10.0 k"),
        (99_960, "100 k"),
        (-1_500, "-1.50 k"),
        (10**21, "1000 E"),
    ],
)
def test_count(value: int, text: str) -> None:
    assert count(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (102_760_448, "98.0 MiB"),
        (1024**2 - 1, "1.00 MiB"),
        (1000 * 1024, "0.98 MiB"),
        (999 * 1024, "999 KiB"),
    ],
)
def test_size(value: int, text: str) -> None:
    assert size(value) == text


@given(st.integers(0, 10**18))
def test_three_digits_and_never_a_thousand(value: int) -> None:
    number, _, unit = count(value).partition(" ")
    assert len(number.replace(".", "")) <= 3
    assert float(number) < 1000
    scale = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}[unit]
    # Three digits: half of the last one is at most half a hundredth of the number.
    assert abs(float(number) * scale - value) <= 0.0051 * value


def test_shares() -> None:
    assert percent(0) == "0.0%"
    assert percent(0.0001) == "<0.1%"
    assert percent(0.0567) == "5.7%"
    assert percent(0.99999) == "99.9%"
    assert percent(1) == "100.0%"


def test_other_forms() -> None:
    assert dims((1, 3, 224, 224)) == "1×3×224×224"
    assert dims(()) == "scalar"
    assert exact(4_089_184_256) == "4,089,184,256"
    assert plural(1, "layer") == "1 layer"
    assert plural(1_200, "layer") == "1,200 layers"
    assert duration(0) == "0 ns"
    assert duration(0.0016) == "1.60 ms"
    assert duration(0.9999) == "1.00 s"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4.1G", 4_100_000_000),
        ("4.1 g", 4_100_000_000),
        ("25M", 25_000_000),
        ("25557032", 25_557_032),
        ("25_557_032", 25_557_032),
        ("25,557,032", 25_557_032),
        ("25e6", 25_000_000),
        (".5k", 500),
        ("0", 0),
        ("1.7B", 1_700_000_000),
        ("4.089184256G", 4_089_184_256),
    ],
)
def test_parse_count(text: str, value: int) -> None:
    assert parse_count(text) == value


@pytest.mark.parametrize("text", ["", "G", "-1", "1.2.3", "four", "1K2", "nan", "inf", "4,1G x", "1e999"])
def test_parse_count_refuses(text: str) -> None:
    with pytest.raises(UsageError, match="--max-macs"):
        parse_count(text, "--max-macs")


@pytest.mark.parametrize(("text", "value"), [("1%", 0.01), ("0.01", 0.01), ("100%", 1), ("0", 0), (" .5 % ", 0.005)])
def test_parse_share(text: str, value: float) -> None:
    assert parse_share(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "%", "one", "-1%", "101%", "1.5", "nan", "1e-2"])
def test_parse_share_refuses(text: str) -> None:
    with pytest.raises(UsageError, match="--hotspot-share"):
        parse_share(text, "--hotspot-share")


def test_a_percentage_without_its_sign_is_told() -> None:
    with pytest.raises(UsageError, match="write 5%"):
        parse_share("5")
