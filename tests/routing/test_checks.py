"""Deployments that can never answer are found when a Router is made."""

from __future__ import annotations

import importlib.util

import pytest

from llm_middleware import ConfigError
from llm_middleware.providers.registry import registry
from llm_middleware.routing.checks import check_deployments
from llm_middleware.routing.model_list import read_model_list


def check(*params: dict[str, object], group: str = "g", environ: dict[str, str] | None = None) -> None:
    entries = [{"model_name": group, "litellm_params": each} for each in params]
    table = registry({"house": {"base_url": "https://{HOUSE}.example", "auth": lambda: 1 / 0}})
    deployments = read_model_list(entries, providers=table, environ={})
    check_deployments(deployments, table, environ or {})


GOOD: list[dict[str, object]] = [
    {"model": "openai/gpt-4o"},  # no key: it may come with the request
    {"model": "groq/llama"},
    {"model": "anthropic/claude-sonnet-4-5"},
    {"model": "azure/d", "api_base": "https://r.openai.azure.com", "api_version": "2024-10-21"},
    {"model": "azure/d", "api_base": "https://r.openai.azure.com/openai/v1"},
    {"model": "bedrock/amazon.nova-pro-v1:0"},  # the region may be AWS's configuration's
    {"model": "bedrock/amazon.nova-pro-v1:0", "aws_region_name": "eu-west-1"},
    {"model": "openai/org/m", "api_base": "http://gpu:8000/v1"},
]


@pytest.mark.parametrize("params", GOOD, ids=str)
def test_one_that_may_work_is_no_error(params: dict[str, object]) -> None:
    check(params)


@pytest.mark.parametrize(
    ("params", "param", "message"),
    [
        ({"model": "azure/d"}, "api_base", "azure needs api_base or AZURE_API_BASE"),
        (
            {"model": "azure/d", "api_base": "https://r.openai.azure.com"},
            "api_version",
            "azure needs an api_version",
        ),
        ({"model": "hosted_vllm/m"}, "api_base", "hosted_vllm needs api_base"),
        ({"model": "house/m"}, "HOUSE", "house needs HOUSE"),
        ({"model": "vertex_ai/m", "vertex_location": "l"}, "vertex_location", "vertex_ai needs"),
        (
            {"model": "vertex_ai/m", "vertex_location": "a/b", "vertex_project": "p"},
            "vertex_location",
            "expected",
        ),
        ({"model": "groq/m", "api_base": "groq.example"}, "api_base", "expected an http:// or https:// URL"),
        ({"model": "groq/m", "api_key": "a\nb"}, "api_key", "a header has a name or a value"),
        ({"model": "groq/m", "extra_headers": {"a b": "c"}}, "extra_headers", "a header has a name"),
        ({"model": "groq/m", "organization": "é"}, "organization", "not ASCII"),
        ({"model": "groq/m", "extra_body": {"a": object()}}, "a", "JSON cannot hold"),
        ({"model": "bedrock/..", "aws_region_name": "eu-west-1"}, "model", "no name of a model"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_one_that_cannot_is_named_by_its_place(params: dict[str, object], param: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r"^model_list\[2\]: ") as caught:
        check(GOOD[0], GOOD[1], params)
    assert caught.value.param == f"model_list[2].{param}"
    assert message in caught.value.message


def test_the_environment_may_have_the_address() -> None:
    check({"model": "azure/d", "api_version": "v1"}, environ={"AZURE_API_BASE": "https://r.openai.azure.com"})
    check({"model": "house/m"}, environ={"HOUSE": "h1"})
    with pytest.raises(ConfigError, match=r"AZURE_API_BASE: expected an http") as caught:
        check({"model": "azure/d", "api_version": "v1"}, environ={"AZURE_API_BASE": "r"})
    assert caught.value.param == "model_list[0].AZURE_API_BASE"


def test_a_wildcard_is_checked_with_some_model() -> None:
    check({"model": "openai/*"}, {"model": "groq/llama-*"}, group="*")
    check({"model": "*"}, group="*")
    with pytest.raises(ConfigError, match=r"^model_list\[1\]: azure needs api_base"):
        check({"model": "openai/*"}, {"model": "azure/*"}, group="*")
    with pytest.raises(ConfigError, match=r"^model_list\[0\]: organization: "):
        check({"model": "*", "organization": "a\nb"}, group="*")


def test_bedrock_needs_boto3_unless_there_is_an_api_key(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "boto3" else found(name))
    check({"model": "bedrock/m", "api_key": "k"})
    check({"model": "bedrock/m"}, environ={"AWS_BEARER_TOKEN_BEDROCK": "k"})
    with pytest.raises(ConfigError, match=r"^model_list\[0\]: bedrock needs boto3: pip install"):
        check({"model": "bedrock/m", "aws_region_name": "eu-west-1"})
