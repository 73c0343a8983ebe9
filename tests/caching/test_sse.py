from __future__ import annotations

import json
import re
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llm_middleware import CacheManager
from llm_middleware.caching.admission import REASONS
from llm_middleware.caching.entry import Form
from llm_middleware.caching.sse import (
    Event,
    dump_json,
    event_ends,
    format_event,
    load_json,
    parse_events,
)

# Bytes in which line ends of every sort meet often.
awkward = st.lists(
    st.sampled_from([b"\n", b"\r", b"\r\n", b"data: x", b":c", b"event: e", "é".encode(), b"id: 1", b"data"])
).map(b"".join)


def pieces(data: bytes) -> list[bytes]:
    ends = event_ends(data)
    return [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", []),
        (b"data: a", [b"data: a"]),
        (b"data: a\n", [b"data: a\n"]),
        (b"data: a\n\ndata: b\n\n", [b"data: a\n\n", b"data: b\n\n"]),
        (b"data: a\n\ndata: b", [b"data: a\n\n", b"data: b"]),
        (b"data: a\n\n\n\ndata: b\n\n", [b"data: a\n\n\n\n", b"data: b\n\n"]),
        (b"data: a\r\n\r\ndata: b\r\n\r\n", [b"data: a\r\n\r\n", b"data: b\r\n\r\n"]),
        (b"data: a\r\n\r\n\r\ndata: b\r\n", [b"data: a\r\n\r\n\r\n", b"data: b\r\n"]),
        (b"data: a\r\rdata: b\r\r", [b"data: a\r\r", b"data: b\r\r"]),
        (b"data: a\ndata: b\r\ndata: c\rdata: d", [b"data: a\ndata: b\r\ndata: c\rdata: d"]),
        (b"data: a\r\n\ndata: b\n\r\ndata: c\n\r", [b"data: a\r\n\n", b"data: b\n\r\n", b"data: c\n\r"]),
        (b": keep-alive\n\ndata: a\n\n", [b": keep-alive\n\n", b"data: a\n\n"]),
        (b"\n\ndata: a\n\n", [b"\n\ndata: a\n\n"]),
        (b"\n\n", [b"\n\n"]),
    ],
)
def test_an_event_ends_after_its_blank_lines(data: bytes, expected: list[bytes]) -> None:
    assert pieces(data) == expected


@given(awkward)
@example(b"a\r\nb\r\n\r\nc")
def test_ends_follow_the_standards_line_rules(data: bytes) -> None:
    """Against the plain reading: split into lines, and cut after every run of empty ones."""
    lines = re.findall(rb"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+", data)
    expected, at = [], 0
    for number, line in enumerate(lines):
        at += len(line)
        following = lines[number + 1] if number + 1 < len(lines) else b"x"
        begun = any(before.strip(b"\r\n") for before in lines[:number])
        if begun and not line.strip(b"\r\n") and following.strip(b"\r\n"):
            expected.append(at)
    if data and expected[-1:] != [len(data)]:
        expected.append(len(data))
    assert event_ends(data) == expected


@given(awkward | st.binary())
def test_the_pieces_make_up_the_data(data: bytes) -> None:
    assert b"".join(pieces(data)) == data
    assert all(pieces(data))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_events_are_read_as_the_standard_says(end: str) -> None:
    text = (
        "\ufeffdata: first\n\n"
        ": a comment\n\n"
        "event: delta\ndata: one\ndata:two\ndata:  three\ndata\nid: 7\nretry: 10\nunknown: x\n\n"
        "event: lost\n\n"
        "data\n\n"
        "id: bad\0id\ndata: sép\u2028arated\n\n"
        "id\ndata: no final blank line"
    )
    assert parse_events(text.replace("\n", end).encode()) == [
        Event(None, "first", None),
        Event("delta", "one\ntwo\n three\n", "7"),
        Event(None, "", "7"),
        Event(None, "sép\u2028arated", "7"),
        Event(None, "no final blank line", None),
    ]


def test_bytes_that_are_not_utf8_are_replaced() -> None:
    assert parse_events(b"data: a\xffb\n\n") == [Event(None, "a\ufffdb", None)]


def test_only_the_first_mark_is_a_byte_order_mark() -> None:
    assert parse_events("\ufeff\ufeffdata: a\n\ndata: b\n\n".encode()) == [Event(None, "b", None)]


@pytest.mark.parametrize(
    ("payload", "event", "expected"),
    [
        (b"{}", None, b"data: {}\n\n"),
        ("é", "delta", "event: delta\ndata: é\n\n".encode()),
        ("a\nb\r\nc\rd", None, b"data: a\ndata: b\ndata: c\ndata: d\n\n"),
        ("", None, b"data: \n\n"),
    ],
)
def test_format_event(payload: bytes | str, event: str | None, expected: bytes) -> None:
    assert format_event(payload, event) == expected


@given(st.text(st.characters(exclude_characters="\r", codec="utf-8")), st.sampled_from([None, "error"]))
def test_a_formatted_event_is_read_back(payload: str, event: str | None) -> None:
    assert parse_events(format_event(payload, event)) == [Event(event, payload, None)]


def recorded(kind: str, chunks: list[bytes]) -> Form:
    """What a cache keeps of a stream that comes in these chunks, whatever is in them."""
    cache = CacheManager(admission=dict.fromkeys(REASONS, True))
    body = {"model": "m", "messages": [], "stream": True}
    answer = cache.fetch(body, lambda _: iter(chunks), kind=kind)
    assert list(answer) == chunks
    form = cache._flow.tiers.memory.get(f"llm:{answer.cache.key}").stream
    assert list(cache.get(body, kind=kind)) == form.chunks()
    return form


@given(awkward | st.binary(), st.lists(st.integers(0, 60)))
def test_any_split_of_the_bytes_gives_the_same_record(data: bytes, cuts: list[int]) -> None:
    """C77: network chunks may split a character, a line end or an event."""
    places = [0, *sorted(cut for cut in cuts if cut <= len(data)), len(data)]
    form = recorded("messages", [data[start:end] for start, end in pairwise(places)])
    assert form.body == data
    assert form.chunks() == pieces(data)


def test_a_record_that_is_not_sse_keeps_its_chunks() -> None:
    assert recorded("json", [b"ab", b"\n\n", b"cde"]).chunks() == [b"ab", b"\n\n", b"cde"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"[NaN]", "NaN is not JSON"),
        (b"-Infinity", "-Infinity is not JSON"),
        (b"[" * 200_000, "nested too deep"),
        (b"\xff", "can't decode"),
        ('{"a":1}'.encode("utf-16"), "can't decode"),
        (b"1" * 5000, "Exceeds the limit"),
    ],
    ids=["empty", "cut", "nan", "infinity", "deep", "bytes", "utf-16", "digits"],
)
def test_what_is_not_json_is_a_value_error(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_json(data)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists))
def test_json_goes_both_ways(value: object) -> None:
    assert load_json(dump_json(value)) == value


def test_a_character_split_into_surrogates_becomes_whole() -> None:
    """Two deltas may each carry one half of a character as an escape."""
    body = dump_json({"content": "\ud83d" + "\ude00"})
    assert json.loads(body) == {"content": "\U0001f600"}


def test_numbers_that_json_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match="Out of range"):
        dump_json(load_json("1e999"))
