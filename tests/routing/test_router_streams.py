"""Streams of the Router: what fails before the first token is repaired, what fails later is told."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from random import Random
from typing import Any

import pytest

from llm_middleware import CacheManager
from llm_middleware.errors import BadRequestError, ProviderError, UpstreamConnectionError, UpstreamServerError
from llm_middleware.routing.router import Router
from llm_middleware.testing import FakeUpstream
from tests.services import wait_for

ASK = [{"role": "user", "content": "How many moons has Mars?"}]


class Face:
    """Streams of a Router, opened, read and closed on the sync or on the async face."""

    def __init__(self, loop: asyncio.AbstractEventLoop | None) -> None:
        self.loop = loop

    def open(self, router: Router, name: str = "completion", content: object = ASK, **options: object) -> Any:
        if self.loop is None:
            return getattr(router, name)("m", content, stream=True, **options)
        return self.run(getattr(router, f"a{name}")("m", content, stream=True, **options))

    def run(self, work: Any) -> Any:
        assert self.loop is not None
        return self.loop.run_until_complete(work)

    def read(self, stream: Any, most: int | None = None) -> tuple[list[Any], ProviderError | None]:
        """The chunks, up to ``most``, and what was raised after them."""
        chunks: list[Any] = []

        async def read() -> None:
            async for chunk in stream:
                chunks.append(chunk)
                if len(chunks) == most:
                    return

        try:
            if self.loop is not None:
                self.run(read())
                return chunks, None
            for chunk in stream:
                chunks.append(chunk)
                if len(chunks) == most:
                    break
        except ProviderError as exc:
            return chunks, exc
        return chunks, None

    def close(self, stream: Any) -> None:
        if self.loop is None:
            stream.close()
        else:
            self.run(stream.aclose())

    def settle(self) -> None:
        """Let what runs beside the caller go on."""
        if self.loop is not None:
            self.run(asyncio.sleep(0))


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


def router(*upstreams: FakeUpstream, cache: CacheManager | None = None, **settings: Any) -> Router:
    rows = [
        {
            "model_name": "m",
            "litellm_params": {
                "model": "openai/gpt-4o-mini",
                "api_key": "sk-a",
                "api_base": up.url,
                "order": place,
            },
        }
        for place, up in enumerate(upstreams, 1)
    ]
    return Router(rows, cache=cache, random=Random(3), **settings)


def in_flight(made: Router) -> list[int]:
    return [made._routing.state.of(each).in_flight for each in made.deployments]


def benched(made: Router) -> list[bool]:
    state, now = made._routing.state, made._routing.clock()
    return [state.of(each).health.admits(now) == "no" for each in made.deployments]


def text(chunks: list[Any]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def scripted(up: FakeUpstream, *events: object, end: str = "data: [DONE]\n\n") -> None:
    """Answer the next call, which must not be for a stream of the server's own, with these events."""
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + end
    up.fail_next(200, body=body)


def said(content: str | None, finish: str | None = None) -> dict[str, object]:
    delta = {"role": "assistant"} if content is None else {"content": content}
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"id": "c", "object": "chat.completion.chunk", "choices": [choice]}


ERROR = {"error": {"message": "broke", "type": "server_error", "code": None}}


@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
def test_a_stream_is_whole_and_counted(
    face: Face, upstreams: Callable[[], FakeUpstream], cached: bool
) -> None:
    up = upstreams()
    made = router(up, cache=CacheManager() if cached else None)
    chunks, error = face.read(face.open(made))
    whole = made.completion("m", ASK, caching=False).choices[0].message.content
    assert (text(chunks), error) == (whole, None)
    assert chunks[-1].choices[0].finish_reason == "stop"
    wait_for(lambda: in_flight(made) == [0], "the call to be over")
    if cached:
        again = face.open(made)
        assert again.cache.status == "hit"
        assert text(face.read(again)[0]) == whole
        assert up.count == 2


@pytest.mark.parametrize("kind", ["completion", "text_completion", "responses"])
def test_every_kind_streams(face: Face, upstreams: Callable[[], FakeUpstream], kind: str) -> None:
    up = upstreams()
    made = router(up)
    chunks, error = face.read(face.open(made, kind, ASK if kind == "completion" else "Say so"))
    assert (len(chunks) > 3, error, in_flight(made)) == (True, None, [0])


def break_status(up: FakeUpstream) -> None:
    up.fail_next(503)


def break_event(up: FakeUpstream) -> None:
    scripted(up, said(None), ERROR)


def break_role(up: FakeUpstream) -> None:
    up.cut_stream_after(1)


def break_head(up: FakeUpstream) -> None:
    up.cut_stream_after(0)


def break_empty(up: FakeUpstream) -> None:
    up.fail_next(200, body="")


