"""The sub-app with a semantic cache, on both fronts: who shares answers, reports, which models it asks."""

from __future__ import annotations

import pytest

from llm_middleware import CacheManager, ConfigError
from llm_middleware.api.app import LLMApp
from tests.api.clients import CHAT, MASTER, chat
from tests.semantic.conftest import PATIENT, Counted, reworded, toy
from tests.support import completion

pytestmark = pytest.mark.usefixtures("environment")

BRIEFLY, SLOWLY, CALMLY = (reworded("gardens", way) for way in ("briefly", "slowly", "calmly"))
PASSWORD = "How do I reset the password of my account?"
RESET = "What is the way to reset my account password?"


def semantic(**settings: object) -> CacheManager:
    known = {"embedding_model": toy, "embedding_budget": PATIENT, "similarity_threshold": 0.5}
    return CacheManager("semantic", **{**known, **settings})


def state(answer) -> str:
    assert answer.status_code == 200, answer.text
    return answer.headers["x-llm-cache"]


def text(answer) -> str:
    assert answer.status_code == 200, answer.text
    said: str = answer.json()["choices"][0]["message"]["content"]
    return said


def counts(client) -> dict[str, object]:
    answer = client.get("/cache/stats").json()
    assert answer["cache_type"] == "semantic"
    return answer["semantic"]


# --- as a file has it


def test_a_configured_cache_answers_by_meaning(front, upstream):
    """With the embedder in this process."""
    client = front({"cache": {"type": "semantic", "similarity_threshold": 0.8, "embedding_budget": PATIENT}})
    before = upstream.count
    first, second, third = (
        client.post(CHAT, chat(each)) for each in (PASSWORD, RESET, "Where is my last invoice?")
    )
    assert [state(each) for each in (first, second, third)] == ["miss", "semantic-hit", "miss"]
    assert text(second) == text(first)
    assert second.headers["x-llm-cache-tier"] == "semantic"
    assert second.headers["cache-status"].endswith("; detail=semantic")
    assert 0.8 < float(second.headers["x-llm-cache-similarity"]) < 1
    assert upstream.count == before + 2
    told = counts(client)
    assert (told["lookups"], told["hits"], told["threshold"]) == (3, {"semantic": 1}, 0.8)


def test_the_settings_are_shown(front):
    client = front(cache=semantic())
    assert client.get("/cache/ping").json()["cache_type"] == "semantic"
    assert client.get("/cache/settings").status_code == 200


def test_streams(front):
    client = front(cache=semantic())
    first = client.post(CHAT, chat(BRIEFLY, stream=True))
    second = client.post(CHAT, chat(SLOWLY, stream=True))
    assert (state(first), state(second)) == ("miss", "semantic-hit")
    assert first.content == second.content
    assert second.content.endswith(b"data: [DONE]\n\n")


# --- who shares


def test_c104_keys_of_two_teams_share_nothing(front):
    client = front(cache=semantic())
    red, blue = client.new_key(team_id="red"), client.new_key(team_id="blue")
    also_red = client.new_key(team_id="red")
    assert state(client.post(CHAT, chat(BRIEFLY), key=red)) == "miss"
    assert state(client.post(CHAT, chat(SLOWLY), key=blue)) == "miss"
    assert state(client.post(CHAT, chat(SLOWLY), key=MASTER)) == "miss"
    mine = client.post(CHAT, chat(CALMLY), key=also_red)
    assert (state(mine), BRIEFLY in text(mine)) == ("semantic-hit", True)


def test_models_share_nothing(front):
    client = front(cache=semantic())
    assert state(client.post(CHAT, chat(BRIEFLY))) == "miss"
    assert state(client.post(CHAT, chat(SLOWLY, model="other"))) == "miss"
    assert state(client.post(CHAT, chat(CALMLY))) == "semantic-hit"


def test_a_key_that_may_not_use_a_model_gets_no_answer_by_meaning(front):
    client = front(cache=semantic())
    assert state(client.post(CHAT, chat(BRIEFLY), key=client.new_key(team_id="t"))) == "miss"
    other = client.new_key(team_id="t", models=["other"])
    assert client.post(CHAT, chat(SLOWLY), key=other).status_code in (401, 403)


