"""Several workers of a real server, and keys and answers that all of them share: in Redis, and in SQLite."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from llm_middleware.keys.recent import BLIND
from llm_middleware.testing import FakeUpstream
from tests.api.clients import CHAT, MASTER, PREFIX, chat
from tests.api.serving import PATIENCE_S, until
from tests.servers.conftest import COMMANDS, read, start, stop
from tests.services import HOST, RedisServer, redis_server
from tests.support import completion

GUNICORN = (
    "gunicorn --workers 2 --worker-class gthread --threads 64 --keep-alive 60 --graceful-timeout 1"
    " --log-level warning --bind 127.0.0.1:{port} {app}"
)
UVICORN = (
    "uvicorn --workers 2 --host 127.0.0.1 --port {port} --log-level warning --timeout-keep-alive 60"
    " --timeout-graceful-shutdown 1 {app}"
)
SERVERS = {
    "gunicorn": (GUNICORN, "tests.api.workers_host:wsgi"),
    "uvicorn": (UVICORN, "tests.api.workers_host:asgi"),
}
EACH = 25  # connections to each worker
AT_ONCE = 2 * EACH
COST = 0.1  # of a call that is answered with `completion`
MODELS = """
model_list:
  - model_name: gpt
    litellm_params: {{model: openai/gpt-up, api_base: "{url}", api_key: sk-up}}
    model_info: {{input_cost_per_token: 0.05, output_cost_per_token: 0.05}}
router_settings: {{num_retries: 0, disable_cooldowns: true}}
general_settings: {{master_key: {master}}}
"""
IN_REDIS = """
litellm_settings:
  cache: true
  cache_params: {{type: redis, host: 127.0.0.1, port: {port}, store_timeout: 5}}
"""
KEYS_IN_REDIS = """
litellm_settings: {{cache: true, cache_params: {{type: local}}}}
keys: {{store: {{type: redis, host: 127.0.0.1, port: {port}}}}}
"""
IN_SQLITE = """
litellm_settings: {{cache: true, cache_params: {{type: local}}}}
keys: {{store: {{type: sqlite, path: {path}}}}}
"""


@dataclass
class Told:
    """An answer. ``sent``, ``got``: when, by the monotonic clock."""

    status: int
    headers: dict[str, str]
    body: bytes
    sent: float
    got: float

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def state(self) -> str:
        return self.headers["x-llm-cache"]

    @property
    def error(self) -> tuple[int, str]:
        return self.status, self.json()["error"]["code"]

    @property
    def ends(self) -> tuple[float, float]:
        """When the time to wait that it tells is over: not before, not after."""
        wait = int(self.headers["retry-after-ms"]) / 1000
        assert int(self.headers["retry-after"]) == -(-wait // 1)
        return self.sent + wait - 0.001, self.got + wait


class Line:
    """One connection, to one worker: ``pid``."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection(HOST, port, PATIENCE_S)
        self.pid = ""
        self.pid = self.request("GET", "/health").headers["x-pid"]

    def request(self, method: str, path: str, body: object = None, key: str = MASTER) -> Told:
        headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        sent = time.monotonic()
        self._connection.request(
            method, PREFIX + path, None if body is None else json.dumps(body).encode(), headers
        )
        answer = self._connection.getresponse()
        data = answer.read()
        pairs = {name.lower(): value for name, value in answer.getheaders()}
        assert self.pid in ("", pairs["x-pid"])
        return Told(answer.status, pairs, data, sent, time.monotonic())

    def chat(self, key: str, text: str = "hi", **fields: object) -> Told:
        return self.request("POST", CHAT, chat(text, **fields), key)

    def manage(self, what: str, **fields: object) -> Any:
        """As the administrator, by ``POST /key/...``."""
        told = self.request("POST", f"/key/{what}", fields)
        assert told.status == 200, told.body
        return told.json()

    def close(self) -> None:
        self._connection.close()


