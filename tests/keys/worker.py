"""A process with a `KeyResolver` of its own: commands come as lines of JSON, answers go out as such."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llm_middleware.errors import KeyLimitError, LLMMiddlewareError
from llm_middleware.keys.resolver import KeyResolver

__all__ = ["Worker"]

ROOT = Path(__file__).parents[2]


class Worker:
    """One such process; ``face``: ``sync`` or ``async``."""

    def __init__(self, setting: object, face: str) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "tests.keys.worker", json.dumps(setting), face],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        assert self.answer() == "ready"

    def tell(self, *command: object) -> None:
        self._popen.stdin.write(json.dumps(command) + "\n")

    def answer(self) -> object:
        line = self._popen.stdout.readline()
        assert line, "the worker ended"
        return json.loads(line)

    def ask(self, *command: object) -> object:
        self.tell(*command)
        return self.answer()

    def close(self) -> None:
        self._popen.stdin.close()
        self._popen.wait(30)
        self._popen.stdout.close()


class _Server:
    def __init__(self, setting: object, face: str) -> None:
        self.resolver = KeyResolver(setting)
        self.is_async = face == "async"
        self.runner = asyncio.Runner()

    def do(self, target: object, method: str, *args: object, **options: object):
        if self.is_async:
            return self.runner.run(getattr(target, "a" + method)(*args, **options))
        return getattr(target, method)(*args, **options)

    def resolve(self, key: str) -> object:
        try:
            record = self.do(self.resolver, "resolve", key)
        except LLMMiddlewareError as exc:
            return exc.code
        return [record.alias, record.rpm_limit]

    def until_changed(self, key: str) -> object:
        """Seconds from the epoch at which the key was first something else; it is used all the time."""
        first = self.resolve(key)
        print(json.dumps(first), flush=True)
        until = time.monotonic() + 20
        while time.monotonic() < until:
            record = self.resolver.known(key)
            found = self.resolve(key) if record is None else [record.alias, record.rpm_limit]
            if found != first:
                return [time.time(), found]
            time.sleep(0.005)  # as requests come
        return None

    def admit(self, key: str, times: int) -> object:
        record = self.do(self.resolver, "resolve", key)
        passed, waits = 0, []
        for _ in range(times):
            try:
                self.do(self.resolver, "admit", record)
                passed += 1
            except KeyLimitError as exc:
                waits.append(exc.retry_after)
        return [passed, waits]

    def spend(self, key: str, times: int, cost: float) -> object:
        """So many calls at the same time; how many were made."""
        record = self.do(self.resolver, "resolve", key)

        def one(_: int) -> int:
            try:
                allowance = self.resolver.begin(record, 1)
            except KeyLimitError:
                return 0
            allowance.end(cost=cost)
            return 1

        async def aone() -> int:
            try:
                allowance = await self.resolver.abegin(record, 1)
            except KeyLimitError:
                return 0
            await asyncio.sleep(0.01)
            await allowance.aend(cost=cost)
            return 1

        async def all_of_them() -> int:
            return sum(await asyncio.gather(*(aone() for _ in range(times))))

        if self.is_async:
            return self.runner.run(all_of_them())
        with ThreadPoolExecutor(16) as pool:
            return sum(pool.map(one, range(times)))


def main() -> None:
    server = _Server(json.loads(sys.argv[1]), sys.argv[2])
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(server, name)(*arguments)), flush=True)
    server.do(server.resolver, "close")


if __name__ == "__main__":
    main()
