"""The documentation of the sub-app does what it says: its commands by curl, its Python, its tables."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llm_middleware.api.routes import find
from llm_middleware.caching.controls import parse_body
from llm_middleware.config.load import load_config
from llm_middleware.events import Event
from llm_middleware.keys.resolver import KeyResolver
from llm_middleware.testing import FakeUpstream
from tests.api import serving
from tests.servers.conftest import run_server

served, server, upstream = serving.served, serving.server, serving.upstream
asgi_server, wsgi_server = serving.asgi_server, serving.wsgi_server

DOCS = Path(__file__).parents[2] / "docs"
MASTER_KEY = "sk-master-of-the-docs-0123456789"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
LOCAL = re.compile(r"http://127\.0\.0\.1:8000\b")


def text(name: str) -> str:
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    return [code for found, code in FENCE.findall(text(name)) if found == language]


def commands(name: str) -> list[str]:
    """The commands of a page that are curl's: fenced or indented, with the lines that go on."""
    lines = iter(text(name).splitlines())
    found = []
    for line in lines:
        command = line.strip()
        if command.startswith("curl "):
            while command.endswith("\\"):
                command = command[:-1] + next(lines).strip()
            found.append(command)
    return found


@dataclass
class Said:
    """What curl printed; ``headers`` only with ``-i``."""

    status: int
    headers: dict[str, str]
    body: str

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def run_curl(command: str, url: str) -> Said:
    """The command as it stands on the page, in a shell, but for where the host is."""
    assert LOCAL.search(command) or "$HOST" in command, "it asks the app of the page"
    command = LOCAL.sub(url, command) + " --write-out '\\n%{http_code}' --no-progress-meter --max-time 30"
    environ = {**os.environ, "HOST": url, "MASTER_KEY": MASTER_KEY, "no_proxy": "*"}
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=environ, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    printed, _, status = done.stdout.replace("\r\n", "\n").rpartition("\n")
    headers = {}
    if printed.startswith("HTTP/"):
        head, _, printed = printed.partition("\n\n")
        lines = [line.partition(":") for line in head.splitlines()[1:]]
        headers = {name.lower(): value.strip() for name, _, value in lines}
    return Said(int(status), headers, printed)


# The quickstart, in both hosts ----------------------------------------------------------------------


