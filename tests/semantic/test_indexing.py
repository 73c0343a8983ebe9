"""What stands between requests and an index: texts that it cannot read, and rows that it has to be rid of."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from llm_middleware import CacheManager
from llm_middleware._drive import run_sync
from llm_middleware._ports.faces import SYNC
from llm_middleware.caching.at_rest import AtRest
from llm_middleware.errors import StoreError
from llm_middleware.semantic.index_numpy import NumpyIndex
from llm_middleware.semantic.indexing import Index
from llm_middleware.testing import FakeClock
from tests.contract.vectors import make_row, scope_of, unit_vectors
from tests.services import HOST, redis_server
from tests.support import completion
from tests.vector_services import on_redis_8, redisearch

VECTOR = unit_vectors(1)[0]
TEXT = "How do I enable \ud800 two-factor authentication?"


def sealed_index(key: object, within: NumpyIndex) -> Index:
    return Index(within, budget=1.0, at_rest=AtRest(compress=None, encryption_key=key))


def found(index: Index) -> list[str]:
    return [one.row.text for one in run_sync(index.search(SYNC, scope_of(0), VECTOR.tobytes(), 3))]


def test_a_sealed_text_comes_back_and_is_nowhere_in_the_index():
    within, key = NumpyIndex(), os.urandom(32)
    index = sealed_index(key, within)
    run_sync(index.add(SYNC, make_row(1, VECTOR, text=TEXT), "tenant"))
    assert found(index) == [TEXT]
    [raw] = within.search(scope_of(0), VECTOR.tobytes(), 1)
    assert "enable" not in raw.row.text
    assert raw.row.key == make_row(1, VECTOR).key


def test_what_cannot_be_opened_is_not_found():
    within = NumpyIndex()
    run_sync(sealed_index(os.urandom(32), within).add(SYNC, make_row(1, VECTOR, text=TEXT), ""))
    within.add(make_row(2, VECTOR, text="as it is"))
    [sealed] = [
        one.row for one in within.search(scope_of(0), VECTOR.tobytes(), 3) if one.row.text != "as it is"
    ]
    within.add(replace(make_row(3, VECTOR), text=sealed.text))  # of another row
    assert found(sealed_index(os.urandom(32), within)) == []


def test_a_caller_without_a_key_is_not_kept():
    index = sealed_index({"tenant": os.urandom(32)}, NumpyIndex())
    run_sync(index.add(SYNC, make_row(1, VECTOR, text=TEXT), "tenant"))
    with pytest.raises(StoreError):
        run_sync(index.add(SYNC, make_row(2, VECTOR, text=TEXT), "stranger"))
    assert found(index) == [TEXT]


class Keeping(NumpyIndex):
    keeps_over = True


def test_rows_that_are_over_are_purged_from_time_to_time(when):
    clock = FakeClock()
    within = Keeping(clock=clock)
    index = Index(within, budget=1.0)
    run_sync(index.add(SYNC, make_row(1, VECTOR, expires=clock() + 60), ""))
    clock.advance(61)
    run_sync(index.add(SYNC, make_row(2, VECTOR), ""))
    assert within.count() == 2  # not with every row
    index._purge_at = 0.0  # ten minutes later
    run_sync(index.add(SYNC, make_row(3, VECTOR), ""))
    when(lambda: within.count() == 2)


def test_an_encrypted_cache_shows_redis_no_question(face):
    key = os.urandom(32)
    with on_redis_8(redis_server(*redisearch())) as server:
        given = {"host": HOST, "port": server.port, "store_timeout": 20, "embedding_budget": 60}
        first, second = (
            CacheManager("redis-semantic", similarity_threshold=0.8, encryption_key=key, **given)
            for _ in range(2)
        )
        face.fetch(first, asked("How do I enable two-factor authentication?"), lambda body: completion("so"))
        answer = face.fetch(
            second, asked("How can I turn on two-factor auth?"), lambda body: completion("no")
        )
        assert (answer.cache.status, answer.json()) == ("semantic-hit", completion("so"))
        with server.client() as client:
            for name in client.scan_iter("*"):
                assert b"two-factor" not in (client.dump(name) or b"")
        for cache in (first, second):
            face.do(cache, "close")
            cache.close()


def asked(text: str) -> dict[str, object]:
    return {"model": "m", "messages": [{"role": "user", "content": text}]}
