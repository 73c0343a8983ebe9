"""How an entry's bytes rest in a store outside the process: compressed, encrypted, both, or as they are.

Bytes in the store (all integers little-endian):

    magic "SEAL" | version u8 | compression u8 | cipher u8 | size u32 of the data, then
    cipher 0 (none):         crc32 u32 of the head and the body | body
    cipher 1 (AES-256-GCM):  key id, 4 bytes | scope label, 16 bytes | nonce, 12 bytes | body and tag

The body is the data, compressed as compression says: 0 not, 1 zlib, 2 zstd. An entry that would be neither
compressed nor encrypted is stored as it is, with its own checksum. The tag covers the head, the key id, the
label and the entry's name in the store beside the body, so a value does not open under another name.

A reader follows what the bytes say, not its own settings, with one exception: who encrypts opens nothing that
is not encrypted, or whoever may write to the store could plant answers. Bytes that do not open are
`CorruptEntryError`, which callers treat as a miss. What cannot be told apart from a healthy entry at the
moment (a key function that fails, a package that is missing) is a plain `StoreError`: such an entry stays.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import os
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final, Protocol, TypeAlias

from ..errors import ConfigError, CorruptEntryError, StoreError

__all__ = ["VERSION", "AtRest", "EncryptionKey", "Keys", "scope_label"]

Keys: TypeAlias = bytes | str | Sequence[bytes | str]
"""One key or several: 32 bytes each, raw or written as base64 or hex. The first seals, all of them open."""

EncryptionKey: TypeAlias = Keys | Mapping[str, Keys] | Callable[[str], Keys | None]
"""Keys for everything; or keys by scope; or a function from a `scope_label` to that scope's keys."""

VERSION: Final = 1
_MAGIC: Final = b"SEAL"
_ENTRY: Final = b"LLMC"  # what `entry.encode` begins with; such bytes need no wrapping to be known
_HEAD: Final = struct.Struct("<4sBBBI")
_CRC: Final = struct.Struct("<I")
_KEYED: Final = struct.Struct("<4s16s12s")
_NOT_SCOPED: Final = bytes(16)
# Measured on chat answers, event streams and embeddings: level 1 saves 94-99 % of the bytes that level 6
# saves, for 26-68 % of its CPU time. Opening costs the same at every level.
_ZLIB_LEVEL: Final = 1
_ZSTD_LEVEL: Final = 3
_PEEKABLE: Final = _MAGIC + bytes((VERSION, 1, 0))  # zlib, not encrypted: what is cut short shows its begin


