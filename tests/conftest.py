"""Fixtures that let one test body run on both faces (`face`) and on both fronts (`front`)."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from llm_middleware.testing import FakeClock
from tests.support import AsgiFront, AsyncFace, Host, Seen, SyncFace, WsgiFront


@pytest.fixture(params=["sync", "async"])
def face(request):
    made = SyncFace() if request.param == "sync" else AsyncFace()
    yield made
    made.close()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture(params=["asgi", "wsgi"])
def front(request):
    """``front(handler, **options)``: a client of the middleware in front of a host whose handler that is."""

    def make(handler: Callable[[Seen], object], **options: object):
        kind = AsgiFront if request.param == "asgi" else WsgiFront
        return kind(Host(handler), **options)

    make.name = request.param
    return make


@pytest.fixture
def when():
    """``when(condition)``: wait until it holds; fails after ten seconds."""

    def wait(condition: Callable[[], bool]) -> None:
        tick = threading.Event()
        for _ in range(10_000):
            if condition():
                return
            tick.wait(0.001)
        raise AssertionError("the condition never held")

    return wait
