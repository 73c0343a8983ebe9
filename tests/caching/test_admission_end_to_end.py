"""Which answers are kept, as callers see it. C95-C99, the ``admission`` switches, the ``admit`` predicate."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest

from llm_middleware import CacheManager
from llm_middleware.caching.admission import REASONS
from tests.support import AsgiFront, AsyncFace, Host, SyncFace, WsgiFront, chat_stream, chunk, completion, sse

BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
JSON = "application/json"


class Response:
    """What httpx returns, as far as it is read."""

    def __init__(self, status: int, content: bytes, kind: str = JSON) -> None:
        self.status_code = status
        self.headers = {"content-type": kind}
        self.content = content


@pytest.fixture(params=["sync", "async", "asgi", "wsgi"])
def ask(request):
    """``ask(cache, answer, ...)``: two requests: what the cache did and why, and then did, and the calls.

    ``answer``: a JSON value, chunks of a stream, an exception, or (status, JSON value).
    """
    face = {"sync": SyncFace, "async": AsyncFace}.get(request.param)
    face = face() if face is not None else None

    def handler(answer: object):
        def handle(_: object) -> object:
            handle.calls += 1
            if isinstance(answer, Exception):
                raise answer
            if isinstance(answer, tuple):
                raw = json.dumps(answer[1]).encode()
                return Response(answer[0], raw) if face else (answer[0], {"content-type": JSON}, raw)
            if isinstance(answer, list):
                return iter(answer) if face else answer
            return answer

        handle.calls = 0
        return handle

    def once(cache: CacheManager, handle, body: object, kind: str) -> tuple[str, str | None, int, bytes]:
        if face is None:
            front = AsgiFront if request.param == "asgi" else WsgiFront
            reply = front(Host(handle), cache=cache, routes={"/llm": kind}).post(body, "/llm")
            _, _, detail = reply.cache_status.partition("detail=")
            return reply.cache, detail or None, reply.status, reply.body
        answer = face.fetch(cache, body, handle, kind=kind)
        whole = b"".join(face.chunks(answer)) if answer.streamed else answer.body
        return answer.cache.status, answer.cache.detail, answer.status, whole

    def twice(cache: CacheManager, answer: object, body: object = BODY, kind: str = "chat"):
        handle = handler(answer)
        if isinstance(answer, list):
            body = {**body, "stream": True}
        first, second = once(cache, handle, body, kind), once(cache, handle, body, kind)
        assert first[2:] == second[2:]
        return first[:2], second[0], handle.calls

    twice.once, twice.handler, twice.name = once, handler, request.param
    yield twice
    if face is not None:
        face.close()


KEPT = (("miss", None), "hit", 1)


def refused(reason: str | None) -> tuple:
    return ("miss", reason), "miss", 2


def choice(content: object = "hello", finish: str = "stop", **message: object) -> dict:
    return {
        "index": 0,
        "message": {"role": "assistant", "content": content, **message},
        "finish_reason": finish,
    }


def chat(*choices: dict) -> dict:
    return completion(choices=list(choices))


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
BROKEN_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": '}}

# Answer, reason code.
REFUSED = {
    "C95 500": ((500, {"error": {"message": "x"}}), "upstream-error"),
    "C95 429": ((429, {"error": {"message": "x"}}), "upstream-error"),
    "C95 404": ((404, {"error": {"message": "x"}}), "upstream-error"),
    "C95 201": ((201, completion()), "upstream-error"),
    "C95 an error with status 200": ({"error": {"message": "x"}}, "unexpected-body"),
    "C95 an error beside choices": (completion(error={"message": "x"}), "error-event"),
    "C96 no choices": (chat(), "empty"),
    "C96 no content": (chat(choice("")), "empty"),
    "C96 null": (chat(choice(None)), "empty"),
    "C97 length": (chat(choice("hel", "length")), "truncated"),
    "C97 length and nothing said": (chat(choice("", "length")), "truncated"),
    "C97 one of two choices": (chat(choice(), choice("hel", "length")), "truncated"),
    "C97 content_filter": (chat(choice("", "content_filter")), "content-filter"),
    "C97 refusal": (chat(choice(None, refusal="I cannot")), "refusal"),
    "C98 a broken call": (chat(choice(None, "tool_calls", tool_calls=[BROKEN_CALL])), "invalid-tool-call"),
    "not an object": (5, "unexpected-body"),
    "another shape": ({"object": "list", "data": []}, "unexpected-body"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_c95_c96_c97_answers_that_are_not_kept(ask, case):
    answer, reason = case
    assert ask(CacheManager(), answer) == refused(reason)


@pytest.mark.parametrize(
    "name", [name for name, (answer, _) in REFUSED.items() if not isinstance(answer, tuple)]
)
def test_every_reason_has_its_switch(ask, name):
    answer, reason = REFUSED[name]
    switches = dict.fromkeys(REASONS, True)
    assert ask(CacheManager(admission=switches), answer) == KEPT
    assert ask(CacheManager(admission={**switches, reason: False}), answer) == refused(reason)


@pytest.mark.parametrize("status", [201, 404, 429, 500, 503])
def test_c95_the_status_and_body_of_an_error_are_the_handlers(ask, status):
    """Whatever the switches: no error comes back as a success."""
    error = {"error": {"message": "x", "type": "server_error", "param": None, "code": None}}
    for settings in ({}, {"admission": {"upstream-error": True}}):
        cache, handle = CacheManager(**settings), ask.handler((status, error))
        for _ in range(2):
            _, _, told, body = ask.once(cache, handle, BODY, "chat")
            assert (told, json.loads(body)) == (status, error)


def test_c95_an_exception_is_raised_and_nothing_is_kept(ask):
    cache, handle = CacheManager(), ask.handler(RuntimeError("down"))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"^down$"):
            ask.once(cache, handle, BODY, "chat")
    assert handle.calls == 2
    assert ask(cache, completion()) == KEPT


GOOD = {
    "a chat": ("chat", completion()),
    "two choices": ("chat", chat(choice(), {**choice(), "index": 1})),
    "C98 a call": ("chat", chat(choice(None, "tool_calls", tool_calls=[CALL]))),
    "a legacy call": ("chat", chat(choice(None, "function_call", function_call=CALL["function"]))),
    "a text": ("text", {"choices": [{"index": 0, "text": "x", "finish_reason": "stop"}]}),
    "an embedding": ("embedding", {"data": [{"index": 0, "embedding": [0.5]}]}),
    "a response": (
        "responses",
        {
            "status": "completed",
            "output": [{"type": "message", "content": [{"type": "output_text", "text": "x"}]}],
        },
    ),
    "a message": ("messages", {"content": [{"type": "text", "text": "x"}], "stop_reason": "end_turn"}),
    "anything": ("json", {"any": "thing"}),
    "a list": ("json", {"rows": []}),
}


@pytest.mark.parametrize("case", GOOD.values(), ids=GOOD)
def test_answers_that_are_kept(ask, case):
    kind, answer = case
    assert ask(CacheManager(), answer, {**BODY, "input": "x"}, kind) == KEPT


BAD_OF_OTHER_KINDS = {
    "a cut text": ("text", {"choices": [{"text": "x", "finish_reason": "length"}]}, "truncated"),
    "no embeddings": ("embedding", {"data": []}, "empty"),
    "an incomplete response": (
        "responses",
        {
            "status": "incomplete",
            "incomplete_details": {"reason": "max_output_tokens"},
            "output": [{"type": "message", "content": [{"type": "output_text", "text": "x"}]}],
        },
        "truncated",
    ),
    "a failed response": (
        "responses",
        {"status": "failed", "error": {"code": "x"}, "output": []},
        "error-event",
    ),
    "a queued response": (
        "responses",
        {
            "status": "queued",
            "output": [{"type": "message", "content": [{"type": "output_text", "text": "x"}]}],
        },
        "unterminated",
    ),
    "a cut message": (
        "messages",
        {"content": [{"type": "text", "text": "x"}], "stop_reason": "max_tokens"},
        "truncated",
    ),
    "a refused message": (
        "messages",
        {"content": [{"type": "text", "text": "x"}], "stop_reason": "refusal"},
        "refusal",
    ),
}


@pytest.mark.parametrize("case", BAD_OF_OTHER_KINDS.values(), ids=BAD_OF_OTHER_KINDS)
def test_answers_of_other_kinds_that_are_not_kept(ask, case):
    kind, answer, reason = case
    assert ask(CacheManager(), answer, {**BODY, "input": "x"}, kind) == refused(reason)


STREAMS = {
    "whole": (chat_stream("a", "b"), True),
    "C98 a call": (
        sse(
            chunk(None, tool_calls=[{"index": 0, **CALL}]),
            chunk(None, "tool_calls"),
        ),
        True,
    ),
    "no [DONE]": (sse(chunk("a"), chunk(None, "stop"), done=False), False),
    "no finish": (sse(chunk("a")), False),
    "C95 an error event": (sse(chunk("a"), {"error": {"message": "x"}}), False),
    "C96 nothing said": (sse(chunk(""), chunk(None, "stop")), False),
    "C97 length": (sse(chunk("a"), chunk(None, "length")), False),
    "C97 content_filter": (sse(chunk(None, "content_filter")), False),
    "no JSON": ([b"data: {\n\n", *chat_stream("a")], False),
}


@pytest.mark.parametrize("case", STREAMS.values(), ids=STREAMS)
def test_c95_c96_c97_streams(ask, case):
    """The reason comes too late for the headers of a stream."""
    chunks, kept = case
    assert ask(CacheManager(), chunks) == (KEPT if kept else refused(None))


def test_c97_the_event_of_a_stream_tells_the_reason(ask):
    events = []
    cache = CacheManager(hooks=[events.append])
    ask(cache, sse(chunk("a"), chunk(None, "length")))
    assert [event.detail for event in events if event.name == "not-stored"] == ["truncated"] * 2


def test_c98_a_switch_for_tool_calls(ask):
    answer = chat(choice(None, "tool_calls", tool_calls=[CALL]))
    assert ask(CacheManager(), answer) == KEPT
    assert ask(CacheManager(admission={"tool-calls": False}), answer) == refused("tool-calls")
    assert ask(CacheManager(admission={"tool-calls": False}), completion()) == KEPT


@pytest.mark.parametrize("temperature", [0.7, 1, 1e-9, 2])
def test_c99_a_switch_for_sampled_answers(ask, temperature):
    body = {**BODY, "temperature": temperature}
    assert ask(CacheManager(), completion(), body) == KEPT
    assert ask(CacheManager(admission={"sampled": False}), completion(), body) == refused("sampled")


@pytest.mark.parametrize("fields", [{}, {"temperature": 0}, {"temperature": 0.0}, {"temperature": None}])
def test_c99_what_is_not_sampled(ask, fields):
    assert ask(CacheManager(admission={"sampled": False}), completion(), {**BODY, **fields}) == KEPT


def test_the_first_cause_is_told(ask):
    answer = chat(choice("", "content_filter", tool_calls=[BROKEN_CALL]))
    assert ask(CacheManager(), answer) == refused("content-filter")
    lifted = CacheManager(admission={"content-filter": True})
    assert ask(lifted, answer) == refused("invalid-tool-call")


def test_an_answer_that_is_too_large(ask):
    answer = completion("x" * 2000)
    assert ask(CacheManager(max_entry_bytes=1000), answer) == refused("answer-too-large")
    assert ask(CacheManager(max_entry_bytes=10_000), answer) == KEPT


def test_a_body_that_is_no_json(front):
    client = front(lambda seen: (200, {"content-type": "text/plain"}, b"hello"), cache=CacheManager())
    assert [client.post(BODY).cache_status for _ in range(2)] == [
        "llm-middleware; fwd=miss; detail=unexpected-body"
    ] * 2


def test_transcriptions_are_judged_by_their_type(front):
    def told(kind: str, raw: bytes) -> str:
        client = front(lambda seen: (200, {"content-type": kind}, raw), cache=CacheManager())
        form = b'--B\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nx\r\n--B--'
        sent = {"content-type": "multipart/form-data; boundary=B"}
        return client.post(form, "/v1/audio/transcriptions", sent).cache_status

    assert told("text/plain; charset=utf-8", b"spoken") == "llm-middleware; fwd=miss; stored"
    assert told("text/plain; charset=utf-8", b" \n") == "llm-middleware; fwd=miss; detail=empty"
    assert told(JSON, b'{"text": "spoken"}') == "llm-middleware; fwd=miss; stored"
    assert told(JSON, b'{"text": ""}') == "llm-middleware; fwd=miss; detail=empty"
    assert told(JSON, b"spoken") == "llm-middleware; fwd=miss; detail=unexpected-body"


# --- admit


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_admit_has_the_last_word(ask, kind):
    seen = []

    def admit(plan, answer) -> bool:
        seen.append(
            (plan.kind, plan.model, answer.status, json.loads(answer.body)["choices"][0]["finish_reason"])
        )
        return "keep" in answer.body.decode()

    async def aadmit(plan, answer) -> bool:
        if ask.name in ("async", "asgi"):
            await asyncio.sleep(0)
        return admit(plan, answer)

    cache = CacheManager(admit=admit if kind == "sync" else aadmit)
    assert ask(cache, completion("drop")) == refused("not-admitted")
    assert ask(cache, completion("keep"), {**BODY, "seed": 1}) == KEPT
    assert seen == [("chat", "m", 200, "stop")] * 3


def test_admit_is_not_asked_about_what_is_refused_anyway(ask):
    cache = CacheManager(admit=lambda plan, answer: 1 / 0)
    assert ask(cache, chat()) == refused("empty")
    assert ask(cache, (500, {})) == refused("upstream-error")


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_an_admit_that_fails_keeps_nothing_and_the_answer_is_given(ask, kind, caplog):
    caplog.set_level(logging.WARNING, "llm_middleware")

    def admit(plan, answer) -> bool:
        raise ValueError("no")

    async def aadmit(plan, answer) -> bool:
        raise ValueError("no")

    cache = CacheManager(admit=admit if kind == "sync" else aadmit)
    assert ask(cache, completion()) == refused("not-admitted")
    assert [record.getMessage() for record in caplog.records] == [
        "the admit predicate failed: ValueError: no"
    ] * 2


def test_admit_judges_streams_too(ask):
    seen = []
    cache = CacheManager(admit=lambda plan, answer: seen.append(answer.body))
    assert ask(cache, chat_stream("a")) == refused(None)
    assert seen == [b"".join(chat_stream("a"))] * 2


def test_set_is_subject_to_admission(face):
    cache = CacheManager()
    assert face.set(cache, BODY, chat()) is None
    assert face.get(cache, BODY) is None
    assert face.set(cache, BODY, completion()) == cache.plan("chat", BODY).digest
    assert face.get(cache, BODY).json() == completion()
