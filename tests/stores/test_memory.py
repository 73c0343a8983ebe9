"""The memory tier: its contract, its budgets, and that a read is never outdated."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llm_middleware._store_contract import ContractClock, StoreContract
from llm_middleware.errors import ConfigError
from llm_middleware.stores.memory import MemoryStore
from llm_middleware.types import Clock, Store

MB = 2**20


def key(number: int, namespace: str = "llm") -> str:
    return f"{namespace}:{number:064x}"


def make(**options: object) -> tuple[MemoryStore[bytes], ContractClock]:
    clock = ContractClock()
    return MemoryStore(clock=clock, **options), clock  # type: ignore[arg-type]


class TestContract(StoreContract):
    def make_store(self, clock: Clock) -> Store:
        return MemoryStore[bytes](clock=clock)


class TestFullContract(StoreContract):
    """A store this small evicts all the time; the contract has room for its own values only."""

    def make_store(self, clock: Clock) -> Store:
        store = MemoryStore[bytes](max_bytes=MB, clock=clock)
        for number in range(2000):
            store.set(key(number, "filler"), bytes(1000), None)
        return store


def test_it_says_that_it_is_called_inline_and_keeps_objects() -> None:
    store, _ = make()
    assert (store.tier, store.inline) == ("memory", True)


def test_an_object_comes_back_itself() -> None:
    value = ["any", "object"]
    store = MemoryStore[list[str]](size_of=lambda value: 100)
    store.set(key(1), value, 60)
    assert store.get(key(1)) is value
    assert store.bytes == 100


@pytest.mark.parametrize("option", ["max_bytes", "max_entries"])
def test_a_budget_below_one_is_refused(option: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(**{option: 0})
    assert caught.value.param == option


def test_c68_two_halves_too_many() -> None:
    store, _ = make(max_bytes=64 * MB)
    store.set(key(1), bytes(50 * MB), None)
    store.set(key(2), bytes(50 * MB), None)
    assert store.keys() == [key(2)]
    assert (store.bytes, len(store)) == (50 * MB, 1)


def test_a_value_larger_than_the_store_removes_only_its_predecessor() -> None:
    store, _ = make(max_bytes=100)
    store.set(key(1), bytes(40), None)
    store.set(key(2), bytes(40), None)
    store.set(key(1), bytes(101), None)
    assert store.keys() == [key(2)]
    assert store.bytes == 40
    store.set(key(3), bytes(100), None)
    assert store.keys() == [key(3)]


def test_a_value_that_grows_makes_room_among_the_others() -> None:
    store, _ = make(max_bytes=100)
    for number in range(10):
        store.set(key(number), bytes(10), None)
    store.set(key(0), bytes(60), None)
    assert store.get(key(0)) == bytes(60)
    assert (store.bytes, len(store)) == (100, 5)


def test_max_entries_bounds_the_count() -> None:
    store, _ = make(max_entries=3)
    for number in range(5):
        store.set(key(number), b"", None)
    assert store.keys() == [key(2), key(3), key(4)]
    store.set(key(3), b"replaced", None)
    assert store.keys() == [key(2), key(3), key(4)]


@pytest.mark.parametrize("reads", [1, 5])
def test_c69_what_is_read_outlives_a_scan_of_cold_keys(reads: int) -> None:
    store, _ = make(max_bytes=1000)
    store.set(key(0), bytes(10), None)
    for _ in range(reads):
        assert store.get(key(0)) == bytes(10)
    for number in range(1, 10_000):
        store.set(key(number), bytes(10), None)
    assert store.get(key(0)) == bytes(10)
    assert (store.bytes, len(store)) == (1000, 100)


def test_what_was_dropped_and_comes_back_goes_to_the_main_queue() -> None:
    store, _ = make(max_bytes=1000)
    for number in range(101):
        store.set(key(number), bytes(10), None)
    assert store.get(key(0)) is None
    store.set(key(0), bytes(10), None)
    for number in range(200, 10_000):
        store.set(key(number), bytes(10), None)
    assert store.get(key(0)) == bytes(10)


def test_a_store_in_which_all_was_read_still_finds_a_victim() -> None:
    store, _ = make(max_bytes=1000)
    for number in range(1000):
        store.set(key(number), bytes(1), None)
        for _ in range(3):
            store.get(key(number))
    for number in range(1000, 3000):
        store.set(key(number), bytes(1), None)
        assert store.get(key(number)) == bytes(1)
        assert (store.bytes, len(store)) == (1000, 1000)


def test_what_is_over_is_swept_out_by_later_sets() -> None:
    store, clock = make()
    for number in range(1000):
        store.set(key(number), bytes(10), 60)
    clock.advance(60)
    for number in range(1000, 1100):
        store.set(key(number), bytes(10), 60)
    assert len(store) == 100
    assert store.bytes == 1000


def test_the_sweep_finds_what_expires_first_though_it_came_last() -> None:
    store, clock = make()
    for number in range(100):
        store.set(key(number), bytes(10), 1000)
    store.set(key(100), bytes(10), 1)
    clock.advance(1)
    for _ in range(10):
        store.set(key(0), bytes(10), 1000)
    assert len(store) == 100


def test_what_is_over_goes_before_what_is_alive() -> None:
    store, clock = make(max_bytes=100)
    for number in range(5):
        store.set(key(number), bytes(10), 60)
    for number in range(5, 10):
        store.set(key(number), bytes(10), 10)
    clock.advance(10)
    for number in range(10, 15):
        store.set(key(number), bytes(10), 60)
    assert store.keys() == [key(number) for number in (0, 1, 2, 3, 4, 10, 11, 12, 13, 14)]


def test_flush_and_delete_give_the_bytes_back_of_what_is_over_too() -> None:
    store, clock = make()
    store.set(key(1), bytes(10), 1)
    store.set(key(2), bytes(10), 1)
    store.set(key(3), bytes(10), 60)
    clock.advance(1)
    assert (len(store), store.keys()) == (3, [key(3)])
    assert store.delete([key(1)]) == 0
    assert store.bytes == 20
    assert store.flush("llm") == 1
    assert (store.bytes, len(store)) == (0, 0)


def test_c67_eight_threads() -> None:
    """No exception, never a wrong value, never more than the budget, and an exact account at the end."""
    store: MemoryStore[bytes] = MemoryStore(max_bytes=50_000)
    failures: list[object] = []
    start = threading.Barrier(8)

    def work(seed: int) -> None:
        start.wait()
        try:
            for step in range(3000):
                number = (seed * 7919 + step * 104729) % 500
                if step % 97 == 0:
                    store.delete([key(number), key(number + 1)])
                elif step % 1499 == 0:
                    store.flush("llm")
                elif step % 2:
                    store.set(key(number), b"%d " % number * (1 + number % 50), [None, 60, 1e-6][step % 3])
                else:
                    value = store.get(key(number))
                    if value is not None and value.split()[0] != b"%d" % number:
                        failures.append((number, value))
                if store.bytes > 50_000:
                    failures.append(store.bytes)
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert store.flush("llm") <= 500
    assert (store.bytes, len(store)) == (0, 0)


@dataclass
class Known:
    value: bytes
    expires: float


class MemoryModel(RuleBasedStateMachine):
    """Against a plain dict: a get gives the last value set or nothing, and the account is exact."""

    budget = 100
    numbers = st.integers(0, 14)

    def __init__(self) -> None:
        super().__init__()
        self.store, self.clock = make(max_bytes=self.budget, max_entries=8)
        self.known: dict[str, Known] = {}
        self.serial = 0

    def alive(self) -> dict[str, Known]:
        return {key: known for key, known in self.known.items() if known.expires > self.clock.now}

    @rule(number=numbers, size=st.integers(4, 110), ttl=st.none() | st.integers(-1, 20))
    def set(self, number: int, size: int, ttl: int | None) -> None:
        self.serial += 1
        value = b"%04d" % self.serial + bytes(size - 4)
        self.store.set(key(number), value, ttl)
        self.known[key(number)] = Known(value, float("inf") if ttl is None else self.clock.now + ttl)
        fits = size <= self.budget and (ttl is None or ttl > 0)
        assert self.store.get(key(number)) == (value if fits else None)
        if not fits:
            del self.known[key(number)]

    @rule(number=numbers)
    def get(self, number: int) -> None:
        value = self.store.get(key(number))
        known = self.alive().get(key(number))
        assert value is None or (known is not None and value == known.value)

    @rule(seconds=st.integers(1, 15))
    def advance(self, seconds: int) -> None:
        self.clock.advance(seconds)

    @rule(numbers=st.lists(numbers, max_size=4))
    def delete(self, numbers: list[int]) -> None:
        keys = [key(number) for number in numbers]
        there = {name for name in keys if self.store.get(name) is not None}
        assert self.store.delete(keys) == len(there)
        for name in keys:
            self.known.pop(name, None)

    @precondition(lambda self: len(self.store) > 6)
    @rule()
    def flush(self) -> None:
        there = self.store.keys()
        assert self.store.flush("llm") == len(there)
        assert (self.store.bytes, len(self.store)) == (0, 0)
        self.known.clear()

    @invariant()
    def keeps_its_account(self) -> None:
        nodes = self.store._table
        assert self.store.bytes == sum(len(node.data) for node in nodes.values())
        assert self.store.bytes <= self.budget
        assert len(nodes) <= 8
        held = self.store.keys()
        assert set(held) <= set(self.alive())
        assert all(nodes[name].data == self.known[name].value for name in held)

    @invariant()
    def every_node_is_in_the_ring_once(self) -> None:
        store, node = self.store, self.store._small.next
        sizes = {id(store._small): 0, id(store._main): 0}
        seen = set()
        while node is not store._small:
            assert node.next.prev is node
            if node is not store._main:
                seen.add(id(node))
                sizes[id(node.queue)] += node.size
            node = node.next
        assert seen == {id(node) for node in store._table.values()}
        assert [store._small.size, store._main.size] == list(sizes.values())

    @invariant()
    def nothing_is_over_before_the_sweep_is_due(self) -> None:
        assert all(node >= self.store._due for node in self.store._table.values())


MemoryModel.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestMemoryModel = MemoryModel.TestCase
