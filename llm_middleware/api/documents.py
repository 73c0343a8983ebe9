"""What the sub-app says of itself: its models, its OpenAPI document, and that it is there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ModelNotFoundError
from .message import Request, Response, json_response

if TYPE_CHECKING:
    from .app import LLMApp

__all__ = ["HANDLERS"]


async def _models(app: LLMApp, request: Request) -> Response:
    shown = [_model(name) for name in app.router.models if request.caller.may_use(name)]
    return json_response({"object": "list", "data": shown})


async def _one(app: LLMApp, request: Request) -> Response:
    name = request.values["id"]
    if name not in app.router or not request.caller.may_use(name):
        raise ModelNotFoundError(f"the model {name!r} does not exist", param="model")
    return json_response(_model(name))


def _model(name: str) -> dict[str, object]:
    # OpenAI's clients want these fields; when a deployment was made nobody knows.
    return {"id": name, "object": "model", "created": 0, "owned_by": "llm-middleware"}


async def _health(app: LLMApp, request: Request) -> Response:
    return json_response({"status": "ok"})


async def _openapi(app: LLMApp, request: Request) -> Response:
    from .openapi import document  # on first use: it is long

    return json_response(document(admin=app.admin))


HANDLERS = {"models": _models, "model": _one, "health": _health, "openapi": _openapi}
