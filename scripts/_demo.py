"""What ``scripts/demo`` runs: all that is printed was measured, and all that is claimed is checked."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
from openai.types.chat import ChatCompletionMessageParam

from llm_middleware import CacheManager
from llm_middleware.routing.response import RouteInfo
from llm_middleware.routing.router import Router
from llm_middleware.testing import FakeUpstream

ROOT = Path(__file__).parents[1]
LATENCY_S = 0.4
CROWD = 50
MODEL = "gpt-4o-mini"
SIMILAR = "semantic-hit"

SERVERS = {
    "FastAPI under uvicorn": "uvicorn --log-level warning --port {port} examples.fastapi_app.main:app",
    "Flask under gunicorn (threads)": "gunicorn --log-level warning --worker-class gthread --threads 64"
    " --graceful-timeout 1 --bind 127.0.0.1:{port} examples.flask_app.main:app",
}

failures: list[str] = []


def check(true: bool, claim: str) -> None:
    """Note a claim that turned out to be false."""
    if not true:
        failures.append(claim)
        print(f"  FALSE: {claim}")


@dataclass
class Timed:
    """An answer, how it came about, and after how many milliseconds."""

    state: str
    headers: Mapping[str, str]
    ms: float
    first_byte_ms: float = 0.0
    content: object = None


@dataclass
class Routed:
    """An answer of the Router, and its way."""

    state: str
    route: RouteInfo
    ms: float
    content: str


class Show:
    """The scenes, before one running app."""

    def __init__(self, base_url: str, upstream: FakeUpstream) -> None:
        self.base_url = base_url
        self.upstream = upstream
        self.client = openai.OpenAI(base_url=f"{base_url}/v1", api_key="sk-demo", max_retries=0)
        self.plain_http = httpx.Client(base_url=base_url, timeout=30)

    def run(self) -> None:
        self.warm_up()
        hit = self.plain()
        self.stream()
        self.own_endpoint()
        asyncio.run(self.crowd())
        print("\n  Headers of a hit:")
        for name in (
            "x-llm-cache",
            "x-llm-cache-tier",
            "cache-status",
            "age",
            "x-llm-cache-key",
            "content-type",
        ):
            if name in hit.headers:
                print(f"    {name}: {hit.headers[name]}")

    def warm_up(self) -> None:
        """Connect and load what is loaded late, so that the first call is not slow for reasons of its own."""
        self.ask("Are you there?")
        self.ask_stream("Are you there?")
        self.plain_http.get("/healthz")

    def plain(self) -> Timed:
        before = self.upstream.count
        first, second = self.ask("What is a cache?"), self.ask("What is a cache?")
        line("first call", first.state, first.ms)
        line("the same again", second.state, second.ms, f"{first.ms / second.ms:.0f} times faster")
        check([first.state, second.state] == ["miss", "hit"], "the second call is a hit")
        check(first.content == second.content, "the hit is the same answer")
        check(second.ms < LATENCY_S * 1000, "a hit does not wait for the provider")
        check(self.upstream.count == before + 1, "the provider was called once")
        return second

    def stream(self) -> None:
        first, second = self.ask_stream("Tell me a story"), self.ask_stream("Tell me a story")
        for title, timed in (("a stream", first), ("the same again", second)):
            line(
                title, timed.state, timed.first_byte_ms, f"to the first event, {timed.ms:.0f} ms to the last"
            )
        check([first.state, second.state] == ["miss", "hit"], "the second stream is a hit")
        check(first.content == second.content, "the replayed events are the same")
        check(first.first_byte_ms < first.ms * 0.8, "a stream is passed on as it comes")
        check(second.ms < LATENCY_S * 1000, "a replayed stream does not wait for the provider")

    def own_endpoint(self) -> None:
        """An endpoint of the app's own shape, ``POST /ask {"question": ...}``."""
        answers = []
        for title in ("POST /ask", "the same again"):
            started = time.perf_counter()
            response = self.plain_http.post("/ask", json={"question": "Why?"})
            answers.append(response)
            line(title, response.headers["x-llm-cache"], ms_since(started), response.text[:44] + "...")
        check([a.headers["x-llm-cache"] for a in answers] == ["miss", "hit"], "the second question is a hit")
        check(answers[0].content == answers[1].content, "the hit is the same answer")

    async def crowd(self) -> None:
        before = self.upstream.count
        async with openai.AsyncOpenAI(
            base_url=f"{self.base_url}/v1", api_key="sk-demo", max_retries=0
        ) as client:
            started = time.perf_counter()
            calls = [
                client.chat.completions.with_raw_response.create(
                    model=MODEL, messages=says("All of us at once")
                )
                for _ in range(CROWD)
            ]
            answers = await asyncio.gather(*calls)
        took = ms_since(started)
        made = self.upstream.count - before
        states = Counter(answer.headers["x-llm-cache"] for answer in answers)
        told = ", ".join(f"{count} {state}" for state, count in states.most_common())
        line(f"{CROWD} alike at once", "", took, f"for all of them: {told}; upstream calls made: {made}")
        check(made == 1, f"{CROWD} identical concurrent calls make one call to the provider")
        check(len({answer.content for answer in answers}) == 1, "all of them get the same answer")

    def ask(self, prompt: str) -> Timed:
        started = time.perf_counter()
        raw = self.client.chat.completions.with_raw_response.create(model=MODEL, messages=says(prompt))
        return Timed(raw.headers["x-llm-cache"], raw.headers, ms_since(started), content=raw.content)

    def ask_stream(self, prompt: str) -> Timed:
        """Read to the very end: the SDK's own iterator hangs up at ``[DONE]``, before the answer is kept."""
        started = time.perf_counter()
        events, first = [], 0.0
        with self.client.chat.completions.with_streaming_response.create(
            model=MODEL, messages=says(prompt), stream=True
        ) as response:
            for event in filter(None, response.iter_lines()):
                first = first or ms_since(started)
                events.append(event)
        check(events[-1] == "data: [DONE]", "the stream is complete")
        return Timed(response.headers["x-llm-cache"], response.headers, ms_since(started), first, events)


