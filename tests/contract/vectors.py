"""What every vector index must do, as tests: classes for pytest to collect from a subclass.

::

    class TestMyIndex(AtomicStatesContract, VectorIndexContract):
        @contextmanager
        def open_index(self, clock):
            yield MyIndex(clock=clock)

    class TestMyIndexAsync(AtomicStatesContract, AsyncVectorIndexContract):
        @contextmanager
        def open_async_index(self, clock):
            yield MyIndex(clock=clock)
"""

from __future__ import annotations

import asyncio
import math
import random
import threading
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from llm_middleware.errors import InvalidRequestError
from llm_middleware.semantic.records import AsyncVectorIndex, Neighbour, Row, VectorIndex
from llm_middleware.testing import FakeClock
from llm_middleware.types import Clock

__all__ = [
    "NEVER",
    "AsyncVectorIndexContract",
    "AtomicStatesContract",
    "Awaited",
    "VectorIndexContract",
    "key_of",
    "keys",
    "make_row",
    "scope_of",
    "unit_vectors",
]

T = TypeVar("T")
NEVER = math.inf
Vectors = NDArray[np.float32]
_SIZE = 16  # dimensions of the contract's vectors


def key_of(number: int, namespace: str = "a") -> str:
    return f"{namespace}:{number:064x}"


def scope_of(number: int) -> str:
    return f"{number:064x}"


def unit_vectors(count: int, dimensions: int = _SIZE, seed: int = 1) -> Vectors:
    """Directions at random; no two of them alike."""
    drawn = np.random.default_rng(seed).standard_normal((count, dimensions), dtype=np.float32)
    unit: Vectors = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    return unit


def make_row(
    number: int,
    vector: Vectors,
    *,
    scope: int = 0,
    expires: float = NEVER,
    namespace: str = "a",
    text: str | None = None,
    payload: Mapping[str, object] | None = None,
) -> Row:
    words = f"question {number}" if text is None else text
    return Row(
        key_of(number, namespace), scope_of(scope), words, vector.tobytes(), expires, dict(payload or {})
    )


def keys(found: list[Neighbour]) -> list[str]:
    return [neighbour.row.key for neighbour in found]


