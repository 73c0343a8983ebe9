from __future__ import annotations

import base64
import hashlib
import json
import random
import struct
import sys
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import zstandard
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_middleware.caching import at_rest
from llm_middleware.caching.at_rest import AtRest, scope_label
from llm_middleware.caching.entry import Entry, Form, decode, encode
from llm_middleware.errors import ConfigError, CorruptEntryError, StoreError
from tests.support import completion

K1, K2, K3 = (bytes([number]) * 32 for number in (1, 2, 3))
NAME = "llm:" + "0" * 64
OTHER = "llm:" + "1" * 64
FORM = Form(((b"content-type", b"application/json"),), json.dumps(completion("hello " * 2000)).encode())
ENTRY = Entry("chat", 1_700_000_000.0, 1_700_003_600.0, FORM, None, "m")
BIG = encode(ENTRY)
SMALL = encode(replace(ENTRY, plain=Form((), b"{}")))
NOISE = random.Random(1).randbytes(10_000)

CONFIGURED: dict[str, Callable[[], AtRest]] = {
    "zlib": AtRest,
    "zstd": lambda: AtRest(compress="zstd"),
    "neither": lambda: AtRest(compress=None),
    "encrypted": lambda: AtRest(compress=None, encryption_key=K1),
    "zlib encrypted": lambda: AtRest(encryption_key=[K1, K2]),
    "zstd encrypted": lambda: AtRest(compress="zstd", encryption_key=K1),
    "by scope": lambda: AtRest(encryption_key={"": K1, "acme": [K2, K3]}),
    "by function": lambda: AtRest(encryption_key={scope_label(""): K1}.get),
}


@pytest.fixture(params=CONFIGURED)
def rest(request) -> AtRest:
    return CONFIGURED[request.param]()


@pytest.fixture
def absent(monkeypatch) -> Iterator[Callable[..., None]]:
    """``absent("zstandard")``: as if that package were not installed."""
    loaders = (at_rest._aesgcm, at_rest._stdlib_zstd, at_rest._zstandard)

    def remove(*names: str) -> None:
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)
        for loader in loaders:
            loader.cache_clear()

    yield remove
    for loader in loaders:
        loader.cache_clear()


def forged(compression: int, body: bytes, size: int) -> bytes:
    """What somebody can write who may write to the store and knows the format, where nothing is encrypted."""
    head = struct.pack("<4sBBBI", b"SEAL", 1, compression, 0, size)
    return head + struct.pack("<I", zlib.crc32(head + body)) + body


def assert_corrupt(rest: AtRest, data: bytes, key: str = NAME) -> None:
    with pytest.raises(CorruptEntryError):
        decode(rest.open(data, key=key))


# What is written


def test_a_small_entry_is_stored_as_it_is() -> None:
    assert AtRest().seal(SMALL, key=NAME) is SMALL
    assert AtRest().open(SMALL, key=NAME) is SMALL
    assert SMALL[:4] == at_rest._ENTRY


def test_the_bytes_of_a_compressed_entry() -> None:
    sealed = AtRest().seal(BIG, key=NAME)
    body = zlib.compress(BIG, 1)
    head = b"SEAL" + bytes([1, 1, 0]) + len(BIG).to_bytes(4, "little")
    assert sealed == head + zlib.crc32(head + body).to_bytes(4, "little") + body
    assert len(sealed) * 20 < len(BIG)


def test_the_bytes_of_an_encrypted_entry(monkeypatch) -> None:
    monkeypatch.setattr(at_rest.os, "urandom", lambda size: bytes(range(size)))
    sealed = AtRest(encryption_key=K1).seal(b"LLMC and so on", key=NAME)
    head = b"SEAL" + bytes([1, 0, 1]) + bytes([14, 0, 0, 0])
    head += hashlib.sha256(b"llm_middleware key id\0" + K1).digest()[:4] + bytes(16) + bytes(range(12))
    assert sealed == head + AESGCM(K1).encrypt(bytes(range(12)), b"LLMC and so on", head + NAME.encode())
    assert sealed.hex() == (
        "5345414c0100010e00000082010d3300000000000000000000000000000000000102030405060708090a0b"
        "f7ead865009f681dde1988e44f07356167780ae8de4926abb4e4e91a59de"
    )