@dataclass
class Workers:
    """A server with two workers. ``lines``: connections, of one worker and the other in turn."""

    upstream: FakeUpstream
    lines: list[Line] = field(default_factory=list)
    redis: RedisServer | None = None

    @property
    def both(self) -> tuple[Line, Line]:
        return self.lines[0], self.lines[1]

    def key(self, **fields: object) -> str:
        made: str = self.lines[0].manage("generate", **fields)["key"]
        return made

    def info(self, key: str) -> Any:
        """As the other worker knows it."""
        return self.lines[1].manage("info", key=key)["info"]

    def together(self, ask: Callable[[Line, int], Told], count: int = AT_ONCE) -> Sending:
        """Each of so many requests on a connection of its own, over both workers."""
        pool = ThreadPoolExecutor(count)
        futures = [pool.submit(ask, line, number) for number, line in enumerate(self.lines[:count])]
        pool.shutdown(wait=False)
        return Sending(futures)


@dataclass
class Sending:
    futures: Sequence[Future[Told]]

    def wait_for(self, count: int) -> None:
        """Until so many have been answered."""
        until(lambda: sum(each.done() for each in self.futures) >= count, f"{count} answers")

    def answers(self) -> list[Told]:
        return [each.result(PATIENCE_S) for each in self.futures]


@contextlib.contextmanager
def running(server: str, settings: str, upstream: FakeUpstream, directory: Path) -> Iterator[Workers]:
    """``settings``: what the file says besides models."""
    file = directory / "config.yaml"
    file.write_text(MODELS.format(url=upstream.url, master=MASTER) + settings)
    command, app = SERVERS[server]
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryFile("w+") as log:
        patch.setitem(COMMANDS, "workers", command)
        process, port = start("workers", app, {"LLM_MIDDLEWARE_CONFIG": str(file)}, log.fileno())
        workers = Workers(upstream)
        try:
            workers.lines = _lines(port)
            yield workers
            assert "Traceback" not in read(log.fileno()), read(log.fileno())
        finally:
            upstream.release()
            for line in workers.lines:
                line.close()
            stop(process)


def _lines(port: int) -> list[Line]:
    """As many to each worker, whichever of them answers first."""
    found: dict[str, list[Line]] = {}

    def enough() -> bool:
        line = Line(port)
        found.setdefault(line.pid, []).append(line)
        return len(found) == 2 and min(map(len, found.values())) >= EACH

    until(enough, "both workers answer")
    for line in itertools.chain(*(lines[EACH:] for lines in found.values())):
        line.close()
    one, other = found.values()
    return [line for pair in zip(one, other[:EACH], strict=False) for line in pair][: 2 * EACH]


@pytest.fixture(scope="module")
def upstream_of_all() -> Iterator[FakeUpstream]:
    with FakeUpstream() as server:
        yield server


KINDS = [f"{server}-{store}" for server in SERVERS for store in ("redis", "sqlite")]


@pytest.fixture(scope="module", params=KINDS)
def started(
    request: pytest.FixtureRequest, upstream_of_all: FakeUpstream, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Workers]:
    server, store = request.param.split("-")
    directory = tmp_path_factory.mktemp(request.param)
    if store == "sqlite":
        settings = IN_SQLITE.format(path=directory / "keys.db")
        with running(server, settings, upstream_of_all, directory) as workers:
            yield workers
        return
    with (
        redis_server() as redis,
        running(server, IN_REDIS.format(port=redis.port), upstream_of_all, directory) as workers,
    ):
        workers.redis = redis
        yield workers


@pytest.fixture
def workers(started: Workers) -> Iterator[Workers]:
    yield started
    started.upstream.release()
    started.upstream._failures.clear()


def use(workers: Workers, key: str) -> None:
    """Have both workers answer the key for longer than they believe a record of which nobody tells them."""
    began = time.monotonic()
    while time.monotonic() - began < 2 * BLIND:
        assert [line.chat(key).status for line in workers.both] == [200, 200]


def until_refused(lines: Sequence[Line], key: str, error: tuple[int, str]) -> dict[str, float]:
    """For each worker how long it goes on answering a key that is in use, counted from now."""
    began, found = time.monotonic(), {}
    for line in lines:
        answers: list[Told] = []
        until(lambda line=line, answers=answers: answers.append(line.chat(key)) or answers[-1].status != 200)
        assert answers[-1].error == error
        found[line.pid] = answers[-1].got - began
    return found