class AtRest:
    """Seals what goes to a store and opens what comes back.

    ``compress``: ``"zlib"``, ``"zstd"`` (needs Python 3.14 or the package zstandard) or None, for data of
    more than ``compress_above`` bytes, and kept only where it is smaller. zlib makes 16 KB of JSON 2.6 times
    smaller (zstd 2.7) and event streams 18-30 times (19-50), at about 100 (200) and 500 (2000) MB/s. Sizes
    in the store then tell a little about the content; None where that matters.

    ``encryption_key``: AES-256-GCM (extra ``crypto``) with

    * a key, or a list of keys to rotate: the first seals, all open. To rotate, append the new key everywhere,
      then put it first, then drop the old one when its entries have expired: a process that does not know a
      key counts its entries as corrupt and removes them. Rotate before a key has sealed 2**32 entries.
    * a mapping of scope to key or keys. Answers of a scope that is not in it are not stored; ``""`` is the
      scope of answers that have none. Read once: leave a scope out of the next process's mapping and its
      entries cannot be opened any more, wherever copies of them are.
    * a function of a scope's *label*, for keys that come and go while the process runs: it returns that
      scope's key or keys, or None where there are none (any more). Keep each key under its scope's
      `scope_label`. It is called for every entry, also on event loops, so it answers from memory.

    The label is all that the store is told of a scope, and a digest: who can guess a scope's name can check
    the guess, who cannot learns only which entries belong together.

    ``max_opened_bytes`` bounds what an entry may become when it is opened, whatever it claims.
    """

    def __init__(
        self,
        *,
        compress: str | None = "zlib",
        compress_above: int = 4096,
        encryption_key: EncryptionKey | None = None,
        max_opened_bytes: int = 64 << 20,
    ) -> None:
        self._codec = _codec(compress)
        self._compress_above = _bytes("compress_above", compress_above, 0)
        self._max = _bytes("max_opened_bytes", max_opened_bytes, 1)
        self._ring = None if encryption_key is None else _ring(encryption_key)
        self._cipher = 0 if encryption_key is None else 1

    def seal(self, data: bytes, *, key: str, scope: str = "") -> bytes:
        """``data`` as it is to be stored under ``key``, an answer of ``scope``. `StoreError` where it must
        not be stored: it is larger than could be opened, or encryption is on and its scope has no key."""
        if len(data) > self._max:
            raise StoreError(f"larger than max_opened_bytes: {len(data)} bytes")
        compression, body = self._compressed(data)
        head = _HEAD.pack(_MAGIC, VERSION, compression, self._cipher, len(data))
        if self._ring is not None:
            return _encrypt(self._ring, head, body, key, scope)
        if not compression and data.startswith(_ENTRY):
            return data
        return b"".join((head, _CRC.pack(zlib.crc32(body, zlib.crc32(head))), body))

    def open(self, data: bytes, *, key: str) -> bytes:
        """What `seal` was given. `CorruptEntryError` for all other bytes, those of another ``key``, those
        sealed with a key that is not known here (any more) and those that claim more than
        ``max_opened_bytes``. `StoreError` where a function or a package failed: they may be sound."""
        if self._ring is None and data.startswith(_ENTRY):
            return data
        compression, size = self._head(data)
        body = _checked(data) if self._ring is None else _decrypt(self._ring, data, key)
        return _decompressed(compression, body, size)

    def peek(self, data: bytes) -> bytes:
        """An entry's first bytes, from the first bytes of what is stored; others where those do not tell."""
        if self._ring is not None or not data.startswith(_PEEKABLE):
            return data
        return zlib.decompressobj().decompress(data[_HEAD.size + _CRC.size :], 1 << 16)

    def _compressed(self, data: bytes) -> tuple[int, bytes]:
        if self._codec is not None and len(data) > self._compress_above:
            packed = self._codec.pack(data)
            if len(packed) + _HEAD.size + _CRC.size < len(data):
                return self._codec.number, packed
        return 0, data

    def _head(self, data: bytes) -> tuple[int, int]:
        if len(data) < _HEAD.size or not data.startswith(_MAGIC):
            raise CorruptEntryError("not encrypted" if data.startswith(_ENTRY) else "not a sealed entry")
        _, version, compression, cipher, size = _HEAD.unpack_from(data)
        if version != VERSION:
            raise CorruptEntryError(f"sealed in version {version}, not {VERSION}")
        if cipher != self._cipher:
            raise CorruptEntryError(f"cipher {cipher} where this cache has {self._cipher}")
        if size > self._max:
            raise CorruptEntryError(f"claims {size} bytes, more than max_opened_bytes")
        return compression, size


def scope_label(scope: str) -> str:
    """What stands for ``scope`` beside an encrypted entry: 32 hex digits, the same in every process."""
    return _label(scope).hex()


def _label(scope: str) -> bytes:
    text = b"llm_middleware scope\0" + scope.encode("utf-8", "surrogatepass")
    return hashlib.sha256(text).digest()[:16]


def _bytes(name: str, value: object, least: int) -> int:
    # The head has four bytes for a size.
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 32:
        raise ConfigError(f"{name}: expected a number of bytes >= {least}, got {value!r}", param=name)
    return value


def _checked(data: bytes) -> bytes:
    body = data[_HEAD.size + _CRC.size :]
    crc = zlib.crc32(body, zlib.crc32(data[: _HEAD.size]))
    if data[_HEAD.size : _HEAD.size + _CRC.size] != _CRC.pack(crc):
        raise CorruptEntryError("checksum does not match")
    return body