def test_a_keys_no_cache_holds_for_meanings_too(front):
    client = front(cache=semantic())
    key = client.new_key(team_id="t", metadata={"cache": {"no-cache": True}})
    assert state(client.post(CHAT, chat(BRIEFLY), key=client.new_key(team_id="t"))) == "miss"
    assert state(client.post(CHAT, chat(SLOWLY), key=key)) == "miss"


# --- reports


@pytest.mark.parametrize("field", ["key", "cache_key"])
def test_a_report_removes_the_answer_that_was_served(front, field):
    client = front(cache=semantic())
    client.post(CHAT, chat(BRIEFLY))
    served = client.post(CHAT, chat(SLOWLY))
    assert state(served) == "semantic-hit"
    key = served.headers["x-llm-cache-key"]
    told = client.post("/cache/report", {field: key})
    assert (told.status_code, told.json()) == (200, {"status": "success", "count": 1})
    assert client.post("/cache/report", {field: key}).json() == {"status": "success", "count": 0}
    assert counts(client)["reported"] == 2
    assert state(client.post(CHAT, chat(SLOWLY))) == "miss"
    assert state(client.post(CHAT, chat(BRIEFLY))) == "semantic-hit"  # of the new one


BAD = {
    "nothing": {},
    "null": {"key": None},
    "both": {"key": "0" * 64, "cache_key": "0" * 64},
    "a number": {"key": 5},
    "a list": {"key": ["0" * 64]},
    "no key": {"key": "hello"},
    "too short": {"cache_key": "0" * 63},
    "another field": {"keys": ["0" * 64]},
}


@pytest.mark.parametrize("body", BAD.values(), ids=BAD)
def test_a_report_that_is_wrong(front, body):
    client = front(cache=semantic())
    answer = client.post("/cache/report", body)
    assert answer.status_code in (400, 422), answer.text
    assert answer.json()["error"]["param"] in ("key", "keys")
    assert counts(client).get("reported") is None


@pytest.mark.parametrize("body", [b"", b"[]", b"{"])
def test_a_report_that_is_no_object(front, body):
    answer = front(cache=semantic()).post("/cache/report", body)
    assert answer.status_code in (400, 422)
    assert answer.json()["error"]["message"]


def test_reports_are_for_administrators(front):
    client = front(cache=semantic())
    key = client.new_key()
    served = client.post(CHAT, chat(BRIEFLY), key=key)
    body = {"key": served.headers["x-llm-cache-key"]}
    assert client.post("/cache/report", body, key=key).status_code == 403
    assert client.post("/cache/report", body, key=None).status_code == 401
    assert state(client.post(CHAT, chat(BRIEFLY), key=key)) == "hit"


def test_a_report_to_a_cache_without_meanings_removes_the_answer(front):
    client = front(cache=CacheManager())
    key = client.post(CHAT, chat(BRIEFLY)).headers["x-llm-cache-key"]
    assert client.post("/cache/report", {"key": key}).json() == {"status": "success", "count": 1}
    assert state(client.post(CHAT, chat(BRIEFLY))) == "miss"


def test_deleting_and_flushing(front):
    client = front(cache=semantic())
    key = client.post(CHAT, chat(BRIEFLY)).headers["x-llm-cache-key"]
    assert client.post("/cache/delete", {"keys": [key]}).json()["count"] == 1
    assert state(client.post(CHAT, chat(SLOWLY))) == "miss"
    assert client.post("/cache/flush").json()["count"] == 1
    assert state(client.post(CHAT, chat(CALMLY))) == "miss"


# --- which models the cache asks


def scripted(upstream, *bodies: object) -> None:
    for body in bodies:
        upstream.fail_next(200, body=body)


def vector_of(question: str) -> dict[str, object]:
    row = {"object": "embedding", "index": 0, "embedding": toy([question])[0]}
    return {"object": "list", "data": [row], "model": "e", "usage": {"prompt_tokens": 1, "total_tokens": 1}}


def model(upstream, name: str, provider: str = "openai") -> dict[str, object]:
    params = {"model": f"{provider}/{name}-up", "api_base": upstream.url, "api_key": "sk-upstream-secret"}
    return {"model_name": name, "litellm_params": params}


def asked_of(upstream, since: int) -> list[tuple[str, str]]:
    return [(call.path.removeprefix("/v1"), call.json["model"]) for call in upstream.calls[since:]]


