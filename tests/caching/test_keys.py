"""Which requests are the same: cases C1-C21, the canonical form as a property, multipart bodies, splicing."""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import gzip
import io
import json
import random
from collections.abc import Callable
from fractions import Fraction

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_middleware import CacheManager
from llm_middleware.caching import cache_key, entry
from llm_middleware.caching.splice import without_member
from llm_middleware.errors import ConfigError
from tests.support import CHAT, completion

USER = {"role": "user", "content": "hi"}
BODY = {"model": "m", "messages": [USER]}
FORM = "multipart/form-data; boundary=BOUND"

PATHS = {
    "chat": CHAT,
    "text": "/v1/completions",
    "embedding": "/v1/embeddings",
    "transcription": "/v1/audio/transcriptions",
    "responses": "/v1/responses",
}
ANSWERS = {
    "chat": completion(),
    "text": {"object": "text_completion", "choices": [{"index": 0, "text": "x", "finish_reason": "stop"}]},
    "embedding": {"object": "list", "data": [{"index": 0, "embedding": [0.5]}]},
    "transcription": {"text": "spoken"},
    "responses": {
        "status": "completed",
        "output": [{"type": "message", "content": [{"type": "text", "text": "x"}]}],
    },
    "json": {"any": "thing"},
}


class Upstream:
    """Counts the calls it answers; each answer is another one."""

    def __init__(self, kind: str = "chat") -> None:
        self.kind = kind
        self.calls = 0

    def __call__(self, asked: object) -> dict:
        self.calls += 1
        answer = {**ANSWERS[self.kind], "call": self.calls}
        if self.kind == "embedding":
            wanted = (asked if isinstance(asked, dict) else asked.json())["input"]
            count = len(wanted) if isinstance(wanted, list) and isinstance(wanted[0], str) else 1
            answer["data"] = [{"index": index, "embedding": [0.5]} for index in range(count)]
        return answer


class Ways:
    """A request made through a face or a front, to one cache and one upstream."""

    def __init__(self, name: str, face, front) -> None:
        self.name = name
        self._face = face
        self._front = front

    def __call__(self, cache: CacheManager, kind: str = "chat") -> Callable[..., tuple[str, object]]:
        """``ask(body)``: what the cache did, and which call's answer it was."""
        upstream = Upstream(kind)
        if self._front is not None:
            client = self._front(upstream, cache=cache)

            def ask(body: object, **headers: str) -> tuple[str, object]:
                sent = {name.replace("_", "-"): value for name, value in headers.items()}
                reply = client.post(body, PATHS[kind], sent)
                return reply.cache, reply.json()["call"]
        else:

            def ask(body: object, **_: str) -> tuple[str, object]:
                answer = self._face.fetch(cache, body, upstream, kind=kind)
                return answer.cache.status, answer.json()["call"]

        return ask


@pytest.fixture(params=["sync", "async", "asgi", "wsgi"])
def way(request) -> Ways:
    """Both faces and both fronts."""
    from tests.support import AsgiFront, AsyncFace, Host, SyncFace, WsgiFront

    if request.param in ("asgi", "wsgi"):
        kind = AsgiFront if request.param == "asgi" else WsgiFront
        yield Ways(request.param, None, lambda handler, **options: kind(Host(handler), **options))
        return
    face = SyncFace() if request.param == "sync" else AsyncFace()
    yield Ways(request.param, face, None)
    face.close()


def key_of(body: object, kind: str = "chat", **options: object) -> str:
    plan = CacheManager().plan(kind, body, **options)
    assert plan.bypass is None
    return plan.digest


def chat(**changes: object) -> dict:
    return {**BODY, **changes}


SAME = {
    "C1 twice": (b'{"model":"m","messages":[]}', b'{"model":"m","messages":[]}'),
    "C1 white space": (b'{"model":"m","messages":[]}', b' {\n"model" : "m",\t"messages": [ ]}\r\n'),
    "C2 top-level order": (
        b'{"model":"m","max_tokens":5,"temperature":1}',
        b'{"temperature":1,"max_tokens":5,"model":"m"}',
    ),
    "C3 order in a message": (
        b'{"messages":[{"role":"user","content":"hi"}]}',
        b'{"messages":[{"content":"hi","role":"user"}]}',
    ),
    "C4 0 and 0.0": (b'{"model":"m","temperature":0}', b'{"model":"m","temperature":0.0}'),
    "C4 1 and 1e0": (b'{"model":"m","temperature":1}', b'{"model":"m","temperature":1e0}'),
    "C4 0 and -0.0": (b'{"model":"m","temperature":0}', b'{"model":"m","temperature":-0.0}'),
    "C4 exponents": (b'{"model":"m","seed":10000000000000000000000}', b'{"model":"m","seed":1E+22}'),
    "C5 n": (b'{"model":"m"}', b'{"model":"m","n":1}'),
    "C5 n as a float": (b'{"model":"m"}', b'{"model":"m","n":1.0}'),
    "C5 tools": (b'{"model":"m"}', b'{"model":"m","tools":[]}'),
    "C5 functions": (b'{"model":"m"}', b'{"model":"m","functions":[]}'),
    "C5 stop": (b'{"model":"m"}', b'{"model":"m","stop":[]}'),
    "C5 logit_bias": (b'{"model":"m"}', b'{"model":"m","logit_bias":{}}'),
    "C5 logprobs": (b'{"model":"m"}', b'{"model":"m","logprobs":false}'),
    "C5 penalties": (b'{"model":"m"}', b'{"model":"m","frequency_penalty":0.0,"presence_penalty":0}'),
    "C5 response_format": (b'{"model":"m"}', b'{"model":"m","response_format":{"type":"text"}}'),
    "C5 null": (b'{"model":"m"}', b'{"model":"m","temperature":null,"tools":null}'),
    "C5 stream false": (b'{"model":"m"}', b'{"model":"m","stream":false}'),
    "C12 metadata": (b'{"model":"m","metadata":{"trace":"1"}}', b'{"model":"m","metadata":{"trace":"2"}}'),
    "escapes": ('{"model":"é😀"}'.encode(), b'{"model":"\\u00e9\\uD83D\\ude00"}'),
    "a byte order mark": (b'{"model":"m"}', b'\xef\xbb\xbf{"model":"m"}'),
    "UTF-16": (b'{"model":"m"}', '{"model":"m"}'.encode("utf-16")),
}