def test_r71_a_key_that_is_deleted_on_one_worker_is_refused_by_both(workers):
    """Expected: at once by Redis, half a second later by SQLite."""
    one, other = workers.both
    assert one.pid != other.pid
    key = workers.key()
    use(workers, key)
    assert other.chat(key).state == "hit"
    one.manage("delete", keys=[key])
    seconds = until_refused((one, other), key, (401, "invalid_api_key"))
    assert seconds.keys() == {one.pid, other.pid}
    assert max(seconds.values()) < 3.0
    for line in workers.lines:
        assert line.chat(key).error == (401, "invalid_api_key")


def test_a_key_that_is_blocked_on_one_worker_is_refused_by_both(workers):
    one, other = workers.both
    key = workers.key()
    use(workers, key)
    other.manage("block", key=key)
    assert max(until_refused((one, other), key, (403, "blocked_key")).values()) < 3.0
    other.manage("unblock", key=key)
    for line in (one, other):
        until(lambda line=line: line.chat(key).status == 200, "it may call again")


def test_r75_a_budget_is_that_of_both_workers(workers):
    """While no cost is known a call holds a tenth of the budget: of a budget of 1, ten calls are made."""
    workers.upstream.fail_next(200, n=AT_ONCE, body=completion())
    key, before = workers.key(max_budget=1), workers.upstream.count
    workers.upstream.hold()
    sending = workers.together(lambda line, number: line.chat(key, f"r75 {number}", seed=number))
    workers.upstream.wait_for(before + 10)
    sending.wait_for(AT_ONCE - 10)
    workers.upstream.release()
    answers = sending.answers()
    made = [answer for answer in answers if answer.status == 200]
    refused = [answer.error for answer in answers if answer.status != 200]
    assert refused == [(429, "insufficient_quota")] * (AT_ONCE - 10)
    assert len(made) == workers.upstream.count - before == 10
    assert {answer.headers["x-pid"] for answer in answers} == {line.pid for line in workers.both}
    assert workers.info(key)["spend"] == pytest.approx(10 * COST)
    again = [line.chat(key, "another").error for line in workers.both]
    assert again == [(429, "insufficient_quota")] * 2


def test_r76_requests_per_minute_are_those_of_both_workers(workers):
    """Hits count too. Who is refused is told when the minute ends that began with the first request."""
    key = workers.key(rpm_limit=20)
    first = workers.lines[0].chat(key, "r76")
    assert first.status == 200
    answers = workers.together(lambda line, number: line.chat(key, "r76")).answers()
    passed = [answer for answer in answers if answer.status == 200]
    refused = [answer for answer in answers if answer.status != 200]
    assert {answer.error for answer in refused} == {(429, "rate_limit_exceeded")}
    assert len(passed) == 19
    assert len({answer.headers["x-pid"] for answer in refused}) == 2
    for answer in refused:
        earliest, latest = answer.ends
        assert earliest <= first.got + 60
        assert latest >= first.sent + 60


def test_requests_at_a_time_are_those_of_both_workers(workers):
    key, before = workers.key(max_parallel_requests=3), workers.upstream.count
    workers.upstream.hold()
    sending = workers.together(lambda line, number: line.chat(key, f"parallel {number}"), 12)
    workers.upstream.wait_for(before + 3)
    sending.wait_for(9)
    workers.upstream.release()
    answers = sending.answers()
    assert sorted(answer.status for answer in answers) == [200] * 3 + [429] * 9
    assert {answer.error for answer in answers if answer.status != 200} == {(429, "rate_limit_exceeded")}
    # And the room is there again, for either of them.
    assert [line.chat(key, "afterwards").status for line in workers.both] == [200, 200]


def test_r72_an_update_while_a_request_is_in_flight_stays(workers):
    one, other = workers.both
    workers.upstream.fail_next(200, body=completion())
    key, before = workers.key(max_budget=1, key_alias="old"), workers.upstream.count
    workers.upstream.hold()
    with ThreadPoolExecutor(1) as pool:
        flying = pool.submit(other.chat, key, "r72")
        workers.upstream.wait_for(before + 1)
        changed = one.manage("update", key=key, max_budget=5, key_alias="new", metadata={"a": 1})
        assert changed["spend"] == 0
        workers.upstream.release()
        assert flying.result(PATIENCE_S).status == 200
    info = workers.info(key)
    assert (info["max_budget"], info["key_alias"], info["metadata"]) == (5, "new", {"a": 1})
    assert info["spend"] == pytest.approx(COST)


