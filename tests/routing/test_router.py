"""The Router over real servers: the same scenarios on both faces."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from copy import deepcopy
from random import Random
from typing import Any

import pytest

from llm_middleware import CacheManager
from llm_middleware.errors import (
    AuthenticationError,
    BadRequestError,
    ConfigError,
    ContextWindowExceededError,
    DeadlineError,
    InvalidRequestError,
    ModelNotFoundError,
    NoCapacityError,
    NotFoundError,
    RateLimitError,
    UpstreamServerError,
)
from llm_middleware.providers.messages import Timeouts
from llm_middleware.routing.router import Router
from llm_middleware.testing import FakeUpstream

ASK = [{"role": "user", "content": "How many moons has Mars?"}]


class Face:
    """Calls of a Router by the names of its sync methods, on the sync or on the async face."""

    def __init__(self, loop: asyncio.AbstractEventLoop | None) -> None:
        self._loop = loop

    def __call__(self, router: Router, name: str, *args: object, **options: object) -> Any:
        if self._loop is None:
            return getattr(router, name)(*args, **options)
        return self._loop.run_until_complete(getattr(router, f"a{name}")(*args, **options))

    def ask(self, router: Router, model: str = "m", **options: object) -> Any:
        return self(router, "completion", model, options.pop("messages", ASK), **options)


@pytest.fixture(params=["sync", "async"])
def face(request: pytest.FixtureRequest) -> Iterator[Face]:
    if request.param == "sync":
        yield Face(None)
        return
    loop = asyncio.new_event_loop()
    yield Face(loop)
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


@pytest.fixture
def upstreams() -> Iterator[Callable[[], FakeUpstream]]:
    with ExitStack() as stack:
        yield lambda: stack.enter_context(FakeUpstream())


def row(up: FakeUpstream, name: str = "m", id: str | None = None, **params: object) -> dict[str, Any]:  # noqa: A002
    made = {"model": "openai/gpt-4o-mini", "api_key": "sk-a", "api_base": up.url, **params}
    return {"model_name": name, "litellm_params": made, "model_info": {} if id is None else {"id": id}}


def router(*rows: dict[str, Any], **settings: Any) -> Router:
    return Router(list(rows), random=Random(7), **settings)


def in_flight(made: Router) -> list[int]:
    return [made._routing.state.of(each).in_flight for each in made.deployments]


def test_an_answer_is_read_by_item_and_by_attribute(
    face: Face, upstreams: Callable[[], FakeUpstream]
) -> None:
    up = upstreams()
    made = router(row(up, id="one"))
    answer = face.ask(made, temperature=0)
    assert answer.choices[0].message.content == answer["choices"][0]["message"]["content"]
    assert answer.choices[0].message.tool_calls is None
    assert (answer.cache, answer.route.deployment, answer.route.attempts) == (None, "one", 1)
    assert up.calls[0].json == {"model": "gpt-4o-mini", "messages": ASK, "temperature": 0}
    assert up.calls[0].headers["authorization"] == "Bearer sk-a"


def test_every_kind_of_request_reaches_its_path(face: Face, upstreams: Callable[[], FakeUpstream]) -> None:
    up = upstreams()
    made = router(row(up))
    assert face(made, "text_completion", "m", "Say so").choices[0].text
    assert len(face(made, "embedding", "m", ["a", "b"]).data) == 2
    assert face(made, "responses", "m", "Say so").object == "response"
    assert face(made, "transcription", "m", ("a.wav", b"RIFF")).text
    text = face(made, "transcription", "m", ("a.wav", b"RIFF"), response_format="text")
    assert text.text == text.raw.decode()
    paths = [call.path.removeprefix("/v1") for call in up.calls]
    assert paths == [
        "/completions",
        "/embeddings",
        "/responses",
        "/audio/transcriptions",
        "/audio/transcriptions",
    ]
    assert in_flight(made) == [0]


def test_r15_the_second_order_serves_only_while_the_first_cools(
    face: Face, upstreams: Callable[[], FakeUpstream]
) -> None:
    first, second = upstreams(), upstreams()
    made = router(row(first, order=1), row(second, order=2), cooldown_time=3600, num_retries=1)
    for _ in range(5):
        face.ask(made)
    assert (first.count, second.count) == (5, 0)
    first.fail_next(429)
    for _ in range(3):
        face.ask(made)
    assert (first.count, second.count) == (6, 3)


def test_r18_r19_tags_choose_and_are_not_sent(face: Face, upstreams: Callable[[], FakeUpstream]) -> None:
    free, paid = upstreams(), upstreams()
    made = router(row(free, tags=["free"]), row(paid, tags=["paid"]), enable_tag_filtering=True)
    for _ in range(10):
        face.ask(made, metadata={"tags": ["free"]})
    face.ask(made, metadata={"tags": ["free"], "trace": "x"})
    assert (free.count, paid.count) == (11, 0)
    assert "metadata" not in free.calls[0].json
    assert free.calls[-1].json["metadata"] == {"trace": "x"}
    with pytest.raises(NotFoundError) as caught:
        face.ask(made, metadata={"tags": ["none"]})
    assert caught.value.param == "metadata"


@pytest.mark.parametrize(("status", "own"), [(404, {}), (401, {"api_key": "sk-of-the-caller"})])
def test_r22_one_callers_mistake_benches_nobody(
    face: Face, upstreams: Callable[[], FakeUpstream], status: int, own: dict[str, str]
) -> None:
    up = upstreams()
    made = router(row(up), num_retries=0, cooldown_time=3600)
    up.fail_next(status)
    with pytest.raises(NotFoundError if status == 404 else AuthenticationError):
        face.ask(made, **own)
    assert face.ask(made).choices
    assert up.count == 2


def test_r23_r59_the_only_deployment_is_not_benched_by_a_429(
    face: Face, upstreams: Callable[[], FakeUpstream]
) -> None:
    up = upstreams()
    made = router(row(up), num_retries=0)
    up.fail_next(429, headers={"Retry-After": "7"})
    with pytest.raises(RateLimitError) as caught:
        face.ask(made)
    assert (caught.value.status, caught.value.retry_after) == (429, 7.0)
    assert face.ask(made).choices
    up.fail_next(429, headers={"Retry-After-Ms": "20"})
    assert face.ask(made, num_retries=1).route.attempts == 2


def test_r24_after_a_429_the_other_is_asked(face: Face, upstreams: Callable[[], FakeUpstream]) -> None:
    bad, good = upstreams(), upstreams()
    made = router(row(bad, order=1), row(good, order=2), num_retries=0)
    bad.fail_next(429, headers={"Retry-After": "60"})
    with pytest.raises(RateLimitError):
        face.ask(made)
    face.ask(made)
    assert (bad.count, good.count) == (1, 1)


def test_r35_one_retry_is_enough_beside_a_good_one(face: Face, upstreams: Callable[[], FakeUpstream]) -> None:
    bad, good = upstreams(), upstreams()
    bad.fail_next(500, n=400)
    made = router(row(bad), row(good), num_retries=1, cooldown_time=0)
    attempts = [face.ask(made).route.attempts for _ in range(300)]
    assert set(attempts) == {1, 2}
    assert (good.count, bad.count) == (300, attempts.count(2))
    assert in_flight(made) == [0, 0]


def test_wrong_credentials_are_tried_elsewhere(face: Face, upstreams: Callable[[], FakeUpstream]) -> None:
    bad, good = upstreams(), upstreams()
    bad.fail_next(401)
    answer = face.ask(router(row(bad, order=1), row(good, order=2), num_retries=1))
    assert (answer.route.attempts, bad.count, good.count) == (2, 1, 1)


def test_r36_no_retry_where_the_provider_wants_more_time_than_there_is(
    face: Face, upstreams: Callable[[], FakeUpstream]
) -> None:
    up = upstreams()
    up.fail_next(429, headers={"Retry-After": "120"})
    with pytest.raises(RateLimitError) as caught:
        face.ask(router(row(up)), timeout=10)
    assert (up.count, caught.value.retry_after) == (1, 120.0)


def test_r39_a_policy_counts_by_class(face: Face, upstreams: Callable[[], FakeUpstream]) -> None:
    up = upstreams()
    policy = {"TimeoutErrorRetries": 3, "AuthenticationErrorRetries": 0}
    made = router(row(up), retry_policy=policy, cooldown_time=0)
    up.fail_next(408, n=4)
    with pytest.raises(DeadlineError):
        face.ask(made)
    assert up.count == 4
    up.fail_next(401)
    with pytest.raises(AuthenticationError):
        face.ask(made)
    assert up.count == 5


def test_r40_the_time_of_a_call_is_for_all_of_it(face: Face, upstreams: Callable[[], FakeUpstream]) -> None:
    up, other = upstreams(), upstreams()
    up.hold()
    bench = {"allowed_fails": 0, "cooldown_time": 3600}
    made = router(row(up), row(other, "b"), fallbacks=[{"m": ["b"]}], **bench)
    with pytest.raises(DeadlineError) as caught:
        face.ask(made, timeout=0.3)
    assert (caught.value.status, up.count, other.count) == (504, 1, 0)
    assert in_flight(made) == [0, 0]
    assert made._routing.state.of(made.deployments[1]).requests == 0
    up.release()
    assert face.ask(made, timeout=30).route.model == "m"  # the caller's own timeout benched nobody


def test_r41_a_body_that_drips_is_ended_too(face: Face, upstreams: Callable[[], FakeUpstream]) -> None:
    up = upstreams()
    up.hold(after_events=3)
    made = router(row(up))
    stream = face.ask(made, timeout=0.5, stream=True)
    with pytest.raises(DeadlineError):
        drained(face, stream)
    assert (up.count, in_flight(made)) == (1, [0])


def drained(face: Face, stream: Any) -> list[Any]:
    if face._loop is None:
        return list(stream)

    async def read() -> list[Any]:
        return [chunk async for chunk in stream]

    return face._loop.run_until_complete(read())


@pytest.mark.parametrize("timeout", [0, -1, True, "1", float("nan"), float("inf")])
def test_r42_a_timeout_that_is_none_is_refused(
    face: Face, upstreams: Callable[[], FakeUpstream], timeout: object
) -> None:
    up = upstreams()
    with pytest.raises(InvalidRequestError) as caught:
        face.ask(router(row(up)), timeout=timeout)
    assert (caught.value.param, up.count) == ("timeout", 0)
    with pytest.raises(ConfigError):
        router(row(up), timeout=timeout)


def test_r43_r48_fallbacks_are_counted_and_asked_once(
    face: Face, upstreams: Callable[[], FakeUpstream]
) -> None:
    up = upstreams()
    up.fail_next(500, n=20)
    names = [f"f{number}" for number in range(7)]
    rows = [row(up, name, f"id-{name}") for name in ("m", *names)]
    made = router(*rows, fallbacks=[{"m": names}], max_fallbacks=2, num_retries=0)
    with pytest.raises(UpstreamServerError):
        face.ask(made)
    assert up.count == 3
    cycle = [{"m": ["f0"]}, {"f0": ["f1"]}, {"f1": ["m", "f0"]}]
    made = router(*rows, fallbacks=cycle, num_retries=0)
    with pytest.raises(UpstreamServerError):
        face.ask(made)
    assert up.count == 6


def test_r44_r61_the_callers_mistake_goes_nowhere_else(
    face: Face, upstreams: Callable[[], FakeUpstream]
) -> None:
    up, other = upstreams(), upstreams()
    body = {"error": {"message": "messages: 'rate limit' is no role", "type": "invalid_request_error"}}
    up.fail_next(400, body=body)
    made = router(row(up), row(other, "b"), fallbacks=[{"m": ["b"]}], default_fallbacks=["b"])
    with pytest.raises(BadRequestError) as caught:
        face.ask(made)
    assert (caught.value.status, up.count, other.count) == (400, 1, 0)
    assert type(caught.value) is BadRequestError


TOO_LONG = {
    "error": {"message": "too long", "type": "invalid_request_error", "code": "context_length_exceeded"}
}


def test_r45_a_prompt_too_long_falls_back_to_the_general_ones(
    face: Face, upstreams: Callable[[], FakeUpstream]
) -> None:
    up, other = upstreams(), upstreams()
    up.fail_next(400, body=TOO_LONG)
    made = router(
        row(up),
        row(other, "b"),
        context_window_fallbacks=[{"elsewhere": ["m"]}],
        fallbacks=[{"m": ["b"]}],
    )
    answer = face.ask(made)
    assert (answer.route.model, answer.route.fallback, other.count) == ("b", True, 1)


def test_r46_a_fallback_that_cannot_read_the_prompt_is_passed_over(
    face: Face, upstreams: Callable[[], FakeUpstream]
) -> None:
    up, small, large = upstreams(), upstreams(), upstreams()
    up.fail_next(500)
    rows = [row(up), row(small, "small"), row(large, "large")]
    rows[1]["model_info"] = {"max_input_tokens": 50}
    made = router(*rows, fallbacks=[{"m": ["small", "large"]}], enable_pre_call_checks=True, num_retries=0)
    answer = face.ask(made, messages=[{"role": "user", "content": "word " * 100}])
    assert (answer.route.model, small.count) == ("large", 0)


def test_r47_the_route_tells_what_happened(face: Face, upstreams: Callable[[], FakeUpstream]) -> None:
    up, other = upstreams(), upstreams()
    up.fail_next(500, n=2)
    made = router(row(up, id="a1"), row(other, "b", "b1"), fallbacks=[{"m": ["b"]}], num_retries=1)
    route = face.ask(made).route
    assert (route.asked, route.model, route.deployment, route.attempts) == ("m", "b", "b1", 3)
    assert (route.fallback, [name for name, _ in route.failures]) == (True, ["a1", "a1"])


def test_r49_a_misspelt_model_is_not_found(face: Face, upstreams: Callable[[], FakeUpstream]) -> None:
    up = upstreams()
    made = router(row(up), default_fallbacks=["m"])
    with pytest.raises(ModelNotFoundError) as caught:
        face.ask(made, "n")
    assert (caught.value.status, caught.value.code, up.count) == (404, "model_not_found", 0)


def test_r50_a_group_that_the_caller_may_not_use_is_no_fallback(
    face: Face, upstreams: Callable[[], FakeUpstream]
) -> None:
    up, other = upstreams(), upstreams()
    up.fail_next(500)
    made = router(row(up), row(other, "b"), fallbacks=[{"m": ["b"]}], num_retries=0)
    with pytest.raises(UpstreamServerError):
        face.ask(made, may_use=lambda group: group == "m")
    assert other.count == 0


def test_r54_the_list_stays_as_it_is(upstreams: Callable[[], FakeUpstream]) -> None:
    up = upstreams()
    rows = [row(up, rpm=5), row(up, "b", tags=["x"])]
    before = deepcopy(rows)
    for _ in range(2):
        Router(rows).completion("m", ASK)
    assert rows == before


def test_r58_a_prompt_too_long_is_told_as_openai_does(
    face: Face, upstreams: Callable[[], FakeUpstream]
) -> None:
    up = upstreams()
    up.fail_next(400, body=TOO_LONG)
    with pytest.raises(ContextWindowExceededError) as caught:
        face.ask(router(row(up)))
    told = json.loads(caught.value.body())["error"]
    assert (caught.value.status, told["code"], told["type"]) == (
        400,
        "context_length_exceeded",
        "invalid_request_error",
    )


def test_r60_no_failure_tells_of_the_configuration(face: Face, upstreams: Callable[[], FakeUpstream]) -> None:
    up = upstreams()
    text = {"error": {"message": f"no sk-very-secret-key-1234 at {up.url}", "type": "server_error"}}
    up.fail_next(500, body=text)
    made = router(row(up, id="dep-17", api_key="sk-very-secret-key-1234"), num_retries=0)
    with pytest.raises(UpstreamServerError) as caught:
        face.ask(made)
    up.stop()
    with pytest.raises(Exception) as gone:  # noqa: PT011 - the text is what counts
        face.ask(made)
    for error in (caught.value, gone.value):
        body = error.body().decode()  # type: ignore[attr-defined]
        assert not [word for word in ("sk-very", "127.0.0.1", "dep-17") if word in body]


def test_r64_a_row_of_the_users_replaces_the_tables(
    face: Face, upstreams: Callable[[], FakeUpstream], monkeypatch: pytest.MonkeyPatch
) -> None:
    up = upstreams()
    monkeypatch.setenv("GROQ_API_KEY", "gsk-of-the-environment")
    item = {"model_name": "m", "litellm_params": {"model": "groq/llama-x"}}
    face.ask(router(item, providers={"groq": {"base_url": up.url}}))
    assert up.calls[0].headers["authorization"] == "Bearer gsk-of-the-environment"
    assert up.calls[0].json["model"] == "llama-x"


@pytest.mark.parametrize(
    "own", ["b", ["b"], [{"m": ["b"]}], [{"*": "b"}]], ids=["name", "names", "litellm", "star"]
)
def test_fallbacks_of_one_request(face: Face, upstreams: Callable[[], FakeUpstream], own: object) -> None:
    up, other = upstreams(), upstreams()
    up.fail_next(500)
    assert face.ask(router(row(up), row(other, "b"), num_retries=0), fallbacks=own).route.model == "b"
    assert "fallbacks" not in other.calls[0].json


@pytest.mark.parametrize(
    "wrong",
    [{"fallbacks": 3}, {"fallbacks": [3]}, {"num_retries": -1}, {"num_retries": "2"}, {"num_retries": True}],
)
def test_wrong_arguments_of_a_call_are_the_callers(
    face: Face, upstreams: Callable[[], FakeUpstream], wrong: dict[str, object]
) -> None:
    up = upstreams()
    with pytest.raises(InvalidRequestError) as caught:
        face.ask(router(row(up)), **wrong)
    assert (caught.value.param, up.count) == (next(iter(wrong)), 0)


def test_the_first_failure_is_told_where_nobody_is_left(
    face: Face, upstreams: Callable[[], FakeUpstream]
) -> None:
    up = upstreams()
    up.fail_next(500, n=5)
    made = router(row(up), allowed_fails=0, cooldown_time=3600)
    with pytest.raises(UpstreamServerError):
        face.ask(made)
    with pytest.raises(NoCapacityError):
        face.ask(made)
    assert up.count == 1


@pytest.mark.parametrize(
    "body", ["<html>busy</html>", {"error": {"message": "busy", "type": "server_error"}}]
)
def test_an_answer_that_is_none_is_a_failure(
    face: Face, upstreams: Callable[[], FakeUpstream], body: Any
) -> None:
    up, other = upstreams(), upstreams()
    up.fail_next(200, body=body)
    assert face.ask(router(row(up, order=1), row(other, order=2))).route.attempts == 2


def test_anthropic_stands_in_for_openai(face: Face, upstreams: Callable[[], FakeUpstream]) -> None:
    up, claude = upstreams(), upstreams()
    up.fail_next(500, n=2)
    base = claude.url.removesuffix("/v1")
    made = router(
        row(up, order=1),
        row(claude, order=2, model="anthropic/claude-3", api_base=base),
        num_retries=1,
        cooldown_time=0,
    )
    answer = face.ask(made)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.content
    chunks = drained(face, face.ask(made, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert [call.path for call in claude.calls] == ["/v1/messages"] * 2
    assert in_flight(made) == [0, 0]


def test_azure_is_asked_for_its_deployment(face: Face, upstreams: Callable[[], FakeUpstream]) -> None:
    up, azure = upstreams(), upstreams()
    up.fail_next(500)
    made = router(
        row(up, order=1),
        row(
            azure,
            order=2,
            model="azure/my-gpt",
            api_base=azure.url.removesuffix("/v1"),
            api_version="2024-10-21",
        ),
        num_retries=1,
    )
    with pytest.raises(NotFoundError):  # the server has no such path, and that is how it is seen
        face.ask(made)
    call = azure.calls[0]
    assert call.path == "/openai/deployments/my-gpt/chat/completions?api-version=2024-10-21"
    assert call.headers["api-key"] == "sk-a"
    answer = {"object": "chat.completion", "choices": [{"message": {"content": "of Azure"}}]}
    up.fail_next(500)
    azure.fail_next(200, body=answer)
    assert face.ask(made).choices[0].message.content == "of Azure"
    events = 'data: {"choices": []}\n\ndata: {"choices": [{"delta": {"content": "hi"}}]}\n\ndata: [DONE]\n\n'
    up.fail_next(500)
    azure.fail_next(200, body=events)
    chunks = drained(face, face.ask(made, stream=True))
    assert [chunk.choices[0].delta.content for chunk in chunks if chunk.choices] == ["hi"]
    assert in_flight(made) == [0, 0]


def test_none_is_a_setting_not_given(upstreams: Callable[[], FakeUpstream]) -> None:
    made = router(row(upstreams()), num_retries=None, cooldown_time=None, fallbacks=None, timeout=None)
    assert (made.settings.num_retries, made.settings.cooldown_time, made.settings.timeout) == (2, 5.0, None)


@pytest.mark.parametrize("name", ["num_retries", "max_fallbacks", "wait_for_capacity"])
@pytest.mark.parametrize("value", [-1, "2", True])
def test_wrong_numbers_are_refused(name: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        Router([], **{name: value})  # type: ignore[arg-type]
    assert caught.value.param == name


def test_unknown_settings_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'num_retrys'; did you mean 'num_retries'") as caught:
        Router([], num_retrys=2)
    assert caught.value.param == "num_retrys"


# --- with a cache


def test_c87_c88_only_missing_inputs_go_upstream_once_each(
    face: Face, upstreams: Callable[[], FakeUpstream]
) -> None:
    up = upstreams()
    made = router(row(up), cache=CacheManager())
    first = face(made, "embedding", "m", ["a", "b"])
    both = face(made, "embedding", "m", ["x", "a", "y", "b"])
    assert [call.json["input"] for call in up.calls] == [["a", "b"], ["x", "y"]]
    assert [item.index for item in both.data] == [0, 1, 2, 3]
    assert [both.data[1].embedding, both.data[3].embedding] == [item.embedding for item in first.data]
    assert both.cache.status == "partial"
    face(made, "embedding", "m", ["dup", "dup"])
    assert up.calls[-1].json["input"] in ("dup", ["dup"])


def test_c89_reversed_vectors_are_put_in_order(face: Face, upstreams: Callable[[], FakeUpstream]) -> None:
    up = upstreams()
    data = [{"object": "embedding", "index": index, "embedding": [float(index)]} for index in (1, 0)]
    usage = {"prompt_tokens": 2, "total_tokens": 2}
    up.fail_next(200, body={"object": "list", "data": data, "model": "e", "usage": usage})
    made = router(row(up), cache=CacheManager())
    face(made, "embedding", "m", ["a", "b"])
    again = face(made, "embedding", "m", ["b", "a"])
    assert [item.embedding for item in again.data] == [[1.0], [0.0]]
    assert ([item.index for item in again.data], up.count) == ([0, 1], 1)


def test_the_wait_for_a_place_ends_when_a_call_does(upstreams: Callable[[], FakeUpstream]) -> None:
    up = upstreams()
    up.hold()
    made = router(row(up, max_parallel_requests=1), wait_for_capacity=30)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(made.completion, "m", ASK)
        up.wait_for(1)
        second = pool.submit(made.completion, "m", ASK)
        with pytest.raises(NoCapacityError):
            made.completion("m", ASK, timeout=0.05)
        up.release()
        assert {first.result().route.attempts, second.result().route.attempts} == {1}
    assert (up.count, in_flight(made)) == (2, [0])


@pytest.mark.parametrize(
    "options", [{"input": [1, 2, 3]}, {"input": ["p", "q"], "encoding_format": "base64"}], ids=["c90", "c91"]
)
def test_c90_c91_tokens_and_base64_are_kept(
    face: Face, upstreams: Callable[[], FakeUpstream], options: dict[str, Any]
) -> None:
    up = upstreams()
    made = router(row(up), cache=CacheManager())
    fresh = face(made, "embedding", "m", **options)
    again = face(made, "embedding", "m", **options)
    assert [item.embedding for item in fresh.data] == [item.embedding for item in again.data]
    assert (again.cache.status, up.count) == ("hit", 1)


def test_c94_both_faces_share_what_is_kept(upstreams: Callable[[], FakeUpstream]) -> None:
    up = upstreams()
    made = router(row(up), cache=CacheManager())
    first = made.embedding("m", ["a", "b"])
    second = asyncio.run(made.aembedding("m", ["b", "a"]))
    third = made.embedding("m", ["a", "b"])
    assert [item.embedding for item in second.data][::-1] == [item.embedding for item in third.data]
    assert (first.data[0].embedding, up.count) == (third.data[0].embedding, 1)


def test_c14_c15_c16_a_transcription_is_found_by_its_content(
    face: Face, upstreams: Callable[[], FakeUpstream]
) -> None:
    up = upstreams()
    made = router(row(up), cache=CacheManager())
    calls: list[tuple[tuple[str, bytes], dict[str, str]]] = [
        (("a.wav", b"one"), {}),
        (("b.wav", b"one"), {}),
        (("a.wav", b"two"), {}),
        (("a.wav", b"one"), {"language": "de"}),
    ]
    seen = [face(made, "transcription", "m", file, **more).cache.status for file, more in calls]
    assert seen == ["miss", "hit", "miss", "miss"]
    assert up.count == 3


def test_the_cache_key_is_of_the_group_and_a_hit_takes_no_limit(
    face: Face, upstreams: Callable[[], FakeUpstream]
) -> None:
    one, two = upstreams(), upstreams()
    made = router(row(one, rpm=1, order=1), row(two, rpm=1, order=2), cache=CacheManager())
    assert face.ask(made).cache.status == "miss"
    assert [face.ask(made).cache.status for _ in range(5)] == ["hit"] * 5
    assert face.ask(made).route.attempts == 0
    other = [{"role": "user", "content": "another"}]
    face.ask(made, messages=other)
    assert (one.count, two.count) == (1, 1)
    assert face.ask(made, messages=other).cache.status == "hit"
    with pytest.raises(NoCapacityError):
        face.ask(made, caching=False)


def test_what_another_server_answers_is_not_kept(face: Face, upstreams: Callable[[], FakeUpstream]) -> None:
    up, theirs = upstreams(), upstreams()
    made = router(row(up), cache=CacheManager())
    face.ask(made, api_base=theirs.url, api_key="sk-theirs")
    assert (theirs.count, up.count) == (1, 0)
    assert face.ask(made).cache.status == "miss"
    assert up.count == 1


def test_many_equal_calls_at_once_are_one(upstreams: Callable[[], FakeUpstream]) -> None:
    up = upstreams()
    made = router(row(up), cache=CacheManager())

    async def many() -> list[Any]:
        return list(await asyncio.gather(*(made.acompletion("m", ASK) for _ in range(50))))

    answers = asyncio.run(many())
    assert (up.count, len({answer.id for answer in answers})) == (1, 1)
    other = [{"role": "user", "content": "threads"}]
    with ThreadPoolExecutor(8) as pool:
        ids = {answer.id for answer in pool.map(lambda _: made.completion("m", other), range(40))}
    assert (up.count, len(ids)) == (2, 1)
    assert in_flight(made) == [0]


def test_r34_who_cannot_be_connected_to_is_benched_whatever_the_caller_allows(face, upstreams) -> None:
    """Its backlog is full, so that connections are neither accepted nor refused."""
    good = upstreams()
    with ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        bad = row(good, order=1, api_base=f"http://127.0.0.1:{full.getsockname()[1]}/v1")
        made = router(bad, row(good, order=2), allowed_fails=0, cooldown_time=3600)
        made._routing.timeouts = Timeouts(connect=0.3)
        assert [face.ask(made, timeout=30).route.attempts for _ in range(2)] == [2, 1]


def test_a_429_costs_no_retry_of_who_waits_for_capacity(
    face: Face, upstreams: Callable[[], FakeUpstream]
) -> None:
    up = upstreams()
    up.fail_next(429, 4, headers={"retry-after-ms": "20"})
    made = router(row(up), num_retries=1, wait_for_capacity=10, cooldown_time=0)
    assert face.ask(made).route.attempts == 5
    up.fail_next(429, 4, headers={"retry-after-ms": "20"})
    with pytest.raises(RateLimitError):
        face.ask(router(row(up), num_retries=1, cooldown_time=0))
