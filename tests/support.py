"""What the tests share: answers as providers send them, both faces, both fronts, and a host app."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from llm_middleware import CacheManager
from llm_middleware.asgi import LLMCacheMiddleware as ASGIMiddleware
from llm_middleware.wsgi import LLMCacheMiddleware as WSGIMiddleware

CHAT = "/v1/chat/completions"


def completion(content: str = "hello", **changes: object) -> dict:
    """A chat completion as a provider sends it."""
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [choice],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        **changes,
    }


def sse(*payloads: object, done: bool = True) -> list[bytes]:
    """Payloads as server-sent events, one chunk each."""
    chunks = [b"data: " + json.dumps(payload).encode() + b"\n\n" for payload in payloads]
    return chunks + ([b"data: [DONE]\n\n"] if done else [])


def chunk(content: str | None, finish: str | None = None, index: int = 0, **delta: object) -> dict:
    """A chunk of a streamed chat completion."""
    fields = {} if content is None else {"content": content}
    choice = {"index": index, "delta": {**fields, **delta}, "finish_reason": finish}
    return {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}


def chat_stream(*words: str) -> list[bytes]:
    """A whole streamed chat completion without usage."""
    return sse(*[chunk(word) for word in words], chunk(None, "stop"))


class SyncFace:
    """The sync methods of a `CacheManager`."""

    name = "sync"

    def fetch(self, cache: CacheManager, body: object, call: Callable, **options: object):
        return cache.fetch(body, call, **options)

    def get(self, cache: CacheManager, body: object, **options: object):
        return cache.get(body, **options)

    def set(self, cache: CacheManager, body: object, answer: object, **options: object):
        return cache.set(body, answer, **options)

    def do(self, cache: CacheManager, method: str, *args: object):
        """Call ``delete``, ``flush``, ``ping`` or ``close``."""
        return getattr(cache, method)(*args)

    def chunks(self, answer) -> list[bytes]:
        return list(answer)

    def together(self, *thunks: Callable[[], object]) -> list:
        """Run thunks made of this face's methods at the same time; results or exceptions, in order."""
        with ThreadPoolExecutor(len(thunks)) as pool:
            futures = [pool.submit(thunk) for thunk in thunks]
            return [future.exception() or future.result() for future in futures]

    def close(self) -> None:
        pass


class AsyncFace(SyncFace):
    """The async methods, each run on one event loop that lives as long as the test."""

    name = "async"

    def __init__(self) -> None:
        self.runner = asyncio.Runner()

    def run(self, coroutine):
        return self.runner.run(coroutine)

    def fetch(self, cache: CacheManager, body: object, call: Callable, **options: object):
        return self.run(cache.afetch(body, _as_async(call), **options))

    def get(self, cache: CacheManager, body: object, **options: object):
        return self.run(cache.aget(body, **options))

    def set(self, cache: CacheManager, body: object, answer: object, **options: object):
        return self.run(cache.aset(body, answer, **options))

    def do(self, cache: CacheManager, method: str, *args: object):
        return self.run(getattr(cache, "a" + method)(*args))

    def chunks(self, answer) -> list[bytes]:
        async def collect() -> list[bytes]:
            return [piece async for piece in answer]

        return self.run(collect())

    def close(self) -> None:
        self.runner.close()


def _as_async(call: Callable) -> Callable:
    async def acall(body: object) -> object:
        result = call(body)
        return _as_async_iterator(result) if isinstance(result, Iterator) else result

    return acall


async def _as_async_iterator(items: Iterator):
    for item in items:
        await asyncio.sleep(0)
        yield item


@dataclass
class Reply:
    """What a client got. ``chunks``: the body as it was sent, piece by piece, empty pieces left out."""

    status: int
    headers: dict[str, str]
    chunks: list[bytes]

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    @property
    def cache(self) -> str:
        return self.headers["x-llm-cache"]

    @property
    def cache_status(self) -> str:
        return self.headers["cache-status"]

    def json(self):
        return json.loads(self.body)


@dataclass
class Seen:
    """What the host's handler was given."""

    path: str
    headers: dict[str, str]
    body: bytes

    def json(self):
        return json.loads(self.body)


