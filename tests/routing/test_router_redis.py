"""Routers that share a real Redis: limits and cooldowns of many processes, lists of embeddings in one look.

Redis gets ample time here, so that a machine that is busy is not taken for a Redis that fails."""

from __future__ import annotations

import contextlib
import gc
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_middleware import CacheManager
from llm_middleware.errors import ConfigError, NoCapacityError
from llm_middleware.routing.router import Router
from llm_middleware.testing import FakeUpstream
from tests.routing.callers import PATIENCE, Callers, Recorder, ask, in_flight, row
from tests.s3_services import S3Server, clean_environment, moto_server
from tests.services import HOST, RedisServer, redis_cluster, redis_server, wait_for

ROOT = Path(__file__).parents[2]
AMPLE = {"socket_timeout": 10}


@pytest.fixture(params=["sync", "async"])
def callers(request: pytest.FixtureRequest) -> Iterator[Callers]:
    made = Callers(request.param)
    yield made
    made.close()


@pytest.fixture
def up() -> Iterator[Recorder]:
    with Recorder() as recorder:
        yield recorder


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as one:
        yield one


@pytest.fixture
def fresh(server: RedisServer) -> RedisServer:
    server.ask("FLUSHALL")
    server.ask("CONFIG", "RESETSTAT")
    return server


def url(server: RedisServer) -> str:
    return f"redis://{HOST}:{server.port}"


def shared(server: RedisServer, *rows: dict[str, Any], **settings: Any) -> Router:
    return Router(list(rows), redis_url=url(server), **{"redis": AMPLE, **settings})


@contextlib.contextmanager
def closing(callers: Callers, *routers: Router) -> Iterator[None]:
    """Close the Routers, and the caches that they made, on both faces."""
    try:
        yield
    finally:
        for router in routers:
            callers.task(router.aclose()).result(PATIENCE)
            if router.cache is not None:
                callers.task(router.cache.aclose()).result(PATIENCE)


def counted(server: RedisServer, id: str, group: str = "m") -> dict[str, float]:  # noqa: A002
    held = server.ask("HGETALL", f"{{llm:router:{group}}}:{id}")
    assert isinstance(held, dict)
    return {key.decode(): float(value) for key, value in held.items()}


# --- processes

# Reads its task, says that it is ready, and begins when the key ``go`` is there.
CHILD = """
import asyncio, json, sys
from concurrent.futures import ThreadPoolExecutor
import redis
from llm_middleware import Router
from llm_middleware.errors import NoCapacityError, RateLimitError

task = json.loads(sys.argv[1])
router = Router(task["rows"], redis_url=task["redis"], redis={"socket_timeout": 10}, **task["settings"])
ask = [{"role": "user", "content": "?"}]
calls, told = task["calls"], []

def call(_):
    try:
        return router.completion("m", ask).route.deployment
    except (NoCapacityError, RateLimitError) as exc:
        return type(exc).__name__

async def acall():
    try:
        return (await router.acompletion("m", ask)).route.deployment
    except (NoCapacityError, RateLimitError) as exc:
        return type(exc).__name__

async def main():
    got = []
    for _ in range(0, calls, 10):
        got += await asyncio.gather(*(acall() for _ in range(min(10, calls))))
    await router.aclose()
    return got

with redis.Redis.from_url(task["redis"]) as client:
    print("ready", flush=True)
    client.blpop("go-" + task["name"], 30)
if task["face"] == "async":
    told = asyncio.run(main())
else:
    with ThreadPoolExecutor(10) as pool:
        told = list(pool.map(call, range(calls)))
print(json.dumps(told), flush=True)
sys.stdin.readline()
router.close()
"""