@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
@pytest.mark.parametrize("how", [break_status, break_event, break_role, break_head, break_empty])
def test_r51_what_fails_before_the_first_token_is_streamed_by_another(
    face: Face, upstreams: Callable[[], FakeUpstream], how: Callable[[FakeUpstream], None], cached: bool
) -> None:
    bad, good = upstreams(), upstreams()
    how(bad)
    made = router(bad, good, allowed_fails=0, cooldown_time=3600, cache=CacheManager() if cached else None)
    stream = face.open(made)
    assert (stream.route.attempts, len(stream.route.failures)) == (2, 1)
    chunks, error = face.read(stream)
    assert (text(chunks) != "", error) == (True, None)
    assert benched(made) == [True, False]
    wait_for(lambda: in_flight(made) == [0, 0], "the call to be over")


def test_r51_of_responses_the_opening_events_are_no_answer(
    face: Face, upstreams: Callable[[], FakeUpstream]
) -> None:
    bad, good = upstreams(), upstreams()
    failed = {"id": "r", "status": "failed", "error": {"code": "server_error", "message": "broke"}}
    opening = {"type": "response.created", "response": {"id": "r"}}
    made = router(bad, good, cooldown_time=0)
    for last in (
        {"type": "response.failed", "response": failed},
        {"type": "error", "code": "server_error", "message": "broke"},
    ):
        scripted(bad, opening, {**opening, "type": "response.in_progress"}, last, end="")
        stream = face.open(made, "responses", "Say so")
        chunks, error = face.read(stream)
        assert (stream.route.attempts, chunks[-1].type, error) == (2, "response.completed", None)


@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
def test_r52_a_cut_is_raised_penalised_and_not_kept(
    face: Face, upstreams: Callable[[], FakeUpstream], cached: bool
) -> None:
    up, other = upstreams(), upstreams()
    up.cut_stream_after(4)
    made = router(up, other, allowed_fails=0, cooldown_time=3600, cache=CacheManager() if cached else None)
    chunks, error = face.read(face.open(made))
    assert text(chunks) != ""
    assert isinstance(error, UpstreamConnectionError)
    wait_for(lambda: in_flight(made) == [0, 0], "the call to be over")
    assert benched(made) == [True, False]
    again = face.open(made)
    assert again.cache is None or again.cache.status in ("miss", "bypass")
    assert face.read(again)[1] is None
    assert (up.count, other.count) == (1, 1)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "no blank line"])
def test_r52_an_error_event_after_content_is_raised(
    face: Face, upstreams: Callable[[], FakeUpstream], whole: bool
) -> None:
    up = upstreams()
    scripted(up, said(None), said('He said "error", and '), end=f"data: {json.dumps(ERROR)}" + "\n\n" * whole)
    made = router(up, allowed_fails=0, cooldown_time=3600)
    _, error = face.read(face.open(made))
    assert isinstance(error, UpstreamServerError)
    assert (benched(made), in_flight(made)) == ([True], [0])


def test_an_event_may_speak_of_errors(face: Face, upstreams: Callable[[], FakeUpstream]) -> None:
    up = upstreams()
    scripted(up, said(None), {**said('"error"'), "error": None}, said("", "stop"))
    chunks, error = face.read(face.open(router(up)))
    assert (text(chunks), error) == ('"error"', None)


@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
@pytest.mark.parametrize("read", [0, 2])
def test_r53_closing_early_ends_the_call(
    face: Face, upstreams: Callable[[], FakeUpstream], read: int, cached: bool
) -> None:
    up = upstreams()
    up.hold(after_events=4)
    cache = CacheManager(on_disconnect="cancel") if cached else None
    made = router(up, cache=cache)
    stream = face.open(made)
    if read:
        assert len(face.read(stream, read)[0]) == read
    assert in_flight(made) == [1]
    face.close(stream)

    def over() -> bool:
        face.settle()
        return in_flight(made) == [0]

    wait_for(over, "the call to be over")
    gone = wait_for(lambda: (face.settle(), up.disconnected)[1], "the upstream to see it")
    assert (gone, benched(made)) == (1, [False])


def test_r53_a_stream_that_is_dropped_ends_the_call(upstreams: Callable[[], FakeUpstream]) -> None:
    up = upstreams()
    up.hold(after_events=4)
    made = router(up)
    for read in (0, 2):
        stream = made.completion("m", ASK, stream=True)
        chunks = iter(stream)
        for _ in range(read):
            next(chunks)
        del stream, chunks
        gc.collect()
    assert in_flight(made) == [0]
    up.wait_for_disconnects(2)


def test_r53_a_dropped_stream_of_a_loop_ends_the_call(upstreams: Callable[[], FakeUpstream]) -> None:
    up = upstreams()
    up.hold(after_events=4)
    made = router(up)

    async def main() -> None:
        for read in (0, 2):
            stream = await made.acompletion("m", ASK, stream=True)
            for _ in range(read):
                await anext(stream)
            del stream
            gc.collect()
        await asyncio.to_thread(up.wait_for_disconnects, 2)
        assert in_flight(made) == [0]

    asyncio.run(main())