@dataclass
class Host:
    """A host app without a framework: ``handler(seen)`` returns a JSON value, or (status, headers, body)
    where body is bytes or an iterable of chunks. ``seen`` lists the requests that reached it."""

    handler: Callable[[Seen], object]
    seen: list[Seen] = field(default_factory=list)

    @property
    def calls(self) -> int:
        return len(self.seen)

    def answer(self, seen: Seen) -> tuple[int, list[tuple[str, str]], object]:
        self.seen.append(seen)
        result = self.handler(seen)
        if isinstance(result, tuple):
            status, headers, body = result
            return status, [(name, value) for name, value in dict(headers).items()], body
        if isinstance(result, list) and result and isinstance(result[0], bytes):
            return 200, [("content-type", "text/event-stream")], result
        body = json.dumps(result).encode()
        return 200, [("content-type", "application/json"), ("content-length", str(len(body)))], body

    async def asgi(self, scope, receive, send) -> None:
        parts = []
        while True:
            message = await receive()
            parts.append(message.get("body", b""))
            if not message.get("more_body"):
                break
        headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"]}
        status, given, body = self.answer(Seen(scope["path"], headers, b"".join(parts)))
        pairs = [(name.encode(), value.encode("latin-1")) for name, value in given]
        await send({"type": "http.response.start", "status": status, "headers": pairs})
        if isinstance(body, bytes):
            await send({"type": "http.response.body", "body": body})
            return
        for piece in body:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b""})

    def wsgi(self, environ, start_response):
        headers = {
            name[5:].lower().replace("_", "-"): value
            for name, value in environ.items()
            if name.startswith("HTTP_")
        }
        headers["content-length"] = environ.get("CONTENT_LENGTH", "")
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        status, given, body = self.answer(Seen(environ["PATH_INFO"], headers, body))
        start_response(f"{status} Status", given)
        return [body] if isinstance(body, bytes) else (piece for piece in body)


class AsgiFront:
    """The ASGI middleware around a `Host`, called in process."""

    name = "asgi"

    def __init__(self, host: Host, **options: object) -> None:
        self.host = host
        self.app = ASGIMiddleware(host.asgi, **options)

    def post(
        self, body: object, path: str = CHAT, headers: dict[str, str] | None = None, method: str = "POST"
    ):
        return asyncio.run(self.apost(body, path, headers, method))

    async def apost(
        self, body: object, path: str = CHAT, headers: dict[str, str] | None = None, method: str = "POST"
    ) -> Reply:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"content-type": "application/json", "content-length": str(len(raw)), **(headers or {})}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "method": method,
            "path": path,
            "root_path": "",
            "query_string": b"",
            "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in sent.items()],
        }
        messages = [{"type": "http.request", "body": raw, "more_body": False}]
        got: list[dict] = []
        connected = asyncio.Event()

        async def receive() -> dict:
            if messages:
                return messages.pop(0)
            await connected.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict) -> None:
            got.append(message)

        await self.app(scope, receive, send)
        start, *rest = got
        pairs = {name.decode(): value.decode("latin-1") for name, value in start["headers"]}
        return Reply(start["status"], pairs, [m["body"] for m in rest if m.get("body")])

    def together(self, *bodies: object) -> list[Reply]:
        """Post all bodies at the same time; replies, or exceptions, in order."""

        async def gather():
            return await asyncio.gather(*map(self.apost, bodies), return_exceptions=True)

        return asyncio.run(gather())


class WsgiFront:
    """The WSGI middleware around a `Host`, called in process."""

    name = "wsgi"

    def __init__(self, host: Host, **options: object) -> None:
        self.host = host
        self.app = WSGIMiddleware(host.wsgi, **options)

    def post(
        self, body: object, path: str = CHAT, headers: dict[str, str] | None = None, method: str = "POST"
    ) -> Reply:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        environ = {
            "REQUEST_METHOD": method,
            "PATH_INFO": path,
            "SCRIPT_NAME": "",
            "QUERY_STRING": "",
            "SERVER_NAME": "test",
            "SERVER_PORT": "80",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "CONTENT_TYPE": "application/json",
            "CONTENT_LENGTH": str(len(raw)),
            "wsgi.input": io.BytesIO(raw),
            "wsgi.errors": io.StringIO(),
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
        }
        for name, value in (headers or {}).items():
            cgi = name.upper().replace("-", "_")
            environ[cgi if cgi in ("CONTENT_TYPE", "CONTENT_LENGTH") else "HTTP_" + cgi] = value
        started: list = []
        written: list[bytes] = []

        def start_response(status, headers, exc_info=None):
            started[:] = [status, headers]
            return written.append

        result = self.app(environ, start_response)
        try:
            chunks = written + [piece for piece in result if piece]
        finally:
            if hasattr(result, "close"):
                result.close()
        status, pairs = started
        return Reply(int(status[:3]), {name.lower(): value for name, value in pairs}, chunks)

    def together(self, *bodies: object) -> list:
        """Post all bodies at the same time; replies, or exceptions, in order."""
        with ThreadPoolExecutor(len(bodies)) as pool:
            futures = [pool.submit(self.post, body) for body in bodies]
            return [future.exception() or future.result() for future in futures]