DIFFERENT = {
    "C6 separators": (
        b'{"model":"m","user":"bob","temperature":0.5}',
        b'{"model":"m","user":"bobtemperature: 0.5"}',
    ),
    "C6 quotes": (b'{"model":"m","user":"a\\",\\"b"}', b'{"model":"m","user":"a","b":1}'),
    "C8 seed": (b'{"model":"m","seed":1}', b'{"model":"m","seed":"1"}'),
    "C8 true is not 1": (b'{"model":"m","logprobs":true}', b'{"model":"m","logprobs":1}'),
    "C8 false is not 0": (b'{"model":"m","x":false}', b'{"model":"m","x":0}'),
    "C8 n true is not the default": (b'{"model":"m"}', b'{"model":"m","n":true}'),
    "C8 a penalty of false is not the default": (b'{"model":"m"}', b'{"model":"m","presence_penalty":false}'),
    "C9 min_p": (b'{"model":"m","min_p":0.1}', b'{"model":"m","min_p":0.2}'),
    "C9 chat_template_kwargs": (
        b'{"model":"m","chat_template_kwargs":{"thinking":true}}',
        b'{"model":"m","chat_template_kwargs":{"thinking":false}}',
    ),
    "C9 extra_body": (b'{"model":"m","extra_body":{"a":1}}', b'{"model":"m","extra_body":{"a":2}}'),
    "C9 present or not": (b'{"model":"m"}', b'{"model":"m","min_p":0}'),
    "C10 model": (b'{"model":"m"}', b'{"model":"m2"}'),
    "C11 user": (b'{"model":"m","user":"a"}', b'{"model":"m","user":"b"}'),
    "order of messages": (
        b'{"messages":[{"role":"user","content":"a"},{"role":"user","content":"b"}]}',
        b'{"messages":[{"role":"user","content":"b"},{"role":"user","content":"a"}]}',
    ),
    "null inside": (b'{"model":"m","x":{"a":null}}', b'{"model":"m","x":{}}'),
    "n": (b'{"model":"m"}', b'{"model":"m","n":2}'),
    "an ignored name further inside": (
        b'{"messages":[{"metadata":1}],"x":{"stream":true}}',
        b'{"messages":[{"metadata":2}],"x":{"stream":true}}',
    ),
    "big integers": (b'{"seed":9007199254740993}', b'{"seed":9007199254740992}'),
    "Unicode normal forms": ('{"model":"é"}'.encode(), '{"model":"e\u0301"}'.encode()),
    "a lone surrogate": (b'{"model":"\\ud800"}', b'{"model":"\\ud801"}'),
}


@pytest.mark.parametrize("bodies", SAME.values(), ids=SAME)
def test_same_requests_hit(way, bodies):
    """C1-C5, C12: the second is a hit, with one upstream call."""
    ask = way(CacheManager())
    assert [ask(body) for body in bodies] == [("miss", 1), ("hit", 1)]


@pytest.mark.parametrize("bodies", DIFFERENT.values(), ids=DIFFERENT)
def test_different_requests_miss(way, bodies):
    """C6, C8-C11: two keys, two calls."""
    ask = way(CacheManager())
    assert [ask(body) for body in bodies] == [("miss", 1), ("miss", 2)]
    assert key_of(bodies[0]) != key_of(bodies[1])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["a", "b"], "['a', 'b']"),
        (["a", "b"], '["a", "b"]'),
        ([1, 2], ["1", "2"]),
    ],
)
def test_c07_a_list_is_not_its_text(way, one, other):
    ask = way(CacheManager(), "embedding")
    assert ask({"model": "e", "input": one}) == ("miss", 1)
    assert ask({"model": "e", "input": other}) == ("miss", 2)
    assert ask({"model": "e", "input": one}) == ("hit", 1)


def test_c05_a_default_belongs_to_its_endpoint():
    assert key_of({"model": "m", "encoding_format": "float"}, "embedding") == key_of(
        {"model": "m"}, "embedding"
    )
    assert key_of({"model": "m", "encoding_format": "float"}) != key_of({"model": "m"})
    assert key_of({"x": 1, "n": 1}, "json") != key_of({"x": 1}, "json")
    assert key_of({"x": 1, "y": None}, "json") != key_of({"x": 1}, "json")
    assert key_of({"x": 1, "metadata": {}}, "json") != key_of({"x": 1}, "json")


