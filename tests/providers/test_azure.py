"""Azure's addresses and credentials."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest

from llm_middleware import ConfigError
from llm_middleware._drive import run_sync
from llm_middleware.errors import BadRequestError
from llm_middleware.providers.azure import build
from llm_middleware.providers.target import authorized, target_of

RESOURCE = "https://res.openai.azure.com"
DEPLOYMENT = f"{RESOURCE}/openai/deployments/my-gpt"
FOUNDRY = "https://res.services.ai.azure.com"


@dataclass
class Served:
    connection: dict[str, object]
    provider: str = "azure"
    model: str = "my-gpt"
    info: dict[str, object] = field(default_factory=dict)


def target(provider="azure", model="my-gpt", environ=None, **connection):
    return target_of(Served({"api_key": "k", **connection}, provider, model), environ=environ or {})


def address(kind="chat", **connection) -> str:
    return build(target(**connection), kind, {"file": b""} if kind == "transcription" else {}, False).url


class TestAddresses:
    @pytest.mark.parametrize(
        ("kind", "path"),
        [
            ("chat", "chat/completions"),
            ("text", "completions"),
            ("embedding", "embeddings"),
            ("transcription", "audio/transcriptions"),
        ],
    )
    def test_classic(self, kind, path):
        url = address(kind, api_base=RESOURCE + "/", api_version="2024-10-21")
        assert url == f"{DEPLOYMENT}/{path}?api-version=2024-10-21"

    def test_classic_responses_have_no_deployment_in_their_address(self):
        url = address("responses", api_base=RESOURCE, api_version="2025-03-01-preview")
        assert url == f"{RESOURCE}/openai/responses?api-version=2025-03-01-preview"

    @pytest.mark.parametrize(
        ("base", "version", "expected"),
        [
            (f"{RESOURCE}/openai", "2024-10-21", f"{DEPLOYMENT}/chat/completions?api-version=2024-10-21"),
            (DEPLOYMENT, "2024-10-21", f"{DEPLOYMENT}/chat/completions?api-version=2024-10-21"),
            (
                f"{DEPLOYMENT}/chat/completions?api-version=2024-02-01",
                None,
                f"{DEPLOYMENT}/chat/completions?api-version=2024-02-01",
            ),
            (
                f"{DEPLOYMENT}?api-version=2024-02-01",
                "2024-10-21",
                f"{DEPLOYMENT}/chat/completions?api-version=2024-10-21",
            ),
            (
                "https://gw.corp.example/llm",
                "2024-10-21",
                "https://gw.corp.example/llm/openai/deployments/my-gpt/chat/completions?api-version=2024-10-21",
            ),
        ],
    )
    def test_bases_that_say_more(self, base, version, expected):
        assert address(api_base=base, api_version=version) == expected

    @pytest.mark.parametrize(
        ("base", "version", "query"),
        [
            (RESOURCE, "v1", ""),
            (RESOURCE, "preview", "?api-version=preview"),
            (f"{RESOURCE}/openai", "latest", "?api-version=latest"),
            (f"{RESOURCE}/openai/v1/", None, ""),
            (f"{RESOURCE}/openai/v1", "preview", "?api-version=preview"),
            (f"{RESOURCE}/openai/v1", "2024-10-21", ""),
        ],
    )
    @pytest.mark.parametrize("kind", ["chat", "responses"])
    def test_v1(self, kind, base, version, query):
        path = {"chat": "chat/completions", "responses": "responses"}[kind]
        assert address(kind, api_base=base, api_version=version) == f"{RESOURCE}/openai/v1/{path}{query}"

    def test_the_name_of_a_deployment_is_one_part_of_the_path(self):
        url = address(model="a/../b?c#d é", api_base=RESOURCE, api_version="v")
        assert url == (
            f"{RESOURCE}/openai/deployments/a%2F..%2Fb%3Fc%23d%20%C3%A9/chat/completions?api-version=v"
        )
        with pytest.raises(BadRequestError, match="no name of a deployment"):
            address(model="..", api_base=RESOURCE, api_version="v")

    def test_the_environment_has_base_and_version(self):
        environ = {"AZURE_API_BASE": RESOURCE, "AZURE_API_VERSION": "2024-10-21"}
        assert address(environ=environ) == f"{DEPLOYMENT}/chat/completions?api-version=2024-10-21"

    def test_a_classic_address_without_a_version_is_an_error(self):
        with pytest.raises(ConfigError, match=r"^azure needs an api_version"):
            address(api_base=RESOURCE)

    @pytest.mark.parametrize(
        ("base", "version", "expected"),
        [
            (FOUNDRY, None, f"{FOUNDRY}/models/chat/completions?api-version=2024-05-01-preview"),
            (f"{FOUNDRY}/models", "2025-01-01", f"{FOUNDRY}/models/chat/completions?api-version=2025-01-01"),
            (FOUNDRY, "v1", f"{FOUNDRY}/openai/v1/chat/completions"),
            (f"{FOUNDRY}/openai/v1", None, f"{FOUNDRY}/openai/v1/chat/completions"),
            (
                "https://m.models.ai.azure.com/v1",
                None,
                "https://m.models.ai.azure.com/v1/chat/completions",
            ),
        ],
    )
    def test_foundry(self, base, version, expected):
        assert address(provider="azure_ai", api_base=base, api_version=version) == expected


class TestRequests:
    def test_the_whole_request(self):
        request = build(
            target(api_base=RESOURCE, api_version="2024-10-21"), "chat", {"messages": [], "model": "g"}, True
        )
        assert request.headers == {
            "content-type": "application/json",
            "accept": "text/event-stream",
            "api-key": "k",
        }
        assert json.loads(request.body) == {"messages": [], "model": "my-gpt", "stream": True}

    def test_an_entra_token_is_a_bearer(self):
        to = target(api_base=RESOURCE, api_version="v1", api_key=None, azure_ad_token="t-1")
        assert to.headers == {"authorization": "Bearer t-1"}
        assert "t-1" in to.secrets()

    def test_an_entra_token_provider_is_asked_for_each_request(self):
        tokens = iter(["t-1", "t-2"])
        to = target(
            api_base=RESOURCE,
            api_version="v1",
            api_key=None,
            azure_ad_token_provider=lambda: next(tokens),
            environ={"AZURE_API_KEY": "not-this"},
        )
        for token in ("t-1", "t-2"):
            request = build(run_sync(authorized(to)), "chat", {}, False)
            assert request.headers["authorization"] == f"Bearer {token}"
            assert "api-key" not in request.headers

    def test_a_key_of_the_environment_goes_where_the_deployment_says(self):
        to = target(api_base=RESOURCE, api_key=None, environ={"AZURE_API_KEY": "e"})
        assert to.headers == {"api-key": "e"}

    def test_reasoning_models_are_known_by_their_base_model(self):
        served = Served({"api_base": RESOURCE, "api_version": "v1"}, info={"base_model": "o3-mini"})
        request = build(target_of(served, environ={}), "chat", {"max_tokens": 5}, False)
        assert json.loads(request.body) == {"model": "my-gpt", "max_completion_tokens": 5}
