"""The example apps, each as a user runs it, before a fake upstream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import pytest

from llm_middleware.testing import FakeUpstream

CHAT = "/v1/chat/completions"
ASK = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "What is a cache?"}]}
FASTAPI = ("uvicorn", "examples.fastapi_app.main:app")
APPS = [
    FASTAPI,
    ("gunicorn-gthread", "examples.flask_app.main:app"),
    ("gunicorn-gthread", "examples.django_app.wsgi:application"),
    ("uvicorn", "examples.django_app.asgi:application"),
]

Serve = Callable[[str, str, Mapping[str, str]], AbstractContextManager[str]]


@pytest.fixture(scope="module")
def shared_upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream() as server:
        yield server


@pytest.fixture
def upstream(shared_upstream: FakeUpstream) -> Iterator[FakeUpstream]:
    """The fake upstream, with its knobs at their defaults again after each test."""
    yield shared_upstream
    shared_upstream.release()
    shared_upstream.chunk_delay = 0.0


@pytest.fixture(scope="module", params=APPS, ids=lambda app: app[1].split(".")[1] + "-" + app[0])
def base_url(request: pytest.FixtureRequest, serve: Serve, shared_upstream: FakeUpstream) -> Iterator[str]:
    env = {"OPENAI_BASE_URL": shared_upstream.url, "OPENAI_API_KEY": "sk-app"}
    with serve(*request.param, env) as url:
        yield url


@pytest.fixture
def client(base_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=base_url, timeout=30, trust_env=False) as session:
        yield session


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/ask", {"question": "why?"}),
        (CHAT, ASK),
        (CHAT, {**ASK, "stream": True, "seed": 1}),
        ("/v1/embeddings", {"model": "text-embedding-3-small", "input": "a"}),
        ("/v1/responses", {"model": "gpt-4o-mini", "input": "a"}),
        ("/v1/messages", {**ASK, "max_tokens": 100}),
    ],
)
def test_every_endpoint_is_cached(
    client: httpx.Client, upstream: FakeUpstream, path: str, body: dict[str, object]
) -> None:
    before = upstream.count
    miss, hit = client.post(path, json=body), client.post(path, json=body)
    assert [r.status_code for r in (miss, hit)] == [200, 200]
    assert [r.headers["x-llm-cache"] for r in (miss, hit)] == ["miss", "hit"]
    assert hit.content == miss.content
    assert upstream.count == before + 1


def test_the_callers_key_goes_before_the_apps(client: httpx.Client, upstream: FakeUpstream) -> None:
    client.post(CHAT, json={**ASK, "seed": 2})
    client.post(CHAT, json={**ASK, "seed": 3}, headers={"authorization": "Bearer sk-caller"})
    sent = [call.headers["authorization"] for call in upstream.calls[-2:]]
    assert sent == ["Bearer sk-app", "Bearer sk-caller"]


@pytest.mark.parametrize(("path", "body"), [("/ask", {"question": "fail"}), (CHAT, {**ASK, "seed": 4})])
def test_upstream_errors_are_passed_on_and_not_kept(
    client: httpx.Client, upstream: FakeUpstream, path: str, body: dict[str, object]
) -> None:
    upstream.fail_next(429, headers={"retry-after": "3"}, body={"error": {"message": "slow down"}})
    failed = client.post(path, json=body)
    assert (failed.status_code, failed.json()) == (429, {"error": {"message": "slow down"}})
    assert client.post(path, json=body).status_code == 200


def test_wrong_questions_and_health(client: httpx.Client, upstream: FakeUpstream) -> None:
    before = upstream.count
    assert client.post("/ask", json={"q": 1}).status_code in {400, 422}
    assert client.get("/healthz").json() == {"status": "ok"}
    assert upstream.count == before


def test_a_client_that_leaves_hangs_up_on_the_upstream(client: httpx.Client, upstream: FakeUpstream) -> None:
    upstream.chunk_delay = 0.1
    before = upstream.disconnected
    with client.stream("POST", CHAT, json={**ASK, "seed": 5, "stream": True}) as response:
        next(response.iter_lines())
    upstream.wait_for_disconnects(before + 1)


def test_concurrent_identical_calls_are_one(client: httpx.Client, upstream: FakeUpstream) -> None:
    before = upstream.count
    upstream.hold()
    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(client.post, CHAT, json={**ASK, "seed": 6}) for _ in range(6)]
        upstream.wait_for(before + 1)
        upstream.release()
        states = sorted(answer.result().headers["x-llm-cache"] for answer in answers)
    assert states.count("miss") == 1
    assert set(states) <= {"miss", "hit", "collapsed"}
    assert len({answer.result().content for answer in answers}) == 1
    assert upstream.count == before + 1


def test_an_upstream_that_is_down_is_a_502(serve: Serve) -> None:
    with FakeUpstream() as gone:
        url = gone.url
    with serve(*FASTAPI, {"OPENAI_BASE_URL": url}) as base_url:
        assert httpx.post(base_url + CHAT, json=ASK, timeout=30).status_code == 502


def test_answers_on_disk_outlive_the_process(serve: Serve, upstream: FakeUpstream, tmp_path: Path) -> None:
    env = {"OPENAI_BASE_URL": upstream.url, "LLM_CACHE_DIR": str(tmp_path)}
    states = []
    for _ in range(2):
        with serve(*FASTAPI, env) as base_url:
            states.append(
                httpx.post(base_url + CHAT, json={**ASK, "seed": 7}, timeout=30).headers["x-llm-cache"]
            )
    assert states == ["miss", "hit"]