class _Cipher(Protocol):
    """AESGCM of cryptography."""

    def encrypt(self, nonce: bytes, data: bytes, associated_data: bytes, /) -> bytes: ...

    def decrypt(self, nonce: bytes, data: bytes, associated_data: bytes, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class _Key:
    """A key that no one can read off this object, and the short name by which entries refer to it."""

    id: bytes
    cipher: _Cipher


@dataclass(frozen=True, slots=True)
class _Ring:
    """``find``: a label's keys, the sealing one first. ``scoped``: entries carry the label of their scope."""

    find: Callable[[bytes], Sequence[_Key]]
    scoped: bool


def _ring(value: EncryptionKey) -> _Ring:
    _aesgcm()  # a missing package shows here, not with the first entry
    if isinstance(value, Mapping):
        if not value or not all(isinstance(scope, str) for scope in value):
            raise _wrong_key()
        by_label = {_label(scope): _some(keys) for scope, keys in value.items()}
        return _Ring(lambda label: by_label.get(label, ()), True)
    if callable(value):
        return _Ring(_asking(value), True)
    keys = _some(value)
    return _Ring(lambda label: keys, False)


def _asking(function: Callable[[str], Keys | None]) -> Callable[[bytes], Sequence[_Key]]:
    def find(label: bytes) -> Sequence[_Key]:
        try:
            value = function(label.hex())
            return () if value is None else _keys(value)
        except Exception as exc:
            raise StoreError("the function given as encryption_key gave no keys") from exc

    return find


def _some(value: object) -> tuple[_Key, ...]:
    keys = _keys(value)
    if not keys:
        raise _wrong_key()
    return keys


def _keys(value: object) -> tuple[_Key, ...]:
    if isinstance(value, bytes | str):
        value = (value,)
    if not isinstance(value, Sequence):
        raise _wrong_key()
    return tuple(_key(_raw(one)) for one in value)


def _key(raw: bytes) -> _Key:
    return _Key(hashlib.sha256(b"llm_middleware key id\0" + raw).digest()[:4], _aesgcm()(raw))


def _raw(value: object) -> bytes:
    """32 bytes, given as such or as text. A passphrase is not stretched into a key but refused."""
    if isinstance(value, bytes) and len(value) == 32:
        return value
    if not isinstance(value, bytes | str):
        raise _wrong_key()
    try:
        text = (value if isinstance(value, bytes) else value.encode("ascii")).strip()
        raw = bytes.fromhex(text.decode("ascii")) if len(text) == 64 else _unbase64(text)
    except ValueError:
        raw = b""  # an error raised in here would carry the value along in its context
    if len(raw) != 32:
        raise _wrong_key()
    return raw


def _unbase64(text: bytes) -> bytes:
    """Either alphabet of RFC 4648, padded or not."""
    text = text.translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
    return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)


def _wrong_key() -> ConfigError:
    """Never shows what was given."""
    expected = "expected keys of 32 bytes, raw, base64 or hex (openssl rand -base64 32 makes one)"
    return ConfigError(f"encryption_key: {expected}", param="encryption_key")


@cache
def _aesgcm() -> Callable[[bytes], _Cipher]:
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError as exc:
        hint = "encryption_key needs cryptography: pip install 'llm-middleware[crypto]'"
        raise ConfigError(hint, param="encryption_key") from exc
    return AESGCM


def _encrypt(ring: _Ring, head: bytes, body: bytes, name: str, scope: str) -> bytes:
    label = _label(scope) if ring.scoped else _NOT_SCOPED
    keys = ring.find(label)
    if not keys:
        raise StoreError("no encryption key for the scope of this entry")
    nonce = os.urandom(12)
    head += _KEYED.pack(keys[0].id, label, nonce)
    return head + keys[0].cipher.encrypt(nonce, body, _associated(head, name))