class VectorIndexContract:
    """Tests of the sync face of an index (`llm_middleware.semantic.records.VectorIndex`).

    ``tolerance``: by how much a similarity may differ from the exact cosine.
    """

    tolerance = 1e-5
    threads = 4
    rounds = 150
    examples = 60

    def open_index(self, clock: Clock) -> AbstractContextManager[VectorIndex]:
        """An empty index that takes the time from ``clock``, closed at the end."""
        raise NotImplementedError("open an empty index that takes the time from `clock`")

    def reopen(self, index: VectorIndex, clock: Clock) -> VectorIndex:
        """The same rows after a restart; here, after `close`."""
        index.close()
        return index

    @pytest.fixture
    def clock(self) -> FakeClock:
        return FakeClock()

    @pytest.fixture
    def index(self, clock: FakeClock) -> Iterator[VectorIndex]:
        with self.open_index(clock) as index:
            yield index

    def test_it_is_an_index(self, index: VectorIndex) -> None:
        assert isinstance(index, VectorIndex)
        assert index.count() == 0

    def test_an_empty_index_finds_nothing(self, index: VectorIndex) -> None:
        query = unit_vectors(1)[0].tobytes()
        assert index.search(scope_of(0), query, 3) == []
        index.add(make_row(1, unit_vectors(1)[0], scope=1))
        assert index.search(scope_of(0), query, 3) == []

    def test_a_row_comes_back_as_it_went_in(self, index: VectorIndex, clock: FakeClock) -> None:
        texts = ["Wie groß ist Köln?", "", "line\nbreak \x00 \ud800 \U0001f600", "x" * 20_000]
        vectors = unit_vectors(len(texts))
        payload = {"labels": [1, 0, 1], "alias": key_of(9), "more": {"nested": None}}
        for number, text in enumerate(texts):
            expires = clock() + 60 if number % 2 else NEVER
            index.add(
                make_row(
                    number, vectors[number], text=text, expires=expires, payload=payload if number else {}
                )
            )
        for number, text in enumerate(texts):
            best = index.search(scope_of(0), vectors[number].tobytes(), 1)[0]
            assert best.similarity == pytest.approx(1, abs=self.tolerance)
            assert best.similarity <= 1
            row = best.row
            assert (row.key, row.scope, row.text) == (key_of(number), scope_of(0), text)
            assert row.expires == pytest.approx(clock() + 60 if number % 2 else NEVER, abs=0.01)
            assert dict(row.payload) == (payload if number else {})

    def test_the_best_come_first_with_their_cosine(self, index: VectorIndex) -> None:
        vectors = unit_vectors(40)
        for number, vector in enumerate(vectors):
            index.add(make_row(number, vector))
        query = unit_vectors(1, seed=2)[0]
        cosines = vectors @ query
        order = np.argsort(-cosines)[:8]
        found = index.search(scope_of(0), query.tobytes(), 8)
        assert keys(found) == [key_of(int(number)) for number in order]
        assert [neighbour.similarity for neighbour in found] == pytest.approx(
            cosines[order].tolist(), abs=self.tolerance
        )

    def test_a_similarity_may_be_negative(self, index: VectorIndex) -> None:
        vector = unit_vectors(1)[0]
        index.add(make_row(1, vector))
        found = index.search(scope_of(0), (-vector).tobytes(), 1)
        assert found[0].similarity == pytest.approx(-1, abs=self.tolerance)

    def test_scopes_never_meet(self, index: VectorIndex) -> None:
        """C100: the best row of another scope is no neighbour."""
        vectors = unit_vectors(30)
        for number, vector in enumerate(vectors):
            index.add(make_row(number, vector, scope=number % 3))
        for number, vector in enumerate(vectors):
            for scope in range(3):
                found = index.search(scope_of(scope), vector.tobytes(), 30)
                assert {n.row.scope for n in found} == {scope_of(scope)}
                assert sorted(keys(found)) == [key_of(n) for n in range(30) if n % 3 == scope]
                assert (keys(found)[0] == key_of(number)) == (number % 3 == scope)

    def test_more_neighbours_than_rows_are_all_rows(self, index: VectorIndex) -> None:
        vectors = unit_vectors(5)
        for number, vector in enumerate(vectors):
            index.add(make_row(number, vector))
        for k in (5, 6, 1000):
            found = index.search(scope_of(0), vectors[0].tobytes(), k)
            assert sorted(keys(found)) == [key_of(number) for number in range(5)]

    @pytest.mark.parametrize("k", [0, -1])
    def test_fewer_than_one_neighbour_is_refused(self, index: VectorIndex, k: int) -> None:
        with pytest.raises(InvalidRequestError) as caught:
            index.search(scope_of(0), unit_vectors(1)[0].tobytes(), k)
        assert caught.value.param == "k"

    def test_ties_are_all_found_once(self, index: VectorIndex) -> None:
        vectors = unit_vectors(2)
        for number in range(12):
            index.add(make_row(number, vectors[0]))
        index.add(make_row(99, vectors[1]))
        found = index.search(scope_of(0), vectors[0].tobytes(), 12)
        assert sorted(keys(found)) == [key_of(number) for number in range(12)]
        some = keys(index.search(scope_of(0), vectors[0].tobytes(), 5))
        assert len(set(some)) == 5
        assert set(some) < set(keys(found))

    def test_a_second_row_of_a_key_replaces_the_first(self, index: VectorIndex, clock: FakeClock) -> None:
        vectors = unit_vectors(3)
        index.add(make_row(1, vectors[0], text="first", payload={"n": 1}))
        index.add(make_row(1, vectors[1], text="second", expires=clock() + 60))
        found = index.search(scope_of(0), vectors[1].tobytes(), 5)
        assert [(n.row.key, n.row.text, dict(n.row.payload)) for n in found] == [(key_of(1), "second", {})]
        assert found[0].similarity == pytest.approx(1, abs=self.tolerance)
        index.add(make_row(1, vectors[1], text="third", payload={"n": 3}))
        found = index.search(scope_of(0), vectors[1].tobytes(), 5)
        assert [(n.row.text, n.row.expires, dict(n.row.payload)) for n in found] == [
            ("third", NEVER, {"n": 3})
        ]
        assert index.count() == 1

    def test_a_key_is_in_one_scope_only(self, index: VectorIndex) -> None:
        vector = unit_vectors(1)[0]
        index.add(make_row(1, vector, scope=1))
        index.add(make_row(1, vector, scope=2))
        assert index.search(scope_of(1), vector.tobytes(), 5) == []
        assert keys(index.search(scope_of(2), vector.tobytes(), 5)) == [key_of(1)]
        assert index.count() == 1

    def test_update_changes_the_payload_and_nothing_else(self, index: VectorIndex, clock: FakeClock) -> None:
        vector = unit_vectors(1)[0]
        index.add(make_row(1, vector, expires=clock() + 60, payload={"n": 1, "gone": True}))
        assert index.update(key_of(1), {"n": 2}) is True
        row = index.search(scope_of(0), vector.tobytes(), 1)[0].row
        assert (row.text, dict(row.payload)) == ("question 1", {"n": 2})
        clock.advance(60)
        assert index.search(scope_of(0), vector.tobytes(), 1) == []
        assert index.update(key_of(2), {"n": 2}) is False
        assert index.search(scope_of(0), vector.tobytes(), 1) == []

    def test_remove_removes_and_counts_what_was_there(self, index: VectorIndex, clock: FakeClock) -> None:
        """C115, C117: unknown keys are no error and count nothing; nor does what is over, or comes twice."""
        vectors = unit_vectors(6)
        for number, vector in enumerate(vectors):
            index.add(make_row(number, vector, expires=clock() + (1 if number == 5 else 60)))
        clock.advance(1)
        gone = [key_of(0), key_of(3), key_of(3), key_of(5), key_of(77), key_of(1, "b")]
        assert index.remove(gone) == 2
        assert index.remove(gone) == 0
        assert index.remove([]) == 0
        for vector in vectors:
            found = index.search(scope_of(0), vector.tobytes(), 10)
            assert sorted(keys(found)) == [key_of(1), key_of(2), key_of(4)]
        assert index.count() == 3

    def test_a_row_is_over_once_its_time_has_passed(self, index: VectorIndex, clock: FakeClock) -> None:
        """C75: it is never a neighbour, though nobody has removed it."""
        vectors = unit_vectors(3)
        for number, vector in enumerate(vectors):
            index.add(make_row(number, vector, expires=clock() + [10, 20, NEVER][number]))
        left = [[0, 1, 2], [1, 2], [2], [2]]
        for expected in left:
            for vector in vectors:
                found = index.search(scope_of(0), vector.tobytes(), 3)
                assert sorted(keys(found)) == [key_of(number) for number in expected]
            clock.advance(10)

    def test_many_rows_that_are_over_hide_none_that_is_not(
        self, index: VectorIndex, clock: FakeClock
    ) -> None:
        vectors = unit_vectors(200)
        for number, vector in enumerate(vectors):
            index.add(make_row(number, vector, expires=clock() + (100 if number % 40 == 7 else 1)))
        clock.advance(1)
        found = index.search(scope_of(0), vectors[3].tobytes(), 5)
        assert sorted(keys(found)) == [key_of(number) for number in range(7, 200, 40)]

    def test_purge_removes_what_is_over(self, index: VectorIndex, clock: FakeClock) -> None:
        vectors = unit_vectors(20)
        for number, vector in enumerate(vectors):
            index.add(make_row(number, vector, scope=number % 4, expires=clock() + 1 + number))
        assert index.purge() == 0
        clock.advance(5)
        assert index.purge() == 5
        assert (index.count(), index.purge()) == (15, 0)
        clock.advance(100)
        assert (index.purge(), index.count()) == (15, 0)

    def test_a_row_that_is_over_already_is_not_kept(self, index: VectorIndex, clock: FakeClock) -> None:
        """C39: nor is the one before it under its key."""
        vector = unit_vectors(1)[0]
        index.add(make_row(1, vector))
        index.add(make_row(1, vector, expires=clock()))
        assert index.search(scope_of(0), vector.tobytes(), 1) == []
        assert index.count() == 0

    def test_flush_removes_exactly_one_namespace(self, index: VectorIndex) -> None:
        """C60, C117: neither a longer name nor a pattern that would match it is touched."""
        names = ["a", "a:b", "ab", "b", "a%", "a_", "a*", "A", "", ":a", "a;", "{a}", "a|b", "a b"]
        vectors = unit_vectors(len(names) * 3)
        for place, name in enumerate(names):
            for number in range(3):
                vector = vectors[place * 3 + number]
                index.add(make_row(number, vector, namespace=name, scope=number))
        assert index.flush("a") == 3
        assert index.flush("a") == 0
        assert index.flush("nothing") == 0
        for number in range(3):
            found = index.search(scope_of(number), vectors[0].tobytes(), 100)
            assert sorted(keys(found)) == sorted(key_of(number, name) for name in names[1:])
        for place, name in enumerate(names[1:], start=2):
            assert index.flush(name) == 3
            assert index.count() == 3 * (len(names) - place)

    def test_what_was_removed_can_be_added_again(self, index: VectorIndex) -> None:
        vectors = unit_vectors(2)
        index.add(make_row(1, vectors[0]))
        index.flush("a")
        index.add(make_row(1, vectors[1]))
        index.remove([key_of(1)])
        index.add(make_row(1, vectors[0]))
        found = index.search(scope_of(0), vectors[0].tobytes(), 5)
        assert (keys(found), index.count()) == ([key_of(1)], 1)

    def test_dimensions_are_those_of_the_first_row(self, index: VectorIndex) -> None:
        index.add(make_row(1, unit_vectors(1)[0]))
        assert index.dimensions == _SIZE

    def test_another_number_of_dimensions_is_refused(self, index: VectorIndex) -> None:
        """Vectors of two embedding models are never compared."""
        vector, longer = unit_vectors(1)[0], unit_vectors(1, 2 * _SIZE)[0]
        index.add(make_row(1, vector))
        with pytest.raises(InvalidRequestError, match="16 dimensions, got 32") as caught:
            index.add(make_row(2, longer))
        assert caught.value.param == "vector"
        with pytest.raises(InvalidRequestError, match="16 dimensions, got 32") as caught:
            index.search(scope_of(0), longer.tobytes(), 1)
        assert caught.value.param == "vector"
        assert index.count() == 1

    @pytest.mark.parametrize(
        "vector",
        [
            b"",
            b"\x00" * 7,
            np.zeros(_SIZE, np.float32).tobytes(),
            np.full(_SIZE, np.nan, np.float32).tobytes(),
            np.full(_SIZE, np.inf, np.float32).tobytes(),
            (2 * unit_vectors(1)[0]).tobytes(),
        ],
        ids=["empty", "not float32", "zero", "nan", "infinite", "twice the length"],
    )
    def test_what_is_no_unit_vector_is_refused(self, index: VectorIndex, vector: bytes) -> None:
        good = unit_vectors(1)[0]
        index.add(make_row(1, good))
        with pytest.raises(InvalidRequestError) as caught:
            index.add(Row(key_of(2), scope_of(0), "text", vector, NEVER, {}))
        assert caught.value.param == "vector"
        with pytest.raises(InvalidRequestError) as caught:
            index.search(scope_of(0), vector, 1)
        assert caught.value.param == "vector"
        assert keys(index.search(scope_of(0), good.tobytes(), 5)) == [key_of(1)]

    def test_rows_outlive_a_restart(self, index: VectorIndex, clock: FakeClock) -> None:
        vectors = unit_vectors(30)
        for number, vector in enumerate(vectors):
            payload = {"n": number} if number % 2 else {}
            expires = clock() + 10 if number % 5 == 0 else NEVER
            index.add(make_row(number, vector, scope=number % 3, expires=expires, payload=payload))
        index.remove([key_of(1), key_of(2)])
        again = self.reopen(index, clock)
        try:
            clock.advance(10)
            kept = [number for number in range(3, 30) if number % 5]
            for number, vector in enumerate(vectors):
                found = again.search(scope_of(number % 3), vector.tobytes(), 30)
                assert sorted(keys(found)) == [key_of(n) for n in kept if n % 3 == number % 3]
                if number in kept:
                    row = found[0].row
                    assert (row.key, row.text) == (key_of(number), f"question {number}")
                    assert dict(row.payload) == ({"n": number} if number % 2 else {})
        finally:
            again.close()

    def test_a_state_comes_back_as_it_was_kept(self, index: VectorIndex) -> None:
        names = ["learnt", "", "a:b", "{a}", "a*", "*", "Köln \x00", "n" * 200]
        for place, name in enumerate(names):
            data = bytes(range(256)) * 16 + bytes([place])
            assert index.state(name) is None
            assert index.keep_state(name, data, None) is True
        for place, name in enumerate(names):
            assert index.state(name) == bytes(range(256)) * 16 + bytes([place])

    def test_a_state_is_kept_only_in_place_of_the_one_before(self, index: VectorIndex) -> None:
        assert index.keep_state("s", b"one", b"nothing such") is False
        assert index.state("s") is None
        assert index.keep_state("s", b"one", None) is True
        for before in (None, b"", b"on", b"one ", b"two"):
            assert index.keep_state("s", b"two", before) is False
            assert index.state("s") == b"one"
        assert index.keep_state("s", b"two", b"one") is True
        assert index.keep_state("s", b"two", b"two") is True
        assert (index.state("s"), index.state("t")) == (b"two", None)

    def test_an_empty_state_is_not_none(self, index: VectorIndex) -> None:
        assert index.keep_state("s", b"", None) is True
        assert index.state("s") == b""
        assert index.keep_state("s", b"one", None) is False
        assert index.keep_state("s", b"one", b"") is True
        assert index.state("s") == b"one"

    def test_states_are_no_rows(self, index: VectorIndex, clock: FakeClock) -> None:
        """C60: nothing that removes rows removes them, whatever they are called."""
        index.add(make_row(1, unit_vectors(1)[0], expires=clock() + 1))
        for name in ("a", key_of(1), scope_of(0)):
            assert index.keep_state(name, b"learnt", None) is True
        assert index.count() == 1
        assert index.remove([key_of(1), key_of(2)]) == 1
        assert index.flush("a") == 0
        clock.advance(1e6)
        assert (index.purge(), index.count()) == (0, 0)
        assert [index.state(name) for name in ("a", key_of(1), scope_of(0))] == [b"learnt"] * 3
        assert index.search(scope_of(0), unit_vectors(1)[0].tobytes(), 9) == []

    def test_states_outlive_a_restart(self, index: VectorIndex, clock: FakeClock) -> None:
        assert index.keep_state("s", b"learnt", None) is True
        again = self.reopen(index, clock)
        try:
            assert again.state("s") == b"learnt"
            assert again.keep_state("s", b"more", b"learnt") is True
        finally:
            again.close()

    def test_many_threads(self, index: VectorIndex) -> None:
        """What a search gives is always in the scope, as near as it says, and there."""
        vectors = unit_vectors(self.threads * self.rounds)
        failures: list[BaseException] = []
        begin = threading.Barrier(2 * self.threads)

        def change(mine: int) -> None:
            begin.wait()
            for step in range(self.rounds):
                number = mine * self.rounds + step
                index.add(make_row(number, vectors[number], scope=number % 2))
                if step % 3 == 2:
                    assert index.remove([key_of(number - 1)]) == 1

        def search(mine: int) -> None:
            draw = random.Random(mine)
            begin.wait()
            for _ in range(self.rounds):
                scope, query = draw.randrange(2), vectors[draw.randrange(len(vectors))]
                for found in index.search(scope_of(scope), query.tobytes(), 4):
                    number = int(found.row.key[2:], 16)
                    assert number % 2 == scope
                    assert found.row.text == f"question {number}"
                    assert found.similarity == pytest.approx(
                        float(vectors[number] @ query), abs=self.tolerance
                    )

        def guarded(work: Any, mine: int) -> None:
            try:
                work(mine)
            except BaseException as exc:
                failures.append(exc)

        workers = [
            threading.Thread(target=guarded, args=(work, mine))
            for work in (change, search)
            for mine in range(self.threads)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert failures == []
        kept = [
            n
            for n in range(len(vectors))
            if not (n % self.rounds % 3 == 1 and n % self.rounds + 1 < self.rounds)
        ]
        assert index.count() == len(kept)
        for scope in range(2):
            found = index.search(scope_of(scope), vectors[0].tobytes(), len(vectors))
            assert sorted(keys(found)) == [key_of(n) for n in kept if n % 2 == scope]

    def test_it_agrees_with_a_plain_list(self) -> None:
        """Fuzz: any order of operations leaves what a list of rows that is searched whole would have."""

        @settings(
            max_examples=self.examples,
            deadline=None,
            database=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        )
        @given(st.lists(_OPERATIONS, min_size=1, max_size=60))
        def agree(operations: list[tuple[Any, ...]]) -> None:
            clock = FakeClock()
            with self.open_index(clock) as index:
                _Oracle(index, clock, self.tolerance).replay(operations)

        agree()


class AtomicStatesContract(VectorIndexContract):
    """Also for an index where of those that keep a state in the same instant exactly one succeeds."""

    def test_one_of_many_keeps_a_state(self, index: VectorIndex) -> None:
        won: list[tuple[int, int]] = []
        step = threading.Barrier(self.threads)
        failures: list[BaseException] = []

        def keep(mine: int) -> None:
            try:
                before = None
                for turn in range(self.rounds):
                    step.wait()
                    if index.keep_state("s", b"%d by %d" % (turn, mine), before):
                        won.append((turn, mine))
                    step.wait()
                    before = index.state("s")
            except BaseException as exc:
                failures.append(exc)
                step.abort()

        workers = [threading.Thread(target=keep, args=(mine,)) for mine in range(self.threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert failures == []
        assert [turn for turn, _ in won] == list(range(self.rounds))
        assert index.state("s") == b"%d by %d" % won[-1]


class AsyncVectorIndexContract(VectorIndexContract):
    """The same tests of the async face (`llm_middleware.semantic.records.AsyncVectorIndex`)."""

    def open_async_index(self, clock: Clock) -> AbstractContextManager[AsyncVectorIndex]:
        """An empty index that takes the time from ``clock``. Its `aclose` is awaited before the end."""
        raise NotImplementedError("open an empty index that takes the time from `clock`")

    @contextmanager
    def open_index(self, clock: Clock) -> Iterator[VectorIndex]:
        with self.open_async_index(clock) as index:
            awaited = Awaited(index)
            try:
                yield awaited
            finally:
                awaited.end()

    def test_it_is_an_async_index(self, index: VectorIndex) -> None:
        assert isinstance(index, Awaited)
        assert isinstance(index.index, AsyncVectorIndex)


class Awaited:
    """The async face of an index as a sync one, for any thread: it is awaited on an event loop in a thread of
    its own. `end` closes the index and the loop."""

    inline = False

    def __init__(self, index: AsyncVectorIndex) -> None:
        self.index = index
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="awaited", daemon=True)
        self._thread.start()

    @property
    def dimensions(self) -> int | None:
        return self.index.dimensions

    def add(self, row: Row) -> None:
        self.do(self.index.aadd(row))

    def update(self, key: str, payload: Mapping[str, object]) -> bool:
        return self.do(self.index.aupdate(key, payload))

    def search(self, scope: str, vector: bytes, k: int) -> list[Neighbour]:
        return self.do(self.index.asearch(scope, vector, k))

    def remove(self, keys: Sequence[str]) -> int:
        return self.do(self.index.aremove(keys))

    def flush(self, namespace: str) -> int:
        return self.do(self.index.aflush(namespace))

    def count(self) -> int:
        return self.do(self.index.acount())

    def purge(self) -> int:
        return self.do(self.index.apurge())

    def state(self, name: str) -> bytes | None:
        return self.do(self.index.astate(name))

    def keep_state(self, name: str, data: bytes, before: bytes | None) -> bool:
        return self.do(self.index.akeep_state(name, data, before))

    def close(self) -> None:
        self.do(self.index.aclose())

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """What ``work`` gives, awaited on the loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def end(self) -> None:
        try:
            self.close()
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()


_NUMBERS = st.integers(0, 30)
_OPERATIONS = st.one_of(
    st.tuples(
        st.just("add"), _NUMBERS, st.integers(0, 60), st.integers(0, 1), st.sampled_from([1, 3, NEVER])
    ),
    st.tuples(st.just("add"), _NUMBERS, st.integers(0, 60), st.integers(0, 1), st.just(NEVER)),
    st.tuples(st.just("fill"), _NUMBERS, st.integers(0, 1)),
    st.tuples(st.just("remove"), st.lists(_NUMBERS, max_size=12)),
    st.tuples(st.just("update"), _NUMBERS, st.integers(0, 9)),
    st.tuples(st.just("search"), st.integers(0, 60), st.integers(0, 1), st.integers(1, 9)),
    st.tuples(st.just("wait"), st.sampled_from([0.5, 1, 2])),
    st.tuples(st.just("purge")),
    st.tuples(st.just("flush"), st.sampled_from(["even", "odd"])),
)
_VECTORS = unit_vectors(61, 4, seed=7)  # in few dimensions many are near one another


class _Oracle:
    """The index and, beside it, the rows that it should hold in a dict."""

    def __init__(self, index: VectorIndex, clock: FakeClock, tolerance: float) -> None:
        self.index, self.clock, self.tolerance = index, clock, tolerance
        self.rows: dict[str, Row] = {}

    def replay(self, operations: list[tuple[Any, ...]]) -> None:
        for what, *values in operations:
            getattr(self, what)(*values)
        for scope in range(2):
            self.search(0, scope, 100)

    def add(self, number: int, vector: int, scope: int, ttl: float) -> None:
        row = make_row(
            number,
            _VECTORS[vector],
            scope=scope,
            expires=self.clock() + ttl,
            namespace=_name(number),
            text=f"vector {vector} in {scope}",
        )
        self.index.add(row)
        self.rows[row.key] = row

    def fill(self, first: int, scope: int) -> None:
        for number in range(first, first + 30):
            self.add(number % 31, number, scope, NEVER)

    def remove(self, numbers: list[int]) -> None:
        gone = {key_of(number, _name(number)) for number in numbers}
        alive = [key for key in gone & self.rows.keys() if self.rows[key].expires > self.clock()]
        assert self.index.remove(sorted(gone)) == len(alive)
        for key in gone:
            self.rows.pop(key, None)

    def update(self, number: int, value: int) -> None:
        key = key_of(number, _name(number))
        row = self.rows.get(key)
        if row is None:
            assert self.index.update(key, {"n": value}) is False
        elif row.expires > self.clock():
            assert self.index.update(key, {"n": value}) is True
            self.rows[key] = replace(row, payload={"n": value})

    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    def flush(self, namespace: str) -> None:
        self.index.flush(namespace)
        self.rows = {key: row for key, row in self.rows.items() if not key.startswith(f"{namespace}:")}

    def purge(self) -> None:
        self.index.purge()
        self.rows = {key: row for key, row in self.rows.items() if row.expires > self.clock()}
        assert self.index.count() == len(self.rows)

    def search(self, query: int, scope: int, k: int) -> None:
        now, vector = self.clock(), _VECTORS[query]
        mine = [row for row in self.rows.values() if row.scope == scope_of(scope) and row.expires > now]
        cosine = {row.key: float(np.frombuffer(row.vector, np.float32) @ vector) for row in mine}
        found = self.index.search(scope_of(scope), vector.tobytes(), k)
        best = sorted(cosine.values(), reverse=True)[:k]
        assert [neighbour.similarity for neighbour in found] == pytest.approx(best, abs=self.tolerance)
        assert len(set(keys(found))) == len(found)
        for neighbour in found:
            row = self.rows[neighbour.row.key]
            assert neighbour.similarity == pytest.approx(cosine[row.key], abs=self.tolerance)
            assert (neighbour.row.text, dict(neighbour.row.payload)) == (row.text, dict(row.payload))


def _name(number: int) -> str:
    return "odd" if number % 2 else "even"
