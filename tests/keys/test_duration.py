"""The grammar of durations, and months of the calendar."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_middleware.errors import InvalidRequestError
from llm_middleware.keys.duration import Duration, parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1s", 1),
        ("30s", 30),
        ("15m", 900),
        ("12h", 43200),
        ("7d", 604800),
        ("2w", 1209600),
        ("1h30m", 5400),
        ("1h30m15s", 5415),
        ("90m5s", 5405),
        ("1h5s", 3605),
    ],
)
def test_seconds(text: str, seconds: int) -> None:
    assert parse_duration(text) == Duration(0, seconds)
    assert parse_duration(text).after(1000.5) == 1000.5 + seconds


@pytest.mark.parametrize(
    "text",
    [
        *("1d2h", "5minutes", "1m3x", "0s"),  # R70
        *("0h", "1h0m", "30m1h", "1s1m", "1m1m", "1mo1d", "1w2d", "1mo2h", "1h30"),
        *("-1s", "+1s", "1.5h", "1e3s", "1S", "1M", "s", "h", "1", "60", "1ms", "1y", "permanent", "null"),
        *("\u0661s", "\u00b2s", "", " 1s", "1s ", "1 s", "1s\n", "1h\x00"),
        *("9" * 40 + "s", "9" * 18 + "s", "1201mo", "36601d"),
    ],
)
def test_what_is_none(text: str) -> None:
    """R70."""
    with pytest.raises(InvalidRequestError) as caught:
        parse_duration(text, field="budget_duration")
    assert (caught.value.param, caught.value.status, caught.value.code) == (
        "budget_duration",
        400,
        "invalid_duration",
    )


@pytest.mark.parametrize("value", [3600, 1.5, True, ["1h"], {"h": 1}, b"1h"])
def test_what_is_no_text(value: object) -> None:
    with pytest.raises(InvalidRequestError, match="a value of type"):
        parse_duration(value)


def test_null_is_for_ever() -> None:
    """R70."""
    assert parse_duration(None) is None


@given(
    st.tuples(st.integers(1, 999), st.integers(1, 999), st.integers(1, 999)),
    st.sets(st.sampled_from("hms"), min_size=1),
)
def test_hours_minutes_and_seconds_in_that_order(numbers, units) -> None:
    parts = [(unit, number) for unit, number in zip("hms", numbers, strict=True) if unit in units]
    text = "".join(f"{number}{unit}" for unit, number in parts)
    seconds = sum({"h": 3600, "m": 60, "s": 1}[unit] * number for unit, number in parts)
    assert parse_duration(text) == Duration(0, seconds)
    if len(parts) > 1:
        with pytest.raises(InvalidRequestError):
            parse_duration("".join(f"{number}{unit}" for unit, number in reversed(parts)))


@given(st.text(alphabet="0123456789smhdwo -+.", max_size=12))
def test_any_text_is_a_positive_time_or_refused(text: str) -> None:
    try:
        duration = parse_duration(text)
    except InvalidRequestError:
        return
    assert duration is not None
    assert 0 < duration.after(1_700_000_000.0) - 1_700_000_000.0 <= 101 * 366 * 86400


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("start", "text", "end"),
    [
        ("2026-01-15T10:30:00.5", "1mo", "2026-02-15T10:30:00.5"),
        ("2026-01-31T00:00:00", "1mo", "2026-02-28T00:00:00"),
        ("2028-01-31T00:00:00", "1mo", "2028-02-29T00:00:00"),
        ("2026-11-30T23:59:59", "3mo", "2027-02-28T23:59:59"),
        ("2026-12-01T00:00:00", "12mo", "2027-12-01T00:00:00"),
    ],
)
def test_months(start: str, text: str, end: str) -> None:
    assert parse_duration(text).after(at(start)) == at(end)


def test_months_keep_the_day_they_began_with() -> None:
    month = parse_duration("1mo")
    start = at("2026-01-31T00:00:00")
    assert month.following(start, at("2026-02-28T00:00:00")) == at("2026-03-31T00:00:00")
    assert month.following(start, at("2026-02-27T23:59:59")) == at("2026-02-28T00:00:00")


@given(
    st.sampled_from(["1s", "90m", "1d", "1mo", "7mo"]),
    st.floats(0, 4e9),
    st.floats(-1e6, 3e8),
)
def test_the_following_moment_is_the_first_after_now(text: str, start: float, passed: float) -> None:
    duration, now = parse_duration(text), start + passed
    found = duration.following(start, now)
    assert found > now
    assert found > start
    times = (
        next(n for n in range(int(3e8) + 3) if duration.after(start, n + 1) == found) if text != "1s" else 0
    )
    if times:
        assert duration.after(start, times) <= now