def test_an_update_is_heeded_by_both_workers(workers):
    key = workers.key(models=["gpt"])
    use(workers, key)
    workers.lines[1].manage("update", key=key, models=["other"])
    assert max(until_refused(workers.both, key, (403, "key_not_allowed")).values()) < 3.0


def test_an_answer_that_one_worker_got_is_the_others(workers):
    one, other = workers.both
    key, before = workers.key(team_id="t"), workers.upstream.count
    texts = [f"shared {number}" for number in range(5)]
    asked = [one.chat(key, text) for text in texts]
    found = [other.chat(workers.key(team_id="t"), text) for text in texts]
    assert [answer.state for answer in asked] == ["miss"] * 5
    if workers.redis is None:  # each has a memory of its own
        assert [answer.state for answer in found] == ["miss"] * 5
        return
    assert [(answer.state, answer.headers["x-llm-cache-tier"]) for answer in found] == [("hit", "redis")] * 5
    assert [answer.body for answer in found] == [answer.body for answer in asked]
    assert workers.upstream.count - before == 5


@pytest.mark.parametrize("server", SERVERS)
def test_a_redis_that_dies_costs_no_request_of_a_key_that_is_known(server, tmp_path):
    """Hits and misses of both workers, before, during and after; nobody can tell of other keys: 503."""
    with (
        FakeUpstream() as upstream,
        redis_server() as redis,
        running(server, IN_REDIS.format(port=redis.port), upstream, tmp_path) as workers,
    ):
        key = workers.key(max_budget=100, rpm_limit=10_000, max_parallel_requests=50)
        assert [line.chat(key).status for line in workers.both] == [200, 200]
        dead, asked = threading.Event(), itertools.count()

        def used_by(line: Line, number: int) -> list[Told]:
            """Until fifteen have come after its death."""
            answers, after = [], 0
            while after < 15:
                after += dead.is_set()
                answers.append(line.chat(key, "hi" if after % 2 else f"{number} {next(asked)}"))
            return answers

        with ThreadPoolExecutor(6) as pool:
            using = [pool.submit(used_by, line, number) for number, line in enumerate(workers.lines[:6])]
            until(lambda: upstream.count > 20, "they are at it")
            redis.kill()
            dead.set()
            answers = [answer for each in using for answer in each.result(60)]
        assert {answer.status for answer in answers} == {200}
        assert {answer.headers["x-pid"] for answer in answers} == {line.pid for line in workers.both}
        unknown = [line.chat("sk-a-key-that-nobody-has-seen").error for line in workers.both]
        assert unknown == [(503, "key_store_unavailable")] * 2
        assert [line.request("GET", "/v1/models").status for line in workers.both] == [200, 200]


@pytest.mark.parametrize("server", SERVERS)
def test_a_redis_that_hangs_is_not_waited_for_again_and_again(server, tmp_path):
    """C62: it is asked until that is known, and then listened to; once it is back, keys are as they are."""
    with (
        FakeUpstream() as upstream,
        redis_server() as redis,
        running(server, KEYS_IN_REDIS.format(port=redis.port), upstream, tmp_path) as workers,
    ):
        one, other = workers.both
        key = workers.key(max_budget=100, rpm_limit=10_000)
        assert [line.chat(key).status for line in (one, other)] == [200, 200]
        redis.pause()
        numbers = itertools.count()

        def at_once() -> bool:
            """Whether five requests in a row wait for nothing."""
            told = [line.chat(key, f"hung {next(numbers)}") for line in (one, other) for _ in range(5)]
            assert [answer.status for answer in told] == [200] * 10
            return sum(answer.got - answer.sent for answer in told) < 0.4

        until(at_once, "it is known to hang")
        redis.resume()
        until(lambda: one.request("POST", "/key/block", {"key": key}).status == 200, "it is back")
        assert max(until_refused((one, other), key, (403, "blocked_key")).values()) < PATIENCE_S
