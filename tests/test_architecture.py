"""The house rules that a machine can check: which room may import which, public names, sizes, words."""

from __future__ import annotations

import ast
import importlib
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import llm_middleware

ROOT = Path(llm_middleware.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))

# A room may import the rooms below it in this list, and itself.
LAYERS = [
    {"asgi", "wsgi"},
    {"api"},
    {"config", "cli"},
    {"routing", "keys"},
    {"caching", "semantic"},
    {"_ports"},
    {"providers", "stores"},
    {"_drive", "events"},
    {"errors", "types"},
]
OUTSIDE = {"testing", "_fake_server", "_fake_payloads", "_fake_items", "_store_contract", "__init__"}
THIRD_PARTY = {
    "boto3",
    "botocore",
    "cachetools",
    "diskcache",
    "django",
    "flask",
    "httpx",
    "numpy",
    "obstore",
    "pydantic",
    "redis",
    "safetensors",
    "sqlalchemy",
    "starlette",
    "tokenizers",
    "werkzeug",
    "yaml",
}
CORE = {"caching", "routing", "providers", "_drive", "api", "keys", "errors", "types", "events"}


def room(module: Path) -> str:
    return module.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(module: Path) -> set[str]:
    """The modules that ``module`` imports, absolute."""
    package = ["llm_middleware", *module.relative_to(ROOT).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found |= {name} if node.module else {f"{name}.{alias.name}" for alias in node.names}
    return found


def layer(name: str) -> int:
    return next(index for index, rooms in enumerate(LAYERS) if name in rooms)


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(module: Path) -> None:
    here = room(module)
    if here in OUTSIDE:
        return
    for name in imports(module):
        parts = name.split(".")
        if parts[0] != "llm_middleware" or len(parts) < 2:
            continue
        there = parts[1]
        assert there not in OUTSIDE, f"{module} imports {name}"
        assert layer(there) >= layer(here), f"{here} must not import {there} ({module})"


@pytest.mark.parametrize("module", [m for m in MODULES if room(m) in CORE], ids=lambda path: path.stem)
def test_the_core_is_free_of_event_loops_and_frameworks(module: Path) -> None:
    names = {name.split(".")[0] for name in imports(module)}
    assert not names & (THIRD_PARTY | {"asyncio", "anyio", "socket"})


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_says_what_it_exports_and_stays_small(module: Path) -> None:
    source = module.read_text()
    tree = ast.parse(source)
    assert ast.get_docstring(tree), "a module says in its docstring what it is"
    if len(tree.body) > 1:
        names = [
            node.targets[0].id
            for node in tree.body
            if isinstance(node, ast.Assign) and hasattr(node.targets[0], "id")
        ]
        assert "__all__" in names
    assert source.count("\n") <= 400
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} is too long"


def test_functions_are_short() -> None:
    lengths = [
        node.end_lineno
        - node.lineno
        + 1
        - (len(ast.get_docstring(node, clean=False).splitlines()) if ast.get_docstring(node) else 0)
        for module in MODULES
        for node in ast.walk(ast.parse(module.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert statistics.median(lengths) < 10


def test_public_names_are_importable_and_complete() -> None:
    assert sorted(llm_middleware.__all__) == llm_middleware.__all__
    assert len(llm_middleware.__all__) <= 25
    for name in llm_middleware.__all__:
        assert getattr(llm_middleware, name) is not None
    assert dir(llm_middleware) == llm_middleware.__all__
    with pytest.raises(AttributeError, match="no attribute 'CacheManger'"):
        llm_middleware.CacheManger  # noqa: B018


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_exported_names_exist(module: Path) -> None:
    name = ".".join(["llm_middleware", *module.relative_to(ROOT).with_suffix("").parts]).removesuffix(
        ".__init__"
    )
    imported = importlib.import_module(name)
    for exported in getattr(imported, "__all__", ()):
        assert hasattr(imported, exported)


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        (
            "import llm_middleware",
            "asyncio httpx starlette werkzeug redis boto3 numpy diskcache pydantic yaml json logging",
        ),
        (
            "from llm_middleware import CacheManager; CacheManager().fetch(b'{}', lambda body: b'{}')",
            "asyncio httpx starlette werkzeug redis boto3 numpy diskcache pydantic yaml",
        ),
        (
            "from llm_middleware.wsgi import LLMCacheMiddleware; LLMCacheMiddleware(print, ttl=1)",
            "asyncio httpx starlette werkzeug redis boto3 numpy diskcache pydantic yaml",
        ),
        (
            "from llm_middleware.asgi import LLMCacheMiddleware; LLMCacheMiddleware(print, ttl=1)",
            "httpx starlette werkzeug redis boto3 numpy diskcache pydantic yaml",
        ),
    ],
)
def test_importing_loads_nothing_optional(statement: str, absent: str) -> None:
    code = f"{statement}\nimport sys\nprint(*sorted(set({absent.split()!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
