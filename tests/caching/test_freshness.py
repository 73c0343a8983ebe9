"""How long an answer may be given. C38, C40-C43, C52, C70, C71, and refreshing behind a stale answer."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import threading

import pytest

from llm_middleware import CacheManager
from tests.support import AsgiFront, Host, WsgiFront, chat_stream, completion

BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


class Upstream:
    """Each call gets another answer; ``fails`` says how the next ones go wrong."""

    def __init__(self) -> None:
        self.calls = 0
        self.fails: object = None

    def __call__(self, _: object) -> object:
        self.calls += 1
        if isinstance(self.fails, Exception):
            raise self.fails
        if isinstance(self.fails, int):
            raw = json.dumps({"error": {"message": "no"}}).encode()
            return self.fails, {"content-type": "application/json"}, raw
        return completion(f"answer {self.calls}")


def text_of(answer) -> str:
    return answer.json()["choices"][0]["message"]["content"]


@pytest.fixture(params=["sync", "async", "asgi", "wsgi"])
def client(request, clock):
    """``client(**settings)``: ``ask(controls)`` over a face or a front: (what the cache did, the answer)."""

    def make(**settings: object):
        upstream = Upstream()
        cache = CacheManager(clock=clock, **{"ttl_jitter": 0, **settings})
        if request.param in ("asgi", "wsgi"):
            front = (AsgiFront if request.param == "asgi" else WsgiFront)(Host(upstream), cache=cache)

            def ask(controls: object = None, **more: object) -> tuple[str, str]:
                reply = front.post(
                    {**BODY, **more} if controls is None else {**BODY, "cache": controls, **more}
                )
                return reply.cache, text_of(reply)
        else:
            face = request.getfixturevalue("faces")(request.param)

            def call(body: object) -> object:
                result = upstream(body)
                return Response(*result) if isinstance(result, tuple) else result

            def ask(controls: object = None, **more: object) -> tuple[str, str]:
                body = {**BODY, **more} if controls is None else {**BODY, "cache": controls, **more}
                answer = face.fetch(cache, body, call)
                return answer.cache.status, text_of(answer)

        ask.upstream, ask.cache = upstream, cache
        return ask

    make.name = request.param
    return make


class Response:
    """What httpx returns, as far as it is read."""

    def __init__(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.status_code = status
        self.headers = headers
        self.content = content


@pytest.fixture
def faces():
    from tests.support import AsyncFace, SyncFace

    made: list = []

    def make(name: str):
        made.append(SyncFace() if name == "sync" else AsyncFace())
        return made[-1]

    yield make
    for face in made:
        face.close()


# --- C38, C41-C43, C52: time


@pytest.mark.parametrize("ttl", [2, 2.0, "2", "2.0"])
def test_c38_a_ttl_ends_exactly_then(client, clock, ttl):
    ask = client()
    assert ask({"ttl": ttl}) == ("miss", "answer 1")
    clock.advance(1.999)
    assert ask() == ("hit", "answer 1")
    clock.advance(0.001)
    assert ask() == ("miss", "answer 2")
    clock.advance(3599)
    assert ask() == ("hit", "answer 2")


def test_c38_in_another_process_too(clock, tmp_path, client):
    """Two managers on one directory: what one stores ends for the other at the same moment."""
    one = client(type="disk", disk_cache_dir=tmp_path)
    other = CacheManager("disk", disk_cache_dir=tmp_path, clock=clock)
    scope = "" if client.name in ("sync", "async") else "caller:anonymous"
    assert one({"ttl": 2}) == ("miss", "answer 1")
    assert text_of(other.get(BODY, scope=scope)) == "answer 1"
    clock.advance(3)
    assert other.get(BODY, scope=scope) is None
    assert one() == ("miss", "answer 2")
    one.cache.close()
    other.close()


def test_c40_a_negative_ttl_in_the_settings_is_refused():
    with pytest.raises(ValueError, match=r"^ttl: expected seconds >= 0 or None, got -1$"):
        CacheManager(ttl=-1)


def test_a_managers_ttl(client, clock):
    ask = client(ttl=10)
    ask()
    clock.advance(9.99)
    assert ask() == ("hit", "answer 1")
    clock.advance(0.01)
    assert ask() == ("miss", "answer 2")


def test_a_manager_without_a_ttl_keeps_for_ever(client, clock):
    ask = client(ttl=None)
    assert ask() == ("miss", "answer 1")
    clock.advance(10 * 365 * 86400)
    assert ask() == ("hit", "answer 1")


def test_an_endless_ttl_keeps_for_ever(client, clock):
    ask = client(ttl=float("inf"))
    assert ask() == ("miss", "answer 1")
    clock.advance(10 * 365 * 86400)
    assert ask() == ("hit", "answer 1")


def test_a_managers_ttl_of_0_stores_nothing(client):
    ask = client(ttl=0)
    assert [ask(), ask()] == [("miss", "answer 1"), ("miss", "answer 2")]
    assert ask({"ttl": 5}) == ("miss", "answer 3")
    assert ask() == ("hit", "answer 3")


@pytest.mark.parametrize("limit", [5, "5", 5.0])
def test_c42_c43_an_entry_older_than_s_maxage_is_refreshed(client, clock, limit):
    ask = client()
    ask()
    clock.advance(5)
    assert ask({"s-maxage": limit}) == ("hit", "answer 1")
    clock.advance(1)
    assert ask({"s-maxage": limit}) == ("miss", "answer 2")
    assert ask({"s-maxage": limit}) == ("hit", "answer 2")
    assert ask() == ("hit", "answer 2")


def test_c42_an_s_maxage_does_not_lengthen_a_ttl(client, clock):
    ask = client(ttl=10)
    ask()
    clock.advance(11)
    assert ask({"s-maxage": 100}) == ("miss", "answer 2")


def test_c41_an_s_maxage_of_0_at_the_very_moment_of_storing(client):
    ask = client()
    assert ask() == ("miss", "answer 1")
    assert ask({"s-maxage": 0}) == ("miss", "answer 2")


def test_c52_a_refresh_with_a_longer_ttl_lives_longer(client, clock):
    ask = client()
    ask({"ttl": 10})
    clock.advance(5)
    assert ask({"no-cache": True, "ttl": 100}) == ("miss", "answer 2")
    clock.advance(99)
    assert ask() == ("hit", "answer 2")
    clock.advance(1)
    assert ask() == ("miss", "answer 3")


def test_c52_a_refresh_with_a_shorter_ttl_lives_shorter(client, clock):
    ask = client()
    ask({"ttl": 100})
    ask({"no-cache": True, "ttl": 10})
    clock.advance(10)
    assert ask() == ("miss", "answer 3")


def test_a_read_does_not_lengthen_a_life(client, clock):
    ask = client(ttl=10)
    ask()
    for _ in range(9):
        clock.advance(1)
        assert ask({"ttl": 1000})[0] == "hit"
    clock.advance(1)
    assert ask()[0] == "miss"


def test_a_clock_set_back_does_no_harm(client, clock):
    ask = client(ttl=10)
    ask()
    clock.advance(-3600)
    assert ask() == ("hit", "answer 1")
    assert ask({"s-maxage": 1}) == ("hit", "answer 1")


# --- C70: jitter


def lives(clock, jitter: object) -> list[float]:
    """The time to live, as a share of that asked for, of 400 entries stored at the same moment."""
    cache = CacheManager(ttl=1000, clock=clock, **({} if jitter is None else {"ttl_jitter": jitter}))
    out = []
    for number in range(400):
        body = {**BODY, "seed": number}
        cache.set(body, completion())
        out.append(cache.get(body).cache.ttl / 1000)
    return out


@pytest.mark.parametrize(
    ("jitter", "share"), [(None, 0.05), (0.05, 0.05), (0.5, 0.5), (1, 1.0), ("0.2", 0.2)]
)
def test_c70_entries_of_one_ttl_end_spread_over_the_jitter(clock, jitter, share):
    spread = lives(clock, jitter)
    assert max(spread) <= 1
    assert min(spread) >= 1 - share
    quarters = [sum(1 - share * (n + 1) / 4 < life <= 1 - share * n / 4 for life in spread) for n in range(4)]
    assert sum(quarters) == 400
    assert min(quarters) > 60


def test_c70_no_jitter_is_none(clock):
    assert set(lives(clock, 0)) == {1.0}


def test_c70_an_entry_ends_after_the_same_time_whoever_asks(clock):
    """Spread by the key: two processes with the same answer agree on its end."""
    ttls = set()
    for _ in range(3):
        cache = CacheManager(ttl=1000, clock=clock, ttl_jitter=0.5)
        cache.set(BODY, completion())
        ttls.add(cache.get(BODY).cache.ttl)
    assert len(ttls) == 1


def test_c70_jitter_never_lengthens_the_grace_for_stale_answers(clock):
    cache = CacheManager(ttl=100, stale_if_error=50, ttl_jitter=0.5, clock=clock)
    cache.set(BODY, completion())
    left = cache.get(BODY).cache.ttl
    clock.advance(left + 51)
    assert cache.get(BODY, controls={"stale-while-revalidate": 1000}) is None


# --- C71: stale-if-error

FAILURES = {
    "an exception": RuntimeError("down"),
    "a timeout": TimeoutError(),
    "500": 500,
    "502": 502,
    "503": 503,
    "504": 504,
    "429": 429,
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_c71_a_stale_answer_stands_in_for_a_failure(client, clock, failure):
    ask = client(ttl=10, stale_if_error=60)
    assert ask() == ("miss", "answer 1")
    clock.advance(69.9)
    ask.upstream.fails = failure
    assert ask() == ("stale", "answer 1")
    assert ask() == ("stale", "answer 1")
    assert ask.upstream.calls == 3
    ask.upstream.fails = None
    assert ask() == ("miss", "answer 4")
    assert ask() == ("hit", "answer 4")


@pytest.mark.parametrize("source", ["settings", "body", "both"])
def test_c71_whoever_asks_for_it(client, clock, source):
    ask = client(ttl=10, **({} if source == "body" else {"stale_if_error": 60}))
    controls = None if source == "settings" else {"stale-if-error": "60"}
    ask(controls)
    clock.advance(11)
    ask.upstream.fails = RuntimeError("down")
    assert ask(controls) == ("stale", "answer 1")


def test_c71_only_so_long(client, clock):
    ask = client(ttl=10, stale_if_error=60)
    ask()
    clock.advance(70.1)
    ask.upstream.fails = RuntimeError("down")
    with pytest.raises(RuntimeError, match=r"^down$"):
        ask()


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_c71_an_error_of_the_caller_is_told(front, clock, status):
    upstream = Upstream()
    ask = front(upstream, cache=CacheManager(ttl=10, stale_if_error=60, ttl_jitter=0, clock=clock))
    ask.post(BODY)
    clock.advance(11)
    upstream.fails = status
    reply = ask.post(BODY)
    assert (reply.status, reply.cache_status) == (status, "llm-middleware; fwd=miss; detail=upstream-error")


def test_c71_off_by_default(client, clock):
    ask = client(ttl=10)
    ask()
    clock.advance(11)
    ask.upstream.fails = RuntimeError("down")
    with pytest.raises(RuntimeError, match=r"^down$"):
        ask()


def test_c71_a_fresh_answer_that_is_too_old_for_the_request_stands_in_too(client, clock):
    """``s-maxage`` asks for a younger one; where there is none, the old one is better than an error."""
    ask = client(ttl=100, stale_if_error=60)
    ask()
    clock.advance(50)
    ask.upstream.fails = RuntimeError("down")
    assert ask({"s-maxage": 5}) == ("stale", "answer 1")


def test_c71_no_cache_wants_no_stale_answer(client, clock):
    ask = client(ttl=10, stale_if_error=60)
    ask()
    clock.advance(11)
    ask.upstream.fails = RuntimeError("down")
    with pytest.raises(RuntimeError, match=r"^down$"):
        ask({"no-cache": True})


def test_c71_the_warning(front, clock):
    upstream = Upstream()
    ask = front(upstream, cache=CacheManager(ttl=10, stale_if_error=60, ttl_jitter=0, clock=clock))
    ask.post(BODY)
    clock.advance(22)
    for upstream.fails in (RuntimeError("down"), 503):
        reply = ask.post(BODY)
        assert reply.status == 200
        assert reply.cache_status == "llm-middleware; hit; ttl=-12; detail=stale-if-error"
        assert (reply.cache, reply.headers["age"], reply.headers["x-llm-cache-tier"]) == (
            "stale",
            "22",
            "memory",
        )
        assert reply.headers["content-length"] == str(len(reply.body))


def test_c71_by_the_header(front, clock):
    upstream = Upstream()
    ask = front(upstream, cache=CacheManager(ttl=10, ttl_jitter=0, clock=clock))
    ask.post({**BODY, "cache": {"stale-if-error": 100}})
    clock.advance(50)
    upstream.fails = 503
    assert ask.post(BODY, headers={"cache-control": "stale-if-error=60"}).cache == "stale"
    assert ask.post(BODY, headers={"cache-control": "stale-if-error=39"}).status == 503


def test_c71_a_stale_stream(front, clock):
    fails = []

    def handler(seen):
        if fails:
            raise RuntimeError("down")
        return chat_stream("a", "b")

    ask = front(handler, cache=CacheManager(ttl=10, stale_if_error=60, ttl_jitter=0, clock=clock))
    body = {**BODY, "stream": True}
    first = ask.post(body)
    clock.advance(11)
    fails.append(1)
    again = ask.post(body)
    assert (again.cache, again.chunks) == ("stale", first.chunks)
    assert again.headers["content-type"] == "text/event-stream"
    assert "content-length" not in again.headers


def test_c71_the_fetch_of_a_stale_stream(face, clock):
    cache = CacheManager(ttl=10, stale_if_error=60, ttl_jitter=0, clock=clock)
    body = {**BODY, "stream": True}
    pieces = chat_stream("a", "b")
    assert face.chunks(face.fetch(cache, body, lambda _: iter(pieces))) == pieces
    clock.advance(11)
    answer = face.fetch(cache, body, lambda _: 1 / 0)
    assert (answer.cache.status, answer.cache.detail, answer.cache.ttl) == ("stale", "stale-if-error", -1.0)
    assert face.chunks(answer) == pieces


# --- stale-while-revalidate


async def idle(cache: CacheManager) -> None:
    """Let the loop run until no call and no refresh is under way."""
    for _ in range(100_000):
        if cache.stats()["flights"] == 0:
            return
        await asyncio.sleep(0)
    raise AssertionError("the refresh never ended")


class Asking:
    """Requests whose background work is seen to its end, on whichever face or front."""

    def __init__(self, name: str, clock, when, runner: asyncio.Runner, **settings: object) -> None:
        self.name = name
        self.when = when
        self.runner = runner
        self.upstream = Upstream()
        self.events: list[str] = []
        self.cache = CacheManager(
            clock=clock, ttl_jitter=0, hooks=[lambda event: self.events.append(event.name)], **settings
        )
        front = {"asgi": AsgiFront, "wsgi": WsgiFront}.get(name)
        self.front = None if front is None else front(Host(self._handler), cache=self.cache)

    def _handler(self, seen: object) -> object:
        return self.upstream(seen)

    def _call(self, body: object) -> object:
        result = self.upstream(body)
        return Response(*result) if isinstance(result, tuple) else result

    def __call__(self, body: dict = BODY) -> tuple[str, str]:
        if self.name in ("asgi", "async"):
            return self.runner.run(self._ask(body))
        if self.front is not None:
            reply = self.front.post(body)
            self._idle()
            return reply.cache, text_of(reply)
        answer = self.cache.fetch(body, self._call)
        self._idle()
        return answer.cache.status, text_of(answer)

    async def _ask(self, body: dict) -> tuple[str, str]:
        if self.front is not None:
            reply = await self.front.apost(body)
            told = reply.cache, text_of(reply)
        else:
            answer = await self.cache.afetch(body, self._call)
            told = answer.cache.status, text_of(answer)
        await idle(self.cache)
        return told

    def _idle(self) -> None:
        self.when(lambda: self.cache.stats()["flights"] == 0)


@pytest.fixture(params=["sync", "async", "asgi", "wsgi"])
def asking(request, clock, when):
    with asyncio.Runner() as runner:
        yield lambda **settings: Asking(
            request.param, clock, when, runner, **{"ttl": 10, "stale_while_revalidate": 60, **settings}
        )


def test_a_stale_answer_is_given_and_refreshed_once(asking, clock):
    ask = asking()
    assert ask() == ("miss", "answer 1")
    clock.advance(69.9)
    assert ask() == ("stale", "answer 1")
    assert ask.upstream.calls == 2
    assert ask() == ("hit", "answer 2")
    assert ask.upstream.calls == 2


def test_the_refreshed_answer_has_a_life_of_its_own(asking, clock):
    ask = asking()
    ask()
    clock.advance(15)
    ask()
    clock.advance(9)
    assert ask() == ("hit", "answer 2")
    clock.advance(1)
    assert ask() == ("stale", "answer 2")
    assert ask() == ("hit", "answer 3")


def test_only_so_long(asking, clock):
    ask = asking()
    ask()
    clock.advance(70.1)
    assert ask() == ("miss", "answer 2")


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_a_refresh_that_fails_leaves_the_stale_answer(asking, clock, failure):
    ask = asking()
    ask()
    clock.advance(11)
    ask.upstream.fails = failure
    assert [ask(), ask()] == [("stale", "answer 1")] * 2
    assert ask.upstream.calls == 3
    ask.upstream.fails = None
    assert ask() == ("stale", "answer 1")
    assert ask() == ("hit", "answer 4")


def test_a_failed_refresh_is_told(asking, clock):
    ask = asking()
    ask()
    clock.advance(11)
    ask.upstream.fails = RuntimeError("down")
    ask()
    assert ask.cache.stats()["refresh-error"] == 1


def test_the_refresh_stores_what_the_request_would(asking, clock):
    """Its own ttl, and under its own key."""
    ask = asking()
    body = {**BODY, "cache": {"ttl": 100}}
    ask(body)
    clock.advance(101)
    assert ask(body) == ("stale", "answer 1")
    clock.advance(99)
    assert ask() == ("hit", "answer 2")


@pytest.mark.parametrize("control", [{"s-maxage": 5}, {"no-cache": True}, {"stale-while-revalidate": 0}])
def test_who_wants_a_fresh_answer_gets_none_that_is_stale(asking, clock, control):
    ask = asking()
    ask()
    clock.advance(11)
    assert ask({**BODY, "cache": control}) == ("miss", "answer 2")


def test_a_refresh_is_not_made_twice_at_once(clock, when):
    """Stale answers while a refresh is under way do not begin another."""
    cache = CacheManager(ttl=10, stale_while_revalidate=60, ttl_jitter=0, clock=clock)
    numbers, gate = itertools.count(1), threading.Event()

    def call(_: object) -> dict:
        number = next(numbers)
        if number == 2:
            assert gate.wait(10)
        return completion(f"answer {number}")

    cache.fetch(BODY, call)
    clock.advance(11)
    told = [cache.fetch(BODY, call).cache.status for _ in range(5)]
    gate.set()
    when(lambda: cache.stats()["flights"] == 0)
    assert told == ["stale"] * 5
    answer = cache.fetch(BODY, call)
    assert (answer.cache.status, text_of(answer)) == ("hit", "answer 2")
    assert next(numbers) == 3


def test_a_refresh_is_not_made_twice_at_once_on_a_loop(clock):
    cache = CacheManager(ttl=10, stale_while_revalidate=60, ttl_jitter=0, clock=clock)
    numbers = itertools.count(1)

    async def run() -> list[str]:
        gate = asyncio.Event()

        async def call(_: object) -> dict:
            number = next(numbers)
            if number == 2:
                await gate.wait()
            return completion(f"answer {number}")

        await cache.afetch(BODY, call)
        clock.advance(11)
        told = [(await cache.afetch(BODY, call)).cache.status for _ in range(5)]
        gate.set()
        await idle(cache)
        return [*told, (await cache.afetch(BODY, call)).cache.status]

    assert asyncio.run(run()) == ["stale"] * 5 + ["hit"]
    assert next(numbers) == 3


def test_the_header_of_a_stale_answer(front, clock):
    cache = CacheManager(ttl=10, stale_while_revalidate=60, ttl_jitter=0, clock=clock)
    client_ = front(Upstream(), cache=cache)
    client_.post(BODY)
    clock.advance(22)
    reply = client_.post(BODY)
    assert reply.cache_status == "llm-middleware; hit; ttl=-12; detail=stale-while-revalidate"
    assert (reply.cache, reply.headers["age"]) == ("stale", "22")


def test_a_wsgi_refresh_runs_when_the_server_closes_the_body(clock):
    """The client has its answer before the handler is called."""
    upstream = Upstream()
    client_ = WsgiFront(
        Host(upstream), cache=CacheManager(ttl=10, stale_while_revalidate=60, ttl_jitter=0, clock=clock)
    )
    client_.post(BODY)
    clock.advance(11)
    raw = json.dumps(BODY).encode()
    environ = {
        "REQUEST_METHOD": "POST",
        "PATH_INFO": "/v1/chat/completions",
        "CONTENT_TYPE": "application/json",
        "CONTENT_LENGTH": str(len(raw)),
        "wsgi.input": io.BytesIO(raw),
    }
    started: list = []
    body = client_.app(environ, lambda *args: started.append(args) or started.append)
    assert json.loads(b"".join(body)) == completion("answer 1")
    assert upstream.calls == 1
    body.close()
    assert upstream.calls == 2
    assert len(started) == 1
    body.close()
    assert upstream.calls == 2
    assert text_of(client_.post(BODY)) == "answer 2"


def test_a_stale_stream_is_refreshed(face, clock, when):
    cache = CacheManager(ttl=10, stale_while_revalidate=60, ttl_jitter=0, clock=clock)
    body = {**BODY, "stream": True}
    numbers = itertools.count(1)

    def call(_: object):
        return iter(chat_stream(f"answer {next(numbers)}"))

    first = face.chunks(face.fetch(cache, body, call))
    clock.advance(11)
    answer = face.fetch(cache, body, call)
    assert (answer.cache.status, face.chunks(answer)) == ("stale", first)
    if face.name == "async":
        face.run(idle(cache))
    when(lambda: cache.stats()["flights"] == 0)
    answer = face.fetch(cache, body, call)
    assert (answer.cache.status, face.chunks(answer)) == ("hit", chat_stream("answer 2"))


def test_a_request_that_stores_nothing_begins_no_refresh(asking, clock):
    """What it would fetch is thrown away."""
    ask = asking()
    ask()
    clock.advance(11)
    assert ask({**BODY, "cache": {"no-store": True}}) == ("stale", "answer 1")
    assert ask.upstream.calls == 1


def test_only_if_cached_is_satisfied_by_a_stale_answer_and_still_refreshes(front, clock):
    cache = CacheManager(ttl=10, stale_while_revalidate=60, ttl_jitter=0, clock=clock)
    client_ = front(Upstream(), cache=cache)
    client_.post(BODY)
    clock.advance(11)
    assert client_.post(BODY, headers={"cache-control": "only-if-cached"}).cache == "stale"
