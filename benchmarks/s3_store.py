"""The S3 store against a server in another process, with 1, 16 and 64 calls under way.

CPU of this process for one object of 4 KiB; the floor is boto3's own call of the same kind, made by as many
threads. What the server takes is not counted.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager

from llm_middleware.stores.s3 import S3Store
from tests.s3_services import S3Server, clean_environment, moto_server

from .harness import Row, compare, quick, show

__all__ = ["results"]

_VALUE = os.urandom(4096)
_CALLS, _QUICK_CALLS = 192, 64
_BUCKET = "answers"
_AT_ONCE = (1, 16, 64)
_ROUNDS = 5  # of a quarter of a second for each candidate; the server takes as long again

# Calls of one operation; its argument is the number of the object.
Call = Callable[[int], object]
AsyncCall = Callable[[int], Awaitable[object]]


def results() -> list[Row]:
    rows = []
    with _clean_environment(), moto_server() as server, ExitStack() as stack:
        boto3, obstore = (stack.enter_context(closing(_store(server, name))) for name in ("boto3", "obstore"))
        client = stack.enter_context(closing(server.client()))
        runner = stack.enter_context(asyncio.Runner())
        client.create_bucket(Bucket=_BUCKET)
        for number in range(_CALLS):
            boto3.set(_key(number), _VALUE, 3600)
        for at_once in _AT_ONCE:
            rows += _reads(client, boto3, obstore, runner, at_once)
        for at_once in _AT_ONCE:
            rows += _writes(client, boto3, runner, at_once)
    return rows


def _reads(client, boto3: S3Store, obstore: S3Store, runner: asyncio.Runner, at_once: int) -> list[Row]:
    def floor(number: int) -> object:
        return client.get_object(Bucket=_BUCKET, Key=boto3._name(_key(number)))["Body"].read()

    with ThreadPoolExecutor(at_once) as pool:
        samples = compare(
            {
                "floor": _threaded(pool, floor),
                "get": _threaded(pool, lambda number: obstore.get(_key(number))),
                "aget": _gathered(runner, at_once, lambda number: obstore.aget(_key(number))),
                "boto3": _threaded(pool, lambda number: boto3.get(_key(number))),
                "aboto3": _gathered(runner, at_once, lambda number: boto3.aget(_key(number))),
            },
            rounds=_ROUNDS,
        )
    name, described = f"S3 hit, {at_once} at once", "boto3's `get_object` in threads"
    return [
        samples.row(f"{name}: `get`", "get", "floor", described, 0.5),
        samples.row(f"{name}: `aget`", "aget", "floor", described, 0.6),
        samples.row(f"{name}: `get` without obstore", "boto3", "floor", described),
        samples.row(f"{name}: `aget` without obstore", "aboto3", "floor", described),
    ]


def _writes(client, store: S3Store, runner: asyncio.Runner, at_once: int) -> list[Row]:
    def floor(number: int) -> object:
        return client.put_object(Bucket=_BUCKET, Key=f"floor/{number}", Body=_VALUE)

    with ThreadPoolExecutor(at_once) as pool:
        samples = compare(
            {
                "floor": _threaded(pool, floor),
                "set": _threaded(pool, lambda number: store.set(_key(number), _VALUE, 3600)),
                "aset": _gathered(runner, at_once, lambda number: store.aset(_key(number), _VALUE, 3600)),
            },
            rounds=_ROUNDS,
        )
    name, described = f"S3 write, {at_once} at once", "boto3's `put_object` in threads"
    return [samples.row(f"{name}: `{face}`", face, "floor", described) for face in ("set", "aset")]


def _threaded(pool: ThreadPoolExecutor, call: Call) -> Callable[[], float]:
    """CPU seconds of one call, made by the threads of the pool."""

    def sample() -> float:
        return _cpu(lambda count: list(pool.map(call, range(count))))

    return sample


def _gathered(runner: asyncio.Runner, at_once: int, call: AsyncCall) -> Callable[[], float]:
    """CPU seconds of one call, made by as many tasks."""

    async def work(numbers: Iterator[int]) -> None:
        for number in numbers:
            await call(number)

    async def gather(count: int) -> None:
        numbers = iter(range(count))
        await asyncio.gather(*(work(numbers) for _ in range(at_once)))

    def sample() -> float:
        return _cpu(lambda count: runner.run(gather(count)))

    return sample


def _cpu(run: Callable[[int], object]) -> float:
    count = _QUICK_CALLS if quick() else _CALLS
    began = time.process_time()
    run(count)
    return (time.process_time() - began) / count


def _key(number: int) -> str:
    return f"llm:{number:064x}"


def _store(server: S3Server, client: str) -> S3Store:
    return S3Store.from_settings(server.settings(_BUCKET, client=client, s3_path="store"))


@contextmanager
def _clean_environment() -> Iterator[None]:
    before = dict(os.environ)
    clean = clean_environment()
    try:
        os.environ.clear()
        os.environ.update(clean)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


if __name__ == "__main__":
    show(results)
