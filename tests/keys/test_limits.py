"""What a key's limits leave room for: exact, on both faces, in every store, and after whatever goes wrong."""

from __future__ import annotations

import asyncio
import gc
import json

import pytest

from llm_middleware.errors import (
    BudgetExceededError,
    ConfigError,
    InvalidKeyError,
    InvalidRequestError,
    KeyLimitError,
)
from llm_middleware.keys.allowance import Allowance
from llm_middleware.keys.record import KeyRecord
from llm_middleware.keys.resolver import KeyResolver
from llm_middleware.stores.keys_memory import MemoryKeys


def made(place, face, **fields):
    """A resolver and the record of a key of these ``fields``."""
    limits = fields.pop("limits", None)
    resolver = place.resolver(limits=limits)
    key = face.do(resolver, "generate", **fields)["key"]
    return resolver, face.do(resolver, "resolve", key)


def spend_of(resolver: KeyResolver, face, record: KeyRecord) -> float:
    return face.do(resolver, "info", record.id)["info"]["spend"]


def test_requests_per_minute(everywhere, face) -> None:
    """R76: the third call, 20 s into the minute, waits 40."""
    resolver, record = made(everywhere, face, rpm_limit=2)
    face.do(resolver, "admit", record)
    everywhere.pass_time(5)
    face.do(resolver, "admit", record)
    everywhere.pass_time(15)
    with pytest.raises(KeyLimitError) as caught:
        face.do(resolver, "admit", record)
    assert caught.value.retry_after == pytest.approx(
        40, abs=2 if everywhere.kind in ("redis", "cluster") else 1e-4
    )
    error = json.loads(caught.value.body())["error"]
    assert (caught.value.status, error["code"], error["param"]) == (429, "rate_limit_exceeded", "rpm_limit")
    everywhere.pass_time(41)
    face.do(resolver, "admit", record, count=2)
    with pytest.raises(KeyLimitError):
        face.do(resolver, "admit", record)


def test_all_requests_or_none(place, face) -> None:
    resolver, record = made(place, face, rpm_limit=3)
    with pytest.raises(KeyLimitError) as caught:
        face.do(resolver, "admit", record, count=4)
    assert caught.value.retry_after is None  # there never is room for four
    face.do(resolver, "admit", record, count=2)
    with pytest.raises(KeyLimitError):
        face.do(resolver, "admit", record, count=2)
    face.do(resolver, "admit", record, count=1)


def test_without_limits_no_store_is_asked(face) -> None:
    asked: list[str] = []

    class Listening(MemoryKeys):
        inline = False

        def __getattribute__(self, name: str):
            if not name.startswith("_"):
                asked.append(name)
            return super().__getattribute__(name)

    resolver = KeyResolver(Listening())
    asked.clear()
    record = KeyRecord(id="x")
    face.do(resolver, "admit", record)
    allowance = face.do(resolver, "begin", record, 10)
    face.do(allowance, "end", tokens=10, cost=1.0)
    assert asked == []
    face.do(resolver, "admit", KeyRecord(id="x", rpm_limit=1))
    assert "count" in asked


def test_tokens_per_minute(place, face) -> None:
    resolver, record = made(place, face, tpm_limit=100)
    first = face.do(resolver, "begin", record, 60)
    with pytest.raises(KeyLimitError) as caught:
        face.do(resolver, "begin", record, 41)
    assert (caught.value.param, caught.value.retry_after) == ("tpm_limit", pytest.approx(60, abs=2))
    face.do(first, "end", tokens=10)
    second = face.do(resolver, "begin", record, 90)
    face.do(second, "end")  # how many is not known, so the estimate stands
    with pytest.raises(KeyLimitError):
        face.do(resolver, "begin", record, 1)
    with pytest.raises(KeyLimitError) as caught:
        face.do(resolver, "begin", record, 101)
    assert caught.value.retry_after is None
    place.pass_time(61)
    face.do(face.do(resolver, "begin", record, 100), "end")


