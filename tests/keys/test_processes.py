"""Several processes and one store: what one of them changes, the others heed; limits are those of all."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import pytest

from llm_middleware.keys.resolver import KeyResolver
from tests.keys.worker import Worker


@pytest.fixture(params=["sync", "async"])
def workers(request, shared) -> Iterator[tuple[KeyResolver, Worker, Worker]]:
    """A resolver here, and two processes."""
    with contextlib.ExitStack() as stack:
        resolver = KeyResolver(shared.setting)
        stack.callback(resolver.close)
        resolver.list()  # makes the file, if it is one
        made = []
        for _ in range(2):
            made.append(Worker(shared.setting, request.param))
            stack.callback(made[-1].close)
        yield resolver, *made


def test_a_deleted_key_is_refused_by_all(workers) -> None:
    """R71. Expected: at once where it is told, half a second where it is looked for."""
    resolver, *others = workers
    key = resolver.generate(key_alias="a")["key"]
    for worker in others:
        assert worker.ask("until_changed", key) == ["a", None]
    time.sleep(1.0)  # so that they have been using it for a while
    deleted = time.time()
    resolver.delete(key)
    for worker in others:
        seen, found = worker.answer()
        assert found == "invalid_api_key"
        assert seen - deleted < 3.0


def test_an_update_reaches_all(workers) -> None:
    resolver, *others = workers
    key = resolver.generate(key_alias="a", rpm_limit=1)["key"]
    for worker in others:
        assert worker.ask("until_changed", key) == ["a", 1]
    changed = time.time()
    resolver.update(key, rpm_limit=2)
    for worker in others:
        seen, found = worker.answer()
        assert found == ["a", 2]
        assert seen - changed < 3.0


def test_requests_of_all_are_counted_together(workers) -> None:
    """R76."""
    resolver, *others = workers
    key = resolver.generate(rpm_limit=30)["key"]
    for worker in others:
        worker.tell("admit", key, 40)
    answers = [worker.answer() for worker in others]
    assert sum(passed for passed, _ in answers) == 30
    waits = [wait for _, each in answers for wait in each]
    assert len(waits) == 50
    assert all(0 < wait <= 60 for wait in waits)


def test_a_budget_is_that_of_all(workers) -> None:
    """R75: 50 concurrent calls of 0.1 in each of two processes, again and again, of a budget of 1."""
    resolver, *others = workers
    key = resolver.generate(max_budget=1)["key"]
    made = 0
    for _ in range(3):
        for worker in others:
            worker.tell("spend", key, 50, 0.1)
        made += sum(worker.answer() for worker in others)
    assert made in (10, 11)
    assert resolver.info(key)["info"]["spend"] == pytest.approx(made * 0.1)