def test_the_label_of_a_scope() -> None:
    assert scope_label("acme") == hashlib.sha256(b"llm_middleware scope\0acme").hexdigest()[:32]
    assert len({scope_label(scope) for scope in ("", "a", "A", "a ", "\ud800", "\0")}) == 6


def test_an_entry_names_its_scope_by_label_only() -> None:
    sealed = AtRest(encryption_key={"acme": K2}).seal(BIG, key=NAME, scope="acme")
    assert sealed[15:31].hex() == scope_label("acme")
    assert b"acme" not in sealed
    assert AtRest(encryption_key=K2).seal(BIG, key=NAME, scope="acme")[15:31] == bytes(16)


def test_no_two_sealed_values_are_alike() -> None:
    rest = AtRest(encryption_key=K1)
    assert len({rest.seal(BIG, key=NAME) for _ in range(100)}) == 100


@pytest.mark.parametrize(("size", "compressed"), [(4096, False), (4097, True)])
def test_compression_begins_above_the_limit(size: int, compressed: bool) -> None:
    assert (AtRest().seal(b"LLMC".ljust(size), key=NAME)[:4] == b"SEAL") is compressed


@pytest.mark.parametrize("compress", ["zlib", "zstd"])
def test_compression_is_kept_only_where_it_saves(compress: str) -> None:
    data = b"LLMC" + NOISE
    assert AtRest(compress=compress, compress_above=0).seal(data, key=NAME) is data
    assert AtRest(compress=compress, compress_above=0).seal(b"LLMC", key=NAME) == b"LLMC"


def test_what_is_encrypted_does_not_show(rest: AtRest) -> None:
    sealed = rest.seal(SMALL, key=NAME)
    assert (b"chat" in sealed) is (rest._ring is None)


# Round trips


@pytest.mark.parametrize(
    "data", [BIG, SMALL, NOISE, b"", b"x", b"SEAL", b"LLMC", b"SEAL" * 5000, bytes(70_000)]
)
def test_what_is_sealed_opens(rest: AtRest, data: bytes) -> None:
    assert rest.open(rest.seal(data, key=NAME), key=NAME) == data


@given(st.sampled_from(list(CONFIGURED)), st.binary(), st.integers(0, 3000), st.text(), st.integers(0, 50))
def test_any_bytes_open_again(how: str, data: bytes, times: int, key: str, above: int) -> None:
    rest = CONFIGURED[how]()
    rest._compress_above = above
    assert rest.open(rest.seal(data * times, key=key), key=key) == data * times


@given(st.dictionaries(st.text(), st.binary(min_size=32, max_size=32), min_size=1), st.data())
def test_any_scope_opens_again(keys: dict[str, bytes], data: st.DataObject) -> None:
    scope = data.draw(st.sampled_from(list(keys)))
    sealed = AtRest(encryption_key=keys).seal(BIG, key=NAME, scope=scope)
    by_label = {scope_label(each): key for each, key in keys.items()}
    assert AtRest(encryption_key=keys).open(sealed, key=NAME) == BIG
    assert AtRest(encryption_key=by_label.get).open(sealed, key=NAME) == BIG


@pytest.mark.parametrize("compress", ["zlib", "zstd", None])
@pytest.mark.parametrize("reader", ["zlib", "zstd", None])
@pytest.mark.parametrize("key", [None, K1])
def test_reading_does_not_depend_on_the_setting(compress: str, reader: str, key: bytes | None) -> None:
    sealed = AtRest(compress=compress, encryption_key=key).seal(BIG, key=NAME)
    opening = AtRest(compress=reader, compress_above=10**6, encryption_key=key)
    assert opening.open(sealed, key=NAME) == BIG