def test_a_stream_that_was_looked_into_goes_on(face: Face, upstreams: Callable[[], FakeUpstream]) -> None:
    stream = face.open(router(upstreams()))
    first, _ = face.read(stream, 2)
    rest, error = face.read(stream)
    assert (len(first), rest[-1].choices[0].finish_reason, error) == (2, "stop", None)
    assert face.read(stream) == ([], None)
    face.close(stream)


@pytest.mark.parametrize("stream", [False, True])
def test_r53_a_cancelled_task_releases_its_place(upstreams: Callable[[], FakeUpstream], stream: bool) -> None:
    up = upstreams()
    up.hold()
    made = router(up)

    async def main() -> None:
        task = asyncio.create_task(made.acompletion("m", ASK, stream=stream))
        await asyncio.to_thread(up.wait_for, 1)
        assert in_flight(made) == [1]
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert in_flight(made) == [0]
        if stream:
            await asyncio.to_thread(up.wait_for_disconnects, 1)
        await made.aclose()

    asyncio.run(main())
    assert benched(made) == [False]


def test_with_closes_a_stream(upstreams: Callable[[], FakeUpstream]) -> None:
    up = upstreams()
    up.hold(after_events=4)
    made = router(up)
    with made.completion("m", ASK, stream=True) as stream:
        next(iter(stream))
    assert in_flight(made) == [0]

    async def main() -> None:
        async with await made.acompletion("m", ASK, stream=True) as stream:
            assert in_flight(made) == [1]
            async for _ in stream:
                break
        assert in_flight(made) == [0]

    asyncio.run(main())
    up.wait_for_disconnects(2)


def test_r51_anthropic_streams_where_openai_breaks(face: Face, upstreams: Callable[[], FakeUpstream]) -> None:
    bad, claude = upstreams(), upstreams()
    bad.cut_stream_after(1)
    made = Router(
        [
            {
                "model_name": "m",
                "litellm_params": {"model": "openai/x", "api_key": "k", "api_base": bad.url, "order": 1},
            },
            {
                "model_name": "m",
                "litellm_params": {
                    "model": "anthropic/claude-3",
                    "api_key": "k",
                    "api_base": claude.url.removesuffix("/v1"),
                    "order": 2,
                },
            },
        ]
    )
    chunks, error = face.read(face.open(made))
    assert (text(chunks) != "", error, chunks[-1].choices[0].finish_reason) == (True, None, "stop")
    claude.cut_stream_after(5)
    bad.fail_next(500, n=9)
    chunks, error = face.read(face.open(made))
    assert text(chunks) != ""
    assert isinstance(error, UpstreamConnectionError)
    assert in_flight(made) == [0, 0]


def test_a_stream_that_ends_before_its_end_is_an_error(
    face: Face, upstreams: Callable[[], FakeUpstream]
) -> None:
    """Its connection was closed in order, so that nothing but the missing end tells."""
    up = upstreams()
    said = b'data: {"choices": [{"index": 0, "delta": {"content": "Two"}, "finish_reason": null}]}\n\n'
    up.fail_next(200, body=said)
    chunks, error = face.read(face.open(router(up)))
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["Two"]
    assert isinstance(error, UpstreamConnectionError)


def test_a_model_that_has_no_streams_is_no_fault_of_its_deployment(
    face: Face, upstreams: Callable[[], FakeUpstream]
) -> None:
    up = upstreams()
    up.fail_next(200, body=b'{"object": "chat.completion", "choices": []}')
    made = router(up, allowed_fails=0, cooldown_time=60)
    with pytest.raises(BadRequestError, match="does not answer in a stream"):
        face.open(made)
    assert face.read(face.open(made))[1] is None


@pytest.mark.parametrize("counted", [True, False])
def test_a_stream_tells_what_it_cost(
    face: Face, upstreams: Callable[[], FakeUpstream], counted: bool
) -> None:
    """By the provider's count, else by one token for each event and a quarter of the prompt's characters."""
    up = upstreams()
    row = {
        "model_name": "m",
        "litellm_params": {"model": "openai/gpt-4o-mini", "api_key": "sk-a", "api_base": up.url},
        "model_info": {"input_cost_per_token": 1.0, "output_cost_per_token": 100.0},
    }
    said = b'data: {"choices": [{"index": 0, "delta": {"content": "Two"}, "finish_reason": "stop"}]}\n\n'
    usage = (
        b'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}}\n\n'
    )
    up.fail_next(200, body=said * 3 + (usage if counted else b"") + b"data: [DONE]\n\n")
    stream = face.open(Router([row]))
    face.read(stream)
    route = stream.route
    if counted:
        assert (route.tokens, route.output_tokens, route.cost) == (9, 2, 207.0)
    else:
        prompt = len(ASK[0]["content"]) // 4 + 4
        assert (route.tokens, route.output_tokens, route.cost) == (prompt + 4, 4, prompt + 400.0)
