"""What goes wrong with a store costs no request (C61, C64, C65): real faults in the midst of traffic, by
threads and by event loops, with every answer checked. The run is that of ``benchmarks.reliability``."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator

import pytest

from benchmarks.reliability import FAULTS, Clock, run
from llm_middleware import CacheManager
from tests.services import HOST, RedisServer, redis_server, wait_for
from tests.support import completion

REQUESTS = 300
BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
# S3 that refuses is left to the benchmark: its server takes seconds to start, and S3 that hangs is here.
SHORT = [fault for fault in FAULTS if fault != "S3: refused"]
MINUTES = 300.0  # seconds by which clocks differ

# Where connecting to a Cluster is given up for lack of time, redis-py leaves what it had connected to the
# garbage collector.
_LEFT = pytest.mark.filterwarnings("ignore:.*(nclosed|loop is closed):ResourceWarning")


@_LEFT
@pytest.mark.parametrize("fault", SHORT)
def test_c61_a_fault_in_the_midst_costs_no_request(fault: str) -> None:
    outcome = run(fault, REQUESTS, single_flight_lease=0.5)
    gc.collect()
    assert (outcome.failed, outcome.wrong, outcome.ages) == ([], [], [])
    assert outcome.answered == REQUESTS
    assert outcome.evidence > 0  # the fault did happen
    assert outcome.hits > 0  # and memory went on
    assert outcome.bounded, f"{outcome.errors} errors where the breaker allows {outcome.allowed}"


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


@pytest.mark.parametrize("late", ["writer", "reader"])
def test_c38_clocks_apart_keep_an_entry_no_longer_than_redis_and_memory_do(
    server: RedisServer, face, late: str
) -> None:
    """A reader that is late takes it for fresh for minutes more; a late writer makes one that is over."""
    clocks = {"writer": Clock(), "reader": Clock()}
    clocks[late].offset = -MINUTES
    given = {"host": HOST, "port": server.port, "namespace": f"skew-{late}-{face.name}", "store_timeout": 10}
    lives = {"ttl": 1, "ttl_jitter": 0, "default_in_memory_ttl": 0.25}
    writer, reader = (CacheManager("redis", **given, **lives, clock=clock) for clock in clocks.values())
    key = f"{given['namespace']}:{face.fetch(writer, BODY, lambda body: completion('old')).cache.key}"
    assert face.get(writer, BODY).json() == completion("old")
    found = face.get(reader, BODY)
    assert (found is None) == (late == "writer")
    wait_for(lambda: not server.ask("EXISTS", key), "Redis has removed the entry")
    # Memory kept it since before that, and no longer than it may.
    wait_for(lambda: face.get(reader, BODY) is None, "the entry is over")
    assert face.fetch(reader, BODY, lambda body: completion("new")).json() == completion("new")
    for cache in (writer, reader):
        face.do(cache, "close")
        cache.close()


def test_c64_a_burst_of_failures_is_three_events_and_one_line(face, caplog) -> None:
    """By one caller; what is asked for later says so, and costs the store nothing."""
    events: list[str] = []
    with redis_server() as server:
        cache = CacheManager(
            "redis",
            host=HOST,
            port=server.port,
            memory_tier=False,
            single_flight="process",
            store_timeout=10,
            hooks=[lambda event: events.append(event.name)],
        )
        assert face.fetch(cache, BODY, lambda body: completion()).cache.stored is True
    events.clear()
    with caplog.at_level(logging.WARNING, "llm_middleware"):
        for number in range(20):
            answer = face.fetch(cache, BODY, lambda body, number=number: completion(str(number)))
            assert answer.json() == completion(str(number))
            assert (answer.cache.status, answer.cache.detail) == ("miss", "backend-down")
    assert events.count("store-error") == 3
    assert [record.getMessage()[:25] for record in caplog.records] == ["cache store redis failed:"]
    face.do(cache, "close")
    cache.close()
