"""What every store must do, as tests: run them against a store of your own.

::

    from llm_middleware.testing import StoreContract

    class TestMyStore(StoreContract):
        def make_store(self, clock):
            return MyStore(clock=clock)

Plain asserts and methods named ``test_*``: pytest collects them from the subclass, and so may anything else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .errors import InvalidRequestError
from .types import Clock, Store

__all__ = ["ContractClock", "StoreContract"]


class ContractClock:
    """Seconds since the epoch that pass only when a test says so."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def _key(namespace: str, number: int) -> str:
    return f"{namespace}:{number:064x}"


def _walk(store: Store, namespace: str, size: int) -> dict[str, bytes] | None:
    """All heads of a namespace; None where the store has no `heads`, which it need not."""
    heads = getattr(store, "heads", None)
    if heads is None:
        return None
    found: dict[str, bytes] = {}
    cursor: str | None = None
    while True:
        cursor, page = heads(namespace, cursor, size)
        found.update(page)
        if cursor is None:
            return found
        assert isinstance(cursor, str)


class StoreContract:
    """Tests of the sync face of a store (`llm_middleware.types.Store`).

    A store may also have ``heads(namespace, cursor, size)``: a page of some entries of exactly this namespace
    as (key, first ``size`` bytes), after the cursor of the next page, which is None at the end. It begins
    with the cursor None and raises `InvalidRequestError` for one that no page gave; by the end it has told
    of every entry that was there all the time.

    `make_store` returns an empty store each time it is called, with room for a megabyte at least; it must
    take the time from ``clock``. It may return one that others use too if nothing of this class's is in it.
    ``many``: entries that no page of the store holds all of; fewer where each one takes long.
    """

    many = 600

    def make_store(self, clock: Clock) -> Store:
        raise NotImplementedError("return an empty store that takes the time from `clock`")

    @contextmanager
    def open_store(self) -> Iterator[tuple[Store, ContractClock]]:
        """A fresh store and its clock; closed at the end."""
        clock = ContractClock()
        store = self.make_store(clock)
        try:
            yield store, clock
        finally:
            store.close()

    def test_it_is_a_store(self) -> None:
        with self.open_store() as (store, _):
            assert isinstance(store, Store)
            assert isinstance(store.tier, str)
            assert store.tier != ""

    def test_an_unknown_key_is_a_miss(self) -> None:
        with self.open_store() as (store, _):
            assert store.get(_key("a", 1)) is None

    def test_bytes_come_back_as_they_went_in(self) -> None:
        values = [b"", b"\x00", b"\x80\x04N.", bytes(range(256)), b"x" * 200_000]
        with self.open_store() as (store, _):
            for number, value in enumerate(values):
                store.set(_key("a", number), value, None)
            assert [store.get(_key("a", number)) for number in range(len(values))] == values

    def test_a_second_value_replaces_the_first(self) -> None:
        with self.open_store() as (store, _):
            for value in (b"short", b"much longer than it was", b"x" * 100_000, b""):
                store.set(_key("a", 1), value, 60)
                assert store.get(_key("a", 1)) == value

    def test_an_entry_is_over_once_its_time_has_passed(self) -> None:
        """C38."""
        with self.open_store() as (store, clock):
            store.set(_key("a", 1), b"value", 2)
            clock.advance(1.75)
            assert store.get(_key("a", 1)) == b"value"
            clock.advance(0.25)
            assert store.get(_key("a", 1)) is None

    def test_without_a_time_to_live_an_entry_stays(self) -> None:
        with self.open_store() as (store, clock):
            store.set(_key("a", 1), b"value", None)
            clock.advance(10 * 365 * 86_400)
            assert store.get(_key("a", 1)) == b"value"

    def test_replacing_sets_a_new_time_to_live(self) -> None:
        """C52: a refreshed entry outlives the time it had at first, and a shortened one does not."""
        with self.open_store() as (store, clock):
            store.set(_key("a", 1), b"old", 10)
            store.set(_key("a", 2), b"old", 100)
            clock.advance(5)
            store.set(_key("a", 1), b"longer", 100)
            store.set(_key("a", 2), b"shorter", 10)
            clock.advance(20)
            assert store.get(_key("a", 1)) == b"longer"
            assert store.get(_key("a", 2)) is None

    def test_a_time_to_live_of_nothing_keeps_nothing(self) -> None:
        """C39: neither the new value nor the outdated one under its key."""
        with self.open_store() as (store, _):
            for ttl in (0, -1):
                store.set(_key("a", 1), b"old", 60)
                store.set(_key("a", 1), b"new", ttl)
                assert store.get(_key("a", 1)) is None

    def test_an_entry_that_was_over_can_be_stored_again(self) -> None:
        with self.open_store() as (store, clock):
            store.set(_key("a", 1), b"first", 1)
            clock.advance(2)
            store.set(_key("a", 1), b"second", 1)
            assert store.get(_key("a", 1)) == b"second"

    def test_delete_removes_and_counts_what_was_there(self) -> None:
        """C115, C117: unknown keys are no error and count nothing."""
        with self.open_store() as (store, _):
            for number in range(4):
                store.set(_key("a", number), b"value", 60)
            assert store.delete([_key("a", 0), _key("a", 1), _key("a", 9), _key("b", 2)]) == 2
            assert [store.get(_key("a", number)) for number in range(4)] == [None, None, b"value", b"value"]
            assert store.delete([_key("a", 0)]) == 0
            assert store.delete([]) == 0

    def test_delete_counts_a_key_once_and_not_when_its_time_is_over(self) -> None:
        with self.open_store() as (store, clock):
            store.set(_key("a", 1), b"value", 60)
            store.set(_key("a", 2), b"value", 1)
            clock.advance(1)
            assert store.delete([_key("a", 1), _key("a", 1), _key("a", 2)]) == 1

    def test_flush_removes_exactly_one_namespace(self) -> None:
        """C60, C117: neither a longer name nor a pattern that would match it is touched."""
        others = ["a:b", "ab", "b", "a%", "a_", "a*", "A", "", ":a", "a;"]
        with self.open_store() as (store, _):
            for namespace in ["a", *others]:
                for number in range(3):
                    store.set(_key(namespace, number), namespace.encode(), 60)
            assert store.flush("a") == 3
            assert [store.get(_key("a", number)) for number in range(3)] == [None] * 3
            for namespace in others:
                assert [store.get(_key(namespace, n)) for n in range(3)] == [namespace.encode()] * 3
            assert store.flush("a%") == 3
            assert store.flush("a:b") == 3
            assert store.flush("nothing") == 0
            assert store.get(_key("ab", 0)) == b"ab"

    def test_flush_removes_large_values_and_many(self) -> None:
        with self.open_store() as (store, _):
            for number in range(self.many):
                store.set(_key("a", number), b"x", 60)
            store.set(_key("a", self.many), b"x" * 100_000, 60)
            assert store.flush("a") == self.many + 1
            assert store.get(_key("a", self.many)) is None

    def test_what_was_flushed_can_be_stored_again(self) -> None:
        with self.open_store() as (store, _):
            store.set(_key("a", 1), b"old", 60)
            store.flush("a")
            store.set(_key("a", 1), b"new", 60)
            assert store.get(_key("a", 1)) == b"new"

    def test_a_closed_store_opens_again(self) -> None:
        with self.open_store() as (store, _):
            store.set(_key("a", 1), b"kept", 60)
            store.close()
            store.close()
            assert store.get(_key("a", 1)) == b"kept"
            store.set(_key("a", 2), b"value", 60)
            assert store.get(_key("a", 2)) == b"value"

    def test_heads_are_of_exactly_one_namespace(self) -> None:
        values = [b"", b"\x00", b"12345678", b"123456789", b"x" * 200_000]
        with self.open_store() as (store, _):
            for namespace in ("a", "a:b", "ab", "", ":a", "a*", "a%", "A", "b"):
                for number, value in enumerate(values):
                    store.set(_key(namespace, number), namespace.encode() + value, 60)
            expected = {_key("a", number): (b"a" + value)[:8] for number, value in enumerate(values)}
            assert _walk(store, "a", 8) in (expected, None)
            expected = {_key("a*", number): (b"a*" + value)[:8] for number, value in enumerate(values)}
            assert _walk(store, "a*", 8) in (expected, None)
            assert _walk(store, "nothing", 8) in ({}, None)

    def test_heads_are_shorter_where_the_value_is(self) -> None:
        values = [b"", b"\x00", b"12345678", b"123456789", b"x" * 200_000]
        with self.open_store() as (store, _):
            for number, value in enumerate(values):
                store.set(_key("a", number), value, None)
            for size in (0, 1, 8, 100_000, 1_000_000):
                expected = {_key("a", number): value[:size] for number, value in enumerate(values)}
                assert _walk(store, "a", size) in (expected, None)

    def test_heads_are_of_what_is_there(self) -> None:
        """Neither what is over nor what was removed; what was replaced is there once."""
        with self.open_store() as (store, clock):
            for number in range(5):
                store.set(_key("a", number), b"old", 100 if number else 1)
            store.set(_key("a", 1), b"new", 100)
            store.set(_key("a", 2), b"short", 1)
            store.delete([_key("a", 3)])
            clock.advance(1)
            assert _walk(store, "a", 8) in ({_key("a", 1): b"new", _key("a", 4): b"old"}, None)
            store.flush("a")
            assert _walk(store, "a", 8) in ({}, None)

    def test_heads_refuse_a_cursor_that_is_none(self) -> None:
        with self.open_store() as (store, _):
            store.set(_key("a", 1), b"value", 60)
            heads = getattr(store, "heads", None)
            for cursor in ("", "x", "-1", " 1", "1.0", "\u0661", "\ud800", "a" * 5000, "9" * 40, 1):
                refused = heads is None
                try:
                    if heads is not None:
                        heads("a", cursor, 8)
                except InvalidRequestError as exc:
                    refused = exc.param == "cursor"
                assert refused
