"""Odd bodies and odd controls: planning raises only `InvalidRequestError`, and every request is answered.

The dice are seeded, so a failure comes again.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import re

import pytest

from llm_middleware import CacheManager, InvalidRequestError
from llm_middleware.caching.endpoints import ENDPOINTS
from tests.support import AsgiFront, Host, WsgiFront, completion

KINDS = [*ENDPOINTS]
REASONS = {None, "unparsable-body", "encoded-body", "no-store", "default-off", "stateful"}

TEXTS = [
    "",
    "a",
    "hi",
    "true",
    "5",
    "\x00",
    "\u2028",
    "é",
    "😀",
    "\ud800",
    "\\",
    '"',
    "x" * 300,
    "٣",
    "nan",
    "-1",
]
NUMBERS = [0, 1, -1, 1.5, -0.0, 1e22, 1e308, 5e-324, 2**53 + 1, -(2**63), 2**64, 10**40, 10**400]
WORDS = [
    *(
        "model",
        "messages",
        "input",
        "prompt",
        "stream",
        "stream_options",
        "temperature",
        "n",
        "tools",
        "stop",
    ),
    *(
        "conversation",
        "image_url",
        "response_format",
        "metadata",
        "cache",
        "file",
        "user",
        "seed",
        "logit_bias",
    ),
]
CONTROLS = [
    *("ttl", "s-maxage", "s-max-age", "no-cache", "no-store", "namespace", "use-cache", "tags"),
    *("stale-while-revalidate", "stale-if-error", "no_cache", "TTL", "cache_key", "", "\x00", "ttl "),
]
DIRECTIVES = [
    *(
        "no-cache",
        "no-store",
        "max-age",
        "min-fresh",
        "max-stale",
        "only-if-cached",
        "stale-if-error",
        "private",
    ),
    *("NO-CACHE", "x", "", '"', "=", ";", "\xe9", "max-age=5", "s-maxage"),
]
PIECES = [
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b",",
        b":",
        b"\\",
        b"\\u",
        b"\\ud800",
        b"null",
        b"tru",
        b"NaN",
        b"Infinity",
        b"-",
    ),
    *(
        b"1e999",
        b"1" * 5000,
        b"0x1",
        b"\xff",
        b"\xfe\xff",
        b"\xef\xbb\xbf",
        b"\x00",
        b"\xc3",
        b"'",
        b"//",
        b"\n",
    ),
    *(
        b'"cache":',
        b'"model":"m"',
        b'{"cache":{',
        b'"ttl":',
        b"--B",
        b"\r\n\r\n",
        b"Content-Disposition: form-data; name=a",
    ),
]


def value(dice: random.Random, depth: int = 0) -> object:
    roll = dice.random()
    if depth > 3 or roll < 0.3:
        return dice.choice(TEXTS)
    if roll < 0.5:
        return dice.choice(NUMBERS)
    if roll < 0.65:
        return dice.choice([None, True, False, [], {}])
    if roll < 0.8:
        return [value(dice, depth + 1) for _ in range(dice.randrange(4))]
    return {dice.choice(WORDS + TEXTS): value(dice, depth + 1) for _ in range(dice.randrange(4))}


def controls(dice: random.Random) -> object:
    if dice.random() < 0.2:
        return value(dice)
    odd = [*TEXTS, *NUMBERS, None, True, False, [], {}, ["a", 1], [""], "1", "0", "FALSE", "1e5", "1e999", 60]
    return {dice.choice(CONTROLS): dice.choice(odd) for _ in range(dice.randrange(4))}


def odd_object(dice: random.Random) -> dict:
    body = {dice.choice(WORDS): value(dice) for _ in range(dice.randrange(6))}
    if dice.random() < 0.5:
        body["cache"] = controls(dice)
    return body


def text(dice: random.Random, given: object) -> bytes:
    raw = json.dumps(given, ensure_ascii=dice.random() < 0.5, indent=dice.choice([None, None, 1]))
    encoding = dice.choice(["utf-8"] * 8 + ["utf-8-sig", "utf-16", "utf-16-be", "utf-32-le"])
    return raw.encode(encoding, "surrogatepass")


def broken(dice: random.Random, raw: bytes) -> bytes:
    """``raw`` with a few of its bytes changed, taken out, doubled or cut off."""
    for _ in range(dice.randrange(1, 4)):
        at = dice.randrange(len(raw) + 1)
        raw = dice.choice(
            [
                raw[:at],
                raw[at:],
                raw[:at] + raw[at + 1 :],
                raw[:at] + bytes([dice.randrange(256)]) + raw[at + 1 :],
                raw[:at] + dice.choice(PIECES) + raw[at:],
                raw[:at] + raw,
            ]
        )
    return raw


def nested(dice: random.Random) -> bytes:
    """Nested to about as far as the interpreter goes, with or without a ``cache`` to be taken out."""
    depth = dice.choice([10, 100, 400, 500, 900, *range(940, 1010), 5000])
    opening, closing = dice.choice(
        [(b"[", b"]"), (b'{"a":', b"}"), (b'{"cache":', b"}"), (b'{"image_url":[', b"]}")]
    )
    inner = opening * depth + dice.choice([b"", b"1", b"null"]) + closing * depth
    return (
        dice.choice(
            [b"%b", b'{"cache":%b}', b'{"cache":{},"a":%b}', b'{"cache":{"ttl":%b}}', b'{"model":%b}']
        )
        % inner
    )


def form(dice: random.Random) -> bytes:
    names = [
        "name=a",
        'name="file"; filename="x"',
        "name*=utf-8''a",
        "name*0=a; name*1=b",
        "x",
        'name="',
        "name*9=a;name*=b",
    ]
    parts = [
        b"--B\r\nContent-Disposition: form-data; "
        + dice.choice(names).encode()
        + b"\r\n\r\n"
        + dice.choice(PIECES)
        for _ in range(dice.randrange(4))
    ]
    return b"\r\n".join([*parts, b"--B--\r\n"])


def odd_body(dice: random.Random) -> bytes:
    roll = dice.random()
    if roll < 0.45:
        return text(dice, odd_object(dice))
    if roll < 0.6:
        return broken(dice, text(dice, odd_object(dice)))
    if roll < 0.7:
        return b"".join(dice.choice(PIECES) for _ in range(dice.randrange(12)))
    if roll < 0.75:
        return dice.randbytes(dice.randrange(64))
    if roll < 0.8:
        return nested(dice)
    if roll < 0.9:
        return form(dice) if dice.random() < 0.5 else broken(dice, form(dice))
    return text(dice, value(dice))


def odd_header(dice: random.Random) -> str:
    def directive() -> str:
        word = dice.choice(DIRECTIVES)
        number = dice.choice(["0", "5", "-1", "abc", "", '"5"', '"', "1e9", "9" * 40, "\xe9", " 5", "5 5"])
        return word + (dice.choice(["=", " = "]) + number if dice.random() < 0.6 else "")

    return dice.choice([",", ", ", ",,", " ; "]).join(directive() for _ in range(dice.randrange(5)))


def odd_settings(dice: random.Random) -> dict[str, object]:
    return dice.choice(
        [{}, {"image_content": lambda url: None}, {"mode": "default_off"}, {"ignore_fields": ["user"]}]
    )


def checked(cache: CacheManager, body: object, **given: str) -> str:
    """Plan it; how it went."""
    kind = given.pop("kind")
    refusal = None
    try:
        plan = cache.plan(kind, body, **given)
    except InvalidRequestError as exc:
        refusal = exc
    if refusal is not None:
        error = json.loads(refusal.body())["error"]
        assert error["type"] == "invalid_request_error"
        assert error["param"]
        assert error["code"] in ("invalid_cache_control", "unknown_cache_control")
        assert len(refusal.message) < 1000
        return "refused"
    assert plan.bypass in REASONS
    if plan.bypass is not None:
        return "bypassed"
    assert re.fullmatch("llm:[0-9a-f]{64}", plan.key)
    return "planned"


def test_odd_bodies_are_planned_bypassed_or_refused():
    """90 000 bodies as they might come over the network."""
    dice = random.Random(20_240_501)
    caches = [CacheManager(**odd_settings(dice)) for _ in range(8)]
    went = {"planned": 0, "bypassed": 0, "refused": 0}
    for number in range(90_000):
        body = odd_body(dice)
        kind = dice.choice(KINDS)
        given = {"kind": kind, "cache_control": odd_header(dice) if dice.random() < 0.3 else ""}
        if kind == "transcription":
            given["content_type"] = dice.choice(
                ["multipart/form-data; boundary=B", "application/json", "", "x; boundary*=B"]
            )
        if dice.random() < 0.02:
            body, given["content_encoding"] = gzip.compress(body)[: dice.choice([5, None])], "gzip"
        try:
            went[checked(caches[number % 8], body, **given)] += 1
        except Exception as exc:
            exc.add_note(f"body {number}: {body[:200]!r} ({len(body)} bytes), {given}")
            raise
    assert min(went.values()) > 5_000
    assert sum(went.values()) == 90_000


def test_odd_python_values_are_planned_bypassed_or_refused():
    """10 000 requests as an app might make them of its own objects."""
    dice = random.Random(7)
    odd = [
        object(),
        b"x",
        {1: 2},
        {1, 2},
        float("nan"),
        float("inf"),
        10**5000,
        (1, 2),
        print,
        range(3),
        bytearray(b"x"),
    ]
    cache = CacheManager()
    went = {"planned": 0, "bypassed": 0, "refused": 0}
    for _ in range(10_000):
        body = odd_object(dice)
        if dice.random() < 0.3:
            body[dice.choice(WORDS)] = dice.choice(odd)
        if dice.random() < 0.1:
            body["cache"] = {dice.choice(CONTROLS): dice.choice(odd)}
        went[checked(cache, body, kind=dice.choice(KINDS))] += 1
    assert min(went.values()) > 300


@pytest.mark.parametrize("name", ["asgi", "wsgi"])
def test_odd_requests_are_answered(name):
    """1 000 on each front: by the handler with 200, or with a 400 that OpenAI's clients understand."""
    dice = random.Random(f"front {name}")
    host = Host(lambda seen: completion())
    client = (AsgiFront if name == "asgi" else WsgiFront)(
        host, cache=CacheManager(image_content=lambda url: None)
    )
    paths = [
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/responses",
        "/v1/audio/transcriptions",
    ]
    statuses = []

    def request() -> tuple[bytes, str, dict[str, str]]:
        sent = {"authorization": "Bearer " + dice.choice(["", "a", "\xe9"])}
        if dice.random() < 0.3:
            sent["cache-control"] = odd_header(dice).replace("only-if-cached", "no-cache")
        if dice.random() < 0.2:
            sent["content-type"] = dice.choice(
                ["", "multipart/form-data; boundary=B", "multipart/form-data", "\xe9"]
            )
        if dice.random() < 0.1:
            sent["content-encoding"] = dice.choice(["gzip", "br", "identity", "\xe9"])
        return odd_body(dice), dice.choice(paths), sent

    def judge(body: bytes, sent: dict[str, str], reply, called: int) -> None:
        statuses.append(reply.status)
        assert reply.headers["cache-status"].startswith("llm-middleware; ")
        if reply.status == 400:
            error = reply.json()["error"]
            assert {*error} == {"message", "type", "param", "code"}
            assert (error["type"], called) == ("invalid_request_error", 0)
            return
        assert (reply.status, reply.json()) == (200, completion())
        if (
            called
            and b"cache" not in body.replace(b"\0", b"")
            and "gzip" not in sent.get("content-encoding", "")
        ):
            assert host.seen[-1].body == body

    async def over_asgi() -> None:
        for _ in range(1_000):
            body, path, sent = request()
            before = host.calls
            judge(body, sent, await client.apost(body, path, sent), host.calls - before)

    if name == "asgi":
        asyncio.run(over_asgi())
    else:
        for _ in range(1_000):
            body, path, sent = request()
            before = host.calls
            judge(body, sent, client.post(body, path, sent), host.calls - before)
    assert {*statuses} == {200, 400}
    assert statuses.count(400) > 50
    assert statuses.count(200) > 500
