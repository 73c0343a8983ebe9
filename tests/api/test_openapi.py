"""The OpenAPI document, and that both fronts do what it says: schemathesis sends what it allows, and what it
does not."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import unquote, urljoin

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, assume, given, settings
from openapi_spec_validator import validate
from schemathesis.checks import CheckFunction
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from llm_middleware import __version__
from llm_middleware.api.admin import CHANGEABLE, SOUGHT
from llm_middleware.api.openapi import document
from llm_middleware.api.openapi_schemas import SCHEMAS
from llm_middleware.api.routes import ROUTES
from llm_middleware.caching.controls import parse_body
from llm_middleware.errors import InvalidRequestError
from llm_middleware.keys.fields import KNOWN
from llm_middleware.testing import FakeUpstream
from tests.api.clients import CHAT, MASTER, PREFIX, Client, chat, config

pytestmark = pytest.mark.usefixtures("environment")

CHECKS: list[CheckFunction] = [content_type_conformance, response_schema_conformance, status_code_conformance]
EXAMPLES = 5  # of each mode, for each of 60 operations on each front
OPERATIONS = [f"{route.method} {route.path}" for route in ROUTES]


def anything(upstream: FakeUpstream) -> dict[str, Any]:
    """A configuration in which every model is one of the upstream's."""
    params = {"model": "openai/*", "api_base": upstream.url, "api_key": "sk-upstream-secret"}
    return config(upstream.url, models=[{"model_name": "*", "litellm_params": params}])


def sent(client: Client, case: schemathesis.Case) -> httpx.Response:
    """The answer to a request as schemathesis wants it made."""
    wanted = case.as_transport_kwargs(base_url=f"http://host{PREFIX}")
    prepared = requests.Request(
        **{name: value for name, value in wanted.items() if value is not None}
    ).prepare()
    headers = {**prepared.headers, "authorization": f"Bearer {MASTER}"}
    body = prepared.body.encode() if isinstance(prepared.body, str) else prepared.body
    assert prepared.method is not None
    return client.send(httpx.Request(prepared.method, str(prepared.url), content=body, headers=headers))


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["right", "wrong"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_request_breaks_the_app(front, upstream, operation, mode):
    client = front(anything(upstream))
    schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
    method, path = operation.split()
    found = schema[path][method]
    if mode is GenerationMode.NEGATIVE and not (found.body or found.query or found.path_parameters):
        return  # nothing can be wrong in it

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=found.as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        assume("\n" not in unquote(case.formatted_path))  # Starlette passes no such path to what it mounts
        answer = sent(client, case)
        late = answer.status_code == 504 and isinstance(case.body, dict) and "timeout" in case.body
        assert answer.status_code < 500 or late, answer.text
        case.validate_response(answer, checks=CHECKS)

    check()


# --- the document itself


def operations(admin: bool = True) -> dict[str, dict[str, Any]]:
    paths = document(admin=admin)["paths"]
    return {
        f"{method.upper()} {path}": operation
        for path, methods in paths.items()
        for method, operation in methods.items()
    }


def test_the_document_is_one_of_openapi():
    told = json.loads(json.dumps(document()))
    validate(told)
    assert (told["openapi"], told["info"]["version"]) == ("3.1.0", __version__)


def test_the_document_has_every_route_and_no_other():
    assert list(operations()) == OPERATIONS
    ids = [operation["operationId"] for operation in operations().values()]
    assert len(set(ids)) == len(ids)
    assert set(operations(admin=False)) == {f"{r.method} {r.path}" for r in ROUTES if r.access != "admin"}


def test_the_document_says_who_may_ask():
    for route, operation in zip(ROUTES, operations().values(), strict=True):
        schemes = [] if route.access == "open" else [{"bearer": []}, {"x-api-key": []}, {"api-key": []}]
        assert operation["security"] == schemes


@pytest.mark.parametrize("url", ["http://host/openapi.json", "https://host/a/b/openapi.json"])
def test_the_server_is_where_the_document_is(url):
    (server,) = document()["servers"]
    assert urljoin(url, server["url"]) == url.removesuffix("openapi.json")


def test_the_document_is_served_to_everybody(front):
    told = front().get("/openapi.json", key=None)
    assert (told.status_code, told.json()) == (200, json.loads(json.dumps(document())))
    assert front(admin=False).get("/openapi.json").json() == json.loads(json.dumps(document(admin=False)))


def test_the_schemas_have_the_fields_that_are_taken():
    assert set(SCHEMAS["KeyNew"]["properties"]) == {"key", *KNOWN}
    assert set(SCHEMAS["KeyReplaced"]["properties"]) == {"key", "new_key", *KNOWN}
    assert set(SCHEMAS["CacheSettings"]["properties"]) == set(CHANGEABLE)
    by_key, by_about = SCHEMAS["CacheDelete"]["oneOf"]
    assert set(by_key["properties"]) == {"keys", "dry_run"}
    assert set(by_about["properties"]) == {*SOUGHT, "dry_run"}
    controls = dict.fromkeys(SCHEMAS["CacheControls"]["properties"])
    assert parse_body(controls) == {}
    with pytest.raises(InvalidRequestError) as refused:
        parse_body({"x": 1})
    assert set(refused.value.message.partition("known: ")[2].split(", ")) == set(controls)


@pytest.mark.parametrize(
    "name", ["a\r\nset-cookie: x=1", "a\nb", "\u00e4\u4e2d\ud800", " a ", "%0d%0a", "\0\x7f"]
)
def test_a_models_name_ends_no_header(front, upstream, name):
    client = front(anything(upstream))
    answers = [client.post(CHAT, chat(model=name)) for _ in range(2)]
    assert [answer.headers["x-llm-cache"] for answer in answers] == ["miss", "hit"]
    for answer in answers:
        assert "set-cookie" not in answer.headers
        for _, value in answer.headers.raw:
            assert value.isascii()
            assert value.decode().isprintable()
    assert unquote(answers[0].headers["x-llm-model"]) == name.replace("\ud800", "?")
