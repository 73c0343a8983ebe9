"""Labels: what an entry may be found by beside its key, as short digests in front of its bytes.

Bytes: ``"LBL1"`` | count u8 | crc32 u32 of the labels | 8 bytes per label | the entry. They stand outside
compression and encryption, so that a walk through a store reads the first `HEAD_BYTES` of each value and
opens nothing. A digest tells who can guess a name whether the guess is right, and nothing else.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from hashlib import blake2b

from ..errors import CorruptEntryError

__all__ = ["HEAD_BYTES", "MOST", "carries", "count", "label", "labelled", "union", "unlabelled"]

_MAGIC = b"LBL1"
_SIZE = 8
_HEAD = struct.Struct("<4sBI")

MOST = 68
"""Labels of one entry: 64 tags, and kind, scope, model and namespace."""

HEAD_BYTES = _HEAD.size + MOST * _SIZE
"""The most that labels take in front of an entry."""


def label(field: str, value: str) -> bytes:
    """``field`` (``tag``, ``model``, ``scope``, ``namespace``, ``kind``) of ``value``, as 8 bytes."""
    text = f"{field}\0{value}".encode("utf-8", "surrogatepass")
    return blake2b(text, digest_size=_SIZE, person=b"llm label").digest()


def union(*labels: bytes) -> bytes:
    """The labels of all of ``labels``, each once."""
    joined = b"".join(labels)
    return b"".join(dict.fromkeys(_each(joined)))


def count(labels: bytes) -> int:
    return len(labels) // _SIZE


def carries(labels: bytes, every: Iterable[bytes], some: Iterable[bytes] = ()) -> bool:
    """Whether ``labels`` has each of ``every``, and one of ``some`` where that is not empty."""
    have, some = set(_each(labels)), list(some)
    return have.issuperset(every) and (not some or not have.isdisjoint(some))


def labelled(labels: bytes, data: bytes) -> bytes:
    """``data`` with ``labels`` in front."""
    return b"".join((_HEAD.pack(_MAGIC, count(labels), zlib.crc32(labels)), labels, data))


def unlabelled(value: bytes) -> tuple[bytes, bytes]:
    """(labels, data) of what `labelled` made; of its first `HEAD_BYTES`, the labels and the rest of those.
    `CorruptEntryError` for other bytes."""
    if len(value) < _HEAD.size:
        raise CorruptEntryError("no labels in front")
    magic, number, crc = _HEAD.unpack_from(value)
    end = _HEAD.size + number * _SIZE
    labels = value[_HEAD.size : end]
    if magic != _MAGIC or len(value) < end or zlib.crc32(labels) != crc:
        raise CorruptEntryError("no labels in front")
    return labels, value[end:]


def _each(labels: bytes) -> list[bytes]:
    return [labels[at : at + _SIZE] for at in range(0, len(labels), _SIZE)]