class Failover:
    """The scenes of a Router in this process, over two providers. It asks ``first`` while that one can."""

    def __init__(self, first: FakeUpstream, second: FakeUpstream) -> None:
        self.first, self.second = first, second
        rows = [
            {
                "model_name": MODEL,
                "litellm_params": {
                    "model": f"openai/{MODEL}",
                    "api_key": "sk-demo",
                    "api_base": upstream.url,
                    "order": order,
                },
                "model_info": {"id": name},
            }
            for order, (name, upstream) in enumerate({"first": first, "second": second}.items())
        ]
        self.router = Router(rows, cache=CacheManager(ttl=600))

    def run(self) -> None:
        for _ in range(2):  # connects, and loads what is loaded late
            self.ask("Are you there?")
            self.ask_stream("Are you there?")
        self.show("both are well", self.ask("Which of you is it?"), "first")
        self.first.fail_next(500)
        self.show("it answers 500", self.ask("And now?"), "second", "upstream_error")
        self.first.cut_stream_after(1)
        broken = self.ask_stream("Tell me a story")
        self.show("its stream breaks", broken, "second", "connection_error")
        self.first.stop()
        self.show("it is gone", self.ask("Still there?"), "second", "connection_error")
        self.second.stop()
        before = self.first.count + self.second.count
        again = self.ask_stream("Tell me a story")
        self.show("both are gone", again, None)
        check(again.content == broken.content, "the hit is the same stream")
        check(self.first.count + self.second.count == before, "a hit calls nobody")
        self.router.close()

    def ask(self, prompt: str) -> Routed:
        started = time.perf_counter()
        answer = self.router.completion(MODEL, says(prompt))
        content = answer.choices[0].message.content
        return Routed(answer.cache.status, answer.route, ms_since(started), content)

    def ask_stream(self, prompt: str) -> Routed:
        started = time.perf_counter()
        stream = self.router.completion(MODEL, says(prompt), stream=True)
        chunks = list(stream)
        check(chunks[-1].choices[0].finish_reason == "stop", "the stream is complete")
        content = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        return Routed(stream.cache.status, stream.route, ms_since(started), content)

    def show(self, title: str, answer: Routed, by: str | None, *codes: str) -> None:
        """Print who answered, and check that it is ``by``, after failures of the first with ``codes``."""
        route = answer.route
        failed = "".join(f" after {name}'s {code}" for name, code in route.failures)
        who = f"by {route.deployment}{failed}; attempts: {route.attempts}" if by else "from the cache"
        line(title, answer.state, answer.ms, who)
        check(answer.state == ("miss" if by else "hit"), f"{title}: hit or miss")
        check(route.deployment == by, f"{title}: answered by {by}")
        check(route.failures == [("first", code) for code in codes], f"{title}: after {codes}")
        check(route.attempts == (len(codes) + 1 if by else 0), f"{title}: no more attempts than that takes")
        check(bool(answer.content), f"{title}: there is an answer")


