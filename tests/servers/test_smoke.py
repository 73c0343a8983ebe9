"""What must hold under every server: hits and misses, streams byte for byte, chunked bodies, lost clients."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import httpx
import pytest

CHAT = "/v1/chat/completions"
EVENTS = 20  # as in apps.py
PATIENCE_S = 20.0

ASGI = {"uvicorn", "uvicorn-h11", "hypercorn", "daphne", "granian-asgi"}


@pytest.fixture
def client(server: tuple[str, str]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server[1], timeout=30, trust_env=False) as session:
        yield session


def body_of(prompt: str, **fields: object) -> dict[str, object]:
    return {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": prompt}], **fields}


def state_of(response: httpx.Response) -> str:
    assert response.status_code == 200
    return response.headers["x-llm-cache"]


def test_miss_then_hit(client: httpx.Client) -> None:
    miss = client.post(CHAT, json=body_of("plain"))
    hit = client.post(CHAT, json=body_of("plain"))
    assert (state_of(miss), state_of(hit)) == ("miss", "hit")
    assert hit.content == miss.content
    assert hit.headers["content-type"] == "application/json"
    assert hit.headers["content-length"] == str(len(hit.content))
    assert int(hit.headers["age"]) >= 0
    assert "age" not in miss.headers
    assert hit.headers["cache-status"].startswith("llm-middleware; hit")
    assert miss.headers["cache-status"].startswith("llm-middleware; fwd=miss")
    assert hit.headers["x-llm-cache-key"] == miss.headers["x-llm-cache-key"]


def test_opaque_json_and_the_cache_field(client: httpx.Client) -> None:
    miss = client.post("/ask", json={"question": "why?"})
    hit = client.post("/ask", json={"question": "why?"})
    fresh = client.post("/ask", json={"question": "why?", "cache": {"no-cache": True}})
    assert (state_of(miss), state_of(hit)) == ("miss", "hit")
    assert hit.json() == miss.json()
    assert fresh.json()["call"] == miss.json()["call"] + 1
    assert fresh.json()["fields"] == ["question"]


def test_stream_miss_then_hit_is_the_same_bytes(client: httpx.Client) -> None:
    miss = client.post(CHAT, json=body_of("streamed", stream=True))
    hit = client.post(CHAT, json=body_of("streamed", stream=True))
    assert (state_of(miss), state_of(hit)) == ("miss", "hit")
    assert hit.content == miss.content
    assert whole(hit.content)
    assert hit.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert "content-length" not in hit.headers


def test_chunked_request_bodies_are_read_whole(client: httpx.Client) -> None:
    raw = json.dumps(body_of("chunked")).encode()
    miss = client.post(CHAT, content=in_chunks(raw), headers={"content-type": "application/json"})
    hit = client.post(CHAT, content=in_chunks(raw), headers={"content-type": "application/json"})
    with_length = client.post(CHAT, json=body_of("chunked"))
    assert [state_of(r) for r in (miss, hit, with_length)] == ["miss", "hit", "hit"]
    assert miss.json()["choices"][0]["message"]["content"] == "You said chunked"
    assert hit.content == with_length.content == miss.content


def test_paths_that_are_not_cached_are_left_alone(client: httpx.Client) -> None:
    raw = bytes(range(256)) * 300
    for response in (client.post("/echo", content=raw), client.post("/echo", content=in_chunks(raw))):
        assert response.content == raw
        assert "x-llm-cache" not in response.headers
    assert client.post("/echo").content == b""


def test_a_client_that_leaves_ends_the_handler_and_leaves_nothing_half(client: httpx.Client) -> None:
    before = client.get("/count").json()["broken"]
    body = body_of("left while it drips", stream=True, model="drip")
    first = leave_after_first_event(client, body)
    wait_until_idle(client)
    assert client.get("/count").json()["broken"] == before + 1
    again = client.post(CHAT, json=body)
    assert state_of(again) == "miss"
    assert first not in again.content  # another call, another id
    assert whole(again.content)
    replay = client.post(CHAT, json=body)
    assert state_of(replay) == "hit"
    assert replay.content == again.content


def test_a_client_that_leaves_while_nothing_is_sent(server: tuple[str, str], client: httpx.Client) -> None:
    """The handler waits for its upstream: under ASGI it is told at once, under WSGI at its next event."""
    if server[0] == "gunicorn-sync":
        return  # its only thread is in the held stream: nobody is there to release it
    body = body_of("left while held", stream=True, model="held")
    leave_after_first_event(client, body)
    if server[0] in ASGI:
        wait_until_idle(client)
    client.post("/release")
    wait_until_idle(client)
    again = client.post(CHAT, json=body)
    assert whole(again.content)
    replay = client.post(CHAT, json=body)
    assert state_of(replay) == "hit"
    assert replay.content == again.content


def leave_after_first_event(client: httpx.Client, body: dict[str, object]) -> bytes:
    """Begin to read a stream and close the connection; the event that came."""
    with client.stream("POST", CHAT, json=body) as response:
        assert state_of(response) == "miss"
        return next(response.iter_lines()).encode()


def in_chunks(raw: bytes) -> Iterator[bytes]:
    """The body in three pieces: httpx sends an iterator with ``Transfer-Encoding: chunked``."""
    third = len(raw) // 3
    yield from (raw[:third], raw[third : 2 * third], raw[2 * third :])


def whole(stream: bytes) -> bool:
    """Whether all the events are there, of one call."""
    events = stream.split(b"\n\n")
    ids = {json.loads(event.removeprefix(b"data: "))["id"] for event in events[:-2]}
    return len(events) == EVENTS + 1 and events[-2:] == [b"data: [DONE]", b""] and len(ids) == 1


def wait_until_idle(client: httpx.Client) -> None:
    """Return when no handler is in the middle of a stream."""
    deadline = time.monotonic() + PATIENCE_S
    while client.get("/count").json()["open"]:
        assert time.monotonic() < deadline, "the handler still streams to a client that has left"
        time.sleep(0.02)
