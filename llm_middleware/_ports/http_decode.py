"""Undoing ``Content-Encoding`` as a body arrives: gzip, deflate, and br where a package for it is there."""

from __future__ import annotations

import importlib
import importlib.util
import zlib
from collections.abc import Callable
from typing import Any, Protocol

__all__ = ["HAS_BROTLI", "Decoder", "decoder"]

# The packages with that interface, of those that are installed.
_BROTLI = [name for name in ("brotli", "brotlicffi") if importlib.util.find_spec(name) is not None]
HAS_BROTLI = bool(_BROTLI)


class Decoder(Protocol):
    """`ValueError` from either method for bytes that are not of the encoding."""

    def decode(self, data: bytes) -> bytes: ...

    def finish(self) -> None:
        """Nothing more comes."""
        ...


class _Zlib:
    """gzip, of one member or more, and deflate, which some send without the header that zlib wants."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(zlib.MAX_WBITS | 32)
        self._begun = False
        self._first = b""

    def decode(self, data: bytes) -> bytes:
        try:
            return self._decode(data)
        except zlib.error as exc:
            raise ValueError(str(exc)) from None

    def _decode(self, data: bytes) -> bytes:
        if not self._begun:
            data = self._first = self._first + data
            if len(data) < 2:  # the length of the header by which the kinds are told apart
                return b""
        try:
            plain = self._inner.decompress(data)
        except zlib.error:
            if self._begun:
                raise
            self._inner = zlib.decompressobj(-zlib.MAX_WBITS)
            plain = self._inner.decompress(data)
        self._begun = True
        while self._inner.eof and (rest := self._inner.unused_data):
            self._inner = zlib.decompressobj(zlib.MAX_WBITS | 32)
            plain += self._inner.decompress(rest)
        return plain

    def finish(self) -> None:
        if self._first and not self._inner.eof:
            raise ValueError("the compressed body is not whole")


class _Brotli:
    def __init__(self) -> None:
        brotli: Any = importlib.import_module(_BROTLI[0])
        self._inner = brotli.Decompressor()
        self._error: type[Exception] = brotli.error

    def decode(self, data: bytes) -> bytes:
        try:
            plain: bytes = self._inner.process(data)
        except self._error as exc:
            raise ValueError(str(exc)) from None
        return plain

    def finish(self) -> None:
        if not self._inner.is_finished():
            raise ValueError("the compressed body is not whole")


class _Chain:
    """Encodings one over the other, the last applied first."""

    def __init__(self, decoders: list[Decoder]) -> None:
        self._decoders = decoders

    def decode(self, data: bytes) -> bytes:
        for each in self._decoders:
            data = each.decode(data)
        return data

    def finish(self) -> None:
        for each in self._decoders:
            each.finish()


_KINDS: dict[str, Callable[[], Decoder]] = {"gzip": _Zlib, "x-gzip": _Zlib, "deflate": _Zlib}
if HAS_BROTLI:
    _KINDS["br"] = _Brotli


def decoder(encoding: str) -> Decoder | None:
    """What undoes a ``Content-Encoding``; None where there is nothing that could be undone."""
    names = [name.strip().lower() for name in encoding.split(",")]
    if not all(name in _KINDS for name in names):
        return None
    return _Chain([_KINDS[name]() for name in reversed(names)])