def test_requests_at_a_time(place, face) -> None:
    resolver, record = made(place, face, max_parallel_requests=2)
    first, second = (face.do(resolver, "begin", record) for _ in range(2))
    with pytest.raises(KeyLimitError) as caught:
        face.do(resolver, "begin", record)
    assert (caught.value.param, caught.value.retry_after) == ("max_parallel_requests", None)
    face.do(first, "end")
    face.do(first, "end")  # the first end is the end
    third = face.do(resolver, "begin", record)
    with pytest.raises(KeyLimitError):
        face.do(resolver, "begin", record)
    for each in (second, third):
        face.do(each, "end")


def test_what_is_dropped_is_given_back(place, face) -> None:
    resolver, record = made(place, face, max_parallel_requests=1)
    for _ in range(3):
        allowance = face.do(resolver, "begin", record)
        del allowance
        gc.collect()
    allowance = face.do(resolver, "begin", record)
    with pytest.raises(KeyLimitError):
        face.do(resolver, "begin", record)
    face.do(allowance, "end")


def test_a_context_manager_ends_once(place) -> None:
    resolver = place.resolver()
    record = resolver.resolve(resolver.generate(max_parallel_requests=1)["key"])
    with resolver.begin(record) as allowance:
        allowance.end(cost=0.5)
    with pytest.raises(ZeroDivisionError), resolver.begin(record):
        1 / 0  # noqa: B018

    async def use() -> None:
        async with await resolver.abegin(record) as allowance:
            await allowance.aend(cost=0.25)
        async with await resolver.abegin(record):
            pass

    asyncio.run(use())
    assert resolver.info(record.id)["info"]["spend"] == 0.75


def test_a_call_whose_process_died_is_forgotten(place, face) -> None:
    resolver, record = made(place, face, max_parallel_requests=1, max_budget=1.0, limits={"hold": 30})
    lost = face.do(resolver, "begin", record)
    lost._ended = True  # as if its process had died
    place.pass_time(29)
    with pytest.raises(KeyLimitError):
        face.do(resolver, "begin", record)
    place.pass_time(2)
    face.do(face.do(resolver, "begin", record), "end")


def test_a_budget_is_never_exceeded_by_more_than_a_request(everywhere, face) -> None:
    """R75: 50 calls of 0.1 at a time, of a budget of 1, until nothing goes any more."""
    resolver, record = made(everywhere, face, max_budget=1)
    passed = 0
    for _ in range(4):
        begun = face.together(*[(resolver, "begin", record, 10)] * 50)
        allowances = [each for each in begun if isinstance(each, Allowance)]
        refused = [each for each in begun if not isinstance(each, Allowance)]
        assert {type(each) for each in refused} == {BudgetExceededError}
        assert len(allowances) <= 10
        passed += len(allowances)
        for allowance in allowances:
            face.do(allowance, "end", tokens=10, cost=0.1)
    assert passed in (10, 11)
    assert spend_of(resolver, face, record) == pytest.approx(passed * 0.1)
    with pytest.raises(BudgetExceededError) as caught:
        face.do(resolver, "begin", record)
    error = json.loads(caught.value.body())["error"]
    assert (caught.value.status, error["code"], error["type"]) == (
        429,
        "insufficient_quota",
        "insufficient_quota",
    )
    assert caught.value.retry_after is None


def test_a_caller_who_knows_the_cost_says_so(place, face) -> None:
    resolver, record = made(place, face, max_budget=1)
    begun = [face.do(resolver, "begin", record, cost=0.5) for _ in range(2)]
    with pytest.raises(BudgetExceededError, match="in flight"):
        face.do(resolver, "begin", record, cost=0.1)
    for each in begun:
        face.do(each, "end", cost=0.0)
    face.do(face.do(resolver, "begin", record, cost=0.1), "end", cost=0.1)
    assert spend_of(resolver, face, record) == 0.1


def test_a_budget_is_renewed(everywhere, face) -> None:
    resolver, record = made(everywhere, face, max_budget=1, budget_duration="1h", spend=1)
    with pytest.raises(BudgetExceededError) as caught:
        face.do(resolver, "begin", record)
    assert caught.value.retry_after == pytest.approx(3600, abs=30)
    everywhere.pass_time(3700)
    face.do(face.do(resolver, "begin", record), "end", cost=0.25)
    info = face.do(resolver, "info", record.id)["info"]
    assert info["spend"] == 0.25
    assert info["budget_reset_at"] > info["updated_at"]