@contextlib.contextmanager
def processes(
    server: RedisServer, face: str, rows: list[dict[str, Any]], *calls: int, **settings: object
) -> Iterator[list[list[str]]]:
    """What each process got for its calls: the deployment's id or the error's name. They begin together, and
    live on until the block ends."""
    running = []
    for number, count in enumerate(calls):
        task = {
            "name": str(number),
            "rows": rows,
            "redis": url(server),
            "face": face,
            "calls": count,
            "settings": settings,
        }
        running.append(
            subprocess.Popen(
                [sys.executable, "-c", CHILD, json.dumps(task)],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    try:
        for child in running:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
        with server.client() as client, client.pipeline(transaction=True) as together:
            for number in range(len(calls)):
                together.rpush(f"go-{number}", "go")
            together.execute()
        yield [json.loads(child.stdout.readline()) for child in running if child.stdout is not None]
    finally:
        for child in running:
            child.communicate("\n", timeout=PATIENCE)
        assert [child.returncode for child in running] == [0] * len(running)


@pytest.mark.parametrize("face", ["sync", "async"])
def test_r7_two_processes_share_one_limit(fresh: RedisServer, up: Recorder, face: str) -> None:
    with processes(fresh, face, [row(up, id="a", rpm=100)], 150, 150) as told:
        assert [len(each) for each in told] == [150, 150]
        got = told[0] + told[1]
        assert (got.count("a"), got.count("NoCapacityError")) == (100, 200)
        assert up.count == 100
        assert counted(fresh, "a")["r"] == 100


@pytest.mark.parametrize("face", ["sync", "async"])
def test_r33_what_one_process_benches_the_other_leaves_alone_within_a_second(
    callers: Callers, fresh: RedisServer, face: str
) -> None:
    with FakeUpstream() as first, FakeUpstream() as second:
        rows = [row(first, id="a", order=1), row(second, id="b", order=2)]
        router = shared(fresh, *rows, num_retries=0)
        with closing(callers, router):
            assert callers(router, "completion", "m", ask("?")).route.deployment == "a"
            first.fail_next(429, headers={"Retry-After": "60"})
            with processes(fresh, face, rows, 1, num_retries=0) as told:
                began = time.monotonic()
                assert told == [["RateLimitError"]]
                wait_for(
                    lambda: callers(router, "completion", "m", ask("?")).route.deployment == "b",
                    "the cooldown is known",
                )
                assert time.monotonic() - began < 1.0
                before = first.count
                for _ in range(20):
                    assert callers(router, "completion", "m", ask("?")).route.deployment == "b"
                assert first.count == before
        assert router._routing.state.of(router.deployments[0]).health.until > router._routing.clock() + 30


# --- one process


def test_r8_a_router_made_without_a_loop_counts_the_calls_of_every_loop(
    fresh: RedisServer, up: Recorder
) -> None:
    router = shared(fresh, row(up, id="a"))
    untold = []
    for _ in range(2):
        callers = Callers("async")
        for _ in range(10):
            callers(router, "completion", "m", ask("?"))
            untold.append(router._routing.limits.store.untold)  # type: ignore[attr-defined]
        callers.close(router)
    assert counted(fresh, "a")["r"] == 20
    assert max(untold) <= 2  # one thing to tell of a minute
    assert router._routing.limits.store.untold == 0  # type: ignore[attr-defined]
    tokens = counted(fresh, "a")["t"]
    state = router._routing.state.of(router.deployments[0])
    assert (state.requests, state.tokens, state.in_flight) == (20, tokens, 0)


def test_a_call_is_one_round_trip(callers: Callers, fresh: RedisServer, up: Recorder) -> None:
    rows = [row(up, id=f"d{number}", rpm=100, tpm=100_000, order=number) for number in range(5)]
    router = shared(fresh, *rows)
    store = router._routing.limits.store  # type: ignore[attr-defined]
    with closing(callers, router):
        callers(router, "completion", "m", ask("?"))
        store.close()  # so that nothing is told but with a reservation
        store._mine()._start = lambda: None
        fresh.ask("CONFIG", "RESETSTAT")
        for _ in range(20):
            callers(router, "completion", "m", ask("?"))
        calls = fresh.calls()
        assert calls.pop("evalsha") == 20
        inside = {"time", "hmget", "hset", "hget", "pexpire"}  # of the script
        assert set(calls) - inside <= {"config|resetstat", "info", "hello", "client|setinfo"}
        assert store.untold == 1


def test_r6_what_redis_says_of_the_minute_is_told(callers: Callers, fresh: RedisServer, up: Recorder) -> None:
    routers = [shared(fresh, row(up, id="a", rpm=2)) for _ in range(2)]
    with closing(callers, *routers):
        for router in routers:
            callers(router, "completion", "m", ask("?"))
        for router in routers:
            with pytest.raises(NoCapacityError) as caught:
                callers(router, "completion", "m", ask("?"))
            assert caught.value.retry_after is not None
            assert 60.0 - PATIENCE < caught.value.retry_after < 60.0
    assert up.count == 2


def test_r56_the_line_holds_over_redis(callers: Callers, fresh: RedisServer, up: Recorder) -> None:
    router = shared(fresh, row(up, id="a", max_parallel_requests=1), wait_for_capacity=60)
    with closing(callers, router):
        calls = [callers.begin(router, "completion", "m", ask(str(number))) for number in range(16)]
        assert [call.result(PATIENCE).route.attempts for call in calls] == [1] * 16
        assert (up.most, in_flight(router)) == (1, [0])
        wait_for(lambda: counted(fresh, "a")["r"] == 16, "what was given back is told")


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of sockets in a cycle
def test_a_stream_may_be_collected_in_a_thread_that_tells(fresh: RedisServer, up: Recorder) -> None:
    callers, router = Callers("sync"), shared(fresh, row(up, id="a"))
    up.hold(after_events=4)

    def collect() -> None:
        cycle: list[object] = [router.completion("m", ask("stream"), stream=True)]
        cycle.append(cycle)
        del cycle
        with router._routing.limits.store._mine()._lock:  # type: ignore[attr-defined]
            gc.collect()

    with closing(callers, router):
        callers._pool.submit(collect).result(PATIENCE)
        assert in_flight(router) == [0]
    callers.close()


@pytest.mark.parametrize("trouble", ["kill", "pause"])
def test_a_redis_that_dies_in_the_midst_costs_no_call(callers: Callers, up: Recorder, trouble: str) -> None:
    with redis_server() as own:
        router = Router(
            [row(up, id="a", rpm=1000, max_parallel_requests=4)],
            redis_host=HOST,
            redis_port=own.port,
            wait_for_capacity=60,
        )
        with closing(callers, router):
            calls = [callers.begin(router, "completion", "m", ask(str(number))) for number in range(40)]
            up.wait_for(10)
            getattr(own, trouble)()
            calls += [callers.begin(router, "completion", "m", ask(str(number))) for number in range(40)]
            assert [call.result(PATIENCE).route.attempts for call in calls] == [1] * 80
            assert (up.count, in_flight(router)) == (80, [0])
            assert up.most <= 4
            if trouble == "pause":
                own.resume()


def test_limits_hold_in_one_process_where_redis_never_was(callers: Callers, up: Recorder) -> None:
    with redis_server() as own:
        own.kill()
        router = Router([row(up, id="a", rpm=3)], redis_url=url(own))
        with closing(callers, router):
            for _ in range(3):
                assert callers(router, "completion", "m", ask("?")).route.attempts == 1
            with pytest.raises(NoCapacityError) as caught:
                callers(router, "completion", "m", ask("?"))
        assert caught.value.retry_after == pytest.approx(60.0, abs=PATIENCE)
        assert up.count == 3


def test_a_password_is_given_and_not_shown(callers: Callers, up: Recorder) -> None:
    with redis_server("--requirepass", "of-the-server", password="of-the-server") as own:
        router = Router(
            [row(up, id="a", rpm=2)],
            redis_host=HOST,
            redis_port=str(own.port),
            redis_password="of-the-server",
            redis=AMPLE,
            cache_responses=True,
        )
        with closing(callers, router):
            assert callers(router, "completion", "m", ask("?")).cache.status == "miss"
            assert callers(router, "completion", "m", ask("?")).cache.status == "hit"
            assert counted(own, "a")["r"] == 1
        assert "of-the-server" not in repr(router.settings)
        wrong = Router([row(up, id="b")], redis_url=url(own), redis_password="wrong")
        with closing(callers, wrong):
            assert callers(wrong, "completion", "m", ask("?")).route.attempts == 1
        assert counted(own, "b") == {}


def test_a_cluster_with_a_password(callers: Callers, up: Recorder) -> None:
    secret = "of-the-cluster"
    with redis_cluster(3, "--requirepass", secret, "--masterauth", secret, password=secret) as cluster:
        settings = {"redis_startup_nodes": cluster.nodes, "password": secret, **AMPLE}
        rows = [row(up, name, id=f"{name}-{number}", rpm=2) for name in "mn" for number in range(2)]
        routers = [Router(rows, redis=settings, cache_responses=True) for _ in range(2)]
        told = []
        with closing(callers, *routers):
            for number in range(6):
                for model in "mn":
                    router = routers[number % 2]
                    try:
                        callers(router, "completion", model, ask(str(number)))
                        told.append(model)
                    except NoCapacityError:
                        told.append("-")
            assert told == [*"mn" * 4, *"----"]
            again = callers(routers[1], "completion", "m", ask("0"))  # the other one's
            assert again.cache.status == "hit"
        assert cluster.calls("evalsha") + cluster.calls("eval") >= 12


def test_namespaces_are_apart(callers: Callers, fresh: RedisServer, up: Recorder) -> None:
    routers = [
        shared(fresh, row(up, id="a", rpm=1), redis={**AMPLE, "namespace": name}) for name in ("one", "two")
    ]
    with closing(callers, *routers):
        for router in routers:
            callers(router, "completion", "m", ask("?"))
            with pytest.raises(NoCapacityError):
                callers(router, "completion", "m", ask("?"))
    assert fresh.ask("EXISTS", "{one:router:m}:a", "{two:router:m}:a") == 2


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"redis_url": "http://x"}, "url"),
        ({"redis_host": "x", "redis_port": "many"}, "port"),
        ({"redis": {"hots": "x"}}, "hots"),
        ({"redis": 3}, "redis"),
        ({"redis_host": "x", "redis_url": "redis://y"}, "host"),
    ],
)
def test_wrong_settings_of_redis_are_told_at_once(settings: dict[str, Any], param: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Router([], **settings)
    assert caught.value.param == param


def test_hits_ask_no_limit(callers: Callers, fresh: RedisServer, up: Recorder) -> None:
    router = shared(fresh, row(up, id="a", rpm=1), cache_responses=True)
    with closing(callers, router):
        callers(router, "completion", "m", ask("?"))
        router._routing.limits.store.close()  # type: ignore[attr-defined]
        fresh.ask("CONFIG", "RESETSTAT")
        for _ in range(10):
            assert callers(router, "completion", "m", ask("?")).cache.status == "hit"
        assert fresh.calls().get("evalsha", 0) == 0
    other = shared(fresh, row(up, id="a", rpm=1), cache_responses=True)
    with closing(callers, other):  # another process's first look is in Redis, and takes no limit either
        assert callers(other, "completion", "m", ask("?")).cache.status == "hit"
    assert counted(fresh, "a")["r"] == 1
    assert up.count == 1


# --- lists of embeddings


def vectors(answer: Any) -> list[Any]:
    return [item.embedding for item in answer.data]


def test_c93_a_hundred_inputs_are_one_look(callers: Callers, fresh: RedisServer, up: Recorder) -> None:
    texts = [f"text {number:02}" for number in range(100)]  # two tokens each
    usage = {"prompt_tokens": 200, "total_tokens": 200}

    def router() -> Router:
        return shared(fresh, row(up, id="a"), cache_responses=True)

    first, second, third = router(), router(), router()
    with closing(callers, first, second, third):
        fresh.ask("CONFIG", "RESETSTAT")
        made = callers(first, "embedding", "m", texts)
        assert (made.cache.status, fresh.calls()["mget"]) == ("miss", 1)
        assert made.usage.model_dump() == usage
        wait_for(lambda: len(fresh.ask("KEYS", "*")) >= 100, "all are stored")  # type: ignore[arg-type]
        fresh.ask("CONFIG", "RESETSTAT")
        again = callers(second, "embedding", "m", texts[::-1])
        assert (again.cache.status, fresh.calls()["mget"]) == ("hit", 1)
        assert "get" not in fresh.calls()
        assert vectors(again) == vectors(made)[::-1]
        assert [item.index for item in again.data] == list(range(100))
        assert again.usage.model_dump() == usage
        assert up.count == 1
        fresh.ask("CONFIG", "RESETSTAT")
        mixed = [f"{kind} {number:02}" for number in range(50) for kind in ("news", "text")]
        partial = callers(third, "embedding", "m", mixed)
        assert (partial.cache.status, fresh.calls()["mget"]) == ("partial", 1)
        assert up.calls[1].json["input"] == [f"news {number:02}" for number in range(50)]
        assert vectors(partial)[1::2] == vectors(made)[:50]
        assert [item.index for item in partial.data] == list(range(100))
        assert partial.usage.model_dump() == usage
        assert up.count == 2


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with moto_server() as one:
        yield one


@pytest.fixture
def bucket(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    clean = clean_environment()
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_EC2_METADATA_DISABLED", "NO_PROXY"):
        monkeypatch.setenv(name, clean[name])
    name = f"bucket-{time.monotonic_ns()}"
    client = s3.client()
    client.create_bucket(Bucket=name)
    client.close()
    return name


def test_c92_a_partial_hit_on_s3(callers: Callers, s3: S3Server, bucket: str, up: Recorder) -> None:
    def router() -> Router:
        cache = CacheManager(type="s3", **s3.settings(bucket))  # type: ignore[arg-type]
        return Router([row(up, id="a")], cache=cache)

    first, second = router(), router()
    with closing(callers, first, second):
        made = callers(first, "embedding", "m", ["a", "b", "c"])
        client = s3.client()
        wait_for(lambda: client.list_objects_v2(Bucket=bucket).get("KeyCount", 0) >= 3, "all are stored")
        client.close()
        partial = callers(second, "embedding", "m", ["x", "c", "y", "a", "a"])
        assert (made.cache.status, partial.cache.status) == ("miss", "partial")
        assert [call.json["input"] for call in up.calls] == [["a", "b", "c"], ["x", "y"]]
        a, _, c = vectors(made)
        assert [vectors(partial)[place] for place in (1, 3, 4)] == [c, a, a]
        assert [item.index for item in partial.data] == [0, 1, 2, 3, 4]
        assert partial.usage.model_dump() == {"prompt_tokens": 4, "total_tokens": 4}
        whole = callers(second, "embedding", "m", ["y", "b"])
        assert (whole.cache.status, len(vectors(whole))) == ("hit", 2)
        assert vectors(whole) == [vectors(partial)[2], vectors(made)[1]]
        assert whole.usage.model_dump() == {"prompt_tokens": 2, "total_tokens": 2}
    assert up.count == 2
