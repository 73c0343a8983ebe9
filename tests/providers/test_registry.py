"""Who is meant by a name or an address, and where which key goes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from llm_middleware import ConfigError
from llm_middleware._drive import run_sync
from llm_middleware.errors import AuthenticationError, InvalidRequestError, SuspendedInSyncError
from llm_middleware.providers.registry import Registry, origin_of, registry
from llm_middleware.providers.table import ALIASES, ROWS
from llm_middleware.providers.target import authorized, target_of

# A key for every provider, so that a wrong one would show.
KEYS = {name: f"key-of-{row.name}" for row in registry() for name in row.api_key_env}


@dataclass
class Served:
    provider: str
    model: str = "m"
    connection: Mapping[str, object] = field(default_factory=dict)
    info: Mapping[str, object] = field(default_factory=dict)


def meant(model: str, environ: Mapping[str, str] = KEYS, providers: Registry | None = None, **connection):
    """The target of a model and a connection, as a model list would have it."""
    row, name = (providers or registry()).resolve(model, connection.get("api_base"))
    return target_of(Served(row.name, name, connection), providers=providers, environ=environ)


def key_sent(target) -> str | None:
    return target.headers.get("authorization")


class TestTable:
    def test_every_provider_has_a_row_of_its_own(self):
        table = registry()
        assert len(table.providers) == len(ROWS) == 104
        assert all(table[name].name == name for name in ROWS)
        assert not ALIASES.keys() & ROWS.keys()
        assert all(table[alias] is table[name] for alias, name in ALIASES.items())

    @pytest.mark.parametrize(
        ("name", "base", "key", "base_env"),
        [
            ("groq", "https://api.groq.com/openai/v1", ("GROQ_API_KEY",), ("GROQ_API_BASE",)),
            ("chutes", "https://llm.chutes.ai/v1", ("CHUTES_API_KEY",), ()),
            ("baseten", "https://inference.baseten.co/v1", ("BASETEN_API_KEY",), ()),
            ("hosted_vllm", None, ("HOSTED_VLLM_API_KEY",), ("HOSTED_VLLM_API_BASE",)),
            (
                "openai",
                "https://api.openai.com/v1",
                ("OPENAI_API_KEY",),
                ("OPENAI_BASE_URL", "OPENAI_API_BASE"),
            ),
        ],
    )
    def test_a_row_says_where_and_by_which_variables(self, name, base, key, base_env):
        row = registry()[name]
        assert (row.base_url, row.api_key_env, row.api_base_env) == (base, key, base_env)

    def test_kinds_and_quirks(self):
        table = registry()
        assert table["together_ai"].kinds == {"chat", "text"}
        assert table["openai"].kinds == {"chat", "text", "embedding", "transcription", "responses"}
        assert table["poe"].renames == {"max_completion_tokens": "max_tokens"}
        assert table["scx-ai"].maximum == {"temperature": 1.99}
        assert table["parasail"].force == {"store": False}
        assert table["publicai"].text_content is True
        assert [row.name for row in table if row.adapter != "openai"] == [
            "azure_ai",
            "anthropic",
            "azure",
            "bedrock",
        ]

    def test_no_variable_is_a_key_for_some_and_an_address_for_others(self):
        keys = {name for row in registry() for name in row.api_key_env}
        bases = {name for row in registry() for name in row.api_base_env}
        assert not keys & bases

    def test_every_address_is_found_again_and_is_safe_for_a_key(self):
        for row in registry():
            for base in (row.base_url, *row.bases):
                if base and "{" not in base:
                    assert registry().at(base).base_url in (base, row.base_url), row.name
                    assert base.startswith("https://") or row.self_hosted


class TestNames:
    @pytest.mark.parametrize(
        ("model", "base", "expected"),
        [
            ("groq/llama-3", None, ("groq", "llama-3")),
            ("openai/gpt-4o", None, ("openai", "gpt-4o")),
            ("together_ai/meta-llama/Llama-3", None, ("together_ai", "meta-llama/Llama-3")),
            ("gpt-4o", None, ("openai", "gpt-4o")),
            ("claude-sonnet-4", None, ("anthropic", "claude-sonnet-4")),
            ("ollama_chat/llama3", None, ("ollama", "llama3")),
            (
                "meta-llama/Llama-3",
                "https://api.deepinfra.com/v1/openai",
                ("deepinfra", "meta-llama/Llama-3"),
            ),
            ("grok-4", "https://api.x.ai/v1", ("xai", "grok-4")),
            ("grok-4", "https://api.x.ai/v1/", ("xai", "grok-4")),
            ("grok-4", "https://API.X.AI:443/v1", ("xai", "grok-4")),
            ("m", "https://unknown.example/v1", ("openai_like", "m")),
        ],
    )
    def test_whose_model_it_is(self, model, base, expected):
        row, name = registry().resolve(model, base)
        assert (row.name, name) == expected

    def test_a_provider_that_is_named_decides(self):
        row, name = registry().resolve("groq/llama", provider="openrouter")
        assert (row.name, name) == ("openrouter", "groq/llama")
        assert registry().resolve("groq/llama", provider="groq")[1] == "llama"

    def test_an_unknown_prefix_is_an_error_that_names_the_nearest(self):
        with pytest.raises(ConfigError, match=r"no provider 'gorq'; did you mean 'groq'\?"):
            registry().resolve("gorq/llama")


class TestUsersRows:
    def test_r64_a_row_of_the_user_is_on_top(self):
        mine = registry({"groq": {"base_url": "https://groq.corp.example/v1/"}})
        target = meant("groq/llama-x", providers=mine)
        assert target.base_url == "https://groq.corp.example/v1"
        assert key_sent(target) == "Bearer key-of-groq"  # the row keeps what it does not name
        assert registry()["groq"].base_url == "https://api.groq.com/openai/v1"

    def test_a_new_provider(self):
        mine = registry(
            {
                "house": {
                    "base_url": "https://llm.house.example/v1",
                    "api_key_env": "HOUSE_KEY",
                    "auth": "x-house-key",
                    "param_mappings": {"max_completion_tokens": "max_tokens"},
                    "headers": {"X-Team": "a"},
                }
            }
        )
        target = meant("house/big", environ={"HOUSE_KEY": "k1"}, providers=mine)
        assert target.headers == {"x-team": "a", "x-house-key": "k1"}
        assert mine.at("https://llm.house.example/v1").name == "house"
        assert mine["house"].renames == {"max_completion_tokens": "max_tokens"}
        assert len(mine.providers) == 105

    def test_the_users_row_counts_where_two_have_one_address(self):
        mine = registry({"my_xai": {"base_url": "https://api.x.ai/v1"}})
        assert mine.at("https://api.x.ai/v1").name == "my_xai"

    @pytest.mark.parametrize(
        ("rows", "where"),
        [
            ({"a": {"base_ulr": "https://x.example"}}, "providers.a.base_ulr"),
            ({"a": {"base_url": "x.example"}}, "providers.a.base_url"),
            ({"a": {"base_url": "https://u:p@x.example"}}, "providers.a.base_url"),
            ({"a": {"adapter": "smtp"}}, "providers.a.adapter"),
            ({"a": {"kinds": ["chat", "video"]}}, "providers.a.kinds"),
            ({"a": {"api_key_env": 5}}, "providers.a.api_key_env"),
            ({"a": {"maximum": {"temperature": "hot"}}}, "providers.a.maximum"),
            ({"a": {"text_content": "yes"}}, "providers.a.text_content"),
            ({"a": "https://x.example"}, "providers.a"),
            (["a"], "providers"),
        ],
    )
    def test_a_wrong_field_is_named(self, rows, where):
        with pytest.raises(ConfigError) as caught:
            registry(rows)
        assert caught.value.param == where


class TestKeys:
    def test_r62_a_bare_model_at_a_known_address_is_that_providers(self):
        target = meant("grok-4", api_base="https://api.x.ai/v1")
        assert (target.provider.name, key_sent(target)) == ("xai", "Bearer key-of-xai")

    def test_r62_an_unknown_address_gets_no_key_of_the_environment(self):
        target = meant("grok-4", api_base="https://llm.unknown.example/v1")
        assert target.provider.name == "openai_like"
        assert target.headers == {}

    @pytest.mark.parametrize(
        "base",
        [
            "https://evil.example/api.groq.com/openai/v1",
            "https://api.groq.com.evil.example/openai/v1",
            "https://evil.example/?u=https://api.groq.com/openai/v1",
            "https://evil.example#https://api.groq.com/openai/v1",
            "https://evilapi.groq.com/openai/v1",
            "https://api.groq.com./openai/v1",
            "https://api.groq.com:8443/openai/v1",
            "https://api.groq.com/openai/v1evil",
            "https://api.groq.com/openai",
            "https://api.groq.com/other/../openai/v1",
            "https://api.groq.com/openai/v1/%2e%2e/x",
            "http://api.groq.com/openai/v1",
            "http://api.groq.com:443/openai/v1",
        ],
    )
    @pytest.mark.parametrize("model", ["llama", "groq/llama", "openai/llama"])
    def test_r63_a_key_goes_to_the_exact_address_only(self, base, model):
        assert "key-of" not in repr(dict(meant(model, api_base=base).headers))

    @pytest.mark.parametrize(
        "base",
        [
            "https://api.groq.com@evil.example/openai/v1",
            "https://user@api.groq.com/openai/v1",
            "https://evil.example\\@api.groq.com/openai/v1",
            "https://api.groq.com\n.evil.example/openai/v1",
            "https://api.groq.com\t/openai/v1",
            "https://api.gr\u043eq.com/openai/v1",
            "ftp://api.groq.com/openai/v1",
            "//api.groq.com/openai/v1",
            "https://[::1",
            "https://api.groq.com:99999/openai/v1",
            "https:///openai/v1",
        ],
    )
    def test_r63_an_address_that_clients_read_differently_is_refused(self, base):
        assert origin_of(base) is None
        with pytest.raises(ConfigError, match=r"^api_base: expected an http"):
            meant("groq/llama", api_base=base)

    def test_r64_base_and_key_come_from_the_table(self):
        target = meant("groq/llama-x")
        assert (target.base_url, target.model) == ("https://api.groq.com/openai/v1", "llama-x")
        assert target.headers == {"authorization": "Bearer key-of-groq"}

    def test_the_first_variable_that_is_set_counts(self):
        environ = {"FIREWORKS_API_KEY": "", "FIREWORKS_AI_API_KEY": "second", "FIREWORKS_AI_TOKEN": "fourth"}
        assert key_sent(meant("fireworks_ai/m", environ)) == "Bearer second"

    def test_an_address_of_the_environment_is_the_providers_own(self):
        environ = {"GROQ_API_KEY": "k", "GROQ_API_BASE": "https://proxy.corp.example/groq/"}
        target = meant("groq/m", environ)
        assert (target.base_url, key_sent(target)) == ("https://proxy.corp.example/groq", "Bearer k")

    def test_an_address_of_a_deployment_needs_its_own_key(self):
        base = "https://proxy.corp.example/v1"
        assert key_sent(meant("openai/gpt-4o", api_base=base)) is None
        assert key_sent(meant("openai/gpt-4o", api_base=base, api_key="mine")) == "Bearer mine"

    def test_another_providers_address_gets_that_providers_key(self):
        target = meant("openai/grok-4", api_base="https://api.x.ai/v1")
        assert (target.provider.name, key_sent(target)) == ("xai", "Bearer key-of-xai")

    @pytest.mark.parametrize("provider", ["hosted_vllm", "ollama", "litellm_proxy"])
    def test_who_has_no_address_of_its_own_is_where_the_deployment_says(self, provider):
        target = meant(f"{provider}/m", api_base="http://gpu-1:8000/v1")
        assert key_sent(target) == f"Bearer key-of-{provider}"
        with pytest.raises(ConfigError, match=r"^heroku needs api_base or HEROKU_API_BASE$"):
            meant("heroku/m")

    def test_a_deployment_with_aws_keys_is_not_the_environments_api_key(self):
        environ = {"AWS_BEARER_TOKEN_BEDROCK": "b"}
        place = {"aws_region_name": "eu-west-1"}
        assert key_sent(meant("bedrock/m", environ, **place)) == "Bearer b"
        for name in ("aws_access_key_id", "aws_profile_name", "aws_role_name"):
            assert meant("bedrock/m", environ, **place, **{name: "x"}).headers == {}
        assert key_sent(meant("bedrock/m", environ, **place, aws_profile_name="x", api_key="k")) == "Bearer k"
        theirs = {"aws_access_key_id": "A", "aws_secret_access_key": "B"}
        assert target_of(Served("bedrock", "m", place), theirs, environ=environ).headers == {}

    def test_suffixes_are_added_where_they_are_missing(self):
        assert meant("ollama/m").base_url == "http://localhost:11434/v1"
        assert meant("ollama/m", api_base="http://gpu:11434/").base_url == "http://gpu:11434/v1"
        assert meant("ollama/m", api_base="http://gpu:11434/v1").base_url == "http://gpu:11434/v1"
        assert meant("mistral/m", api_base="https://api.mistral.ai").base_url == "https://api.mistral.ai/v1"

    def test_the_key_of_the_deployment_counts_first(self):
        assert key_sent(meant("groq/m", api_key=" mine\n")) == "Bearer mine"

    @pytest.mark.parametrize(
        ("model", "header"),
        [("sarvam/m", "api-subscription-key"), ("anthropic/claude-3", "x-api-key"), ("azure/d", "api-key")],
    )
    def test_each_provider_gets_its_key_in_its_way(self, model, header):
        base = "https://r.openai.azure.com" if model == "azure/d" else None
        target = meant(model, **({"api_base": base} if base else {}))
        assert target.headers == {header: f"key-of-{target.provider.name}"}

    def test_azure_foundry_and_serverless_take_the_key_differently(self):
        assert meant("azure_ai/m", api_base="https://r.services.ai.azure.com").headers == {
            "api-key": "key-of-azure_ai"
        }
        assert meant("azure_ai/m", api_base="https://m.models.ai.azure.com").headers == {
            "authorization": "Bearer key-of-azure_ai"
        }

    def test_organization_project_and_extra_headers(self):
        target = meant(
            "openai/gpt-4o", organization="org-1", project="p-1", extra_headers={"X-A": "1", "X-B": "2"}
        )
        assert target.headers == {
            "authorization": "Bearer key-of-openai",
            "openai-organization": "org-1",
            "openai-project": "p-1",
            "x-a": "1",
            "x-b": "2",
        }
        environ = {"OPENAI_ORG_ID": "org-9"}
        assert meant("openai/m", environ).headers == {"openai-organization": "org-9"}
        assert meant("openai/m", environ, api_base="https://x.example").headers == {}

    @pytest.mark.parametrize("value", ["a\r\nx-evil: 1", "a\x00", "schl\u00fcssel"])
    def test_a_header_is_one_line_of_ascii(self, value):
        with pytest.raises(ConfigError) as caught:
            meant("groq/m", api_key=value)
        assert value not in str(caught.value)

    def test_blanks_in_an_address_are_filled_with_labels_only(self):
        places = {"vertex_project": "p", "vertex_location": "europe-west1"}
        assert meant("vertex_ai/google/gemini", api_key="t", **places).base_url == (
            "https://europe-west1-aiplatform.googleapis.com/v1/projects/p/locations/europe-west1/endpoints/openapi"
        )
        environ = {"CLOUDFLARE_ACCOUNT_ID": "acc1", "CLOUDFLARE_API_KEY": "k"}
        assert meant("cloudflare/m", environ).base_url == (
            "https://api.cloudflare.com/client/v4/accounts/acc1/ai/v1"
        )
        with pytest.raises(ConfigError, match=r"^vertex_location: expected letters"):
            meant("vertex_ai/m", vertex_project="p", vertex_location="evil.example/")
        with pytest.raises(ConfigError, match=r"^vertex_ai needs vertex_location and vertex_project$"):
            meant("vertex_ai/m", environ={})

    def test_nothing_secret_is_in_the_text_of_a_target(self):
        target = meant(
            "groq/m", api_key="hidden-1", extra_headers={"a": "hidden-2"}, extra_body={"b": "hidden-3"}
        )
        assert "hidden" not in repr(target)

    def test_secrets_are_what_no_message_may_show(self):
        target = meant("azure/my-gpt", api_base="https://res.openai.azure.com", api_key="hidden-key")
        assert set(target.secrets()) == {"hidden-key", "res.openai.azure.com", "my-gpt"}
        assert "hidden-key" in meant("groq/m", api_key="hidden-key").secrets()


class TestCallers:
    SERVED = Served(
        "groq", "m", {"api_key": "house-key", "extra_headers": {"x-house": "h"}, "drop_params": True}
    )

    def over(self, served=SERVED, **overrides):
        return target_of(served, overrides, environ=KEYS)

    def test_a_callers_key_is_used_alone(self):
        target = self.over(api_key="theirs")
        assert target.headers == {"authorization": "Bearer theirs"}
        assert target.caller_key is True
        assert self.over().caller_key is False

    def test_a_callers_address_gets_nothing_of_the_deployment(self):
        target = self.over(api_base="https://theirs.example/v1")
        assert target.headers == {}
        assert target.drop_params is True
        vllm = Served("hosted_vllm", "m", {"api_base": "http://gpu:8000/v1", "api_key": "house-key"})
        assert self.over(vllm, api_base="http://theirs.example/v1").headers == {}
        azure = Served("azure", "m", {"api_base": "https://r.openai.azure.com", "azure_ad_token": "house"})
        assert self.over(azure, api_base="https://theirs.example").headers == {}

    def test_a_callers_path_at_the_deployments_own_server_keeps_its_key(self):
        vllm = Served("hosted_vllm", "m", {"api_base": "http://gpu:8000/v1", "api_key": "house-key"})
        target = self.over(vllm, api_base="http://gpu:8000/v2")
        assert (target.base_url, key_sent(target)) == ("http://gpu:8000/v2", "Bearer house-key")

    def test_an_address_that_is_the_deployments_changes_nothing(self):
        own = self.over(api_base="https://api.groq.com/openai/v1")
        assert own.headers == {"authorization": "Bearer house-key", "x-house": "h"}
        plain = self.over(Served("groq"), api_base="https://api.groq.com/openai/v1/")
        assert plain.headers == {"authorization": "Bearer key-of-groq"}
        by_variable = {"GROQ_API_KEY": "k", "GROQ_API_BASE": "https://proxy.example/groq"}
        theirs = {"api_base": "https://proxy.example/groq"}
        assert key_sent(target_of(Served("groq"), theirs, environ=by_variable)) == "Bearer k"
        theirs = {"api_base": "https://api.groq.com/openai/v1"}
        assert key_sent(target_of(Served("groq"), theirs, environ=by_variable)) is None

    def test_a_callers_address_of_another_provider_gets_no_key_of_the_environment(self):
        target = self.over(api_base="https://api.x.ai/v1")
        assert (target.provider.name, target.headers, target.house) == ("xai", {}, False)
        assert self.over(Served("openai", "grok-4"), api_base="https://api.x.ai/v1").headers == {}
        mine = registry({"house": {"base_url": "https://house.example/v1", "auth": lambda: "t"}})
        away = {"api_base": "https://house.example/v1"}
        assert target_of(Served("groq"), away, providers=mine, environ=KEYS).token is None

    @pytest.mark.parametrize(
        "brought",
        [
            {"azure_ad_token": "theirs"},
            {"azure_ad_token_provider": lambda: "theirs"},
            {"aws_access_key_id": "A", "aws_secret_access_key": "B"},
        ],
    )
    def test_who_brings_credentials_uses_nobody_elses(self, brought):
        environ = KEYS | {"OPENAI_ORG_ID": "org-9"}
        connection = {"api_key": "k", "organization": "org-1", "project": "p-1", "aws_role_name": "arn"}
        for served in (Served("openai", "m", connection), Served("openai"), Served("bedrock_mantle")):
            target = target_of(served, {**brought, "aws_region_name": "eu-west-1"}, environ=environ)
            assert not {"openai-organization", "openai-project"} & target.headers.keys()
            assert "key-of" not in repr(dict(target.headers))
            assert "Bearer k" not in target.headers.values()
            assert "aws_role_name" not in target.connection
            assert (target.caller_key, target.house) == (True, False)

    def test_an_empty_key_is_none(self):
        assert key_sent(self.over(api_key="")) == "Bearer house-key"
        assert self.over(api_key="", azure_ad_token=None).house is True

    @pytest.mark.parametrize(
        ("wrong", "param"),
        [
            ({"aws_profile_name": "admin"}, "aws_profile_name"),
            ({"aws_role_name": "arn:aws:iam::1:role/r"}, "aws_role_name"),
            ({"aws_session_name": "s"}, "aws_session_name"),
            ({"vertex_credentials": "/etc/key.json"}, "vertex_credentials"),
            ({"aws_web_identity_token": "oidc/file//etc/x"}, "aws_web_identity_token"),
            ({"aws_sts_endpoint": "https://h.example"}, "aws_sts_endpoint"),
            ({"tenant_id": "t"}, "tenant_id"),
            ({"temperature": 1}, "temperature"),
            ({"api_key": 5}, "api_key"),
            ({"api_key": "os.environ/OPENAI_API_KEY"}, "api_key"),
            ({"api_base": " os.environ/HOME"}, "api_base"),
            ({"api_base": lambda: "https://h.example"}, "api_base"),
            ({"api_base": "ftp://h.example"}, "api_base"),
            ({"base_url": "h.example"}, "api_base"),
            ({"api_key": "a\r\nx-evil: 1"}, "api_key"),
            ({"organization": "a\nb"}, "organization"),
            ({"extra_headers": {"a": "b\r\nc: d"}}, "extra_headers"),
            ({"extra_headers": {"a b": "c"}}, "extra_headers"),
            ({"extra_headers": {"a": 5}}, "extra_headers"),
            ({"extra_headers": {"a": "os.environ/HOME"}}, "extra_headers"),
            ({"extra_headers": {"Host": "h.example"}}, "extra_headers"),
            ({"extra_headers": {"Transfer-Encoding": "chunked"}}, "extra_headers"),
            ({"extra_headers": {"Content-Length": "0"}}, "extra_headers"),
            ({"extra_headers": {"Proxy-Authorization": "x"}}, "extra_headers"),
            ({"extra_headers": {"Helicone-Target-Url": "https://h.example"}}, "extra_headers"),
            ({"extra_headers": "a"}, "extra_headers"),
            ({"extra_body": {"model": "the-dear-one"}}, "extra_body"),
            ({"extra_body": {"stream": True}}, "extra_body"),
            ({"extra_body": "x"}, "extra_body"),
            ({"drop_params": "true"}, "drop_params"),
            ({"additional_drop_params": "a"}, "additional_drop_params"),
            ({"additional_drop_params": [1]}, "additional_drop_params"),
            ({"max_retries": -1}, "max_retries"),
            ({"aws_access_key_id": "A"}, "aws_secret_access_key"),
            ({"aws_secret_access_key": "B"}, "aws_access_key_id"),
            ({"aws_session_token": "C"}, "aws_access_key_id"),
        ],
    )
    def test_what_a_caller_may_not_say_is_named(self, wrong, param):
        with pytest.raises(InvalidRequestError) as caught:
            self.over(**wrong)
        assert (caught.value.param, caught.value.status) == (param, 400)
        assert caught.value.message.startswith(f"{param}: ")

    def test_no_value_of_a_callers_is_told(self):
        for wrong in ({"api_key": "hidden\nx"}, {"api_base": "hidden"}, {"vertex_credentials": "hidden"}):
            with pytest.raises(InvalidRequestError) as caught:
                self.over(**wrong)
            assert "hidden" not in str(caught.value)

    @pytest.mark.parametrize("place", ["evil.example/x", "x.s3.us-east-1", "a.b", "..", "a@b"])
    def test_a_callers_place_is_one_label_of_the_host(self, place):
        served = Served("vertex_ai", "m", {"api_key": "k", "vertex_project": "p", "vertex_location": "l"})
        with pytest.raises(InvalidRequestError, match=r"^vertex_location: expected letters"):
            self.over(served, vertex_location=place)
        with pytest.raises(InvalidRequestError, match=r"^aws_region_name: expected letters"):
            self.over(Served("bedrock"), aws_region_name=place)
        assert self.over(served, vertex_location="europe-west1").base_url.startswith("https://europe-west1-")

    def test_what_is_wrong_with_the_deployment_is_not_the_callers_mistake(self):
        with pytest.raises(ConfigError, match=r"^azure needs api_base"):
            self.over(Served("azure"), api_key="theirs")
        with pytest.raises(ConfigError, match=r"^api_key: a header"):
            self.over(Served("groq", "m", {"api_key": "a\nb"}), drop_params=True)

    def test_a_callers_headers_and_fields_are_added(self):
        served = Served("groq", "m", {"extra_body": {"a": 1, "b": 1}, "extra_headers": {"x-a": "1"}})
        target = self.over(served, extra_body={"b": 2}, extra_headers={"x-b": "2"})
        assert target.extra_body == {"a": 1, "b": 2}
        assert target.headers == {"authorization": "Bearer key-of-groq", "x-a": "1", "x-b": "2"}

    def test_nothing_of_the_callers_objects_changes(self):
        connection = {"extra_body": {"a": 1}}
        overrides = {"extra_body": {"b": 2}, "api_key": None}
        target_of(Served("groq", "m", connection), overrides, environ=KEYS)
        assert connection == {"extra_body": {"a": 1}}
        assert overrides == {"extra_body": {"b": 2}, "api_key": None}


class TestTokens:
    def test_a_function_gives_the_token_of_each_request(self):
        tokens = iter(["t1", "t2"])
        target = meant("vertex_ai/m", vertex_project="p", vertex_location="l1", api_key=lambda: next(tokens))
        assert target.headers == {}
        assert [run_sync(authorized(target)).headers for _ in range(2)] == [
            {"authorization": "Bearer t1"},
            {"authorization": "Bearer t2"},
        ]
        assert run_sync(authorized(meant("groq/m"))).headers == {"authorization": "Bearer key-of-groq"}

    def test_it_may_be_awaitable_where_there_is_a_loop(self):
        async def token():
            return "t"

        assert run_sync(authorized(meant("groq/m", api_key=token))).headers == {"authorization": "Bearer t"}

        class Suspends:
            def __await__(self):
                yield

        with pytest.raises(SuspendedInSyncError):
            run_sync(authorized(meant("groq/m", api_key=Suspends)))

    def test_a_row_may_have_one_which_goes_to_its_own_address_only(self):
        mine = registry({"house": {"base_url": "https://house.example/v1", "auth": lambda: "t"}})
        assert run_sync(authorized(meant("house/m", providers=mine))).headers == {"authorization": "Bearer t"}
        away = meant("house/m", providers=mine, api_base="https://away.example/v1")
        assert run_sync(authorized(away)).headers == {}

    def test_what_may_block_is_run_where_it_may(self):
        places = []

        async def blocking(function, *args):
            places.append(threading.current_thread().name)
            return await asyncio.to_thread(function, *args)

        def token():
            places.append(threading.current_thread().name)
            return "t"

        async def awaited():
            return token()

        class Awaited:
            async def __call__(self):
                return token()

        def returned():
            places.append(threading.current_thread().name)
            return awaited()

        async def main():
            here = threading.current_thread().name
            for give, hops in ((token, [False]), (awaited, []), (Awaited(), []), (returned, [False])):
                places.clear()
                target = await authorized(meant("groq/m", api_key=give), blocking)
                assert key_sent(target) == "Bearer t"
                ran = [name == here for name in places]
                assert ran == (
                    [True, *hops] if hops and give is token else [True, False, True] if hops else [True]
                )

        asyncio.run(main())

    @pytest.mark.parametrize("give", [lambda: None, lambda: "", lambda: 1 / 0, lambda: "a\r\nb"])
    def test_one_that_fails_is_an_authentication_error(self, give):
        with pytest.raises(AuthenticationError, match=r"the token (provider )?of the deployment") as caught:
            run_sync(authorized(meant("groq/m", api_key=give)))
        assert caught.value.code == "no_token"
