"""What clients, hosts and stores may do to a semantic cache, and what it does not do for that."""

from __future__ import annotations

import asyncio
import threading

import pytest

from llm_middleware._drive import run_sync
from llm_middleware._ports.faces import SYNC
from llm_middleware.errors import CacheMissError, StoreError
from llm_middleware.semantic import learning
from llm_middleware.semantic.calibration import State
from llm_middleware.semantic.embedders import EmbeddingError, callable_embedder
from llm_middleware.semantic.guards import conflict_of
from llm_middleware.semantic.index_numpy import NumpyIndex
from tests.semantic.conftest import PATIENT, Held, asked, reworded
from tests.semantic.test_teaching import FEW, QUESTIONS, ask, family, same_topic
from tests.support import AsyncFace, completion

GARDENS = reworded("gardens", "briefly")
CALL = {"id": "c1", "type": "function", "function": {"name": "sell", "arguments": '{"all": true}'}}


def test_an_answer_that_became_a_tool_call_answers_no_other_question(make):
    asking = make()
    asking(GARDENS)
    message = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    calls = completion(None, choices=[{"index": 0, "message": message, "finish_reason": "tool_calls"}])
    again = asking.face.fetch(asking.cache, asked(GARDENS), lambda body: calls, controls={"no-cache": True})
    assert again.cache.stored is True
    assert asking.status(reworded("gardens", "slowly")) == ("miss", "unsuitable")


# --- what costs a client nothing teaches nothing


def test_who_makes_no_call_moves_no_bar(make):
    asking = make(max_error_rate=0.05, judge=same_topic)
    ask(asking, FEW)
    before = family(asking).state.lookups
    for number in range(50):
        body = asked(reworded("gardens", f"way{number}"))
        plan = asking.cache.plan("chat", body, cache_control="only-if-cached")
        with pytest.raises(CacheMissError):
            run_sync(asking.cache._flow.open(SYNC, plan))
        asking.face.get(asking.cache, asked(reworded("gardens", f"form{number}")))
        asking(reworded("gardens", f"kind{number}"), controls={"no-store": True})
    asking.done()
    assert family(asking).state.lookups == before
    asking(reworded("gardens", "honestly"))
    assert family(asking).state.lookups == before + 1


@pytest.mark.parametrize("opinion", [None, "error"])
def test_a_judge_without_an_opinion_spends_the_budget_all_the_same(make, opinion):
    judged: list[object] = []

    def judge(pair):
        judged.append(pair)
        if opinion == "error":
            raise OSError("no judge today")

    asking = make(max_error_rate=0.05, judge=judge, judge_budget=50)
    ask(asking, QUESTIONS[:200])
    assert 5 <= len(judged) <= 11  # of 200, 50 in 1000


def test_a_shadow_keeps_to_the_budget_too(make):
    asking = make(max_error_rate=0.05, judge=same_topic, shadow=True, judge_budget=100)
    ask(asking, QUESTIONS[:300])
    told = asking.counts()
    assert told["hits"] == {}
    assert 20 <= told["judged-right"] + told.get("judged-wrong", 0) <= 31


# --- lines


CODE = "what does this print\nfor x in y:\n    print(x)\n    done()"


def test_code_that_is_indented_otherwise_is_another_question(make):
    asking = make()
    flat = CODE.replace("    done", "done")
    assert asking(asked(CODE.replace("print", "gardens")))[0] == "miss"
    assert asking(asked(flat.replace("print", "gardens")))[0] == "miss"
    assert conflict_of(CODE, flat) == "layout:[0, 0, 4, 4]!=[0, 0, 4, 0]"
    assert conflict_of(f"  {CODE}", f"  {CODE}") is None
    assert conflict_of("how do I\nstart", "  how do I\n  start") is None


# --- rows whose answers are gone


def test_a_row_whose_answer_is_gone_is_dropped_while_learning(make):
    index = NumpyIndex()
    asking = make(max_error_rate=0.05, judge=same_topic, vector_index=index)
    key = asking.fetch(asked(GARDENS)).cache.key
    asking.cache._flow.tiers.memory.delete([f"llm:{key}"])  # evicted: nobody tells the index
    asking(reworded("gardens", "slowly"))
    asking.done()
    assert index.count() == 1
    asking(reworded("gardens", "calmly"))
    asking.done()
    assert asking.counts()["judged-right"] == 1