def test_kinds_never_share_a_key():
    kinds = ("chat", "text", "embedding", "responses", "messages", "json")
    assert len({key_of(b'{"model":"m"}', kind) for kind in kinds}) == 6


def test_routes_of_ones_own_never_share_an_answer(front):
    """Two handlers of the host take the same body: each has its own answers."""
    client = front(
        lambda seen: {"by": seen.path}, cache=CacheManager(), routes={"/sum": "json", "/turn": "json"}
    )
    assert client.post({"text": "x"}, "/sum").json() == {"by": "/sum"}
    assert client.post({"text": "x"}, "/turn").json() == {"by": "/turn"}
    assert client.post({"text": "x"}, "/sum").cache == "hit"


def test_the_same_endpoint_with_and_without_v1_shares_answers(front):
    client = front(lambda seen: completion(), cache=CacheManager())
    assert client.post(BODY, "/v1/chat/completions").cache == "miss"
    assert client.post(BODY, "/chat/completions").cache == "hit"


def test_c11_ignored_fields(way):
    ask = way(CacheManager(ignore_fields=["user"]))
    assert ask(chat(user="a")) == ("miss", 1)
    assert ask(chat(user="b")) == ("hit", 1)
    assert ask(BODY) == ("hit", 1)
    assert ask(chat(messages=[{**USER, "user": "b"}])) == ("miss", 2)


# --- C13: Python values


def models(field: type) -> type[pydantic.BaseModel]:
    return pydantic.create_model("Reply", value=(field, ...))


def test_c13_response_formats_of_one_name_and_another_schema(face):
    cache, upstream = CacheManager(), Upstream()
    one, other, again = models(int), models(str), models(int)
    told = [
        face.fetch(cache, chat(response_format=model), upstream).cache.status for model in (one, other, again)
    ]
    assert told == ["miss", "miss", "hit"]
    assert upstream.calls == 2


def test_python_values_have_the_key_of_their_json():
    class Message(pydantic.BaseModel):
        role: str
        content: str

    @dataclasses.dataclass
    class Plain:
        role: str
        content: str

    class Role(enum.StrEnum):
        USER = "user"

    class Seed(enum.IntEnum):
        ONE = 1

    expected = key_of(json.dumps(chat(seed=1)).encode())
    for message in (Message(**USER), Plain(**USER), {"role": Role.USER, "content": "hi"}):
        assert key_of(chat(messages=(message,), seed=Seed.ONE)) == expected


def test_an_enumeration_of_strings_counts_by_its_values():
    def model(value: str) -> enum.Enum:
        return enum.Enum("Model", {"BEST": value}, type=str).BEST

    assert json.dumps(model("a")) == '"a"'
    assert key_of({"model": model("a")}) == key_of({"model": "a"})
    assert key_of({"model": model("a")}) != key_of({"model": model("b")})


@pytest.mark.parametrize("value", [object(), float("nan"), float("inf"), {1: 2}, {"a": {object()}}, print])
def test_a_value_without_a_json_form_is_served_uncached(face, value):
    cache, upstream = CacheManager(), Upstream()
    for call in (1, 2):
        answer = face.fetch(cache, chat(x=value), upstream)
        assert (answer.cache.status, answer.cache.detail) == ("bypass", "unparsable-body")
        assert answer.json()["call"] == call


def test_a_value_that_contains_itself_is_served_uncached(face):
    body = chat()
    body["body"] = body
    answer = face.fetch(CacheManager(), body, Upstream())
    assert (answer.cache.status, answer.cache.detail) == ("bypass", "unparsable-body")


# --- C14-C16: uploads


def multipart(*parts: tuple[str, bytes], boundary: str = "BOUND") -> bytes:
    """Parts: what follows ``form-data;`` in the disposition, and the content."""
    out = []
    for disposition, content in parts:
        out.append(
            f"--{boundary}\r\nContent-Disposition: form-data; {disposition}\r\n\r\n".encode() + content
        )
    return b"\r\n".join([*out, f"--{boundary}--\r\n".encode()])


def upload(content: bytes = b"\x00RIFF\xff", file: str = "a.wav", **fields: str) -> bytes:
    texts = [(f'name="{name}"', value.encode()) for name, value in {"model": "whisper", **fields}.items()]
    return multipart(*texts, (f'name="file"; filename="{file}"', content))


def spoken(front, **options: object):
    upstream = Upstream("transcription")
    client = front(upstream, cache=CacheManager(**options))
    return lambda body, kind=FORM: client.post(body, PATHS["transcription"], {"content-type": kind})


UPLOADS = {
    "C14 other file name": (upload(file="b.wav"), "hit"),
    "C14 other boundary": (upload().replace(b"BOUND", b"OTHER"), "hit"),
    "C14 order of fields": (
        multipart(('name="file"; filename="a.wav"', b"\x00RIFF\xff"), ('name="model"', b"whisper")),
        "hit",
    ),
    "C14 unquoted": (upload().replace(b'name="model"', b"name=model"), "hit"),
    "C14 a content type": (
        upload().replace(b'filename="a.wav"', b'filename="a.wav"\r\nContent-Type: audio/wav'),
        "hit",
    ),
    "C15 other bytes": (upload(b"\x00RIFF\xfe"), "miss"),
    "C15 no bytes": (upload(b""), "miss"),
    "C15 longer by a line end": (upload(b"\x00RIFF\xff\r\n"), "miss"),
    "C16 language": (upload(language="de"), "miss"),
    "C16 prompt": (upload(prompt="x"), "miss"),
    "C16 response_format": (upload(response_format="srt"), "miss"),
    "C16 the default response_format": (upload(response_format="json"), "hit"),
    "C16 model": (upload(model="whisper-2"), "miss"),
}


