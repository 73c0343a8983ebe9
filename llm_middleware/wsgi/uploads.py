"""Requests that upload a recording: it is read as it arrives, and kept outside memory while it is needed."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from typing import TYPE_CHECKING

from .._drive import run_sync
from .._ports.sync import SyncPort
from ..api.gate import Told
from ..api.message import TooLargeError
from ..api.uploads import Upload, read_upload
from ..caching.plan import Asked, Plan
from ..errors import LLMMiddlewareError
from .reading import content_length, pieces_of

if TYPE_CHECKING:
    from wsgiref.types import WSGIEnvironment

    from .exchange import Exchange

__all__ = ["answer_upload"]

_port = SyncPort()


def answer_upload(exchange: Exchange, told: Told) -> Iterable[bytes]:
    """Read a form, and answer it. Where this returns a Router has sent the file, or a refresh has it."""
    with Upload() as upload:
        told.upload = upload
        try:
            plan = run_sync(_planned(exchange, told, upload))
        except LLMMiddlewareError as exc:
            return exchange.refuse(exc)
        return exchange.answer(plan)


async def _planned(exchange: Exchange, told: Told, upload: Upload) -> Plan:
    environ, limit, caller = exchange.environ, exchange.front.max_body_bytes, told.caller
    if (content_length(environ) or 0) > limit:
        raise TooLargeError(f"the body has more than {limit} bytes")
    content_type = environ.get("CONTENT_TYPE", "")
    await read_upload(_port, upload, _pieces(environ), content_type, limit, exchange.named)
    control = environ.get("HTTP_CACHE_CONTROL", "")
    asked = Asked(
        exchange.kind, upload.keyed, caller.scope, exchange.route, control, enforced=caller.enforced
    )
    plan = await exchange.cache.planner.planned(_port, asked)
    told.about(plan, exchange.query)
    return plan


async def _pieces(environ: WSGIEnvironment) -> AsyncGenerator[bytes]:
    for data in pieces_of(environ):
        yield data
