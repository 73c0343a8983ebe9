"""What decisions have learnt, in the file beside the index in process."""

from __future__ import annotations

import base64
import json
import os
import stat
import zlib
from pathlib import Path

import pytest

from llm_middleware.semantic.index_numpy import NumpyIndex
from llm_middleware.semantic.states import States
from tests.contract.vectors import make_row, unit_vectors


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "vectors"


def test_they_are_written_with_the_rows(path: Path) -> None:
    index = NumpyIndex(path=path)
    index.add(make_row(1, unit_vectors(1)[0]))
    assert index.keep_state("s", b"\x00learnt\xff", None) is True
    index.close()
    assert sorted(os.listdir(path.parent)) == ["vectors", "vectors.states"]
    assert stat.S_IMODE((path.parent / "vectors.states").stat().st_mode) == 0o600
    again = NumpyIndex(path=path)
    assert again.state("s") == b"\x00learnt\xff"
    assert again.count() == 1


def test_they_are_written_where_there_are_no_rows(path: Path) -> None:
    index = NumpyIndex(path=path)
    assert index.keep_state("s", b"learnt", None) is True
    assert index.save() is True
    assert os.listdir(path.parent) == ["vectors.states"]
    assert NumpyIndex(path=path).state("s") == b"learnt"


def test_a_change_of_one_is_a_change(path: Path) -> None:
    """`close` writes it though no row has changed; nothing is written where it was refused."""
    index = NumpyIndex(path=path)
    index.keep_state("s", b"one", None)
    index.close()
    index.keep_state("s", b"two", b"one")
    index.close()
    assert NumpyIndex(path=path).state("s") == b"two"
    (path.parent / "vectors.states").unlink()
    assert index.keep_state("s", b"three", b"one") is False
    index.close()
    assert os.listdir(path.parent) == []


def test_nothing_is_written_where_nothing_was_kept(path: Path) -> None:
    index = NumpyIndex(path=path)
    index.add(make_row(1, unit_vectors(1)[0]))
    assert index.save() is True
    assert os.listdir(path.parent) == ["vectors"]


def _line(text: bytes) -> bytes:
    return b"%08x\n" % zlib.crc32(text) + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"00000000\n{}x",
        _line(b"[]"),
        _line(b"{"),
        _line(b'{"s": 1}'),
        _line(b'{"s": "no base64!"}'),
        _line(b'{"s": "YQ=="}')[:-1],
        _line(b'{"s": "\xff"}'),
        b"\xff" * 100,
    ],
)
def test_a_damaged_file_is_ignored_and_written_over(
    path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    file = path.parent / "vectors.states"
    file.write_bytes(content)
    index = NumpyIndex(path=path)
    assert index.state("s") is None
    assert "vectors.states is ignored" in caplog.text
    assert index.keep_state("s", b"new", None) is True
    index.close()
    assert file.read_bytes() == _line(json.dumps({"s": base64.b64encode(b"new").decode()}).encode())


def test_a_file_that_cannot_be_read_is_ignored(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (path.parent / "vectors.states").mkdir()
    index = NumpyIndex(path=path)
    assert index.state("s") is None
    assert "is ignored" in caplog.text
    assert index.keep_state("s", b"new", None) is True
    assert index.save() is False
    assert "cannot write" in caplog.text
    assert index.state("s") == b"new"


def test_a_write_that_fails_leaves_the_file_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = States(path)
    states.keep("s", b"one", None)
    states.write()
    before = path.read_bytes()
    states.keep("s", b"two", b"one")

    def full(*arguments: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        states.write()
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_what_is_kept_is_a_copy() -> None:
    states, data = States(), bytearray(b"one")
    states.keep("s", data, None)  # type: ignore[arg-type]
    data[0] = 0
    assert states.get("s") == b"one"