def test_threads_share_it(rest: AtRest) -> None:
    def trip(number: int) -> bool:
        data = BIG + str(number).encode()
        return rest.open(rest.seal(data, key=str(number)), key=str(number)) == data

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(trip, range(400)))


# Damage


def test_every_flipped_bit_shows(rest: AtRest) -> None:
    rest._compress_above = 100
    sealed = rest.seal(encode(replace(ENTRY, plain=Form((), b"a" * 300))), key=NAME)
    for at in range(len(sealed)):
        for bit in range(8):
            damaged = bytearray(sealed)
            damaged[at] ^= 1 << bit
            assert_corrupt(rest, bytes(damaged))


def test_every_other_byte_in_the_head_shows(rest: AtRest) -> None:
    sealed = rest.seal(BIG, key=NAME)
    for at in range(44):
        for value in set(range(256)) - {sealed[at]}:
            assert_corrupt(rest, sealed[:at] + bytes([value]) + sealed[at + 1 :])


def test_every_truncation_and_addition_shows(rest: AtRest) -> None:
    sealed = rest.seal(BIG, key=NAME)
    for size in [*range(min(300, len(sealed))), *range(300, len(sealed), 97), len(sealed) - 1]:
        assert_corrupt(rest, sealed[:size])
    for more in (b"\0", b"x" * 100, sealed):
        assert_corrupt(rest, sealed + more)
    assert_corrupt(rest, b"\0" + sealed)


@settings(max_examples=300)
@given(st.sampled_from(list(CONFIGURED)), st.binary(), st.sampled_from([b"", b"SEAL", b"SEAL\1", b"LLMC\1"]))
def test_random_bytes_are_corrupt(how: str, data: bytes, start: bytes) -> None:
    assert_corrupt(CONFIGURED[how](), start + data)


@settings(max_examples=300)
@given(st.integers(0, 255), st.binary(), st.integers(0, 2**32 - 1))
def test_forgeries_with_a_right_checksum_are_corrupt(compression: int, body: bytes, size: int) -> None:
    assert_corrupt(AtRest(), forged(compression, body, size))


@settings(max_examples=300)
@given(st.sampled_from([1, 2]), st.integers(0, 200), st.integers(1, 255), st.integers(-1, 1))
def test_damaged_streams_with_a_right_checksum_are_never_of_another_size(
    compression: int, at: int, change: int, longer: int
) -> None:
    codec = at_rest._reader(compression)
    body = bytearray(codec.pack(BIG))
    body[at % len(body)] ^= change
    try:
        opened = AtRest().open(forged(compression, bytes(body), len(BIG) + longer), key=NAME)
    except CorruptEntryError:
        return
    assert len(opened) == len(BIG) + longer  # zstd frames carry no checksum; the entry inside does


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"SEAL\2\0\0", "sealed in version 2, not 1"),
        (b"SEAL\1\3\0", "compression 3 is not known"),
        (b"SEAL\1\0\2", "cipher 2 where this cache has 0"),
        (b"SEAM\1\0\0", "not a sealed entry"),
    ],
)
def test_unknown_versions_and_numbers(head: bytes, message: str) -> None:
    head += bytes(4)
    with pytest.raises(CorruptEntryError, match=message):
        AtRest().open(head + zlib.crc32(head).to_bytes(4, "little"), key=NAME)


# Bombs


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("size", [1, 1000, 1 << 20, (64 << 20) + 1, 2**32 - 1])
def test_a_bomb_is_never_unpacked(number: int, size: int) -> None:
    bomb = forged(number, at_rest._reader(number).pack(bytes(100 << 20)), size)
    tracemalloc.start()
    try:
        with pytest.raises(CorruptEntryError):
            AtRest().open(bomb, key=NAME)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_zstd_bomb_that_does_not_tell_its_size() -> None:
    stream = zstandard.ZstdCompressor().compressobj()
    bomb = stream.compress(bytes(100 << 20)) + stream.flush()
    tracemalloc.start()
    try:
        assert_corrupt(AtRest(), forged(2, bomb, 1000))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("number", [1, 2])
