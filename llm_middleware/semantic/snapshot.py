"""A vector index on disk: one file, written beside and renamed over the last one, read through `mmap`.

Layout, little-endian, every part at a multiple of 64 bytes::

    header   8 bytes b"LLMVECS" and the version, u32 dimensions, u32 CRC-32 of what comes before
    cell     b"CELL", u32 CRC-32 of all that follows in the cell, u32 rows, u32 bytes of JSON;
             JSON {"scope", "keys", "texts", "expires", "payloads"}; float32 vectors, one row after the other
    end      b"LAST", u32 CRC-32 of the next, u32 cells, u32 0

Anything else is a `CorruptEntryError`. The file holds what users asked, so only its owner may read it.
"""

from __future__ import annotations

import contextlib
import glob
import json
import math
import mmap
import os
import struct
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Final

import numpy as np

from ..errors import CorruptEntryError
from .cells import Cell, Matrix, Record

__all__ = ["read", "write"]

_MAGIC: Final = b"LLMVECS\x01"
_HEADER: Final = struct.Struct("<8sII")
_BLOCK: Final = struct.Struct("<4sIII")
_ALIGN: Final = 64
_UNIT: Final = 1e-2  # how far from 1 a vector's square may be
_ABANDONED: Final = 3600.0  # seconds after which a file that was never finished is nobody's
_MOST_DIMENSIONS: Final = 65_536


def write(path: Path, dimensions: int, cells: Iterable[Cell]) -> None:
    """Put the cells into ``path`` in place of what is there; readers see either file whole. `OSError`."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _clear_up(path)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            _write_all(file, dimensions, cells)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def _clear_up(path: Path) -> None:
    """Remove what writers left that were killed."""
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED:
                left.unlink()


def _write_all(file: IO[bytes], dimensions: int, cells: Iterable[Cell]) -> None:
    head = struct.pack("<8sI", _MAGIC, dimensions)
    _put(file, head + struct.pack("<I", zlib.crc32(head)))
    count = 0
    for cell in cells:
        parts = {"keys": cell.keys, "texts": cell.texts, "expires": cell.expires, "payloads": cell.payloads}
        text = json.dumps({"scope": cell.scope, **parts}, separators=(",", ":")).encode()
        sizes = struct.pack("<II", len(cell.keys), len(text))
        vectors = np.ascontiguousarray(cell.vectors, "<f4").tobytes()
        crc = zlib.crc32(vectors, zlib.crc32(text, zlib.crc32(sizes)))
        _put(file, struct.pack("<4sI", b"CELL", crc) + sizes)
        _put(file, text)
        _put(file, vectors)
        count += 1
    sizes = struct.pack("<II", count, 0)
    _put(file, struct.pack("<4sI", b"LAST", zlib.crc32(sizes)) + sizes)


def _put(file: IO[bytes], part: bytes) -> None:
    file.write(part)
    file.write(bytes(-len(part) % _ALIGN))


def read(path: Path) -> tuple[int, list[Cell]]:
    """The dimensions and the cells; their vectors stay in the file, read-only, until they are needed.

    `FileNotFoundError` where there is none, `OSError` where it cannot be read, `CorruptEntryError`.
    """
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size < _ALIGN:
            raise CorruptEntryError("snapshot: it is shorter than its header")
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    magic, dimensions, crc = _HEADER.unpack_from(view)
    if magic != _MAGIC:
        raise CorruptEntryError("snapshot: not one of this version")
    if crc != zlib.crc32(view[: _HEADER.size - 4]) or not 0 < dimensions <= _MOST_DIMENSIONS:
        raise CorruptEntryError("snapshot: its header is damaged")
    try:
        return dimensions, list(_cells(view, dimensions))
    except (struct.error, ValueError, KeyError, TypeError, RecursionError) as exc:
        raise CorruptEntryError(f"snapshot: damaged: {exc}") from exc


def _cells(view: memoryview, dimensions: int) -> Iterator[Cell]:
    at, found = _ALIGN, 0
    while True:
        kind, crc, rows, size = _BLOCK.unpack_from(view, at)
        text_at = at + _ALIGN
        vectors_at = _aligned(text_at + size)
        end = vectors_at + rows * dimensions * 4
        if kind == b"LAST":
            if crc != zlib.crc32(view[at + 8 : at + 16]) or rows != found or len(view) != at + _ALIGN:
                raise ValueError("its end is not where it should be")
            return
        sums = zlib.crc32(view[text_at : text_at + size], zlib.crc32(view[at + 8 : at + 16]))
        if kind != b"CELL" or end > len(view) or crc != zlib.crc32(view[vectors_at:end], sums):
            raise ValueError(f"a cell at byte {at} is not what was written")
        matrix = np.frombuffer(view, "<f4", rows * dimensions, vectors_at).reshape(rows, dimensions)
        yield _cell(json.loads(bytes(view[text_at : text_at + size])), matrix.astype(np.float32, copy=False))
        at, found = _aligned(end), found + 1


def _cell(parts: dict[str, object], matrix: Matrix) -> Cell:
    columns = [parts[name] for name in ("keys", "texts", "expires", "payloads")]
    if not isinstance(parts["scope"], str) or not all(_is_list(column, len(matrix)) for column in columns):
        raise ValueError("a cell's columns do not fit")
    records = [Record(*row) for row in zip(*columns, strict=True)]
    if not records or not all(map(_is_record, records)):
        raise ValueError("a row is not what was written")
    if not (np.abs(np.einsum("ij,ij->i", matrix, matrix) - 1) < _UNIT).all():
        raise ValueError("a vector is not of unit length")
    return Cell(parts["scope"], matrix, records)


def _is_list(column: object, length: int) -> bool:
    return isinstance(column, list) and len(column) == length


def _is_record(record: Record) -> bool:
    strings = isinstance(record.key, str) and isinstance(record.text, str) and isinstance(record.payload, str)
    timed = isinstance(record.expires, float) and not math.isnan(record.expires)
    return strings and timed and (not record.payload or isinstance(json.loads(record.payload), dict))


def _aligned(at: int) -> int:
    return at + -at % _ALIGN
