"""The sub-app's OpenAPI document, made from the table of routes that both fronts answer by.

Schemas say what is checked here. What a model takes beyond that is its provider's affair, so requests to
models may have more fields than are named.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Final

from .openapi_schemas import ANSWERS, PARAMETERS, REQUESTS, SCHEMAS, ref
from .routes import LLM, ROUTES, Route

__all__ = ["document"]

_TITLE: Final = "LLM endpoints"
_ABOUT: Final = "OpenAI's API, cached and routed. Paths are below the place where the app is mounted."
_ERRORS: Final = {
    "400": "The request is wrong; `param` names the field",
    "401": "There is no API key, or it is not known, or it has expired",
    "403": "The API key does not allow this",
    "404": "There is no such thing",
    "408": "The request did not come in time",
    "409": "It is there already, or was changed meanwhile",
    "413": "The body is too large",
    "422": "The body is well-formed, and asks for what cannot be done",
    "429": "A limit is reached; `Retry-After` says for how long",
    "500": "The provider failed",
    "502": "The provider could not be reached, or answered something else",
    "503": "A store does not answer",
    "504": "The provider did not answer in time, or nothing is stored (`only-if-cached`)",
}
# What each kind of route answers beside 200.
_OF_MODELS: Final = tuple(_ERRORS)
_OF_KEYS: Final = ("400", "401", "403", "404", "409", "413", "422", "429", "503")
_OF_ALL: Final = ("413",)
_SCHEMES: Final[Mapping[str, Mapping[str, str]]] = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    "api-key": {"type": "apiKey", "in": "header", "name": "api-key"},
}
_JSON: Final = "application/json"
_FORM: Final = "multipart/form-data"


def document(admin: bool = True) -> dict[str, Any]:
    """The document, as JSON values. ``admin``: whether the admin routes are there."""
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        if admin or route.access != "admin":
            paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": _TITLE, "description": _ABOUT, "version": _version()},
        "servers": [{"url": "."}],  # of the document's own place, so that it is right wherever that is
        "paths": paths,
        "components": {"schemas": SCHEMAS, "securitySchemes": _SCHEMES, "responses": _responses()},
    }


def _version() -> str:
    version: str = import_module(__package__.partition(".")[0]).__version__
    return version


def _responses() -> dict[str, object]:
    content = {_JSON: {"schema": ref("Error")}}
    return {f"Error{status}": {"description": text, "content": content} for status, text in _ERRORS.items()}


def _operation(route: Route) -> dict[str, Any]:
    name = route.kind if route.handler == LLM else route.handler
    assert name is not None
    operation: dict[str, Any] = {
        "operationId": _id(route),
        "summary": route.summary,
        "tags": [_tag(route)],
        "responses": {"200": _answer(name), **_errors(route)},
        "security": [] if route.access == "open" else [{scheme: []} for scheme in _SCHEMES],
    }
    in_path = [_in_path(part[1:-1]) for part in route.path.split("/") if part.startswith("{")]
    parameters = [*in_path, *(PARAMETERS.get(name, ()) if route.method == "GET" else ())]
    if parameters:
        operation["parameters"] = parameters
    if route.method == "POST" and name in REQUESTS:
        operation["requestBody"] = _body(name, named="{model}" in route.path)
    return operation


def _id(route: Route) -> str:
    words = route.path.replace("{", "").replace("}", "").replace("/", " ").replace(".", " ").split()
    return "_".join([route.method.lower(), *words]).replace("-", "_")


def _tag(route: Route) -> str:
    if route.handler == LLM or route.handler.startswith("model"):
        return "models"
    return route.handler.partition("_")[0] if "_" in route.handler else "app"


def _errors(route: Route) -> dict[str, object]:
    statuses = _OF_MODELS if route.handler == LLM else _OF_ALL if route.access == "open" else _OF_KEYS
    return {status: {"$ref": f"#/components/responses/Error{status}"} for status in statuses}


def _answer(name: str) -> dict[str, object]:
    description, content = ANSWERS[name]
    return {
        "description": description,
        "content": {kind: {"schema": value} for kind, value in content.items()},
    }


def _body(name: str, *, named: bool) -> dict[str, object]:
    """``named``: the model stands in the path."""
    schema, required = REQUESTS[name]
    if named:
        schema = f"{schema}InPath"
    kind = _FORM if name == "transcription" else _JSON
    return {"required": required, "content": {kind: {"schema": ref(schema)}}}


def _in_path(name: str) -> dict[str, object]:
    schema = {"type": "string", "minLength": 1}
    return {"name": name, "in": "path", "required": True, "schema": schema}
