"""What importing the library costs a process that starts, beyond the interpreter itself."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
from collections.abc import Callable

from .harness import Row, compare, show

__all__ = ["results"]

_HEAVY = [
    "asyncio",
    "boto3",
    "diskcache",
    "httpx",
    "numpy",
    "pydantic",
    "redis",
    "starlette",
    "werkzeug",
    "yaml",
]
_IMPORT = "import llm_middleware"
_CHECK = f"{_IMPORT}, sys; sys.exit(' '.join(n for n in {_HEAVY} if n in sys.modules) or None)"
_LATER = {
    "`CacheManager()`": "from llm_middleware import CacheManager; CacheManager()",
    "`llm_middleware.asgi`": "import asyncio, llm_middleware.asgi",
    "`llm_middleware.wsgi`": "import llm_middleware.wsgi",
}
_REPEATS = 3


def _cpu(code: str) -> Callable[[], float]:
    def sample() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        for _ in range(_REPEATS):
            subprocess.run([sys.executable, "-c", code], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / _REPEATS

    return sample


def results() -> list[Row]:
    loaded = subprocess.run([sys.executable, "-c", _CHECK], capture_output=True, text=True, check=False)
    assert loaded.returncode == 0, f"import llm_middleware loads {loaded.stderr.strip()}"
    samples = compare(
        {
            "bare": _cpu("pass"),
            "asyncio": _cpu("import asyncio"),
            _IMPORT: _cpu(_IMPORT),
            **{name: _cpu(code) for name, code in _LATER.items()},
        },
        rounds=9,
    )

    def row(path: str, name: str, floor: str, described: str, goal: float | None = None) -> Row:
        pairs = zip(samples.by_name[name], samples.by_name[floor], strict=True)
        extra = [(own - least) * 1e3 for own, least in pairs]
        return Row(path, described, goal, statistics.median(extra), min(extra), max(extra), unit="ms")

    bare = "interpreter alone, subtracted"
    return [
        row(f"`{_IMPORT}`, CPU", _IMPORT, "bare", bare, 40.0),
        row("import and `CacheManager()`, CPU", "`CacheManager()`", "bare", bare),
        row("import of `llm_middleware.wsgi`, CPU", "`llm_middleware.wsgi`", "bare", bare),
        row(
            "import of `llm_middleware.asgi`, CPU",
            "`llm_middleware.asgi`",
            "asyncio",
            "interpreter with asyncio, subtracted",
        ),
    ]


if __name__ == "__main__":
    show(results)
