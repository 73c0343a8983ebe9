"""What every store of keys does, as tests: subclass it with a fixture ``everywhere``."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from llm_middleware.keys.management import _NEW
from llm_middleware.stores.keys_rules import Ask, Ended, Reply

__all__ = ["KeyStoreContract"]


def row(name: str = "a", **columns: object) -> dict[str, object]:
    return {**_NEW, "id": name * 64, "name": "sk-...", "created": 1.0, "updated": 1.0, **columns}


A = "a" * 64


def ask(**asked: object) -> Ask:
    return Ask(**{"stored": True, **asked})


class KeyStoreContract:
    @pytest.fixture
    def store(self, everywhere):
        return everywhere.store()

    def test_a_row_comes_back_as_it_went_in(self, store) -> None:
        given = row(
            alias="alïas",
            user="u",
            team="t",
            models=["gpt-4*", "模型"],
            aliases={"a": "b"},
            metadata={"cache": {"no-store": True}, "deep": [1, {"x": None}], "odd": "\ud800\x00"},
            allowed_cache_controls=["ttl"],
            expires=1700000000.123456,
            rpm_limit=2**53 - 1,
            max_budget=0.1,
            budget_duration="1mo",
            blocked=True,
            config={"a": 1.5},
        )
        assert store.add(given, 0.30000000000000004, 1800000000.654321) is True
        assert store.get(A) == {**given, "spend": 0.30000000000000004, "budget_resets": 1800000000.654321}

    def test_what_is_not_there(self, store) -> None:
        assert store.get(A) is None
        assert store.change(A, {"blocked": True}, {"spend": 1.0}) is None
        assert store.replace(A, {"id": "b" * 64}, {}) is None
        assert store.remove([A]) == []
        assert store.get(A) is None
        assert store.page(0, 10, {}) == ([], 0)

    def test_a_key_is_added_once(self, store) -> None:
        assert store.add(row(alias="first"), 1.0, None) is True
        assert store.add(row(alias="second"), 2.0, None) is False
        found = store.get(A)
        assert (found["alias"], found["spend"], found["budget_resets"]) == ("first", 1.0, None)

    def test_a_change_leaves_the_rest(self, store) -> None:
        store.add(row(alias="x", rpm_limit=5), 1.5, 9e9)
        changed = store.change(A, {"rpm_limit": None, "user": "u"}, {})
        assert changed == {**row(alias="x", user="u"), "spend": 1.5, "budget_resets": 9e9}
        assert store.get(A) == changed
        assert store.change(A, {}, {"spend": 0.25, "budget_resets": None})["spend"] == 0.25
        assert store.get(A)["budget_resets"] is None
        assert store.page(0, 10, {"user": "u"})[1] == 1

    def test_a_change_of_the_id_takes_the_use_along(self, store) -> None:
        b = "b" * 64
        store.add(row(alias="x"), 1.5, 9e9)
        store.add(row("c"), 0.0, None)
        assert store.count(A, ask(requests=2, rpm=2)) == Reply()
        assert store.replace(A, {"id": "c" * 64}, {}) is None
        changed = store.replace(A, {"id": b, "alias": "y"}, {})
        assert changed == {**row("b", alias="y"), "spend": 1.5, "budget_resets": 9e9}
        assert store.get(A) is None
        assert store.count(b, ask(requests=1, rpm=2)).refused == "rpm"
        assert {each["id"] for each in store.page(0, 10, {})[0]} == {b, "c" * 64}

    def test_removed_is_gone_with_its_use(self, store) -> None:
        store.add(row(), 5.0, None)
        store.add(row("b"), 0.0, None)
        assert store.remove([A, "f" * 64, A]) == [A]
        assert store.count(A, ask(requests=1, rpm=1)).refused == "gone"
        assert store.count(A, ask(ended=(Ended("", None, 1.0),))).refused == "gone"
        assert store.get(A) is None
        assert store.add(row(), 0.0, None) is True
        assert store.get(A)["spend"] == 0.0

    def test_pages(self, store) -> None:
        for number in range(9):
            store.add(row(str(number), created=float(number), team="t" if number % 2 else None), 0.0, None)
        rows, total = store.page(2, 3, {})
        assert ([each["id"][0] for each in rows], total) == (["6", "5", "4"], 9)
        rows, total = store.page(1, 2, {"team": "t"})
        assert ([each["id"][0] for each in rows], total) == (["5", "3"], 4)
        assert store.page(9, 5, {}) == ([], 9)
        assert store.page(0, 5, {"team": "t", "user": "u"}) == ([], 0)

    def test_requests_of_a_minute(self, store, everywhere) -> None:
        store.add(row(), 0.0, None)
        assert store.count(A, ask(requests=1, rpm=3)) == Reply()
        everywhere.pass_time(20)
        assert store.count(A, ask(requests=2, rpm=3)) == Reply()
        refused, seconds, _ = store.count(A, ask(requests=1, rpm=3))
        assert (refused, seconds) == ("rpm", pytest.approx(40, abs=1))
        assert store.count(A, ask(requests=4, rpm=3)) == Reply("rpm")
        assert store.count(A, ask(requests=1, rpm=0)) == Reply("rpm")
        everywhere.pass_time(40.5)
        assert store.count(A, ask(requests=3, rpm=3)) == Reply()
        assert store.count(A, ask(requests=1, rpm=3)).retry_after == pytest.approx(60, abs=1)

    def test_tokens_of_a_minute(self, store, everywhere) -> None:
        store.add(row(), 0.0, None)
        assert store.count(A, ask(call="1", tokens=60, tpm=100)) == Reply()
        assert store.count(A, ask(call="2", tokens=41, tpm=100)).refused == "tpm"
        assert store.count(A, ask(ended=(Ended("1", 10, 0.0),))) == Reply()
        assert store.count(A, ask(call="3", tokens=90, tpm=100)) == Reply()
        assert store.count(A, ask(call="4", tokens=1, tpm=100)).retry_after == pytest.approx(60, abs=1)
        assert store.count(A, ask(call="5", tokens=101, tpm=100)) == Reply("tpm")
        everywhere.pass_time(61)
        assert store.count(A, ask(call="6", tokens=100, tpm=100)) == Reply()
        # A call of the minute before says nothing of this one.
        assert store.count(A, ask(ended=(Ended("3", 0, 0.0),))) == Reply()
        assert store.count(A, ask(call="7", tokens=1, tpm=100)).refused == "tpm"

    def test_calls_at_a_time(self, store, everywhere) -> None:
        store.add(row(), 0.0, None)
        for number in range(2):
            assert store.count(A, ask(call=str(number), parallel=2)) == Reply()
        assert store.count(A, ask(call="2", parallel=2)) == Reply("parallel")
        assert store.count(A, ask(ended=(Ended("0", None, 0.0),))) == Reply()
        # An end of what is over already frees nothing.
        assert store.count(A, ask(ended=(Ended("0", None, 0.0, True),))) == Reply()
        assert store.count(A, ask(call="3", parallel=2)) == Reply()
        assert store.count(A, ask(call="4", parallel=2)) == Reply("parallel")
        everywhere.pass_time(599)
        assert store.count(A, ask(call="5", parallel=2)) == Reply("parallel")
        everywhere.pass_time(2)
        assert store.count(A, ask(call="6", parallel=2)) == Reply()

    def test_a_budget_is_held_and_spent(self, store) -> None:
        store.add(row(), 0.0, None)
        assert store.count(A, ask(call="1", budget=1.0, share=0.25)) == Reply(held=0.25)
        assert store.count(A, ask(call="2", budget=1.0, share=0.25, cost=0.75)) == Reply(held=0.75)
        assert store.count(A, ask(call="3", budget=1.0, share=0.25, cost=0.01)) == Reply("held")
        ends = (Ended("1", None, 0.5), Ended("2", None, 0.0))
        # The mean of what calls cost is what the next one holds: that of 0.5 alone, as nothing is no cost.
        assert store.count(A, ask(ended=ends)) == Reply()
        assert store.count(A, ask(call="4", budget=1.0)) == Reply(held=0.5)
        assert store.count(A, ask(ended=(Ended("4", None, 0.25),))) == Reply()
        assert store.get(A)["spend"] == 0.75
        assert store.count(A, ask(call="5", budget=2.0)) == Reply(held=pytest.approx(0.45))
        assert store.count(A, ask(call="6", budget=0.75)) == Reply("budget")
        assert store.count(A, ask(call="7", budget=2.0, minimum=0.5)) == Reply(held=0.5)

    def test_one_call_may_cost_more_than_is_left(self, store) -> None:
        store.add(row(), 0.9, None)
        assert store.count(A, ask(call="1", budget=1.0, cost=5.0)) == Reply(held=5.0)
        assert store.count(A, ask(call="2", budget=1.0, cost=0.01)) == Reply("held")

    def test_a_repeated_end_counts_once(self, store) -> None:
        store.add(row(), 0.0, None)
        store.count(A, ask(call="1", budget=1.0))
        told = (Ended("1", None, 0.25),)
        assert store.count(A, ask(ended=told)) == Reply()
        assert store.count(A, ask(ended=(told[0]._replace(again=True),))) == Reply()
        assert store.get(A)["spend"] == 0.25
        # Its first end counts, though what it held is given back already.
        assert store.count(A, ask(ended=(Ended("unheard", None, 0.5),))) == Reply()
        assert store.get(A)["spend"] == 0.75

    def test_a_budget_is_renewed(self, store, everywhere) -> None:
        now = everywhere.clock()
        store.add(row(budget_duration="1h"), 1.0, now + 3600)
        refused = store.count(A, ask(call="1", budget=1.0, following=now + 7200))
        assert refused == Reply("budget", pytest.approx(3600, abs=30))
        everywhere.pass_time(3599)
        assert store.count(A, ask(call="1", budget=1.0, following=now + 7200)).refused == "budget"
        everywhere.pass_time(30)
        assert store.count(A, ask(call="1", budget=1.0, following=now + 7200)).refused == ""
        found = store.get(A)
        assert (found["spend"], found["budget_resets"]) == (0.0, now + 7200)

    def test_a_key_that_the_store_does_not_know(self, store) -> None:
        unknown = ask(stored=False, call="1", budget=1.0, spend=0.95, resets=9e9, share=0.1)
        assert store.count("host", unknown) == Reply(held=0.1)
        assert store.count("host", ask(stored=False, ended=(Ended("1", None, 0.05),))) == Reply()
        assert store.count("host", ask(stored=False, call="2", budget=1.0)).refused == "budget"
        assert store.get("host") is None

    def test_refused_counts_nothing(self, store) -> None:
        store.add(row(), 0.0, None)
        asked = {"tpm": 100, "parallel": 5, "budget": 1.0, "tokens": 10}
        assert store.count(A, ask(call="1", requests=1, rpm=9, **asked)).refused == ""
        assert store.count(A, ask(call="2", requests=1, rpm=9, **{**asked, "tokens": 91})).refused == "tpm"
        assert store.count(A, ask(requests=8, rpm=9)) == Reply()
        assert store.count(A, ask(call="3", **{**asked, "parallel": 2, "tokens": 90})).refused == ""

    def test_many_at_once_are_counted_one_by_one(self, store, everywhere) -> None:
        others = [store, store if everywhere.kind == "memory" else everywhere.store()]
        store.add(row(), 0.0, None)

        def use(number: int) -> str:
            mine = others[number % 2]
            reply = mine.count(A, ask(call=str(number), requests=1, rpm=30, tokens=1, tpm=100))
            if not reply.refused:
                mine.count(A, ask(ended=(Ended(str(number), 2, 0.5),)))
            return reply.refused

        with ThreadPoolExecutor(8) as pool:
            refused = list(pool.map(use, range(48)))
        assert (refused.count(""), refused.count("rpm")) == (30, 18)
        assert store.get(A)["spend"] == 15.0

    def test_changes_while_it_is_used(self, store) -> None:
        """R72: neither overwrites the other."""
        store.add(row(), 0.0, None)

        def spend(_: int) -> None:
            store.count(A, ask(ended=(Ended("", None, 1.0),)))

        def change(number: int) -> None:
            store.change(A, {"alias" if number % 2 else "user": str(number)}, {})

        with ThreadPoolExecutor(4) as pool:
            done = [pool.submit(work, n) for n in range(40) for work in (spend, change)]
            assert all(each.exception() is None for each in done)
        store.change(A, {"max_budget": 7.0}, {})
        found = store.get(A)
        assert (found["spend"], found["max_budget"]) == (40.0, 7.0)
        assert int(found["alias"]) % 2 == 1
        assert int(found["user"]) % 2 == 0

    def test_it_opens_again_after_it_was_closed(self, store) -> None:
        store.add(row(), 1.0, None)
        store.close()
        assert store.get(A)["spend"] == 1.0
