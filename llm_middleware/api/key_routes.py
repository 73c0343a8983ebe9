"""The routes of API keys, with LiteLLM's names: make, show, change, replace, block and delete them.

Routes that change keys are for admins, which the table of routes says. Everybody may see the key they call
with; nobody has to write a key into a URL.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from ..errors import InvalidRequestError, KeyPermissionError, LLMMiddlewareError, did_you_mean
from ..keys.management import shown
from ..keys.record import KeyRecord, id_of
from .message import Request, Response, json_response

if TYPE_CHECKING:
    from ..keys.resolver import KeyResolver
    from .app import LLMApp

__all__ = ["HANDLERS"]

_SIZE: Final = "100"
_NO_STORE: Final = (b"cache-control", b"no-store")


class _NoKeysError(LLMMiddlewareError):
    status = 404
    type = "invalid_request_error"
    code = "keys_not_configured"


def _resolver(app: LLMApp) -> KeyResolver:
    if app.gate.keys is None:
        raise _NoKeysError("this app keeps no API keys: configure general_settings.master_key")
    return app.gate.keys


def _answer(value: Mapping[str, Any]) -> Response:
    """What may hold a key, or tells of one, is kept by nobody on the way."""
    response = json_response(value)
    response.headers.append(_NO_STORE)
    return response


async def _generate(app: LLMApp, request: Request) -> Response:
    return _answer(await _resolver(app)._generate(request.port, request.json()))


async def _update(app: LLMApp, request: Request) -> Response:
    key, fields = _named(request)
    return _answer(await _resolver(app)._update(request.port, key, fields))


async def _regenerate(app: LLMApp, request: Request) -> Response:
    key, fields = _named(request)
    return _answer(await _resolver(app)._regenerate(request.port, key, fields))


async def _block(app: LLMApp, request: Request) -> Response:
    return await _set_blocked(app, request, blocked=True)


async def _unblock(app: LLMApp, request: Request) -> Response:
    return await _set_blocked(app, request, blocked=False)


async def _set_blocked(app: LLMApp, request: Request, *, blocked: bool) -> Response:
    key, rest = _named(request)
    _check_fields(rest, ("key",))
    return _answer(await _resolver(app)._update(request.port, key, {"blocked": blocked}))


async def _delete(app: LLMApp, request: Request) -> Response:
    body = request.json()
    _check_fields(body, ("keys",))
    keys = body.get("keys")
    if not isinstance(keys, list):
        raise InvalidRequestError("keys: expected a list of keys, or of their ids (token)", param="keys")
    return _answer({"deleted_keys": await _resolver(app)._delete(request.port, keys)})


async def _list(app: LLMApp, request: Request) -> Response:
    params = request.params
    page, size = _number(params, "page", "1"), _number(params, "size", _SIZE)
    user, team = params.get("user_id") or None, params.get("team_id") or None
    return _answer(await _resolver(app)._list(request.port, page, size, user, team))


async def _info(app: LLMApp, request: Request) -> Response:
    """Of the caller's own key, unless an admin names another one: by its id in the query, or in the body."""
    record = request.caller.record
    named = _asked_for(request)
    if record is None:
        _resolver(app)
        raise _NoKeysError("nobody is asked for an API key here, so there is none to show")
    if named is None or _is_own(named, record):
        # A record that is no row of the store's is all that there is of it.
        told = await _resolver(app)._info(request.port, record.id) if record.stored else _as_info(record)
        return _answer(told)
    if not request.caller.admin:
        raise KeyPermissionError("this key may see no key but itself", param="key")
    return _answer(await _resolver(app)._info(request.port, named))


def _asked_for(request: Request) -> str | None:
    if request.method != "POST":
        return request.params.get("key") or None
    body = request.json()
    _check_fields(body, ("key",))
    key = body.get("key")
    return None if key is None else _text(key)


def _is_own(named: str, record: KeyRecord) -> bool:
    return record.id in (named, id_of(named))


def _as_info(record: KeyRecord) -> dict[str, Any]:
    return {"key": record.id, "info": shown(record)}


def _named(request: Request) -> tuple[str, dict[str, Any]]:
    """The key that the body names, and what else it says."""
    body = request.json()
    return _text(body.pop("key", None)), body


def _text(key: object) -> str:
    if not isinstance(key, str) or not key:
        raise InvalidRequestError("key: expected a key, or its id (token)", param="key")
    return key


def _number(params: Mapping[str, str], name: str, default: str) -> int:
    text = params.get(name) or default
    if not text.isascii() or not text.isdecimal() or len(text) > 9:
        raise InvalidRequestError(f"{name}: expected a whole number", param=name)
    return int(text)


def _check_fields(body: Mapping[str, object], known: tuple[str, ...]) -> None:
    for name in body:
        if name not in known:
            hint = did_you_mean(name, known) or f"; known: {', '.join(known)}"
            shown_name = name[:80]
            raise InvalidRequestError(
                f"unknown field {shown_name!r}{hint}", param=shown_name, code="unknown_field"
            )


HANDLERS = {
    "key_generate": _generate,
    "key_info": _info,
    "key_update": _update,
    "key_delete": _delete,
    "key_regenerate": _regenerate,
    "key_block": _block,
    "key_unblock": _unblock,
    "key_list": _list,
}