@pytest.mark.parametrize("case", UPLOADS.values(), ids=UPLOADS)
def test_c14_c15_c16_uploads(front, case):
    second, expected = case
    ask = spoken(front)
    assert ask(upload()).cache == "miss"
    kind = FORM.replace("BOUND", "OTHER") if b"OTHER" in second else FORM
    assert ask(second, kind).cache == expected


def test_c14_uploads_of_python_values(face):
    cache, upstream = CacheManager(), Upstream("transcription")

    def ask(file: object, **fields: object) -> str:
        body = {"model": "whisper", "file": file, **fields}
        return face.fetch(cache, body, upstream, kind="transcription").cache.status

    assert ask(b"audio") == "miss"
    assert [ask(bytearray(b"audio")), ask(memoryview(b"audio")), ask(io.BytesIO(b"audio"))] == ["hit"] * 3
    named = io.BytesIO(b"audio")
    named.name = "other.wav"
    assert ask(named) == "hit"
    assert named.read() == b"audio"
    assert ask(b"Audio") == "miss"
    assert ask(b"audio", language="de") == "miss"
    assert ask(b"audio", response_format="text") == "miss"
    assert ask(b"audio", response_format="json") == "hit"
    assert ask("audio") == "miss"


def test_c14_the_name_in_a_file_tuple_does_not_count(face):
    """OpenAI's SDK takes ``file=(name, bytes, content type)``."""
    cache, upstream = CacheManager(), Upstream("transcription")

    def ask(*file: object) -> str:
        return face.fetch(cache, {"model": "w", "file": file}, upstream, kind="transcription").cache.status

    assert ask("a.wav", b"audio", "audio/wav") == "miss"
    assert ask("b.wav", b"audio", "audio/wav") == "hit"
    assert ask("a.wav", b"other", "audio/wav") == "miss"


class Pipe(io.RawIOBase):
    """A file that can be read once only."""

    def readable(self) -> bool:
        return True

    def readall(self) -> bytes:
        return b"audio"


@pytest.mark.parametrize("file", [Pipe, lambda: io.StringIO("text")], ids=["a pipe", "a text file"])
def test_a_file_that_cannot_be_keyed_is_served(face, file):
    answer = face.fetch(
        CacheManager(), {"model": "w", "file": file()}, Upstream("transcription"), kind="transcription"
    )
    assert answer.json()["call"] == 1


def test_a_closed_file_is_left_to_the_call(face):
    closed = io.BytesIO(b"audio")
    closed.close()
    answer = face.fetch(
        CacheManager(), {"model": "w", "file": closed}, Upstream("transcription"), kind="transcription"
    )
    assert answer.json()["call"] == 1


NOT_UNDERSTOOD = {
    "no boundary": (upload(), "multipart/form-data"),
    "an empty boundary": (upload(), 'multipart/form-data; boundary=""'),
    "another boundary": (upload(), "multipart/form-data; boundary=ELSE"),
    "another type": (upload(), "application/x-www-form-urlencoded"),
    "no type": (upload(), ""),
    "no end": (upload()[: -len(b"--BOUND--\r\n")], FORM),
    "a preamble": (b"hello\r\n" + upload(), FORM),
    "empty": (b"", FORM),
    "only the end": (b"--BOUND--", "multipart/mixed; boundary=BOUND"),
    "no name": (multipart(("x=1", b"y")), FORM),
    "no blank line": (b'--BOUND\r\nContent-Disposition: form-data; name="a"\r\n--BOUND--\r\n', FORM),
    "a header without a colon": (b"--BOUND\r\nContent-Disposition\r\n\r\nx\r\n--BOUND--\r\n", FORM),
    "the boundary as a prefix": (upload(b"x\r\n--BOUNDARY\r\ny"), FORM),
    "parts after the end": (upload() + upload(), FORM),
    "an encoded name in pieces": (multipart(("name*=utf-8''a; name*0=b", b"x")), FORM),
    "a name in very many pieces": (multipart((f"name*{'9' * 5000}=b", b"x")), FORM),
    "a boundary in pieces": (upload(), "multipart/form-data; boundary*=x; boundary*0=y"),
    "only odd bytes": (bytes(range(256)), FORM),
}


@pytest.mark.parametrize("case", NOT_UNDERSTOOD.values(), ids=NOT_UNDERSTOOD)
def test_a_form_that_is_not_understood_passes_untouched(front, case):
    body, kind = case
    seen = []

    def handler(request):
        seen.append(request.body)
        return {"text": "spoken"}

    client = front(handler, cache=CacheManager())
    reply = client.post(body, PATHS["transcription"], {"content-type": kind})
    assert reply.json() == {"text": "spoken"}
    assert reply.cache_status == "llm-middleware; fwd=bypass; detail=unparsable-body"
    assert seen == [body]