class Meaning:
    """The scenes of a semantic cache, in this process: other words, opposite words, another tenant."""

    def __init__(self, upstream: FakeUpstream) -> None:
        self.upstream = upstream
        # Patient, as the embedder's weights are read with the first question.
        self.cache = CacheManager("semantic", similarity_threshold=0.8, embedding_budget=30.0)
        self.client = openai.OpenAI(base_url=upstream.url, api_key="sk-demo", max_retries=0)

    def run(self) -> None:
        before = self.upstream.count
        first = self.show("first call", "How do I enable two-factor authentication?", "miss", "none")
        again = self.show("other words", "How can I turn on two-factor auth?", SIMILAR, "semantic")
        self.show("spelt otherwise", "how do I enable two-factor authentication", SIMILAR, "normalized")
        self.show("the opposite", "How do I disable two-factor authentication?", "miss", "veto-opposite")
        self.show("another tenant", "How can I turn on two-factor auth?", "miss", "none", tenant="globex")
        check(first.content == again.content, "the answer to other words is the stored one")
        check(self.upstream.count == before + 3, "the provider was called for misses only")
        self.client.close()
        self.cache.close()

    def show(self, title: str, prompt: str, state: str, detail: str, tenant: str = "acme") -> Timed:
        body = {"model": MODEL, "messages": says(prompt)}
        started = time.perf_counter()
        answer = self.cache.fetch(
            body, lambda body: self.client.chat.completions.create(**body), scope=tenant
        )
        took, found = ms_since(started), answer.cache
        line(title, found.status, took, f"{prompt}  ({found.detail}, similarity {found.similarity or 0:.2f})")
        check((found.status, found.detail) == (state, detail), f"{title}: {state}, {detail}")
        return Timed(found.status, {}, took, content=answer.body)


def says(prompt: str) -> list[ChatCompletionMessageParam]:
    return [{"role": "user", "content": prompt}]


def ms_since(started: float) -> float:
    return (time.perf_counter() - started) * 1000


def line(title: str, state: str, ms: float, remark: str = "") -> None:
    print(f"  {title:<20} {state:<12} {ms:>8.1f} ms   {remark}".rstrip(), flush=True)


@contextlib.contextmanager
def serving(command: str, upstream: FakeUpstream) -> Iterator[str]:
    """The app in a process of its own; yields its base URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    base_url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command.format(port=port).split()],
            cwd=ROOT,
            env={**os.environ, "OPENAI_BASE_URL": upstream.url, "PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=log,
        )
        try:
            wait_until_healthy(process, base_url)
            yield base_url
        except BaseException:
            log.seek(0)
            print(log.read(), file=sys.stderr)
            raise
        finally:
            process.terminate()
            process.wait(15)


def wait_until_healthy(process: subprocess.Popen[bytes], base_url: str) -> None:
    deadline = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            httpx.get(f"{base_url}/healthz", timeout=5).raise_for_status()
            return
        time.sleep(0.05)
    raise SystemExit("the server did not start; its log is above")


def main() -> int:
    for name in ("LLM_CACHE_DIR", "OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        os.environ.pop(name, None)
    os.environ["NO_PROXY"] = "127.0.0.1"
    with FakeUpstream(latency=LATENCY_S, chunk_delay=0.05) as upstream:
        print(f"The provider is a fake OpenAI at {upstream.url}; it takes {LATENCY_S} s to begin an answer.")
        for name, command in SERVERS.items():
            print(f"\n{name}:  {command.split()[-1]}")
            with serving(command, upstream) as base_url:
                Show(base_url, upstream).run()
    print("\nA provider fails:  a Router over two of them, in this process")
    with FakeUpstream(latency=LATENCY_S) as first, FakeUpstream(latency=LATENCY_S) as second:
        Failover(first, second).run()
    print("\nA question in other words:  a semantic cache, in this process")
    with FakeUpstream(latency=LATENCY_S) as upstream:
        Meaning(upstream).run()
    print(f"\n{len(failures)} claims were false." if failures else "\nAll of this was checked, and holds.")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
