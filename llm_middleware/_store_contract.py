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


class StoreContract:
    """Tests of the sync face of a store (`llm_middleware.types.Store`).

    `make_store` returns an empty store each time it is called, with room for a megabyte at least; it must
    take the time from ``clock``. It may return one that others use too if nothing of this class's is in it.
    """

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
            for number in range(600):
                store.set(_key("a", number), b"x", 60)
            store.set(_key("a", 600), b"x" * 100_000, 60)
            assert store.flush("a") == 601
            assert store.get(_key("a", 600)) is None

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
