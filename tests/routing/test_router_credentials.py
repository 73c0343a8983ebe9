"""Credentials that are fetched for a call: AWS's signatures, and functions that give a token."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator

import pytest

from llm_middleware import CacheManager
from llm_middleware.errors import ConfigError, DeadlineError, InvalidRequestError
from llm_middleware.routing.router import Router
from llm_middleware.testing import FakeUpstream
from tests.providers.bedrock_server import KEYS, REGION, Server

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        yield made


@pytest.fixture
def up() -> Iterator[FakeUpstream]:
    with FakeUpstream() as made:
        yield made


def bedrock(server: Server, **params: object) -> dict[str, object]:
    place = {"model": "bedrock/amazon.nova:0", "api_base": server.url, "aws_region_name": REGION}
    return {"model_name": "m", "litellm_params": {**place, **params}}


def keyed(up: FakeUpstream, key: object, **params: object) -> dict[str, object]:
    return {
        "model_name": "m",
        "litellm_params": {"model": "openai/m", "api_base": up.url, "api_key": key, **params},
    }


def on_both(router: Router, **options: object) -> list[str]:
    """The answer of either face."""

    async def ask() -> object:
        try:
            return await router.acompletion("m", MESSAGES, **options)
        finally:
            await router.aclose()

    answers = [router.completion("m", MESSAGES, **options), asyncio.run(ask())]
    return [answer.choices[0].message.content for answer in answers]


def test_bedrock_is_asked_with_a_signature(server: Server) -> None:
    assert on_both(Router([bedrock(server, **KEYS)])) == ["yes", "yes"]
    assert [seen["authorization"][:16] for seen in server.seen] == ["AWS4-HMAC-SHA256"] * 2


def test_a_caller_may_sign_with_credentials_of_their_own(server: Server) -> None:
    house = bedrock(server, aws_profile_name="absent")
    assert on_both(Router([house]), **KEYS) == ["yes", "yes"]
    for name in ("aws_profile_name", "aws_role_name", "vertex_credentials"):
        with pytest.raises(InvalidRequestError) as caught:
            on_both(Router([house]), **{name: "x"})
        assert caught.value.param == name


def test_a_deployment_without_credentials_gives_way_to_another(server: Server, up: FakeUpstream) -> None:
    router = Router([bedrock(server, aws_profile_name="absent", order=1), keyed(up, "k", order=2)])
    answer = router.completion("m", MESSAGES)
    assert answer.route.attempts == 2
    assert answer.route.failures[0][1] == "no_credentials"
    assert server.seen == []


def test_a_function_that_blocks_does_not_hold_up_the_event_loop(up: FakeUpstream) -> None:
    called, go_on, places = threading.Event(), threading.Event(), []

    def token() -> str:
        places.append(threading.current_thread())
        called.set()
        assert go_on.wait(30)
        return "t"

    async def main() -> None:
        router = Router([keyed(up, token)])
        asked = asyncio.create_task(router.acompletion("m", MESSAGES))
        await asyncio.to_thread(called.wait, 30)
        go_on.set()  # by the loop itself, which would be the one that waits
        await asked
        await router.aclose()

    asyncio.run(main())
    assert places != [threading.main_thread()]
    assert up.calls[0].headers["authorization"] == "Bearer t"
    go_on.set()
    Router([keyed(up, token)]).completion("m", MESSAGES)
    assert places[1] is threading.current_thread()


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_the_deadline_holds_for_credentials_too(up: FakeUpstream, kind: str) -> None:
    end = threading.Event()

    def slow() -> str:
        assert end.wait(30)
        return "t"

    async def never() -> str:
        await asyncio.Event().wait()
        return "t"

    give: Callable[[], object] = slow if kind == "sync" else never

    async def main() -> None:
        router = Router([keyed(up, give)], num_retries=0)
        with pytest.raises(DeadlineError):
            await router.acompletion("m", MESSAGES, timeout=0.05)
        end.set()
        await router.aclose()

    asyncio.run(main())
    assert up.count == 0


def test_a_deployment_that_can_never_answer_is_found_at_once() -> None:
    entry = {"model_name": "m", "litellm_params": {"model": "azure/d", "api_version": "v1"}}
    with pytest.raises(ConfigError, match=r"^model_list\[0\]: azure needs api_base") as caught:
        Router([entry], cache=CacheManager())
    assert caught.value.param == "model_list[0].api_base"