def test_two_streams_in_one_are_refused(number: int) -> None:
    codec = at_rest._reader(number)
    assert_corrupt(AtRest(), forged(number, codec.pack(BIG) + codec.pack(BIG), len(BIG)))
    assert_corrupt(AtRest(), forged(number, codec.pack(BIG) + codec.pack(BIG), 2 * len(BIG)))
    assert AtRest().open(forged(number, codec.pack(BIG), len(BIG)), key=NAME) == BIG


def test_what_could_not_be_opened_is_not_sealed(rest: AtRest) -> None:
    rest._max = len(BIG)
    sealed = rest.seal(BIG, key=NAME)
    assert rest.open(sealed, key=NAME) == BIG
    with pytest.raises(StoreError, match=f"larger than max_opened_bytes: {len(BIG) + 1} bytes"):
        rest.seal(BIG + b"x", key=NAME)
    if sealed is not BIG:
        rest._max = len(BIG) - 1
        with pytest.raises(CorruptEntryError, match=f"claims {len(BIG)} bytes"):
            rest.open(sealed, key=NAME)


# Keys


@pytest.mark.parametrize(
    "written",
    [
        K1,
        K1.hex(),
        K1.hex().upper().encode(),
        base64.b64encode(K1).decode(),
        base64.b64encode(K1).decode().rstrip("="),
        base64.b64encode(K1) + b"\n",
        [K1.hex()],
        (K1, K2),
    ],
)
def test_the_spellings_of_a_key(written: object) -> None:
    assert AtRest(encryption_key=K1).open(AtRest(encryption_key=written).seal(BIG, key=NAME), key=NAME) == BIG


def test_both_alphabets_of_base64() -> None:
    raw = b"\xfb\xff\xfe" * 10 + b"ab"
    for written in (base64.b64encode(raw), base64.urlsafe_b64encode(raw)):
        sealed = AtRest(encryption_key=written).seal(BIG, key=NAME)
        assert AtRest(encryption_key=raw).open(sealed, key=NAME) == BIG


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        b"",
        "correct horse battery staple",
        "secret-of-exactly-32-characters!",
        b"secret" * 5,
        b"secret" * 6,
        "secret" + "0" * 58,
        "s\u00e9cret",
        b"secret\xff" * 9 + b"x",
        base64.b64encode(b"secret" * 4).decode(),
        base64.b64encode(b"secret" * 6).decode(),
        K1.hex() + "00",
        [],
        (),
        {},
        [K1, "secret"],
        [[K1]],
        {"acme": "secret"},
        {"acme": []},
        {"acme": None},
        {7: K1},
        7,
        True,
        {K1},
        bytearray(K1),
    ],
)
def test_wrong_keys_are_named_but_not_shown(wrong: object) -> None:
    with pytest.raises(ConfigError, match="encryption_key: expected keys of 32 bytes") as caught:
        AtRest(encryption_key=wrong)
    assert caught.value.param == "encryption_key"
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_a_key_cannot_be_read_off_the_object() -> None:
    rest = AtRest(encryption_key={"acme": K1})
    shown = repr(rest) + repr(vars(rest)) + repr(rest._ring.find(bytes.fromhex(scope_label("acme"))))
    assert repr(K1)[2:-1] not in shown
    assert K1.hex() not in shown


