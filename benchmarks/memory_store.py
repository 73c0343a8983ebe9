"""The memory tier against a dict of the same million entries, an LRU of the same size, and its own payload.

CPU time, rounds interleaved. "One at a time": each call takes its key from the one before, as calls do that
are requests apart. "Back to back": a loop over keys at random, where the processor works on several dict
lookups at once but on one call of a Python function. New keys cost the garbage collector's passes as well.
Run it::

    python benchmarks/memory_store.py
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from llm_middleware.caching.entry import Entry, Form, entry_size
from llm_middleware.stores.memory import MemoryStore

__all__ = ["Row", "main", "results"]

Row = tuple[str, float, float, float, float]
"""Name, goal, median, lowest and highest."""

_BODY = 2048
_GET, _GET_LOOP = "get / dict get, one at a time", "get / dict get, back to back"
_SET, _SET_NEW = "set / dict set, one at a time", "set / dict set, back to back, new keys"
_GOALS = {_GET: 2.0, _GET_LOOP: 2.0, _SET: 3.0, _SET_NEW: 3.0}


def results(quick: bool = False) -> list[Row]:
    """Ratios at a million entries (``quick``: a tenth), hits against LRU, bytes per payload byte."""
    ratios = _ratios(100_000 if quick else 1_000_000, 20_000 if quick else 100_000, rounds=9)
    rows = [_row(name, goal, ratios[name]) for name, goal in _GOALS.items()]
    rows.append(_row("LRU hits / hits, zipf 0.8, 1 % of keys", 1.0, _hits(50_000 if quick else 200_000)))
    grown = _in_new_process("--memory", "20000" if quick else "100000")
    payload, traced, resident = grown["payload"], grown["traced"], grown["resident"]
    rows.append(_row("memory / payload, 2 KiB entries, traced", 1.35, [traced / payload]))
    rows.append(_row("memory / payload, 2 KiB entries, RSS", 1.35, [resident / payload]))
    return rows


def main(quick: bool = False) -> None:
    print(f"{'':42}{'goal':>8}{'median':>8}{'low':>8}{'high':>8}")
    for name, goal, median, low, high in results(quick):
        print(f"{name:42}{goal:8.2f}{median:8.2f}{low:8.2f}{high:8.2f}")


def _row(name: str, goal: float, values: list[float]) -> Row:
    return name, goal, statistics.median(values), min(values), max(values)


def _new_keys(count: int) -> list[str]:
    return [f"llm:{os.urandom(32).hex()}" for _ in range(count)]


def _ratios(entries: int, steps: int, rounds: int) -> dict[str, list[float]]:
    keys = _new_keys(entries)
    ring = random.Random(1).sample(keys, entries)
    following = dict(zip(ring, ring[1:] + ring[:1], strict=True))
    table = {key: following[key] for key in keys}  # in another order than the ring's, as it is visited in
    store: MemoryStore[str] = MemoryStore(max_bytes=2**60)
    for key in keys:
        store.set(key, following[key], 3600.0)
    found: dict[str, list[float]] = {name: [] for name in _GOALS}
    key = ring[0]
    for _ in range(rounds):
        floor, key = _cpu(_walk, table.get, key, steps)
        ours, key = _cpu(_walk, store.get, key, steps)
        found[_GET].append(ours / floor)
        floor, key = _cpu(_replace_in_dict, table, key, steps)
        ours, key = _cpu(_replace_in_store, store, key, steps)
        found[_SET].append(ours / floor)
        some = random.sample(keys, steps)
        floor, _ = _cpu(_look_up, table.get, some)
        ours, _ = _cpu(_look_up, store.get, some)
        found[_GET_LOOP].append(ours / floor)
        fresh = _new_keys(steps)
        floor, _ = _cpu(_add_to_dict, table, fresh)
        ours, _ = _cpu(_add_to_store, store, fresh)
        found[_SET_NEW].append(ours / floor)
        store.delete(fresh)
        for name in fresh:
            del table[name]
    return found


def _cpu(function: Callable[..., object], *arguments: object) -> tuple[float, object]:
    before = time.process_time()
    value = function(*arguments)
    return time.process_time() - before, value


def _walk(get: Callable[[str], str], key: str, steps: int) -> str:
    for _ in range(steps):
        key = get(key)
    return key


def _look_up(get: Callable[[str], str], keys: list[str]) -> None:
    for key in keys:
        get(key)


def _replace_in_dict(table: dict[str, str], key: str, steps: int) -> str:
    for _ in range(steps):
        following = table[key]
        table[key] = following
        key = following
    return key


def _replace_in_store(store: MemoryStore[str], key: str, steps: int) -> str:
    get, put = store._table, store.set  # the next key comes the same way as above: the lookup is not ours
    for _ in range(steps):
        following = get[key].data
        put(key, following, 3600.0)
        key = following
    return key


def _add_to_dict(table: dict[str, str], keys: list[str]) -> None:
    for key in keys:
        table[key] = key  # noqa: PERF403


def _add_to_store(store: MemoryStore[str], keys: list[str]) -> None:
    put = store.set
    for key in keys:
        put(key, key, 3600.0)


def _hits(requests: int) -> list[float]:
    """LRU's hits per hit of ours, on three traces of 100 000 keys with room for 1 % of them."""
    weights = list(itertools.accumulate(1 / (rank + 1) ** 0.8 for rank in range(100_000)))
    ratios = []
    for seed in range(3):
        trace = random.Random(seed).choices(range(100_000), cum_weights=weights, k=requests)
        ratios.append(_lru_hits(trace, 1000) / _store_hits(trace, 1000))
    return ratios


def _lru_hits(trace: list[int], size: int) -> int:
    kept: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for number in trace:
        if number in kept:
            hits += 1
            kept.move_to_end(number)
        else:
            kept[number] = None
            if len(kept) > size:
                kept.popitem(last=False)
    return hits


def _store_hits(trace: list[int], size: int) -> int:
    store: MemoryStore[bytes] = MemoryStore(max_entries=size)
    hits = 0
    for number in trace:
        key = str(number)
        if store.get(key) is None:
            store.set(key, b"x", None)
        else:
            hits += 1
    return hits


def _in_new_process(*arguments: str) -> dict[str, int]:
    command = [sys.executable, __file__, *arguments]
    found: dict[str, int] = {}
    for how in ("traced", "resident"):
        output = subprocess.run([*command, how], capture_output=True, text=True, check=True).stdout
        payload, grown = output.split()
        found |= {"payload": int(payload), how: int(grown)}
    return found


def _measure_memory(entries: int, how: str) -> None:
    """Fill a store with answers of 2 KiB; print their bytes and those by which the process has grown."""
    store: MemoryStore[Entry] = MemoryStore(max_bytes=2**40, size_of=entry_size)
    headers = ((b"content-type", b"application/json"),)
    store.set("llm:warm", Entry("chat", time.time(), 0.0, Form(headers, b"")), 60.0)
    if how == "traced":
        tracemalloc.start()
    before = _resident()
    for key in (f"llm:{os.urandom(32).hex()}" for _ in range(entries)):
        now = time.time()
        entry = Entry("chat", now, now + 3600.0, Form(headers, os.urandom(_BODY)), model="gpt-4o-mini")
        store.set(key, entry, 3600.0)
    grown = tracemalloc.get_traced_memory()[0] if how == "traced" else _resident() - before
    print(entries * _BODY, grown)


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--memory", nargs=2, metavar=("ENTRIES", "HOW"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        _measure_memory(int(options.memory[0]), options.memory[1])
    else:
        main(quick=options.quick)
