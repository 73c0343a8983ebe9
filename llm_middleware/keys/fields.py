"""What an administrator may say of a key, under LiteLLM's names: checked before anything is written.

A name that nobody knows is refused with the nearest one. So is one that LiteLLM knows and that has no meaning
here, unless it is empty: nobody shall believe in a restriction that there is not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from ..caching.controls import parse_body
from ..errors import InvalidRequestError, did_you_mean
from .duration import parse_duration

__all__ = ["KNOWN", "check_fields", "check_key", "money", "whole"]

_TEXT: Final = 256  # characters
_JSON: Final = 65536  # characters
_ITEMS: Final = 1000
_SHORTEST_KEY: Final = 20
_LONGEST_KEY: Final = 256
# Of a team or a user of LiteLLM's, which there are not here.
_NO_MODELS: Final = ("all-team-models", "no-default-models")

_UNSUPPORTED: Final = frozenset(
    """access_group_ids agent_id allowed_passthrough_routes allowed_routes allowed_vector_store_indexes
    auto_rotate budget_id budget_limits disable_global_guardrails enforced_params grace_period guardrails
    key_type model_max_budget model_rpm_limit model_tpm_limit object_permission organization_id permissions
    policies project_id prompts rotation_interval router_settings rpm_limit_type send_invite_email
    soft_budget tags temp_budget_expiry temp_budget_increase tpm_limit_type""".split()  # noqa: SIM905 - a table
)


def _wrong(field: str, expected: str, value: object) -> InvalidRequestError:
    shown = (
        f"{value!r}" if isinstance(value, bool | int | float) else f"a value of type {type(value).__name__}"
    )
    return InvalidRequestError(f"{field}: expected {expected}, got {shown}", param=field)


def _is_text(value: object) -> bool:
    # Whatever cannot be printed is refused by some store, or misread by whoever looks at it.
    return isinstance(value, str) and 0 < len(value) <= _TEXT and value.isprintable()


def _text(field: str, value: object) -> object:
    if value is None or value == "":
        return None
    if not _is_text(value):
        raise _wrong(field, f"a printable string of at most {_TEXT} characters", value)
    return value


def _models(field: str, value: object) -> object:
    names = _strings(field, [] if value is None else value)
    for name in names:
        if name in _NO_MODELS:
            raise InvalidRequestError(f"{field}: {name!r} is not supported", param=field)
    return names


def _strings(field: str, value: object) -> list[str]:
    if not isinstance(value, list | tuple | set | frozenset) or len(value) > _ITEMS:
        raise _wrong(field, f"a list of at most {_ITEMS} strings", value)
    for item in value:
        if not _is_text(item):
            raise _wrong(f"{field}[]", f"a printable string of at most {_TEXT} characters", item)
    return sorted(value) if isinstance(value, set | frozenset) else list(value)


def _object(field: str, value: object) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise _wrong(field, "an object", value)
    try:
        text = json.dumps(dict(value), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as exc:
        raise InvalidRequestError(f"{field}: not JSON: {exc}", param=field) from None
    if len(text) > _JSON:
        raise InvalidRequestError(f"{field}: more than {_JSON} characters of JSON", param=field)
    copied: dict[str, Any] = json.loads(text)
    return copied


def _aliases(field: str, value: object) -> object:
    names = _object(field, value)
    for name, model in names.items():
        if not _is_text(name) or not _is_text(model):
            raise _wrong(f"{field}.{name[:80]}", "the name of a model", model)
    return names


def _metadata(field: str, value: object) -> object:
    metadata = _object(field, value)
    parse_body(metadata.get("cache"), field=f"{field}.cache")
    return metadata


def _controls(field: str, value: object) -> object:
    names = _strings(field, [] if value is None else value)
    parse_body(dict.fromkeys(names), field=field)
    return names or None  # as in LiteLLM, an empty list allows all


def whole(field: str, value: object) -> int:
    """A number of requests or tokens."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**53:
        raise _wrong(field, "a whole number >= 0", value)
    return value


def money(field: str, value: object) -> float:
    """An amount in whatever unit budgets have."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e15:
        raise _wrong(field, "a number >= 0", value)
    return float(value)


def _limit(field: str, value: object) -> object:
    return None if value is None else whole(field, value)


def _budget(field: str, value: object) -> object:
    return None if value is None else money(field, value)


def _spend(field: str, value: object) -> object:
    return money(field, 0.0 if value is None else value)


def _flag(field: str, value: object) -> object:
    if value is not None and not isinstance(value, bool):
        raise _wrong(field, "true or false", value)
    return bool(value)


def _duration(field: str, value: object) -> object:
    parse_duration(value, field=field)
    return value


# From LiteLLM's name to the column's, and what checks it. ``duration`` and ``spend`` are no columns.
KNOWN: Final[Mapping[str, tuple[str, Callable[[str, object], object]]]] = {
    "key_alias": ("alias", _text),
    "user_id": ("user", _text),
    "team_id": ("team", _text),
    "models": ("models", _models),
    "aliases": ("aliases", _aliases),
    "metadata": ("metadata", _metadata),
    "allowed_cache_controls": ("allowed_cache_controls", _controls),
    "duration": ("duration", _duration),
    "rpm_limit": ("rpm_limit", _limit),
    "tpm_limit": ("tpm_limit", _limit),
    "max_parallel_requests": ("max_parallel_requests", _limit),
    "max_budget": ("max_budget", _budget),
    "budget_duration": ("budget_duration", _duration),
    "spend": ("spend", _spend),
    "blocked": ("blocked", _flag),
    "admin": ("admin", _flag),
    "config": ("config", _object),
}


def check_fields(fields: Mapping[str, object], *, besides: Iterable[str] = ()) -> dict[str, Any]:
    """The columns that ``fields`` set, and ``duration`` and ``spend``. ``besides``: names to be passed over.

    `InvalidRequestError` names a field that is unknown, unsupported or of a wrong value.
    """
    passed, columns = set(besides), {}
    for name, value in fields.items():
        if name in passed:
            continue
        if name in _UNSUPPORTED:
            if value is None or value is False or value in ("", [], {}, ()):
                continue
            raise InvalidRequestError(f"{name}: not supported", param=name, code="unsupported_field")
        if name not in KNOWN:
            hint = did_you_mean(name, (*KNOWN, *passed))
            shown = str(name)[:80]
            raise InvalidRequestError(f"unknown field {shown!r}{hint}", param=shown, code="unknown_field")
        column, check = KNOWN[name]
        columns[column] = check(name, value)
    return columns


def check_key(key: object, field: str = "key") -> str:
    """A key of the caller's own choice; no message shows it."""
    fits = isinstance(key, str) and key.startswith("sk-") and _SHORTEST_KEY <= len(key) <= _LONGEST_KEY
    if not fits or not key.isascii() or any(not "!" <= letter <= "~" for letter in key):  # type: ignore[attr-defined]
        raise InvalidRequestError(
            f'{field}: expected "sk-" and visible ASCII characters, {_SHORTEST_KEY} to {_LONGEST_KEY} in all',
            param=field,
        )
    assert isinstance(key, str)
    return key
