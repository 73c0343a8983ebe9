"""Requests and answers as apps and providers send them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

__all__ = ["ANSWER", "EVENTS", "chat", "http_request", "pad", "reserialised"]

_WORDS = [
    *("latency", "throughput", "cache", "request", "answer", "token", "model", "prompt", "stream", "event"),
    *("buffer", "header", "scope", "tenant", "quota", "retry", "timeout", "upstream", "gateway", "digest"),
    *("canonical", "replay", "budget", "eviction", "queue", "shard", "replica", "of", "the", "is", "a", "in"),
]


def pad(size: int, seed: int = 1) -> str:
    """About ``size`` characters of English-looking text."""
    words = random.Random(seed)
    text = ""
    while len(text) < size:
        text += words.choice(_WORDS) + " "
    return text[:size]


def chat(size: int, **changes: object) -> dict[str, object]:
    """A chat request whose compact JSON takes about ``size`` bytes: several messages, some options."""
    body: dict[str, object] = {
        "model": "gpt-4o-mini",
        "messages": [
            {"role": "system", "content": pad(size // 4)},
            {"role": "user", "content": pad(size // 8, 2)},
            {"role": "assistant", "content": pad(size // 8, 3)},
            {"role": "user", "content": [{"type": "text", "text": pad(size // 8, 4)}]},
            {"role": "user", "content": ""},
        ],
        "temperature": 0.2,
        "top_p": 0.95,
        "max_tokens": 512,
        "seed": 7,
        "stop": ["###", "END"],
        "user": "user-1234",
        "response_format": {"type": "json_object"},
        **changes,
    }
    messages = body["messages"]
    assert isinstance(messages, list)
    messages[-1]["content"] = pad(size - len(json.dumps(body)), 5)
    return body


ANSWER = json.dumps(
    {
        "id": "chatcmpl-9f2",
        "object": "chat.completion",
        "created": 1_760_000_000,
        "model": "gpt-4o-mini-2024-07-18",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": pad(1200, 6), "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 320, "completion_tokens": 210, "total_tokens": 530},
        "system_fingerprint": "fp_1",
    }
).encode()


def _chunk(content: str | None, finish: str | None) -> bytes:
    choice = {"index": 0, "delta": {} if content is None else {"content": content}, "finish_reason": finish}
    head = {"id": "chatcmpl-9f2", "object": "chat.completion.chunk", "created": 1_760_000_000}
    data = {**head, "model": "gpt-4o-mini-2024-07-18", "system_fingerprint": "fp_1", "choices": [choice]}
    return b"data: " + json.dumps(data).encode() + b"\n\n"


EVENTS = [
    *[_chunk(f"{word} ", None) for word in pad(6000, 7).split()[:498]],
    _chunk(None, "stop"),
    b"data: [DONE]\n\n",
]
"""A streamed answer of 500 events."""


def reserialised(value: dict[str, object], seed: int = 1) -> Iterator[bytes]:
    """The same JSON value over and over, its keys in another order and with other white space each time;
    no text comes twice."""
    shuffle = random.Random(seed)
    seen: set[int] = set()
    spaces = [(",", ":"), (", ", ": "), (",", ": "), (", ", ":")]
    while True:
        text = json.dumps(_shuffled(value, shuffle), separators=shuffle.choice(spaces)).encode()
        mark = hash(text)
        if mark not in seen:
            seen.add(mark)
            yield bytes(bytearray(text))  # a copy that does not know its hash yet


def _shuffled(value: object, shuffle: random.Random) -> object:
    if isinstance(value, list):
        return [_shuffled(item, shuffle) for item in value]
    if not isinstance(value, dict):
        return value
    names = list(value)
    shuffle.shuffle(names)
    return {name: _shuffled(value[name], shuffle) for name in names}


def http_request(path: str, body: bytes, method: str = "POST") -> bytes:
    """A request as OpenAI's Python client sends it, on the wire."""
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: application/json\r\n"
        "Accept-Encoding: gzip, deflate\r\nConnection: keep-alive\r\nContent-Type: application/json\r\n"
        "User-Agent: OpenAI/Python 1.50.0\r\nX-Stainless-Lang: python\r\nX-Stainless-Async: false\r\n"
        "Authorization: Bearer sk-proj-0123456789abcdefghijklmnopqrstuvwxyz\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
