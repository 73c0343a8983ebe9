"""Requests to Bedrock on their way: signed by the book, over real connections, on both faces."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from botocore.credentials import RefreshableCredentials

from llm_middleware._drive import run_sync
from llm_middleware._ports import bedrock
from llm_middleware._ports.bedrock import BedrockSigner
from llm_middleware._ports.http_async import AsyncTransport
from llm_middleware._ports.http_settings import HTTPSettings
from llm_middleware._ports.http_sync import SyncTransport
from llm_middleware.errors import AuthenticationError, ConfigError
from llm_middleware.providers.adapters import prepared
from llm_middleware.providers.messages import Timeouts
from llm_middleware.providers.target import Target, target_of
from llm_middleware.routing.deployment import Deployment
from tests.providers.bedrock_server import ANSWER, KEYS, REGION, Server

BODY = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}


@pytest.fixture(autouse=True)
def no_aws_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = "ACCESS_KEY_ID SECRET_ACCESS_KEY SESSION_TOKEN PROFILE REGION DEFAULT_REGION BEARER_TOKEN_BEDROCK"
    for name in names.split():
        monkeypatch.delenv(f"AWS_{name}", raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        yield made


def target(base: str | None = None, **connection: object) -> Target:
    named = {"aws_region_name": REGION} | ({"api_base": base} if base else {})
    return target_of(
        Deployment(
            id="d", group="g", provider="bedrock", model="amazon.nova:0", connection=named | connection
        ),
        environ={},
    )


class Threads:
    """``blocking`` of the async face, which says how often it was asked."""

    def __init__(self) -> None:
        self.hops = 0

    async def __call__(self, function: Callable[..., object], *args: object) -> object:
        self.hops += 1
        return await asyncio.to_thread(function, *args)


async def inline(function: Callable[..., object], *args: object) -> object:
    return function(*args)


async def ask(to: Target, signer: BedrockSigner, blocking: object, transport: object) -> tuple[int, bytes]:
    _, request = await prepared(to, "chat", BODY, False, signer=signer, blocking=blocking)  # type: ignore[arg-type]
    reply = await transport.send(request, Timeouts())  # type: ignore[attr-defined]
    return reply.status, await reply.read()


@pytest.mark.parametrize("token", [None, "session-token"])
def test_a_sync_request_arrives_with_a_signature_that_is_right(server: Server, token: str | None) -> None:
    transport, signer = SyncTransport(HTTPSettings()), BedrockSigner()
    to = target(server.url, **KEYS, aws_session_token=token)
    for _ in range(2):
        assert run_sync(ask(to, signer, inline, transport)) == (200, json.dumps(ANSWER).encode())
    assert server.seen[0].get("x-amz-security-token") == token
    wrong = target(server.url, **KEYS | {"aws_secret_access_key": "wrong"})
    assert run_sync(ask(wrong, signer, inline, transport))[0] == 403
    run_sync(transport.aclose())


def test_an_async_request_too_and_only_the_first_one_takes_a_thread(server: Server) -> None:
    async def main() -> None:
        transport, signer, threads = AsyncTransport(HTTPSettings()), BedrockSigner(), Threads()
        to = target(server.url, **KEYS)
        assert not signer.ready(to)
        for _ in range(3):
            assert await ask(to, signer, threads, transport) == (200, json.dumps(ANSWER).encode())
        assert signer.ready(to)
        assert threads.hops == 1
        await transport.aclose()

    asyncio.run(main())


def test_credentials_that_expire_are_renewed_in_a_thread() -> None:
    def given(hours: float) -> dict[str, str]:
        expiry = (datetime.now(UTC) + timedelta(hours=hours)).isoformat()
        return {"access_key": "A", "secret_key": "B", "token": "C", "expiry_time": expiry}

    renewals: list[str] = []

    def renew() -> dict[str, str]:
        renewals.append(threading.current_thread().name)
        return given(1.0)

    async def main() -> None:
        signer, threads, to = BedrockSigner(), Threads(), target(**KEYS)
        stale = RefreshableCredentials.create_from_metadata(given(0.01), renew, "test")
        signer._sessions[bedrock._key(to)] = (None, stale)
        for _ in range(3):
            _, request = await prepared(to, "chat", BODY, False, signer=signer, blocking=threads)  # type: ignore[arg-type]
            assert request.headers["x-amz-security-token"] == "C"
        assert threads.hops == 1
        assert len(renewals) == 1
        assert renewals[0] != threading.current_thread().name

    asyncio.run(main())


def test_an_api_key_takes_no_thread_and_no_signature() -> None:
    async def main() -> None:
        threads, signer = Threads(), BedrockSigner()
        to = target(api_key="k")
        _, request = await prepared(to, "chat", BODY, False, signer=signer, blocking=threads)  # type: ignore[arg-type]
        assert request.headers["authorization"] == "Bearer k"
        assert (threads.hops, signer._sessions) == (0, {})

    asyncio.run(main())


def test_who_opens_a_session_holds_up_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    opened, begun, go_on = bedrock._opened, threading.Event(), threading.Event()
    openings: list[object] = []

    def slow(connection: Mapping[str, object]) -> tuple[object, object]:
        openings.append(connection["aws_access_key_id"])
        if connection["aws_access_key_id"] == "SLOW":
            begun.set()
            assert go_on.wait(30)
        return opened(connection)

    monkeypatch.setattr(bedrock, "_opened", slow)
    signer, late = BedrockSigner(), target(**KEYS | {"aws_access_key_id": "SLOW"})

    def ask_signer(to: Target) -> None:
        run_sync(prepared(to, "chat", BODY, False, signer=signer, blocking=inline))  # type: ignore[arg-type]

    waiting = [threading.Thread(target=ask_signer, args=(late,), daemon=True) for _ in range(4)]
    for thread in waiting:
        thread.start()
    assert begun.wait(30)
    ask_signer(target(**KEYS))  # while the others wait
    assert not signer.ready(late)
    go_on.set()
    for thread in waiting:
        thread.join(30)
    assert sorted(map(str, openings)) == ["AKIDEXAMPLE", "SLOW"]
    assert signer.ready(late)


def test_what_is_wrong_with_a_deployment_is_an_error_of_the_provider() -> None:
    """Another deployment can answer: it is no error of the call."""
    signer = BedrockSigner()
    bare = Deployment(id="d", group="g", provider="bedrock", model="m", connection=KEYS)
    nowhere = target_of(bare, environ={})
    with pytest.raises(ConfigError, match="needs aws_region_name"):
        signer.located(nowhere)
    for to, message in (
        (nowhere, "needs aws_region_name"),
        (target(aws_profile_name="absent"), "AWS settings are wrong"),
        (target(), "no AWS credentials"),
    ):
        with pytest.raises(AuthenticationError, match=message) as caught:
            run_sync(prepared(to, "chat", BODY, False, signer=signer, blocking=inline))  # type: ignore[arg-type]
        assert caught.value.code == "no_credentials"


@pytest.mark.parametrize(
    "theirs",
    [
        {"aws_bedrock_runtime_endpoint": "https://bedrock-runtime.us-east-1.amazonaws.com"},
        {"api_base": "https://x.execute-api.us-east-1.amazonaws.com"},
    ],
)
def test_a_caller_does_not_sign_as_this_machine(
    theirs: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "abc")
    own = Deployment(
        id="d",
        group="g",
        provider="bedrock",
        model="m",
        connection={**KEYS, "aws_region_name": REGION},
    )
    for deployment in (own, Deployment(id="d", group="g", provider="bedrock", model="m")):
        to = target_of(deployment, {**theirs, "aws_region_name": REGION}, environ={})
        with pytest.raises(AuthenticationError, match="needs all of its AWS credentials"):
            run_sync(prepared(to, "chat", BODY, False, signer=BedrockSigner(), blocking=inline))  # type: ignore[arg-type]


def test_a_callers_own_credentials_sign_for_them(server: Server) -> None:
    house = Deployment(
        id="d",
        group="g",
        provider="bedrock",
        model="m",
        connection={"aws_role_name": "arn:aws:iam::1:role/house", "aws_region_name": REGION},
    )
    to = target_of(house, {**KEYS, "api_base": server.url, "aws_region_name": REGION}, environ={})
    transport = SyncTransport(HTTPSettings())
    assert run_sync(ask(to, BedrockSigner(), inline, transport))[0] == 200
    run_sync(transport.aclose())
