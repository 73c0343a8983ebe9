"""Plans: operations on a Redis, written once for both faces.

A plan is a generator that yields steps and is sent their replies. A step is a function from a redis-py
client to a reply; of the async client, to something to be awaited for it. Each step has the connection's
budget. What goes wrong in one is a `StoreError`, raised where it was yielded: a plan may catch it and go on.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Generator, Sequence
from typing import Any, Final, TypeAlias, TypeVar

from ..errors import StoreError
from .redis_connect import RedisConnection

__all__ = ["Command", "Plan", "Step", "arun", "milliseconds", "one", "pipeline", "run", "send"]

T = TypeVar("T")

Command: TypeAlias = tuple[bytes | str | int, ...]
Step: TypeAlias = Callable[[Any], Any]
Plan: TypeAlias = Generator[Step, Any, T]

_MOST_MS: Final = 2.0**53  # from here on a time to live is for ever: Redis refuses it


def milliseconds(ttl: float | None) -> int | None:
    """A time to live in seconds as Redis takes it; None: for ever."""
    return None if ttl is None or ttl * 1e3 >= _MOST_MS else math.ceil(ttl * 1e3)


def run(connection: RedisConnection, plan: Plan[T]) -> T:
    """The plan's result, made with this process's sync client."""
    advance: Callable[[], Step] = functools.partial(plan.send, None)
    while True:
        try:
            step = advance()
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]
        try:
            with connection.use() as client:
                reply = step(client)
        except StoreError as exc:
            advance = functools.partial(plan.throw, exc)
        else:
            advance = functools.partial(plan.send, reply)


async def arun(connection: RedisConnection, plan: Plan[T]) -> T:
    """The plan's result, made with the event loop's client."""
    advance: Callable[[], Step] = functools.partial(plan.send, None)
    while True:
        try:
            step = advance()
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]
        try:
            async with connection.ause() as client:
                reply = await step(client)
        except StoreError as exc:
            advance = functools.partial(plan.throw, exc)
        else:
            advance = functools.partial(plan.send, reply)


def one(command: Command) -> Step:
    """The reply to one command."""
    return lambda client: client.execute_command(*command)


def pipeline(commands: Sequence[Command], *, strict: bool = True) -> Step:
    """``commands`` at once; their replies in order. The first error is raised, or stands among them."""

    def step(client: Any) -> Any:
        pipe = client.pipeline(transaction=False)
        for command in commands:
            pipe.execute_command(*command)
        return pipe.execute(raise_on_error=strict)

    return step


def send(commands: Sequence[Command]) -> Plan[list[Any]]:
    """The replies to ``commands``, which are sent at once."""
    if len(commands) == 1:
        return [(yield one(commands[0]))]
    return (yield pipeline(commands)) if commands else []
