"""Who calls a Router in tests: threads, tasks of an event loop, or both in turn; and an upstream that keeps
account of when calls came and of how many it had at a time."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from llm_middleware._fake_payloads import Stamp
from llm_middleware._fake_server import Call, Failure
from llm_middleware.routing.router import Router
from llm_middleware.testing import FakeUpstream
from tests.services import wait_for

__all__ = ["PATIENCE", "Callers", "Recorder", "ask", "in_flight", "in_line", "row", "said"]

PATIENCE = 30.0  # seconds


class Callers:
    """Begins calls that go on beside the test. ``kind``: ``sync`` (a thread each), ``async`` (a task each of
    one loop), or ``mixed``: first a thread, then a task, and so on."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._turn = itertools.cycle(["sync", "async"] if kind == "mixed" else [kind])
        self._pool = ThreadPoolExecutor(64)
        self._loop = asyncio.new_event_loop()
        self._running = self._pool.submit(self._loop.run_forever)

    def begin(self, router: Router, name: str, *args: object, **options: object) -> Future[Any]:
        """A call of the Router's method ``name``, or of its async twin. Cancelling it cancels a task."""
        if next(self._turn) == "sync":
            return self._pool.submit(getattr(router, name), *args, **options)
        return self.task(getattr(router, f"a{name}")(*args, **options))

    def __call__(self, router: Router, name: str, *args: object, **options: object) -> Any:
        return self.begin(router, name, *args, **options).result(PATIENCE)

    def task(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def read(self, stream: Any) -> list[Any]:
        """All chunks of a stream of the ``sync`` or of the ``async`` kind."""

        async def read() -> list[Any]:
            return [chunk async for chunk in stream]

        return list(stream) if self.kind == "sync" else self.task(read()).result(PATIENCE)

    def end(self, stream: Any) -> None:
        """Close a stream."""
        if self.kind == "sync":
            stream.close()
        else:
            self.task(stream.aclose()).result(PATIENCE)

    def on_loop(self, work: Callable[[], object]) -> None:
        """Do ``work`` in the loop's thread."""

        async def done() -> None:
            work()

        self.task(done()).result(PATIENCE)

    def close(self, *routers: Router) -> None:
        """Close the Routers on both faces, and end the loop and the threads."""
        for router in routers:
            self.task(router.aclose()).result(PATIENCE)
        self.task(self._loop.shutdown_asyncgens()).result(PATIENCE)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._running.result(PATIENCE)
        self._pool.shutdown()
        self._loop.close()


class Recorder(FakeUpstream):
    """An upstream that knows of its plain calls: ``arrivals``: when each came, by `time.monotonic`;
    ``most``: how many it had at a time, from their arrival until their answer."""

    def __init__(self, **knobs: Any) -> None:
        super().__init__(**knobs)
        self.arrivals: list[float] = []
        self.most = self._here = 0
        self._count = threading.Lock()

    def arrived(self, call: Call) -> tuple[Failure | None, Stamp]:
        with self._count:
            self.arrivals.append(time.monotonic())
            self._here += 1
            self.most = max(self.most, self._here)
        return super().arrived(call)

    def is_held(self, sent: float, wait: float) -> bool:
        held = super().is_held(sent, wait)
        if not held:
            with self._count:
                self._here -= 1  # its answer is written next
        return held


def ask(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def said(up: FakeUpstream) -> list[Any]:
    """What the upstream was asked, in the order in which it was."""
    return [call.json["messages"][0]["content"] for call in up.calls]  # type: ignore[index]


def row(up: FakeUpstream, name: str = "m", id: str | None = None, **params: object) -> dict[str, Any]:  # noqa: A002
    made = {"model": "openai/gpt-4o-mini", "api_key": "sk-a", "api_base": up.url, **params}
    return {"model_name": name, "litellm_params": made, "model_info": {} if id is None else {"id": id}}


def in_flight(router: Router) -> list[int]:
    return [router._routing.state.of(each).in_flight for each in router.deployments]


def in_line(router: Router, count: int) -> None:
    """Wait until so many calls stand in line."""
    wait_for(lambda: len(router._routing.state.lines) == count, f"{count} wait")
