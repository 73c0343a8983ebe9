"""Forms: read field by field, or refused."""

from __future__ import annotations

import json

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_middleware.caching.cache_key import UnkeyableError
from llm_middleware.caching.multipart import Part, form_fields, form_parts
from llm_middleware.providers.multipart import form

TYPE = "multipart/form-data; boundary=B"


def raw(*parts: bytes) -> bytes:
    return b"".join(b"--B\r\n" + part + b"\r\n" for part in parts) + b"--B--\r\n"


def field(name: str, value: bytes, *headers: str) -> bytes:
    lines = [f'Content-Disposition: form-data; name="{name}"', *headers, "", ""]
    return "\r\n".join(lines).encode() + value


def test_fields_and_files_in_their_order() -> None:
    audio = b"RIFF\r\n--C\x00\xff\r\n\r\n"
    body = raw(
        field("model", b"m"),
        b'content-disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\n'
        + audio,
        field("x[]", b"one"),
        field("x[]", b""),
        field("é", "ü".encode(), "Content-Type: text/plain; charset=utf-8"),
    )
    assert form_parts(body, TYPE) == [
        Part("model", None, None, b"m"),
        Part("file", "a.wav", "audio/wav", audio),
        Part("x[]", None, None, b"one"),
        Part("x[]", None, None, b""),
        Part("é", None, "text/plain", "ü".encode()),
    ]
    assert form_fields(body, TYPE)["x[]"] == ["one", ""]
    assert form_parts(body, TYPE)[4].text == "ü"


@pytest.mark.parametrize(
    ("disposition", "name"),
    [
        ('filename="a b.wav"', "a b.wav"),
        ("filename=a.wav", "a.wav"),
        ('filename=""', ""),
        ('filename="é.wav"', "é.wav"),
        ('filename="a\\"b\\\\c.wav"', 'a"b\\c.wav'),
        ("filename*=UTF-8''%C3%A9%20b.wav", "é b.wav"),
        ('filename="a;b.wav"', "a;b.wav"),
    ],
)
def test_names_of_files(disposition: str, name: str) -> None:
    part = f'Content-Disposition: form-data; name="file"; {disposition}\r\n\r\nx'
    assert form_parts(raw(part.encode()), TYPE) == [Part("file", name, None, b"x")]


@pytest.mark.parametrize(
    "content_type",
    [
        'multipart/form-data; boundary="B"',
        "Multipart/Form-Data; charset=utf-8; BOUNDARY=B",
        "multipart/form-data;boundary=B",
    ],
)
def test_content_types_that_say_the_same(content_type: str) -> None:
    assert [part.name for part in form_parts(raw(field("a", b"1")), content_type)] == ["a"]


def test_a_text_that_is_not_utf8_is_not_lost() -> None:
    (part,) = form_parts(raw(field("a", b"\xff\xe9")), TYPE)
    assert part.text.encode("utf-8", "surrogateescape") == b"\xff\xe9"


def test_there_may_be_blank_lines_before_it_and_anything_after_it() -> None:
    body = b"\r\n" + raw(field("a", b"1")) + b"epilogue"
    assert [part.content for part in form_parts(body, TYPE)] == [b"1"]
    assert form_parts(b"--B--\r\n", TYPE) == []


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (raw(field("a", b"1")), "multipart/form-data"),
        (raw(field("a", b"1")), "multipart/form-data; boundary="),
        (raw(field("a", b"1")), "multipart/mixed; boundary=B"),
        (raw(field("a", b"1")), "application/json"),
        (raw(field("a", b"1")), ""),
        (raw(field("a", b"1")), "multipart/form-data; boundary=C"),
        (raw(field("a", b"1"))[:-6], TYPE),  # not ended
        (raw(field("a", b"1")).replace(b"\r\n", b"\n"), TYPE),
        (raw(field("a", b"1")).replace(b"--B\r\n", b"--BB\r\n"), TYPE),
        (b"preamble\r\n" + raw(field("a", b"1")), TYPE),
        (b"", TYPE),
        (raw(b"Content-Disposition: form-data; name=a"), TYPE),
        (raw(b"no header\r\n\r\n1"), TYPE),
        (raw(b"Content-Disposition: form-data\r\n\r\n1"), TYPE),
        (raw(b"Content-Type: text/plain\r\n\r\n1"), TYPE),
        (raw(field("a", b"MQ==", "Content-Transfer-Encoding: base64")), TYPE),
    ],
)
def test_what_is_unusual_is_refused(body: bytes, content_type: str) -> None:
    with pytest.raises(UnkeyableError):
        form_parts(body, content_type)


@pytest.mark.parametrize("encoding", ["7bit", "8BIT", "binary"])
def test_encodings_that_are_none(encoding: str) -> None:
    part = field("a", b"1", f"Content-Transfer-Encoding: {encoding}")
    assert form_parts(raw(part), TYPE)[0].content == b"1"


@settings(deadline=None)
@given(
    st.dictionaries(st.text(max_size=9).filter(lambda name: name != "file"), st.text(max_size=9), max_size=5),
    st.binary(max_size=60),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=9),
)
def test_what_a_client_sends_comes_back(fields: dict[str, str], content: bytes, filename: str) -> None:
    request = httpx.Request("POST", "http://x", data=fields, files={"file": (filename, content, "audio/wav")})
    parts = form_parts(request.read(), request.headers["content-type"])
    assert [part.content.decode() for part in parts[:-1]] == [*fields.values()]
    assert (parts[-1].name, parts[-1].content, parts[-1].content_type) == ("file", content, "audio/wav")
    assert parts[-1].filename == filename.replace('"', "%22").strip()


@settings(deadline=None)
@given(st.binary(max_size=40), st.text('abc.é "\\%;', min_size=1, max_size=9))
def test_our_own_forms_come_back(content: bytes, filename: str) -> None:
    file = (filename, content, "audio/wav")
    content_type, body = form({"model": "m", "x": ["1", "2"], "t": 0.5, "file": file})
    parts = form_parts(body, content_type)
    assert [(part.name, part.content) for part in parts] == [
        ("model", b"m"),
        ("x[]", b"1"),
        ("x[]", b"2"),
        ("t", json.dumps(0.5).encode()),
        ("file", content),
    ]
    assert parts[-1].content_type == "audio/wav"


@settings(deadline=None)
@given(st.binary(max_size=200), st.text(max_size=60))
def test_nothing_but_a_refusal_is_raised(body: bytes, content_type: str) -> None:
    for kind in (TYPE, content_type, f"multipart/form-data; boundary={content_type}"):
        for data in (body, raw(body), raw(field("a", b"1"), body)):
            try:
                form_parts(data, kind)
            except UnkeyableError:
                pass