def test_what_is_over_is_shown_renewed(face) -> None:
    from llm_middleware.testing import FakeClock

    clock = FakeClock()
    resolver = KeyResolver(clock=clock)
    key = face.do(resolver, "generate", max_budget=1, budget_duration="1h", spend=0.5)["key"]
    clock.advance(3601)
    info = face.do(resolver, "info", key)["info"]
    assert (info["spend"], info["budget_reset_at"]) == (0.0, "2023-11-15T00:13:20.000Z")
    assert face.do(resolver, "resolve", key).spend == 0.0


def test_costs_are_counted_without_a_budget(place, face) -> None:
    resolver, record = made(place, face)
    for _ in range(3):
        face.do(face.do(resolver, "begin", record), "end", cost=0.5)
    assert spend_of(resolver, face, record) == 1.5


def test_an_update_while_a_call_is_in_flight(everywhere, face) -> None:
    """R72: neither the new values nor the spend are overwritten."""
    resolver, record = made(everywhere, face, max_budget=1, key_alias="old", rpm_limit=5)
    allowance = face.do(resolver, "begin", record, 10)
    face.do(resolver, "update", record.id, key_alias="new", max_budget=5, rpm_limit=None, models=["gpt"])
    face.do(allowance, "end", tokens=5, cost=0.75)
    info = face.do(resolver, "info", record.id)["info"]
    assert (info["key_alias"], info["max_budget"], info["rpm_limit"], info["models"]) == (
        "new",
        5.0,
        None,
        ["gpt"],
    )
    assert info["spend"] == 0.75
    allowance = face.do(resolver, "begin", record, 10)
    face.do(resolver, "update", record.id, spend=0)
    face.do(allowance, "end", cost=0.25)
    assert spend_of(resolver, face, record) == 0.25


def test_a_key_that_is_removed_while_it_is_used(place, face) -> None:
    resolver, record = made(place, face, max_budget=1, rpm_limit=5)
    allowance = face.do(resolver, "begin", record)
    face.do(resolver, "delete", record.id)
    face.do(allowance, "end", cost=0.5)
    for method in ("admit", "begin"):
        with pytest.raises(InvalidKeyError):
            face.do(resolver, method, record)


@pytest.mark.parametrize("wrong", [-1, 1.5, "3", True, None])
def test_wrong_numbers(wrong, face) -> None:
    record = KeyRecord(id="x", rpm_limit=1, tpm_limit=1)
    with pytest.raises(InvalidRequestError) as caught:
        face.do(KeyResolver(), "admit", record, count=wrong)
    assert caught.value.param == "count"
    with pytest.raises(InvalidRequestError) as caught:
        face.do(KeyResolver(), "begin", record, wrong)
    assert caught.value.param == "tokens"


def test_wrong_limit_settings() -> None:
    with pytest.raises(ConfigError, match="did you mean 'hold'"):
        KeyResolver(limits={"holt": 5})


@pytest.mark.parametrize("wrong", [-0.1, float("nan"), float("inf"), "1", True])
def test_wrong_costs(wrong, face) -> None:
    resolver = KeyResolver()
    record = face.do(resolver, "resolve", face.do(resolver, "generate", max_budget=1)["key"])
    with pytest.raises(InvalidRequestError) as caught:
        face.do(resolver, "begin", record, cost=wrong)
    assert caught.value.param == "cost"
    allowance = face.do(resolver, "begin", record)
    with pytest.raises(InvalidRequestError) as caught:
        face.do(allowance, "end", cost=wrong)
    assert caught.value.param == "cost"
    with pytest.raises(InvalidRequestError) as caught:
        face.do(allowance, "end", tokens=-1)
    assert caught.value.param == "tokens"
    face.do(allowance, "end", cost=0.5)
    assert spend_of(resolver, face, record) == 0.5