@given(st.binary(max_size=60), st.binary(max_size=60), st.text(max_size=20))
@settings(max_examples=200, deadline=None)
def test_any_form_has_a_key_or_passes(disposition, content, boundary):
    """Whatever the bytes and headers, planning does not raise."""
    head = b"Content-Disposition: form-data; " + disposition
    body = (
        b"--"
        + boundary.encode()
        + b"\r\n"
        + head
        + b"\r\n\r\n"
        + content
        + b"\r\n--"
        + boundary.encode()
        + b"--"
    )
    kind = f"multipart/form-data; boundary={boundary}"
    plan = CacheManager().plan("transcription", body, content_type=kind)
    assert plan.bypass in (None, "unparsable-body")


@given(
    st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), st.booleans(), st.binary(max_size=8)), max_size=4),
    st.data(),
)
@settings(max_examples=200, deadline=None)
def test_forms_are_the_same_when_their_parts_are(parts, data):
    """Parts of one name in order; a text is not a file of the same bytes."""
    other = data.draw(
        st.one_of(
            st.permutations(parts),
            st.lists(
                st.tuples(st.sampled_from(["a", "b", "c"]), st.booleans(), st.binary(max_size=8)), max_size=4
            ),
        )
    )

    def grouped(given_parts):
        groups: dict[str, list] = {}
        for name, is_file, content in given_parts:
            groups.setdefault(name, []).append((is_file, content))
        return groups

    def key(given_parts) -> str:
        raw = multipart(
            *(
                (f'name="{name}"' + ('; filename="f"' if is_file else ""), content)
                for name, is_file, content in given_parts
            )
        )
        raw = (
            raw
            if given_parts
            else b"--BOUND\r\n" + b'Content-Disposition: form-data; name="z"\r\n\r\n\r\n' + raw
        )
        return key_of(raw, "transcription", content_type=FORM)

    assert (key(parts) == key(other)) == (grouped(parts) == grouped(other))


# --- C17: a key function of one's own


@pytest.mark.parametrize("how", ["setting", "attribute", "update"])
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_c17_a_key_function(way, how, kind):
    given_to = []

    def by_model(kind: str, form: dict) -> str:
        given_to.append((kind, form))
        return str(form["model"])

    async def aby_model(kind: str, form: dict) -> str:
        if way.name in ("async", "asgi"):
            await asyncio.sleep(0)
        return by_model(kind, form)

    function = by_model if kind == "sync" else aby_model
    cache = CacheManager(key=function) if how == "setting" else CacheManager()
    ask = way(cache)
    if how == "attribute":
        cache.get_cache_key = function
    elif how == "update":
        cache.update(key=function)
    assert ask(chat(messages=[], stream=False)) == ("miss", 1)
    assert ask(chat(messages=[USER])) == ("hit", 1)
    assert ask(chat(model="other")) == ("miss", 2)
    assert given_to == [
        ("chat", {"model": "m", "messages": []}),
        ("chat", {"model": "m", "messages": [USER]}),
        ("chat", {"model": "other", "messages": [USER]}),
    ]


def test_c17_a_custom_key_stays_in_its_scope_namespace_and_kind(face):
    cache = CacheManager(key=lambda kind, form: "one for all")
    upstream = Upstream()
    options = [{}, {"scope": "a"}, {"scope": "b"}, {"controls": {"namespace": "n"}}, {"kind": "responses"}]
    told = [face.fetch(cache, BODY, upstream, **given_options).cache.key for given_options in options]
    assert len(set(told)) == 5
    assert "one for all" not in "".join(told)


@pytest.mark.parametrize(
    "key", [lambda kind, form: 1 / 0, lambda kind, form: None, lambda kind, form: "", lambda: "x"]
)
def test_c17_a_key_function_that_fails_bypasses(way, key):
    ask = way(CacheManager(key=key))
    assert [ask(BODY), ask(BODY)] == [("bypass", 1), ("bypass", 2)]


def test_c17_the_reason_code(front):
    client = front(lambda seen: completion(), cache=CacheManager(key=lambda kind, form: 1 / 0))
    assert client.post(BODY).cache_status == "llm-middleware; fwd=bypass; detail=key-failed"


# --- C18: functions of one's own


class Kept:
    """What a pair of functions of the host's keeps."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.ttls: list[float | None] = []

    def get(self, key: str) -> bytes | None:
        return self.values.get(key)

    def add(self, key: str, value: bytes, ttl: float | None) -> None:
        self.values[key] = value
        self.ttls.append(ttl)

    def functions(self, kind: str) -> dict[str, Callable]:
        if kind == "sync":
            return {"get_cache": self.get, "add_cache": self.add}

        async def aget(key: str) -> bytes | None:
            return self.get(key)

        async def aadd(key: str, value: bytes, ttl: float | None) -> None:
            self.add(key, value, ttl)

        return {"get_cache": aget, "add_cache": aadd}


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_c18_functions_given(way, kind):
    kept = Kept()
    cache = CacheManager(ttl=60, ttl_jitter=0, **kept.functions(kind))
    ask = way(cache)
    assert [ask(BODY), ask(BODY)] == [("miss", 1), ("hit", 1)]
    (stored,) = kept.values
    assert stored.startswith("llm:")
    assert len(stored) == 4 + 64
    assert type(kept.values[stored]) is bytes
    assert kept.ttls == [60.0]


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_c18_functions_replaced(way, kind):
    first, second = Kept(), Kept()
    cache = CacheManager(**first.functions(kind))
    ask = way(cache)
    assert ask(BODY) == ("miss", 1)
    for name, function in second.functions(kind).items():
        setattr(cache, name, function)
    assert [ask(BODY), ask(BODY)] == [("miss", 2), ("hit", 2)]
    assert (len(first.values), len(second.values)) == (1, 1)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_c18_functions_set_on_a_plain_manager(way, kind):
    """``cache.get_cache = ...`` and ``cache.add_cache = ...``, as LiteLLM's users write it."""
    kept, cache = Kept(), CacheManager()
    for name, function in kept.functions(kind).items():
        setattr(cache, name, function)
    ask = way(cache)
    assert [ask(BODY), ask(BODY)] == [("miss", 1), ("hit", 1)]
    assert len(kept.values) == 1