def test_a_model_of_the_list_makes_the_vectors(front, upstream):
    cache = {
        "type": "semantic",
        "embedding_model": "embedder",
        "similarity_threshold": 0.5,
        "embedding_budget": PATIENT,
    }
    client = front({"models": [model(upstream, "gpt"), model(upstream, "embedder")], "cache": cache})
    since = upstream.count
    scripted(upstream, vector_of(BRIEFLY), completion("first"), vector_of(SLOWLY))
    assert text(client.post(CHAT, chat(BRIEFLY))) == "first"
    second = client.post(CHAT, chat(SLOWLY))
    assert (state(second), text(second)) == ("semantic-hit", "first")
    assert asked_of(upstream, since) == [
        ("/embeddings", "embedder-up"),
        ("/chat/completions", "gpt-up"),
        ("/embeddings", "embedder-up"),
    ]


def test_a_model_of_the_list_judges(front, upstream, when):
    cache = {
        "type": "semantic",
        "embedding_model": "embedder",
        "max_error_rate": 0.05,
        "judge": "gpt",
        "embedding_budget": PATIENT,
    }
    client = front({"models": [model(upstream, "gpt"), model(upstream, "embedder")], "cache": cache})
    since = upstream.count
    scripted(upstream, vector_of(BRIEFLY), completion("first"), vector_of(SLOWLY), completion("second"))
    scripted(upstream, completion("YES"))
    assert text(client.post(CHAT, chat(BRIEFLY))) == "first"
    assert text(client.post(CHAT, chat(SLOWLY))) == "second"
    if client.name == "wsgi":
        when(lambda: counts(client).get("judged-right") == 1)
    else:  # its event loop goes on while it is asked something
        when(lambda: client.get("/health").status_code == 200 and counts(client).get("judged-right") == 1)
    assert asked_of(upstream, since)[-1] == ("/chat/completions", "gpt-up")
    assert len(asked_of(upstream, since)) == 5


def test_a_model_that_is_in_no_list_is_asked_at_its_provider(front, upstream, monkeypatch):
    """And is none that clients can ask for."""
    monkeypatch.setenv("OPENAI_BASE_URL", upstream.url)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-environment")
    cache = {
        "type": "semantic",
        "embedding_model": "text-embedding-3-small",
        "similarity_threshold": 0.5,
        "embedding_budget": PATIENT,
    }
    client = front({"cache": cache})
    since = upstream.count
    scripted(upstream, vector_of(BRIEFLY), completion("first"), vector_of(SLOWLY))
    client.post(CHAT, chat(BRIEFLY))
    assert state(client.post(CHAT, chat(SLOWLY))) == "semantic-hit"
    assert asked_of(upstream, since) == [
        ("/embeddings", "text-embedding-3-small"),
        ("/chat/completions", "gpt-up"),
        ("/embeddings", "text-embedding-3-small"),
    ]
    assert upstream.calls[since].headers["authorization"] == "Bearer sk-of-the-environment"
    listed = {each["id"] for each in client.get("/v1/models").json()["data"]}
    assert listed == {"gpt", "other"}
    assert client.post("/v1/embeddings", {"model": "text-embedding-3-small", "input": "x"}).status_code == 404


def test_a_cache_given_by_the_host_asks_what_it_was_given(front):
    embed = Counted()
    client = front(cache=semantic(embedding_model=embed))
    client.post(CHAT, chat(BRIEFLY))
    assert embed.calls == [[BRIEFLY]]


def test_a_misspelt_model_is_a_problem_at_the_start():
    settings = {
        "models": [{"model_name": "gpt", "litellm_params": {"model": "openai/gpt", "api_key": "k"}}],
        "cache": {"type": "semantic", "embedding_model": "nobody/knows-this"},
    }
    with pytest.raises(ConfigError) as caught:
        LLMApp(settings)
    assert "nobody" in str(caught.value)


# --- what hooks are told


def test_hooks_are_told_how(front):
    events = []
    client = front(cache=semantic(), hooks=[events.append])
    client.post(CHAT, chat(BRIEFLY))
    client.post(CHAT, chat(SLOWLY))
    [hit] = [each for each in events if each.name == "success" and each.cache_hit]
    assert (hit.detail, hit.tier, hit.model) == ("semantic", "semantic", "gpt")