def test_rotation() -> None:
    old = AtRest(encryption_key=K1).seal(BIG, key=NAME)
    both = AtRest(encryption_key=[K2, K1])
    new = both.seal(BIG, key=NAME)
    assert both.open(old, key=NAME) == both.open(new, key=NAME) == BIG
    assert AtRest(encryption_key=[K1, K2]).open(new, key=NAME) == BIG  # appended first, sealing later
    only = AtRest(encryption_key=K2)
    assert only.open(new, key=NAME) == BIG
    with pytest.raises(CorruptEntryError, match="an encryption key that is not known here"):
        only.open(old, key=NAME)


def test_two_keys_of_one_id(monkeypatch) -> None:
    """One pair in four thousand million: the entry is a miss, not an accident."""
    rest, other = AtRest(encryption_key=K1), AtRest(encryption_key=K2)
    (key,) = other._ring.find(b"")
    alias = replace(key, id=rest._ring.find(b"")[0].id)
    other._ring = replace(other._ring, find=lambda label: (alias,))
    with pytest.raises(CorruptEntryError, match="changed since it was sealed"):
        other.open(rest.seal(BIG, key=NAME), key=NAME)


@pytest.mark.parametrize("how", [name for name in CONFIGURED if "encrypted" in name or "by" in name])
def test_a_value_that_was_moved_to_another_key(how: str) -> None:
    rest = CONFIGURED[how]()
    sealed = rest.seal(BIG, key=NAME)
    for key in (OTHER, "", NAME + "0", NAME[:-1]):
        with pytest.raises(CorruptEntryError, match="moved from another key"):
            rest.open(sealed, key=key)


def test_what_is_not_encrypted_is_not_opened_by_who_encrypts() -> None:
    rest = AtRest(encryption_key=K1)
    with pytest.raises(CorruptEntryError, match="not encrypted"):
        rest.open(SMALL, key=NAME)
    with pytest.raises(CorruptEntryError, match="cipher 0 where this cache has 1"):
        rest.open(AtRest().seal(BIG, key=NAME), key=NAME)
    with pytest.raises(CorruptEntryError, match="cipher 1 where this cache has 0"):
        AtRest().open(rest.seal(BIG, key=NAME), key=NAME)


# Scopes


def test_a_dropped_key_makes_its_scope_unreadable_and_no_other() -> None:
    keys = {"acme": K1, "globex": K2}
    rest = AtRest(encryption_key=keys)
    acme = rest.seal(BIG, key=NAME, scope="acme")
    globex = rest.seal(BIG, key=OTHER, scope="globex")
    after = AtRest(encryption_key={"globex": K2})
    assert after.open(globex, key=OTHER) == BIG
    with pytest.raises(CorruptEntryError, match="not known here"):
        after.open(acme, key=NAME)
    with pytest.raises(StoreError, match="no encryption key for the scope"):
        after.seal(BIG, key=NAME, scope="acme")
    keys.clear()  # a mapping is read once
    assert rest.open(acme, key=NAME) == BIG


def test_a_function_drops_a_key_at_once() -> None:
    keys: dict[str, object] = {scope_label("acme"): K1, scope_label("globex"): [K2, K3]}
    rest = AtRest(encryption_key=keys.get)
    acme = rest.seal(BIG, key=NAME, scope="acme")
    globex = rest.seal(BIG, key=OTHER, scope="globex")
    for gone in (None, ()):
        keys[scope_label("acme")] = gone
        with pytest.raises(CorruptEntryError, match="not known here"):
            rest.open(acme, key=NAME)
        with pytest.raises(StoreError, match="no encryption key for the scope"):
            rest.seal(BIG, key=NAME, scope="acme")
    assert rest.open(globex, key=OTHER) == BIG
    keys[scope_label("acme")] = K3  # a new key does not bring back what the old one sealed
    with pytest.raises(CorruptEntryError):
        rest.open(acme, key=NAME)


def test_a_dropped_key_is_missed_even_where_another_scope_has_the_same() -> None:
    sealed = AtRest(encryption_key={"acme": K1}).seal(BIG, key=NAME, scope="acme")
    with pytest.raises(CorruptEntryError, match="not known here"):
        AtRest(encryption_key={"globex": K1}).open(sealed, key=NAME)


