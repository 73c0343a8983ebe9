"""What the benchmarks of stores on the network share: answers of a size, and what a Redis was asked."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from tests.services import HOST, RedisServer

from .harness import Row
from .payloads import ANSWER, pad

__all__ = ["answer", "commands", "counted", "environment", "on_one_core", "settings"]

# Our own questions, and what a connection costs once or every second, whatever is asked.
_ASIDE = ("hello", "info", "ping", "pubsub|channels")


def answer(size: int) -> bytes:
    """A chat answer of exactly ``size`` bytes."""
    value = json.loads(ANSWER)
    message = value["choices"][0]["message"]
    message["content"] = ""
    message["content"] = pad(size - len(json.dumps(value)), 6)
    return json.dumps(value).encode()


def settings(server: RedisServer) -> dict[str, object]:
    """What a `CacheManager` is given to reach ``server``."""
    return {"host": HOST, "port": server.port}


@contextmanager
def environment(**values: object) -> Iterator[None]:
    """Variables for the servers that are started inside."""
    before = dict(os.environ)
    try:
        os.environ.update({name: str(value) for name, value in values.items()})
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def on_one_core(server: RedisServer) -> Iterator[None]:
    """``server`` and this thread take turns on one core, where the system can do that.

    On two, each wakes the other from its idle core for every command: that costs as much as the command, and
    between nothing and three times as much from one moment to the next.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    one = {min(before)}
    try:
        os.sched_setaffinity(server.popen.pid, one)
        os.sched_setaffinity(0, one)
        yield
    finally:
        os.sched_setaffinity(0, before)
        os.sched_setaffinity(server.popen.pid, before)


def commands(server: RedisServer, work: Callable[[], object]) -> Counter[str]:
    """How often ``work`` made the server run each command, by its own count; those of scripts included."""
    before = server.calls()
    work()
    spent = Counter(server.calls())
    spent.subtract(before)
    return +Counter({name: count for name, count in spent.items() if name not in _ASIDE})


def counted(path: str, spent: Mapping[str, int], times: int, goal: float | None = None) -> Row:
    """How many commands one of ``times`` operations took; the row names them."""
    each = sum(spent.values()) / times
    named = ", ".join(f"{count / times:g} {name.upper()}" for name, count in sorted(spent.items()))
    return Row(f"Redis commands, {path}: {named or 'none'}", "", goal, each, each, each, unit="commands")