@pytest.mark.parametrize("name", ["get_cache", "add_cache"])
def test_c18_a_function_that_fails_is_a_miss(way, name):
    kept = Kept()
    functions = kept.functions("sync") | {name: lambda *args: 1 / 0}
    ask = way(CacheManager(**functions))
    assert [ask(BODY), ask(BODY)] == [("miss", 1), ("miss", 2)]


def test_c18_one_function_alone(way):
    kept = Kept()
    ask = way(CacheManager(add_cache=kept.add))
    assert [ask(BODY), ask(BODY)] == [("miss", 1), ("miss", 2)]
    ask = way(CacheManager(get_cache=kept.get))
    assert ask(BODY)[0] == "hit"


# --- C19: versions


def test_c19_a_new_form_version_never_reads_old_entries(way, tmp_path, monkeypatch):
    def ask() -> str:
        cache = CacheManager("disk", disk_cache_dir=tmp_path)
        told = way(cache)(BODY)[0]
        cache.close()
        return told

    assert [ask(), ask()] == ["miss", "hit"]
    monkeypatch.setattr(cache_key, "FORM_VERSION", b"v2")
    assert [ask(), ask()] == ["miss", "hit"]
    monkeypatch.undo()
    assert ask() == "hit"


def test_c19_a_new_entry_version_never_reads_old_entries(way, monkeypatch):
    kept = Kept()
    cache = CacheManager(get_cache=kept.get, add_cache=kept.add)
    ask = way(cache)
    assert ask(BODY) == ("miss", 1)
    monkeypatch.setattr(entry, "VERSION", 2)
    assert [ask(BODY), ask(BODY)] == [("miss", 2), ("hit", 2)]


def test_c20_a_megabyte_of_prompt(way):
    ask = way(CacheManager())
    body = chat(messages=[{"role": "user", "content": "é\n" * 500_000}])
    assert [ask(body), ask(body)] == [("miss", 1), ("hit", 1)]
    assert ask(chat(messages=[{"role": "user", "content": "é\n" * 499_999 + "e\n"}])) == ("miss", 2)


def test_c20_a_body_that_comes_again_is_not_parsed_again(front, monkeypatch):
    parsed = []
    parse = cache_key.parse
    monkeypatch.setattr(cache_key, "parse", lambda body: parsed.append(body) or parse(body))
    client = front(lambda seen: completion(), cache=CacheManager())
    replies = [client.post(BODY).cache for _ in range(5)]
    assert replies == ["miss", "hit", "hit", "hit", "hit"]
    assert len(parsed) == 1


# --- C21: images


def picture(url: str, **more: object) -> dict:
    return chat(
        messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url, **more}}]}]
    )


DATA_URL = "data:image/png;base64,UE5H"
STORED = {"https://s3/a?sig=1": b"PNG", "https://s3/a?sig=2": b"PNG", "https://s3/b?sig=1": b"GIF"}


def test_c21_images_by_content(way):
    ask = way(CacheManager(image_content=STORED.get))
    assert ask(picture(DATA_URL)) == ("miss", 1)
    assert ask(picture("data:image/png,PNG")) == ("hit", 1)
    assert ask(picture("https://s3/a?sig=1")) == ("hit", 1)
    assert ask(picture("https://s3/a?sig=2")) == ("hit", 1)
    assert ask(picture("https://s3/b?sig=1")) == ("miss", 2)
    assert ask(picture(DATA_URL, detail="high")) == ("miss", 3)
    assert ask(picture("https://elsewhere/a")) == ("miss", 4)
    assert ask(picture("https://elsewhere/b")) == ("miss", 5)
    assert ask(picture("data:no comma")) == ("miss", 6)


def test_c21_images_by_url_by_default(way):
    ask = way(CacheManager())
    assert ask(picture("https://s3/a?sig=1")) == ("miss", 1)
    assert ask(picture("https://s3/a?sig=2")) == ("miss", 2)
    assert ask(picture(DATA_URL)) == ("miss", 3)
    assert ask(picture(DATA_URL)) == ("hit", 3)


def test_c21_images_by_a_name(way):
    ask = way(CacheManager(image_content=lambda url: url.partition("?")[0]))
    assert ask(picture("https://s3/a?sig=1")) == ("miss", 1)
    assert ask(picture("https://s3/a?sig=2")) == ("hit", 1)
    assert ask(picture("https://s3/b?sig=2")) == ("miss", 2)


def test_c21_images_of_a_responses_request():
    def key(url: str) -> str:
        item = {"role": "user", "content": [{"type": "input_image", "image_url": url}]}
        return CacheManager(image_content=STORED.get).plan("responses", {"model": "m", "input": [item]}).key

    assert key(DATA_URL) == key("https://s3/a?sig=1") != key("https://s3/b?sig=1")


def test_c21_a_function_that_fails_does_not_fail_the_request(way):
    ask = way(CacheManager(image_content=lambda url: 1 / 0))
    assert ask(picture("https://s3/a"))[1] == 1
    assert ask(picture("https://s3/b"))[1] == 2


