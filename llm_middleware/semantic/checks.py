"""What every index checks of rows and queries, without numpy."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Mapping
from typing import Final

from ..errors import InvalidRequestError
from .records import Row

__all__ = [
    "check_expires",
    "check_floats",
    "check_k",
    "check_unit",
    "mismatch",
    "payload_text",
    "vector_size",
]

_UNIT: Final = 1e-3  # how far from 1 a vector's length may be


def vector_size(data: bytes, dimensions: int | None) -> int:
    """How many dimensions a vector of unit length has. `InvalidRequestError` (``vector``) where it is no such
    vector, or ``dimensions`` is another number."""
    check_floats(data)
    vector = array("f", data)
    if dimensions is not None and len(vector) != dimensions:
        raise mismatch(dimensions, len(vector))
    check_unit(math.hypot(*vector))
    return len(vector)


def check_floats(data: bytes) -> None:
    """`InvalidRequestError` (``vector``) where these are not the bytes of some float32."""
    if len(data) == 0 or len(data) % 4:
        raise InvalidRequestError(f"vector: expected float32 values, got {len(data)} bytes", param="vector")


def check_unit(length: float) -> None:
    """`InvalidRequestError` (``vector``) where this is not the length of a unit vector."""
    if not abs(length - 1) < _UNIT:  # not-a-number too
        raise InvalidRequestError(f"vector: expected unit length, got {length:g}", param="vector")


def mismatch(expected: int, got: int) -> InvalidRequestError:
    """The error for a vector of another size."""
    message = (
        f"vector: this index holds {expected} dimensions, got {got}; is the embedding model another one?"
    )
    return InvalidRequestError(message, param="vector")


def check_k(k: int) -> None:
    """`InvalidRequestError` where ``k`` is no number of neighbours."""
    if k < 1:
        raise InvalidRequestError(f"k: expected a number >= 1, got {k!r}", param="k")


def check_expires(row: Row) -> None:
    """`InvalidRequestError` where a row's ``expires`` is no time."""
    if math.isnan(row.expires):
        raise InvalidRequestError("expires: expected seconds since the epoch, got nan", param="expires")


def payload_text(payload: Mapping[str, object]) -> str:
    """A payload as JSON, the empty one as nothing. `InvalidRequestError` where it is none."""
    if not payload:
        return ""
    try:
        return json.dumps(dict(payload), separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as exc:
        raise InvalidRequestError(f"payload: expected JSON: {exc}", param="payload") from exc