def _decrypt(ring: _Ring, data: bytes, name: str) -> bytes:
    from cryptography.exceptions import InvalidTag

    at = _HEAD.size + _KEYED.size
    if len(data) < at + 16:
        raise CorruptEntryError("cut short")
    key_id, label, nonce = _KEYED.unpack_from(data, _HEAD.size)
    for key in ring.find(label):
        if key.id == key_id:
            try:
                return key.cipher.decrypt(nonce, data[at:], _associated(data[:at], name))
            except InvalidTag as exc:
                raise CorruptEntryError("changed since it was sealed, or moved from another key") from exc
    raise CorruptEntryError("sealed with an encryption key that is not known here")


def _associated(head: bytes, name: str) -> bytes:
    return head + name.encode("utf-8", "surrogatepass")


@dataclass(frozen=True, slots=True)
class _Codec:
    """``unpack(body, size)`` never makes more than ``size + 1`` bytes, and raises ``error`` or returns bytes
    of another size where ``body`` is not one whole stream of that size."""

    number: int
    pack: Callable[[bytes], bytes]
    unpack: Callable[[bytes, int], bytes]
    error: type[Exception]


def _decompressed(number: int, body: bytes, size: int) -> bytes:
    codec = _reader(number)
    if codec is not None:
        try:
            body = codec.unpack(body, size)
        except codec.error as exc:
            raise CorruptEntryError("does not decompress") from exc
    if len(body) != size:
        raise CorruptEntryError("not of the size it claims")
    return body


def _reader(number: int) -> _Codec | None:
    if number in (0, _ZLIB.number):
        return _ZLIB if number else None
    if number != 2:
        raise CorruptEntryError(f"compression {number} is not known")
    try:
        return _zstd()
    except ConfigError as exc:
        raise StoreError(exc.message) from exc


def _codec(name: str | None) -> _Codec | None:
    if name is None or name == "zlib":
        return _ZLIB if name else None
    if name != "zstd":
        raise ConfigError(f"compress: expected 'zlib', 'zstd' or None, got {name!r}", param="compress")
    return _zstd()


def _inflate(body: bytes, size: int) -> bytes:
    stream = zlib.decompressobj()
    data = stream.decompress(body, size + 1)
    if not stream.eof or stream.unused_data:
        raise zlib.error("not one whole stream")
    return data


_ZLIB: Final = _Codec(1, lambda data: zlib.compress(data, _ZLIB_LEVEL), _inflate, zlib.error)


def _zstd() -> _Codec:
    codec = _stdlib_zstd() or _zstandard()
    if codec is None:
        hint = "zstd needs Python 3.14 or the package zstandard: pip install zstandard"
        raise ConfigError(hint, param="compress")
    return codec


@cache
def _stdlib_zstd() -> _Codec | None:
    try:
        zstd = importlib.import_module("compression.zstd")
    except ImportError:
        return None

    def unpack(body: bytes, size: int) -> bytes:
        stream = zstd.ZstdDecompressor()
        data: bytes = stream.decompress(body, size + 1)
        if not stream.eof or stream.unused_data:
            raise zstd.ZstdError("not one whole frame")
        return data

    return _Codec(2, lambda data: zstd.compress(data, _ZSTD_LEVEL), unpack, zstd.ZstdError)


@cache
def _zstandard() -> _Codec | None:
    try:
        zstd = importlib.import_module("zstandard")
    except ImportError:
        return None

    def unpack(body: bytes, size: int) -> bytes:
        # The frame says how much memory is taken before it is read, so it must say what the head says.
        if zstd.frame_content_size(body) != size:
            raise zstd.ZstdError("not a frame of that size")
        data: bytes = zstd.ZstdDecompressor().decompress(body, allow_extra_data=False)
        return data

    # One compressor per call: an object of zstandard serves one thread at a time.
    return _Codec(
        2, lambda data: zstd.ZstdCompressor(level=_ZSTD_LEVEL).compress(data), unpack, zstd.ZstdError
    )