def test_c21_a_deeply_nested_body_does_not_fail_the_request(way):
    ask = way(CacheManager(image_content=STORED.get))
    assert ask(b'{"model":"m","x":' + b"[" * 600 + b"]" * 600 + b"}")[1] == 1


# --- the key itself


def test_a_key_is_64_hex_digits_behind_the_namespace():
    plan = CacheManager(namespace="shop").plan("chat", BODY)
    assert plan.key == f"shop:{plan.digest}"
    assert len(bytes.fromhex(plan.digest)) == 32


def test_parts_of_a_key_do_not_run_into_each_other():
    def key(namespace: str, scope: str, inner: str | None) -> str:
        cache = CacheManager(namespace=namespace)
        return cache.plan("chat", chat(cache={"namespace": inner}), scope=scope).digest

    places = [("a", "b", "c"), ("ab", "c", None), ("a", "bc", None), ("a", "", "bc"), ("abc", "", None)]
    assert len({key(*place) for place in places}) == 5


def test_a_secret_changes_every_key():
    keys = {CacheManager(secret=secret).plan("chat", BODY).digest for secret in (None, "one", "two")}
    assert len(keys) == 3
    assert CacheManager(secret=b"one").plan("chat", BODY).digest in keys


def test_a_compressed_body_has_the_key_of_its_content():
    raw = json.dumps(BODY).encode()
    assert key_of(gzip.compress(raw), content_encoding="gzip") == key_of(raw)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"nul", b"\xff\xfe", b'{"a":NaN}', b'{"a":1e999}', b'{"a":-Infinity}', b"[]", b"1"]
)
def test_what_is_no_json_object_has_no_key(way, body):
    ask = way(CacheManager())
    assert [ask(body), ask(body)] == [("bypass", 1), ("bypass", 2)]


def test_any_json_value_has_a_key_where_the_handler_is_opaque():
    bodies = [b"[]", b"1", b'"1"', b"null", b"{}", b"true"]
    assert len({key_of(body, "json") for body in bodies}) == 6


# --- the canonical form, as a property

SCALARS = [
    *(0, 1, -1, 2, 10, 10**22, 10**22 + 1, 2**53, 2**53 + 1, -(10**30)),
    *(0.0, -0.0, 1.0, 0.1, 0.5, 1e22, -1.5, 1e-7, 5e-324, 1.7976931348623157e308, float(2**53)),
    *(True, False, None),
    *(
        "",
        "0",
        "1",
        "1.0",
        "true",
        "null",
        "a",
        "A",
        "é",
        "e\u0301",
        "😀",
        "\u2028",
        '"',
        "\\",
        "\x00",
        "/",
        "\ud800",
    ),
    *({"type": "text"}, {"type": "json_object"}, [], {}),
]
NAMES = [
    *(
        "model",
        "n",
        "tools",
        "stop",
        "stream",
        "stream_options",
        "metadata",
        "user",
        "logprobs",
        "logit_bias",
    ),
    *("frequency_penalty", "response_format", "é", "", "a", "A"),
]
VALUES = st.recursive(
    st.sampled_from(SCALARS)
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=8,
)
BODIES = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=6)


def spell(value: object, dice: random.Random) -> str:
    """``value`` as JSON text, in one of its many spellings."""

    def space() -> str:
        return dice.choice(["", "", " ", "\n\t", "\r\n"])

    if isinstance(value, str):
        return '"' + "".join(_spell_char(char, dice) for char in value) + '"'
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, (int, float)):
        return _spell_number(value, dice)
    if isinstance(value, list):
        return "[" + space() + ",".join(space() + spell(item, dice) + space() for item in value) + "]"
    members = [*value.items()]
    dice.shuffle(members)
    pairs = (
        f"{space()}{spell(name, dice)}{space()}:{space()}{spell(item, dice)}{space()}"
        for name, item in members
    )
    return "{" + space() + ",".join(pairs) + "}" + space()


def _spell_char(char: str, dice: random.Random) -> str:
    code = ord(char)
    must = code < 0x20 or char in '"\\' or 0xD800 <= code < 0xE000
    if not must and dice.random() < 0.6:
        return "\\/" if char == "/" and dice.random() < 0.5 else char
    units = char.encode("utf-16-be", "surrogatepass")
    digits = [f"{(units[at] << 8) + units[at + 1]:04x}" for at in range(0, len(units), 2)]
    return "".join("\\u" + dice.choice([unit, unit.upper()]) for unit in digits)


def _spell_number(value: float, dice: random.Random) -> str:
    if isinstance(value, float):
        plain = repr(value)
        return dice.choice(
            [plain, plain.upper(), plain if "e" in plain else plain + "00", plain.replace("e-", "e-0")]
        )
    if abs(value) > 2**53:
        return str(value)
    sign = "-" if value == 0 and dice.random() < 0.3 else ""
    return sign + dice.choice([f"{value}", f"{value}.0", f"{value}e0", f"{value}.00E+00", f"{value * 10}e-1"])