def test_what_was_judged_of_a_row_outlives_its_refresh(make):
    index = NumpyIndex()
    asking = make(max_error_rate=0.05, judge=lambda pair: False, vector_index=index)
    asking(GARDENS)
    asking(reworded("gardens", "slowly"))
    asking.done()

    def blocked() -> int:
        scope = index._scopes.keys()
        rows = [index._scopes._where[key] for key in scope]
        return sum('"not"' in payload for cell in set(rows) for payload in cell.payloads)

    assert blocked() == 1
    asking(GARDENS, controls={"no-cache": True})
    asking.done()
    assert blocked() == 1


# --- an embedder that hangs


def test_an_embedder_that_hangs_leaves_the_host_its_threads(make, face):
    held = Held()
    asking = make(embedding_model=held, embedding_budget=0.05)
    try:
        if isinstance(face, AsyncFace):
            face.run(_beside(asking))
        else:
            for number in range(10):
                assert asking.status(reworded("gardens", f"way{number}")) == ("miss", "embedding-late")
    finally:
        held.release()


async def _beside(asking) -> None:
    async def call(body: object) -> object:
        return completion("an answer")

    bodies = [asked(reworded("gardens", f"way{number}")) for number in range(40)]
    answers = await asyncio.gather(*(asking.cache.afetch(body, call) for body in bodies))
    assert {answer.cache.detail for answer in answers} == {"embedding-late"}
    assert await asyncio.wait_for(asyncio.to_thread(lambda: "the host's own"), PATIENT) == "the host's own"


def test_calls_that_never_return_are_bounded(when):
    held = Held()
    embedder = callable_embedder(held, id="held")
    threads = [threading.Thread(target=embedder.embed, args=([f"text {number}"],)) for number in range(64)]
    try:
        for thread in threads:
            thread.start()
        when(lambda: len(held.calls) == 64)
        with pytest.raises(EmbeddingError, match="64 calls have not returned"):
            embedder.embed(["one more"])
    finally:
        held.release()
        for thread in threads:
            thread.join()
    assert len(embedder.embed(["and now"])) == 1


# --- sharing what was learnt


class Unsure(NumpyIndex):
    """Writes, and then says that it failed."""

    failing = False

    def keep_state(self, name: str, data: bytes, before: bytes | None) -> bool:
        kept = super().keep_state(name, data, before)
        if self.failing:
            raise StoreError("no answer within 0.25 s")
        return kept


def test_labels_that_were_written_though_nobody_said_so_count_once(make):
    index = Unsure()
    asking = make(max_error_rate=0.05, judge=same_topic, vector_index=index)
    ask(asking, FEW)
    known, families = family(asking), asking.cache._flow.semantic.teacher.families
    for index.failing in (True, False):
        known.pause = 0.0
        run_sync(families.share(SYNC, known))
    assert State.from_bytes(index.state(known.name)).labels == known.state.labels == 20


def test_models_that_nobody_learnt_anything_of_leave_nothing(make):
    index = NumpyIndex()
    asking = make(max_error_rate=0.05, judge=same_topic, vector_index=index)
    for number in range(5):
        asking(asked(GARDENS, model=f"made-up-{number}"))
    names = [known.name for known in asking.cache._flow.semantic.teacher.families.known()]
    asking.face.do(asking.cache, "close")
    assert (len(names), [index.state(name) for name in names]) == (5, [None] * 5)


def test_a_family_that_is_let_go_of_is_shared_before(make, monkeypatch):
    monkeypatch.setattr(learning, "_MOST", 2)
    index = NumpyIndex()
    asking = make(max_error_rate=0.05, judge=same_topic, vector_index=index)
    ask(asking, FEW)
    name = family(asking).name
    for number in range(3):
        asking(asked(GARDENS, model=f"made-up-{number}"))
    asking.done()
    assert State.from_bytes(index.state(name)).labels == 20