@contextmanager
def quickstart(
    front: str, folder: Path, upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch, *, keys: bool
) -> Iterator[str]:
    """A server of the page's own files: ``config.yaml`` and ``main.py``. ``keys``: step 5 is done too."""
    config, general = blocks("quickstart", "yaml")
    changed = config.replace("api_key:", f"api_base: {upstream.url}\n      api_key:")
    assert changed != config
    (folder / "config.yaml").write_text(changed + ("\n" + general if keys else ""), encoding="utf-8")
    main = blocks("quickstart", "python")[0 if front == "asgi" else 1]
    module = f"quickstart_{front}_{'keys' if keys else 'open'}"
    assert '"config.yaml"' in main
    main = main.replace('"config.yaml"', repr(str(folder / "config.yaml")))
    (folder / f"{module}.py").write_text(main, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    environ = {"OPENAI_API_KEY": "sk-upstream", "MASTER_KEY": MASTER_KEY}
    with run_server({"asgi": "uvicorn", "wsgi": "gunicorn-gthread"}[front], f"{module}:app", environ) as url:
        yield url


@pytest.fixture(params=["asgi", "wsgi"])
def front(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_quickstart_says_how_the_servers_are_run():
    """As the tests here run them."""
    assert "uvicorn main:app" in text("quickstart")
    assert "gunicorn --worker-class gthread main:app" in text("quickstart")


def test_the_quickstart_gives_a_cached_answer(front, tmp_path, upstream, monkeypatch):
    ask, make = commands("quickstart")[:2]
    assert len(commands("quickstart")) == 2
    with quickstart(front, tmp_path, upstream, monkeypatch, keys=False) as url:
        answers = [run_curl(ask, url) for _ in range(2)]
        assert [each.status for each in answers] == [200, 200]
        assert [each.headers["x-llm-cache"] for each in answers] == ["miss", "hit"]
        assert answers[0].body == answers[1].body
        key = answers[0].headers["x-llm-cache-key"]
        assert [each.headers["x-litellm-cache-key"] for each in answers] == [key, key]
        assert answers[0].json["choices"][0]["message"]["content"]
        assert upstream.count == 1
        assert upstream.calls[0].headers["authorization"] == "Bearer sk-upstream"
        with_sdk(url)
        assert run_curl(make, url).status == 403, "nobody administers yet"


def with_sdk(url: str) -> None:
    """The page's OpenAI client, which is given nothing but another base URL."""
    (code,) = [block for block in blocks("quickstart", "python") if "OpenAI(" in block]
    names: dict[str, Any] = {}
    exec(LOCAL.sub(url, code), names)
    question = [{"role": "user", "content": "How many moons has Mars?"}]
    with names["client"] as client:
        completion = client.chat.completions.with_raw_response.create(model="gpt-4o-mini", messages=question)
        assert completion.headers["x-llm-cache"] in ("miss", "hit")
        assert completion.parse().choices[0].message.content


def test_the_quickstart_makes_a_key(front, tmp_path, upstream, monkeypatch):
    ask, make = commands("quickstart")
    with quickstart(front, tmp_path, upstream, monkeypatch, keys=True) as url:
        assert run_curl(ask, url).status == 401
        made = run_curl(make, url)
        assert made.status == 200
        fields = made.json
        assert fields["key"].startswith("sk-")
        assert (fields["models"], fields["rpm_limit"]) == (["gpt-4o-mini"], 60)
        assert fields["expires"] is not None
        answers = [run_curl(f"{ask} -H 'authorization: Bearer {fields['key']}'", url) for _ in range(2)]
        assert [each.headers["x-llm-cache"] for each in answers] == ["miss", "hit"]
        assert upstream.count == 1
        pages(url)


def pages(url: str) -> None:
    """The commands of the other pages, against the same app."""
    ping, delete = commands("admin")
    pinged = run_curl(ping, url)
    assert (pinged.status, pinged.json["status"]) == (200, "healthy")
    deleted = run_curl(delete, url)
    assert (deleted.status, deleted.json) == (200, {"status": "success", "count": 0, "dry_run": True})
    for command in commands("keys"):
        assert run_curl(command, url).status == 200, command


def test_the_quickstart_names_a_fake_provider_that_runs():
    """The command of the page, on a port of its own."""
    (command,) = re.findall(r"python -m llm_middleware\.testing --port 8001", text("quickstart"))
    arguments = shlex.split(command.replace("8001", "0"))
    with subprocess.Popen([sys.executable, *arguments[1:]], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        process.terminate()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/v1\n", said)


def test_the_extras_that_are_installed_are_there():
    project = (DOCS.parent / "pyproject.toml").read_text(encoding="utf-8")
    extras = {
        name
        for found in re.findall(r"llm-middleware\[([\w,-]+)\]", text("quickstart"))
        for name in found.split(",")
    }
    assert extras == {"asgi", "wsgi", "router", "config"}
    for name in extras:
        assert f"\n{name} = [" in project


# The page of keys -----------------------------------------------------------------------------------


def test_the_resolver_of_the_page(tmp_path, monkeypatch, upstream):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MASTER_KEY", MASTER_KEY)
    first = next(code for code in blocks("keys", "python") if "keys.generate(" in code)
    names: dict[str, Any] = {}
    exec(first, names)
    keys, made, record = names["keys"], names["made"], names["record"]
    assert made["key"].startswith("sk-")
    assert len(made["token"]) == 64
    assert record.may_use("openai/gpt-4.1-mini")
    assert not record.may_use("gpt-4o")
    assert record.scope("team") == "team:red"
    assert keys.info(made["token"])["info"]["spend"] == 0.002
    keys.close()


def test_keys_of_ones_own(monkeypatch):
    (code,) = [code for code in blocks("keys", "python") if "resolve=look_up" in code]
    names: dict[str, Any] = {"KeyResolver": KeyResolver, "look_up": lambda key: None}
    exec(code, names)


LOGINS = ["head.bearer", "HTTPBearer", "in_flask(app"]


@pytest.mark.parametrize("mark", LOGINS)
def test_the_logins_of_the_page(mark, tmp_path, upstream, monkeypatch):
    """Each refuses a stranger with 401 and answers whom it knows, with one call for both."""
    monkeypatch.chdir(tmp_path)
    config = blocks("quickstart", "yaml")[0].replace("api_key:", f"api_base: {upstream.url}\n      api_key:")
    (tmp_path / "config.yaml").write_text(config, encoding="utf-8")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-upstream")
    (code,) = [code for code in blocks("keys", "python") if mark in code]
    names: dict[str, Any] = {"__name__": "page"}
    exec(code, names)
    with host_of(mark, names) as (client, known):
        body = serving.chat(model="gpt-4o-mini")
        assert client.post(f"/llm{serving.CHAT}", json=body).status_code == 401
        known(client)
        answers = [client.post(f"/llm{serving.CHAT}", json=body) for _ in range(2)]
    assert [each.headers.get("x-llm-cache") for each in answers] == ["miss", "hit"], answers[0].text
    assert upstream.count == 1


@contextmanager
def host_of(mark: str, names: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """A client of the page's host, and how somebody whom it knows logs in."""
    from starlette.testclient import TestClient

    bearer = {"authorization": "Bearer secret-of-ann"}
    if mark == "in_flask(app":
        flask_app = names["app"]

        @flask_app.get("/login")
        def log_in() -> str:
            import flask

            flask.session["user"] = "ann"
            return ""

        import httpx

        with httpx.Client(transport=httpx.WSGITransport(flask_app), base_url="http://host") as client:
            yield client, lambda client: client.get("/login")
        names["llm"].close()
        return
    app = names.get("app")
    if app is None:
        import fastapi

        from llm_middleware.asgi import llm_app

        app = fastapi.FastAPI()
        app.mount("/llm", llm_app("config.yaml", authorize=names["current_user"]))
    with TestClient(app) as client:
        yield client, lambda client: client.headers.update(bearer)


# The page for those who come from LiteLLM -----------------------------------------------------------


def rows(heading: str) -> list[tuple[str, str]]:
    """The rows of the table below a heading of the page."""
    section = text("migrate-from-litellm").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return [(line[0].strip(), line[1].strip()) for line in lines[2:]]


def test_the_routes_of_the_page_are_there():
    """Those on the right, and on the left where the right says that they are the same."""
    cells = [
        cell
        for there, here in rows("Routes")
        for cell in ((there, here) if here.startswith("the same") else (here,))
    ]
    paths = [path for cell in cells for path in re.findall(r"`(?:GET |POST )?(/[^`]*)`", cell)]
    assert len(paths) > 20
    for path in paths:
        path = path.replace("{model}", "m").replace("{id}", "m").replace("/...", "/chat/completions")
        assert find("GET", path) or find("POST", path), path
        if path in ("/completions", "/embeddings", "/audio/transcriptions", "/responses"):
            assert find("POST", f"/v1{path}"), path


def test_the_response_headers_of_the_page_are_sent(served, upstream):
    client = served(cache={"type": "semantic", "similarity_threshold": 0.9, "embedding_budget": 60})
    miss, hit = (client.chat("what is written in every answer") for _ in range(2))
    named = {name for _, here in rows("Response headers") for name in re.findall(r"`(x-llm-[\w-]+)`", here)}
    assert named == {
        "x-llm-cache",
        "x-llm-cache-key",
        "x-llm-cache-similarity",
        "x-llm-cache-tier",
        "x-llm-deployment",
        "x-llm-model",
        "x-llm-attempts",
        "x-llm-fallback",
    }
    assert named - set(miss.headers) - set(hit.headers) == set()


CACHE_VALUES = {
    "port": 6379,
    "ttl": 60,
    "default_in_memory_ttl": 60,
    "default_in_redis_ttl": 60,
    "mode": "default_off",
    "supported_call_types": ["acompletion"],
    "redis_flush_size": 100,
    "namespace": "n",
    "host": "localhost",
    "password": "p",
}


def test_the_settings_of_the_page_have_a_meaning():
    """A LiteLLM file with the settings that the page calls the same is read, and nothing of it ignored."""
    (cache,) = [cell for cell, _ in rows("Settings") if cell.startswith("`cache_params`")]
    named = re.findall(r"`(\w+)`", cache)
    assert set(CACHE_VALUES) <= set(named)
    config = load_config(
        {
            "model_list": [
                {
                    "model_name": "m",
                    "litellm_params": {
                        "model": "openai/m",
                        "api_key": "sk-x",
                        "rpm": 1,
                        "tpm": 1,
                        "weight": 1,
                        "order": 1,
                        "tags": ["a"],
                    },
                    "model_info": {"id": "m-1"},
                }
            ],
            "litellm_settings": {
                "cache": True,
                "cache_params": {"type": "redis", **CACHE_VALUES},
                "callbacks": ["json.dumps"],
                "success_callback": ["json.loads"],
            },
            "router_settings": {
                "routing_strategy": "least-busy",
                "num_retries": 1,
                "retry_after": 1,
                "retry_policy": {"TimeoutErrorRetries": 1},
                "allowed_fails": 1,
                "allowed_fails_policy": {"TimeoutErrorAllowedFails": 1},
                "cooldown_time": 1,
                "timeout": 1,
                "stream_timeout": 1,
                "fallbacks": [{"m": ["m"]}],
                "model_group_alias": {"n": "m"},
                "enable_tag_filtering": True,
            },
            "general_settings": {"master_key": "sk-master-0123456789", "user_api_key_cache_ttl": 60},
        }
    )
    assert config.ignored == ()
    assert config.hooks == ("json.dumps", "json.loads")
    assert config.master_key == "sk-master-0123456789"
    assert config.header_profile == "litellm"


def test_the_cache_controls_of_the_page_are_read():
    (here,) = [cell for cells in rows("Request") for cell in cells if '"cache": {' in cell]
    (more,) = [here for there, here in rows("Request") if '"cache": {' in there]
    named = [*re.findall(r'"([\w-]+)"', here)[1:], *re.findall(r"`([\w-]+)`", more)]
    flags = {"no-cache": True, "no-store": True, "use-cache": True, "namespace": "n", "tags": ["t"]}
    assert len(named) == 9
    assert parse_body({name: flags.get(name, 60) for name in named})


def test_a_hook_of_the_page(served, upstream, capsys):
    (code,) = blocks("admin", "python")
    names: dict[str, Any] = {}
    exec(code, names)
    client = served(options={"hooks": [names["told"]]})
    client.chat(), client.chat()
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:4] for line in printed] == [["success", "m", hit, "None"] for hit in ("False", "True")]


def test_the_fields_of_events_are_all_on_the_page():
    section = text("admin").partition("## Hooks\n")[2]
    named = {
        name for line in re.findall(r"^\| (`.*?) \|", section, re.M) for name in re.findall(r"`(\w+)`", line)
    }
    fields = set(Event.__dataclass_fields__)
    assert named == fields - {"error"}
    assert "`error`" in section


def test_the_python_of_the_page_is_there():
    import llm_middleware

    for _, here in rows("In Python"):
        for name in re.findall(r"`(?:llm_middleware\.)?([A-Za-z_]+)\(", here):
            if name != "llm_app":
                assert hasattr(llm_middleware, name), name
