"""What a key's use comes to where clients leave, share calls, or call models by names of their own."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from llm_middleware.testing import FakeUpstream

from . import serving
from .serving import chat, until

served = serving.served
server = serving.server
asgi_server = serving.asgi_server
wsgi_server = serving.wsgi_server
upstream = serving.upstream

ADMIN = {"authorization": "Bearer sk-master-0123456789"}


def sections(upstream: FakeUpstream) -> dict[str, Any]:
    priced = serving.model("m", upstream)
    priced["model_info"] |= {"input_cost_per_token": 0.0, "output_cost_per_token": 0.01}
    keys = {"master_key": ADMIN["authorization"].removeprefix("Bearer ")}
    return {"models": [priced, serving.model("other", upstream)], "keys": keys}


def new_key(client: serving.Client, **fields: object) -> dict[str, str]:
    made = client.post("/key/generate", headers=ADMIN, json=fields).json()
    return {"authorization": f"Bearer {made['key']}"}


def spend(client: serving.Client, key: dict[str, str]) -> float:
    found: float = client.get("/key/info", headers=key).json()["info"]["spend"]
    return found


def test_r75_a_stream_that_is_left_costs_what_came_of_it(
    served: serving.Serve, upstream: FakeUpstream
) -> None:
    client = served(**sections(upstream))
    key = new_key(client, max_budget=100)
    upstream.hold(after_events=4)
    with client.stream("POST", "/v1/chat/completions", json=chat(stream=True), headers=key) as answer:
        lines = answer.iter_lines()
        while '"content"' not in next(lines):
            pass
    upstream.release()  # who serves WSGI sees that a client has left when there is something to send
    until(lambda: spend(client, key) > 0, "the spend")


def test_r75_the_budget_of_one_key_refuses_nobody_else(served: serving.Serve, upstream: FakeUpstream) -> None:
    """Both are of one team and ask the same at the same time."""
    client = served(**sections(upstream))
    poor, rich = new_key(client, team_id="t", max_budget=0.001), new_key(client, team_id="t")
    client.chat("use it up", headers=poor)
    until(lambda: spend(client, poor) > 0.001, "the spend")
    for number in range(10):
        body = chat(f"the same {number}")

        def ask(key: dict[str, str], body: dict[str, Any] = body) -> httpx.Response:
            return client.post("/v1/chat/completions", json=body, headers=key)

        first = client.together(1, lambda ask=ask: ask(poor))
        second = client.together(1, lambda ask=ask: ask(rich))
        assert [answer.status_code for answer in (*first(), *second())] in ([429, 200], [200, 200])


def test_r73_names_of_a_keys_own_share_no_answer_with_others(
    served: serving.Serve, upstream: FakeUpstream
) -> None:
    client = served(**sections(upstream))
    plain = new_key(client, team_id="t", models=["m"])
    own = new_key(client, team_id="t", models=["m", "other"], aliases={"m": "other"})
    assert client.chat(headers=own).json()["model"] == "other-up"
    assert client.chat(headers=plain).json()["model"] == "m-up"
    assert client.chat(headers=own).headers["x-llm-cache"] == "hit"


@pytest.mark.parametrize("path", ["/engines/m/chat/completions", "/openai/deployments/m/chat/completions"])
def test_r68_who_calls_is_asked_before_the_body_is_read(
    served: serving.Serve, upstream: FakeUpstream, path: str
) -> None:
    client = served(**sections(upstream))
    answer = client.post(path, content=b"\x1f\x8b no gzip", headers={"content-encoding": "gzip"})
    assert (answer.status_code, json.loads(answer.content)["error"]["code"]) == (401, "invalid_api_key")
