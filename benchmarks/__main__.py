"""Run every benchmark and print the tables; ``--write`` puts them into docs/performance.md as well."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

from .harness import Row, quick, set_quick, table

_PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
_BEGIN, _END = "<!-- {}: begin -->", "<!-- {}: end -->"

# In the order of the table.
PATHS = (
    "repeat_hit",
    "reordered_hit",
    "asgi_hit",
    "wsgi_hit",
    "passthrough",
    "streamed_miss",
    "memory_store",
    "import_time",
    "large_prompt",
    "replay",
    "disk_hit",
    "pick",
    "transports",
)

# These start redis-server.
REDIS_PATHS = ("redis_hit", "memory_tier", "cold_fleet")

# This one starts moto.
S3_PATHS = ("s3_store",)

# This one starts redis-server too.
ROUTER_PATHS = ("router_call",)

# The sub-app, with an upstream.
SUB_APP_PATHS = ("sub_app",)

# The semantic cache, and its index in this process.
SEMANTIC_PATHS = ("semantic_lookup", "vector_index")

# By the name of their place in the page.
_TABLES = {
    "table": PATHS,
    "Redis table": REDIS_PATHS,
    "S3 table": S3_PATHS,
    "Router table": ROUTER_PATHS,
    "Sub-app table": SUB_APP_PATHS,
    "Semantic table": SEMANTIC_PATHS,
}


def _rows(names: list[str]) -> list[Row]:
    rows: list[Row] = []
    for name in names:
        began = time.perf_counter()
        module = importlib.import_module(f"benchmarks.{name}")
        rows += map(_store_row, module.results(quick())) if name == "memory_store" else module.results()
        print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    return rows


def _store_row(row: tuple[str, float, float, float, float]) -> Row:
    # That module stands alone, and names what it measures "ours / floor".
    name, goal, median, low, high = row
    ours, _, floor = name.partition(" / ")
    return Row(f"memory store: {ours}", floor, goal, median, low, high)


def _versions(*names: str) -> str:
    parts = [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in names)]
    return f"{', '.join(parts)}; {platform.system()} {platform.machine()}"


_USED = {
    "table": ("uvicorn", "uvloop", "httptools", "gunicorn", "starlette", "flask"),
    "Redis table": ("redis", "hiredis", "uvicorn", "uvloop", "httptools", "gunicorn"),
    "S3 table": ("boto3", "obstore", "moto"),
    "Router table": ("aiohttp", "redis", "hiredis"),
    "Sub-app table": ("uvicorn", "uvloop", "httptools", "gunicorn", "starlette", "werkzeug", "aiohttp"),
    "Semantic table": ("numpy",),
}


def _write(place: str, text: str) -> None:
    page = _PAGE.read_text()
    head, begin, rest = page.partition(_BEGIN.format(place))
    _, end, tail = rest.partition(_END.format(place))
    if not (begin and end):
        raise SystemExit(f"{_PAGE.name} has no {_BEGIN.format(place)} ... {_END.format(place)}")
    _PAGE.write_text(f"{head}{begin}\n{text}\n{end}{tail}")


def main() -> None:
    every = [name for paths in _TABLES.values() for name in paths]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds: does it run?")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/performance.md")
    parser.add_argument("only", nargs="*", metavar="PATH", help=f"of {', '.join(every)}")
    chosen = parser.parse_args()
    unknown = set(chosen.only) - set(every)
    if unknown:
        parser.error(f"no such path: {', '.join(sorted(unknown))}")
    set_quick(chosen.quick)
    missed = []
    for place, paths in _TABLES.items():
        present = [name for name in paths if importlib.util.find_spec(f"benchmarks.{name}")]
        rows = _rows([name for name in present if not chosen.only or name in chosen.only])
        if not rows:
            continue
        text = table(rows)
        print(text, flush=True)
        if chosen.write:
            command = " ".join(["python -m benchmarks", *sys.argv[1:]])
            _write(place, f"`{command}` with {_versions(*_USED[place])}.\n\n{text}")
        missed += [row.path for row in rows if row.met is False]
    if missed:
        print(f"goals missed: {'; '.join(missed)}", file=sys.stderr)


if __name__ == "__main__":
    main()
