"""Requests that upload a recording: it is read as it arrives, and kept outside memory while it is needed."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

from .._ports.async_ import AsyncPort
from ..api.gate import Told
from ..api.uploads import ClientLeftError, Upload, read_upload
from ..caching.plan import Asked, Plan
from ..errors import LLMMiddlewareError
from .types import Receive

if TYPE_CHECKING:
    from .exchange import Exchange

__all__ = ["answer_upload"]

_port = AsyncPort()


async def answer_upload(exchange: Exchange, told: Told, cache_control: str, content_type: str) -> None:
    """Read a form, and answer it."""
    with Upload() as upload:
        told.upload = upload
        try:
            plan = await _planned(exchange, told, upload, cache_control, content_type)
        except LLMMiddlewareError as exc:
            await exchange.refuse(exc)
        except ClientLeftError:
            return
        else:
            await exchange.answer(plan)


async def _planned(
    exchange: Exchange, told: Told, upload: Upload, cache_control: str, content_type: str
) -> Plan:
    pieces, caller = _pieces(exchange.receive), told.caller
    await read_upload(_port, upload, pieces, content_type, exchange.limit, exchange.named)
    asked = Asked(
        exchange.kind, upload.keyed, caller.scope, exchange.route, cache_control, enforced=caller.enforced
    )
    plan = await exchange.cache.planner.planned(_port, asked)
    told.about(plan, exchange.query)
    return plan


async def _pieces(receive: Receive) -> AsyncGenerator[bytes]:
    """The request's body as it arrives. `ClientLeftError` where the client leaves before its end."""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise ClientLeftError
        yield message.get("body", b"")
        if not message.get("more_body", False):
            return