def nearly(value: object, dice: random.Random) -> object:
    """``value``, changed in one place or not at all."""
    if isinstance(value, dict) and value and dice.random() < 0.7:
        name = dice.choice([*value])
        return {**value, name: nearly(value[name], dice)}
    if isinstance(value, list) and value and dice.random() < 0.7:
        at = dice.randrange(len(value))
        return [*value[:at], nearly(value[at], dice), *value[at + 1 :]]
    changes: list[object] = [value, [value], str(value), dice.choice(SCALARS)]
    if isinstance(value, bool):
        changes += [int(value)]
    elif isinstance(value, (int, float)):
        changes += [
            value == 1,
            value + 1,
            -value,
            int(value),
            *([] if abs(value) > 1e300 else [float(value)]),
        ]
    elif isinstance(value, list):
        changes += [value[::-1], [*value, None], value[:-1]]
    elif isinstance(value, dict):
        changes += [{**value, dice.choice(NAMES): dice.choice(SCALARS)}, dict([*value.items()][1:])]
    return dice.choice(changes)


def understood(text: str) -> object:
    """The JSON value, numbers exact: an integer is what it says, all others are the double that is meant."""
    return json.loads(text, parse_int=Fraction, parse_float=lambda number: Fraction(float(number)))


IGNORED = {"cache", "stream", "stream_options", "metadata"}
DEFAULTS = understood(
    '{"n":1,"tools":[],"functions":[],"stop":[],"logprobs":false,"logit_bias":{},'
    '"frequency_penalty":0,"presence_penalty":0,"response_format":{"type":"text"}}'
)


def same(one: object, other: object) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def counted(text: str) -> dict:
    return {
        name: value
        for name, value in understood(text).items()
        if name not in IGNORED
        and value is not None
        and not (name in DEFAULTS and same(value, DEFAULTS[name]))
    }


@given(BODIES, st.integers(0, 2**32))
@settings(max_examples=1000, deadline=None)
def test_keys_are_equal_exactly_where_the_bodies_are(body, seed):
    dice = random.Random(seed)
    near = nearly(body, dice)
    near = near if isinstance(near, dict) else body
    one, other = spell(body, dice), spell(near, dice)
    assert (key_of(one.encode()) == key_of(other.encode())) == same(counted(one), counted(other))


@given(BODIES, st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_a_python_value_has_the_key_of_each_of_its_spellings(body, seed):
    assert key_of(body) == key_of(spell(body, random.Random(seed)).encode())


@given(st.lists(BODIES, max_size=6), st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_an_opaque_body_keeps_every_field_and_default(bodies, seed):
    dice = random.Random(seed)
    texts = [spell(body, dice) for body in bodies]
    for one in texts:
        for other in texts:
            kept = [
                {n: v for n, v in understood(text).items() if n not in ("cache", "stream")}
                for text in (one, other)
            ]
            assert (key_of(one.encode(), "json") == key_of(other.encode(), "json")) == same(*kept)


# --- splicing

MEMBER_NAMES = st.sampled_from(["cache", "cach", "caché", "Cache", "a", "", "cache "])


@given(
    st.lists(st.tuples(MEMBER_NAMES, VALUES), max_size=6),
    st.integers(0, 2**32),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"]),
)
@settings(max_examples=500, deadline=None)
def test_one_member_is_taken_out_and_no_other_byte_changes(members, seed, encoding):
    dice = random.Random(seed)

    def space() -> str:
        return dice.choice(["", " ", "\n  ", "\t"])

    texts = [
        (name, spell(name, dice) + space() + ":" + space() + spell(value, dice)) for name, value in members
    ]
    before, after = space() + "{", space() + "}" + space()
    text = before + ",".join(space() + member + space() for _, member in texts) + after
    body = text.encode(encoding)
    result = without_member(body, "cache").decode(encoding)

    expected = {name: value for name, value in understood(text).items() if name != "cache"}
    assert same(understood(result), expected)
    if all(name != "cache" for name, _ in members):
        assert result == text
    assert result.startswith(before)
    rest = result[len(before) :]
    for name, member in texts:
        if name != "cache":
            rest = rest.lstrip(" \r\n\t,")
            assert rest.startswith(member.rstrip())
            rest = rest[len(member.rstrip()) :]
    assert rest.strip(" \r\n\t") == "}"
    assert result.endswith(after)
    remaining = iter(text)
    assert all(char in remaining for char in result)


def test_splicing_keeps_what_parsers_would_change():
    body = b'{"big":1.0000000000000000001, "cache" : {"ttl":1} ,"a":1,"a":2,"s":"\\u00e9\\/"}'
    assert without_member(body, "cache") == b'{"big":1.0000000000000000001 ,"a":1,"a":2,"s":"\\u00e9\\/"}'


def test_splicing_takes_out_every_member_of_that_name():
    assert without_member(b'{"cache":1,"c\\u0061che":2}', "cache") == b"{}"
    assert without_member(b'{"cache":1,"a":{"cache":2},"cache":3}', "cache") == b'{"a":{"cache":2}}'


def test_models_of_one_group_share_their_answers(way):
    ask = way(CacheManager(caching_groups=[["a", "b"], ["c"]]))
    assert ask(b'{"model":"a"}') == ("miss", 1)
    assert ask(b'{"model":"b"}') == ("hit", 1)
    assert ask(b'{"model":"c"}') == ("miss", 2)
    assert ask(b'{"model":"d"}') == ("miss", 3)


@pytest.mark.parametrize("groups", ["ab", [["a"], ["a"]], [["a", 1]], [3]])
def test_wrong_groups_are_refused(groups):
    with pytest.raises(ConfigError, match="caching_groups"):
        CacheManager(caching_groups=groups)