def test_a_value_that_was_moved_to_another_scope() -> None:
    rest = AtRest(encryption_key={"acme": K1, "globex": K1, "initech": K2})
    sealed = rest.seal(BIG, key=NAME, scope="acme")
    for scope in ("globex", "initech", "unknown", ""):
        moved = sealed[:15] + bytes.fromhex(scope_label(scope)) + sealed[31:]
        assert_corrupt(rest, moved)


def test_each_scope_is_sealed_with_its_own_first_key() -> None:
    rest = AtRest(encryption_key={"acme": [K2, K1], "": K3})
    for scope, key in (("acme", K2), ("", K3)):
        sealed = rest.seal(SMALL, key=NAME, scope=scope)
        assert AESGCM(key).decrypt(sealed[31:43], sealed[43:], sealed[:43] + NAME.encode()) == SMALL


def test_rotation_within_a_scope() -> None:
    old = AtRest(encryption_key={"acme": K1}).seal(BIG, key=NAME, scope="acme")
    assert AtRest(encryption_key={"acme": [K2, K1]}).open(old, key=NAME) == BIG


def failing(label: str) -> bytes:
    raise ConnectionError("the key service is away")


@pytest.mark.parametrize("function", [failing, lambda label: "passphrase", lambda label: 7])
def test_a_function_that_fails_says_nothing_of_the_entry(function: Callable) -> None:
    sealed = AtRest(encryption_key={"": K1}).seal(BIG, key=NAME)
    rest = AtRest(encryption_key=function)
    for act in (lambda: rest.open(sealed, key=NAME), lambda: rest.seal(BIG, key=NAME)):
        with pytest.raises(StoreError, match="the function given as encryption_key gave no keys") as caught:
            act()
        assert type(caught.value) is StoreError


# Settings and packages


@pytest.mark.parametrize("compress", ["gzip", "", "ZLIB", 1, True])
def test_unknown_compression(compress: object) -> None:
    with pytest.raises(ConfigError, match=r"compress: expected 'zlib', 'zstd' or None, got") as caught:
        AtRest(compress=compress)
    assert caught.value.param == "compress"


@pytest.mark.parametrize("name", ["compress_above", "max_opened_bytes"])
@pytest.mark.parametrize("value", [-1, 1.5, "1", True, None, 2**32])
def test_wrong_sizes(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{name}: expected a number of bytes >= ") as caught:
        AtRest(**{name: value})
    assert caught.value.param == name


def test_without_cryptography(absent) -> None:
    absent("cryptography.hazmat.primitives.ciphers.aead")
    with pytest.raises(ConfigError, match=r"pip install 'llm-middleware\[crypto\]'") as caught:
        AtRest(encryption_key=K1)
    assert caught.value.param == "encryption_key"
    assert AtRest().open(AtRest().seal(BIG, key=NAME), key=NAME) == BIG


def test_without_zstd(absent) -> None:
    sealed = AtRest(compress="zstd").seal(BIG, key=NAME)
    absent("zstandard", "compression.zstd")
    with pytest.raises(ConfigError, match="pip install zstandard") as caught:
        AtRest(compress="zstd")
    assert caught.value.param == "compress"
    with pytest.raises(StoreError, match="pip install zstandard") as missed:
        AtRest().open(sealed, key=NAME)
    assert type(missed.value) is StoreError  # another process can read it: it stays


if sys.version_info >= (3, 14):  # with zstd in the standard library

    def test_the_two_zstd_packages_read_each_other() -> None:
        one, other = at_rest._stdlib_zstd(), at_rest._zstandard()
        assert one is not None
        assert other is not None
        assert other.unpack(one.pack(BIG), len(BIG)) == BIG
        assert one.unpack(other.pack(BIG), len(BIG)) == BIG
