"""What decisions have learnt, kept beside a vector index: a few kilobytes under each name, in one small file.

The file is one line with the CRC-32 of what follows, and JSON: from names to base64. It is written beside and
renamed over the last one, and only its owner may read it. One that is damaged is ignored with a warning: what
it held can be learnt again.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import threading
import zlib
from pathlib import Path

__all__ = ["States"]

logger = logging.getLogger("llm_middleware")


class States:
    """Named bytes of one process, for all its threads; ``path``: a file that keeps them over a restart, read
    when the first of them is asked for."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._kept: dict[str, bytes] = {}
        self._read = path is None

    def __len__(self) -> int:
        with self._lock:
            return len(self._all())

    def get(self, name: str) -> bytes | None:
        """What is kept under ``name``."""
        with self._lock:
            return self._all().get(name)

    def keep(self, name: str, data: bytes, before: bytes | None) -> bool:
        """Keep ``data`` if what is there is still ``before``; whether that was so."""
        with self._lock:
            if self._all().get(name) != before:
                return False
            self._kept[name] = bytes(data)
            return True

    def write(self) -> None:
        """Put all of them into the file, in place of what is there. `OSError`."""
        with self._lock:
            kept = dict(self._all())
        if self._path is None or not kept:
            return
        text = json.dumps({name: base64.b64encode(data).decode() for name, data in kept.items()}).encode()
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        beside = self._path.with_name(f"{self._path.name}.{os.getpid()}.tmp")
        try:
            with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(b"%08x\n" % zlib.crc32(text) + text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, self._path)
        finally:
            with contextlib.suppress(OSError):
                beside.unlink()

    def _all(self) -> dict[str, bytes]:
        if not self._read:
            self._read = True
            self._kept = self._from_file()
        return self._kept

    def _from_file(self) -> dict[str, bytes]:
        assert self._path is not None
        try:
            crc, _, text = self._path.read_bytes().partition(b"\n")
            if crc != b"%08x" % zlib.crc32(text):
                raise ValueError("it is damaged")
            return {name: base64.b64decode(data, validate=True) for name, data in json.loads(text).items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, AttributeError, TypeError) as exc:
            logger.warning("vector index: %s is ignored: %s", self._path, exc)
            return {}
