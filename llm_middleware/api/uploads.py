"""Forms with a recording in them, read piece by piece as they arrive.

The file goes into memory while it is small and to disk beyond that, and its digest, which is what the cache
key has of it, is taken on the way; the other fields are small, and are held. The digest needs all of the
file, so also a request that is answered from the cache is read to its end.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
import threading
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from typing import Any, Final

from .._ports.protocol import Port
from ..caching.cache_key import UnkeyableError
from ..caching.multipart import FormParser, Part, PartHead, keyed_fields
from ..errors import InvalidRequestError, LLMMiddlewareError
from ..routing.request import form_values
from .message import TooLargeError

__all__ = ["LONGEST_FIELD", "MOST_FIELDS", "ClientLeftError", "Recording", "Upload", "read_upload"]

logger = logging.getLogger("llm_middleware")

MOST_FIELDS: Final = 64
LONGEST_FIELD: Final = 2**16  # bytes
_IN_MEMORY: Final = 2**20  # bytes of a recording that is not on disk
_PIECE: Final = 2**18  # bytes that are written and read at once


class ClientLeftError(Exception):
    """The client left before its request was whole: there is nobody to answer."""


class _NotKeptError(LLMMiddlewareError):
    status = 503
    code = "upload_not_kept"


class Recording:
    """A file that was uploaded, as `Pieces`. Any number of threads may read it at once."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115 - `close` closes it
        self._hash = hashlib.sha256()
        self._size = 0
        self._using = threading.Lock()

    def __len__(self) -> int:
        return self._size

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def fits_memory(self, data: bytes) -> bool:
        """Whether writing ``data`` does not touch the disk."""
        return self._size + len(data) <= _IN_MEMORY

    def write(self, data: bytes) -> None:
        """Add ``data``, before anybody reads."""
        with self._using:
            self._file.write(data)
            self._file.flush()  # where the disk is full it is told here
            self._hash.update(data)
            self._size += len(data)

    def pieces(self) -> Iterator[bytes]:
        at = 0
        while at < self._size:
            with self._using:
                if self._file.closed:
                    raise OSError("the recording is closed")
                self._file.seek(at)
                data = self._file.read(_PIECE)
            if not data:
                raise OSError("the recording is not whole any more")
            at += len(data)
            yield data

    def close(self) -> None:
        with self._using:
            self._file.close()

    def __del__(self) -> None:
        self._file.close()  # of a request whose task never ran


class Upload:
    """A form. It is the `with` statement's that have it: the last to end closes its file.

    ``values``: its fields as a Router takes them. ``keyed``: as the cache keys them."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.values: Mapping[str, Any] = {}
        self._users = 0
        self._counting = threading.Lock()

    @property
    def keyed(self) -> Mapping[str, object]:
        return keyed_fields(self.parts)

    def __enter__(self) -> Upload:
        with self._counting:
            self._users += 1
        return self

    def __exit__(self, *exc_info: object) -> None:
        with self._counting:
            self._users -= 1
            over = self._users == 0
        if over:
            for part in self.parts:
                if isinstance(part.content, Recording):
                    part.content.close()


async def read_upload(
    port: Port, upload: Upload, pieces: AsyncGenerator[bytes], content_type: str, limit: int, model: str = ""
) -> None:
    """Read a form of at most ``limit`` bytes into ``upload``, which somebody has. ``model``: takes the place
    of the form's own. Raises what the client is told."""
    reading = _Reading(port, upload.parts)
    size = 0
    try:
        parser = FormParser(content_type)
        async with aclosing(pieces):
            async for data in pieces:
                size += len(data)
                if size > limit:
                    raise TooLargeError(f"the body has more than {limit} bytes")
                for event in parser.feed(data):
                    await (reading.begin(event) if isinstance(event, PartHead) else reading.add(event))
        parser.finish()
    except UnkeyableError as exc:
        raise InvalidRequestError(f"the body is not a form: {exc}") from None
    await reading.end()
    if model:
        own = Part("model", None, None, model.encode("utf-8", "surrogatepass"))
        upload.parts[:] = [own, *(part for part in upload.parts if part.name != "model")]
    upload.values = form_values(upload.parts)
    if not isinstance(upload.values.get("file"), tuple):
        raise InvalidRequestError("file: a transcription needs a file", param="file")


class _Reading:
    """Where the parts of a form go: ``parts``."""

    def __init__(self, port: Port, parts: list[Part]) -> None:
        self._port = port
        self._parts = parts
        self._head: PartHead | None = None
        self._recording: Recording | None = None
        self._pending: list[bytes] = []
        self._size = 0  # of what is pending

    async def begin(self, head: PartHead) -> None:
        await self.end()
        if len(self._parts) >= MOST_FIELDS:
            raise InvalidRequestError(f"the form has more than {MOST_FIELDS} fields")
        self._head = head
        if head.filename is not None:
            self._recording = Recording()
            self._parts.append(Part(*head, self._recording))
            form_values(self._parts)  # a second file, or one in another field, is refused before it is kept

    async def add(self, data: bytes) -> None:
        self._pending.append(data)
        self._size += len(data)
        if self._recording is not None:
            if self._size >= _PIECE:
                await self._keep(self._recording)
        elif self._size > LONGEST_FIELD:
            name = "" if self._head is None else self._head.name
            raise InvalidRequestError(f"{name}: longer than {LONGEST_FIELD} bytes", param=name)

    async def end(self) -> None:
        """The part that was begun is whole."""
        head, self._head = self._head, None
        recording, self._recording = self._recording, None
        if recording is not None:
            await self._keep(recording)
        elif head is not None:
            self._parts.append(Part(*head, self._taken()))

    async def _keep(self, recording: Recording) -> None:
        data = self._taken()
        try:
            if recording.fits_memory(data):
                recording.write(data)
            else:
                await self._port.blocking(recording.write, data)
        except OSError as exc:
            logger.error("an upload could not be kept in %s: %s", tempfile.gettempdir(), exc)
            raise _NotKeptError("the file could not be kept") from None

    def _taken(self) -> bytes:
        data, self._pending, self._size = b"".join(self._pending), [], 0
        return data
