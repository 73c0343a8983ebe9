"""LiteLLM's files at work: each is started as a sub-app of both fronts and does what its documentation says,
over a fake upstream, with real servers for what is kept. Of a file only addresses change here."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from llm_middleware.cli import main
from llm_middleware.config.load import ConfigProblems
from llm_middleware.keys.resolver import KeyResolver
from llm_middleware.testing import FakeUpstream
from tests.api.clients import CHAT, Client
from tests.config.elsewhere import FRONTS, Elsewhere
from tests.config.files import FILES, SECRETS
from tests.keys.postgres import PostgreSQL, postgresql
from tests.s3_services import S3Server, clean_environment, moto_server
from tests.servers.conftest import run_server
from tests.services import (
    HOST,
    RedisCluster,
    RedisSentinels,
    RedisServer,
    redis_cluster,
    redis_sentinel,
    redis_server,
    redis_tls,
    wait_for,
)
from tests.support import completion

EMBEDDINGS = "/v1/embeddings"
MODEL = "gpt-4o"
TRANSCRIPTION = (
    b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\ngpt-4o\r\n'
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n'
    b"Content-Type: audio/wav\r\n\r\nRIFF0000WAVE\r\n--b--\r\n"
)
ENTRY = re.compile(r"(.+):([0-9a-f]{64})\Z")
REFUSED = ["broken.yaml", "semantic.yaml"]
STARTED = sorted(each.name for each in FILES.glob("*.yaml") if each.name not in REFUSED)
# Time enough for a machine that is busy.
PATIENT = ("  cache_params:\n", "  cache_params:\n    store_timeout: 30\n")
WHICH_REDIS = ("cache: True #", "cache_params: {store_timeout: 30}\n  cache: True #")

Change = tuple[str, str]


def ask(text: str = "hi", **fields: object) -> dict[str, object]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **fields}


def changed(tmp_path: Path, name: str, *changes: Change) -> Path:
    """A copy of a file where each of these texts, which is there once, is another."""
    text = (FILES / name).read_text(encoding="utf-8")
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream() as server:
        yield server


@pytest.fixture(autouse=True)
def environment(upstream: FakeUpstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No variable of this machine's is a setting, and none that a file sets stays."""
    before, logger = dict(os.environ), logging.getLogger("llm_middleware")
    level, path = logger.level, list(sys.path)
    own = {
        name: value
        for name, value in clean_environment().items()
        if not name.startswith(("LITELLM_", "OPENAI_", "REDIS_"))
    }
    _replace_environment({**own, **SECRETS, "OPENAI_BASE_URL": upstream.url})
    monkeypatch.chdir(tmp_path)
    yield
    _replace_environment(before)
    logger.setLevel(level)
    sys.path[:] = path


def _replace_environment(environ: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environ)


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Elsewhere]:
    made = Elsewhere()
    yield made
    made.close()


@dataclass
class Front:
    """Makes clients of sub-apps. ``name``: ``asgi`` or ``wsgi``; ``other``: what it is not."""

    name: str
    other: str
    start: Callable[[Path], Client]


@pytest.fixture(params=sorted(FRONTS))
def front(request: pytest.FixtureRequest) -> Iterator[Front]:
    made: list[Client] = []

    def start(file: Path) -> Client:
        made.append(FRONTS[request.param](file))
        return made[-1]

    yield Front(request.param, next(name for name in FRONTS if name != request.param), start)
    for client in made:
        client.close()


def states(*answers: Any) -> list[str]:
    assert [answer.status_code for answer in answers] == [200] * len(answers), answers[0].text
    return [answer.headers["x-llm-cache"] for answer in answers]


def error(answer: Any) -> tuple[int, object, object]:
    told = json.loads(answer.text)["error"]
    return answer.status_code, told["code"], told["param"]


def transcribe(client: Client, key: str | None = None) -> httpx.Response:
    form = {"content-type": "multipart/form-data; boundary=b"}
    return client.post("/v1/audio/transcriptions", TRANSCRIPTION, key=key, headers=form)


# What is there to be started ----------------------------------------------------------------------


@pytest.mark.parametrize("name", STARTED)
def test_the_check_of_a_documented_file_is_ok(capsys, name):
    assert main(["config", "check", str(FILES / name)]) == 0
    out, err = capsys.readouterr()
    assert (out.splitlines()[0], err) == ("ok", "")


@pytest.mark.parametrize("name", STARTED)
def test_a_documented_file_starts_as_it_is(front, name, hooks_of_the_host):
    """Its own models are there; nothing that it names has to be."""
    client = front.start(FILES / name)
    assert client.get("/health", key=None).json() == {"status": "ok"}
    keyless = client.core.config.master_key is None
    answer = client.get("/v1/models", key=client.core.config.master_key)
    assert answer.status_code == 200
    served = {each["id"] for each in answer.json()["data"]}
    assert served >= ({"gpt"} if name == "short.yaml" else {MODEL})
    assert client.get("/v1/models", key=None).status_code == (200 if keyless else 401)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_told_at_the_start(front, name):
    with pytest.raises(ConfigProblems):
        front.start(FILES / name)


@pytest.fixture
def hooks_of_the_host(tmp_path: Path) -> Iterator[list[Any]]:
    """Modules with the functions that files name; the events that they got."""
    (tmp_path / "my_package").mkdir()
    module = "events = []\non_event = on_success = proxy_handler_instance = events.append\n"
    (tmp_path / "my_package" / "hooks.py").write_text(module)
    (tmp_path / "custom_callbacks.py").write_text("def proxy_handler_instance(event):\n    pass\n")
    sys.path.insert(0, str(tmp_path))
    import my_package.hooks  # type: ignore[import-not-found]

    yield my_package.hooks.events
    for name in ("my_package.hooks", "my_package", "custom_callbacks"):
        sys.modules.pop(name, None)


# Stores that processes share ----------------------------------------------------------------------


@dataclass
class Place:
    """``entries()``: what is kept there, by name, and for how many seconds still."""

    file: Path
    namespace: str
    ttl: float
    entries: Callable[[], Mapping[str, float]]
    tier: str = "redis"


def left_in(*servers: RedisServer, **options: object) -> Callable[[], dict[str, float]]:
    def read() -> dict[str, float]:
        found = {}
        for server in servers:
            with server.client(**options) as client:
                names = [name.decode() for name in client.scan_iter("*:*", 1000)]
                found |= {name: client.pttl(name) / 1000 for name in names if ENTRY.match(name)}
        return found

    return read


@pytest.fixture(scope="module")
def plain() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture
def redis_here(plain: RedisServer) -> RedisServer:
    """The Redis of files that say localhost and no port."""
    plain.ask("FLUSHALL")
    os.environ["REDIS_PORT"] = str(plain.port)
    return plain


@pytest.fixture(scope="module")
def guarded() -> Iterator[RedisServer]:
    with redis_server("--requirepass", "redis-secret", password="redis-secret") as server:
        yield server


@pytest.fixture(scope="module")
def encrypted() -> Iterator[tuple[RedisServer, str]]:
    with redis_tls() as (server, made):
        server.ask("ACL", "SETUSER", "app", "on", ">p@ss", "~*", "&*", "+@all")
        yield server, made.authority


@pytest.fixture(scope="module")
def cluster() -> Iterator[RedisCluster]:
    with redis_cluster() as made:
        yield made


@pytest.fixture(scope="module")
def sentinels() -> Iterator[RedisSentinels]:
    with redis_sentinel("password") as made:
        yield made


@pytest.fixture(scope="module")
def moto() -> Iterator[S3Server]:
    with moto_server() as server:
        yield server


def in_redis(request: pytest.FixtureRequest, path: Path) -> Place:
    """`default_in_redis_ttl` wins over `ttl`, and the name begins with the namespace."""
    server: RedisServer = request.getfixturevalue("guarded")
    server.ask("FLUSHALL")
    file = changed(path, "redis.yaml", PATIENT, ("port: 6379", f"port: {server.port}"))
    return Place(file, "litellm.caching.caching", 900, left_in(server))


def in_redis_of_the_environment(request: pytest.FixtureRequest, path: Path) -> Place:
    """C121"""
    server: RedisServer = request.getfixturevalue("redis_here")
    os.environ["REDIS_HOST"] = HOST
    return Place(changed(path, "redis_from_environment.yaml", WHICH_REDIS), "llm", 3600, left_in(server))


def by_url(request: pytest.FixtureRequest, path: Path) -> Place:
    server, authority = request.getfixturevalue("encrypted")
    server.ask("FLUSHALL")
    os.environ["REDIS_SSL_CA_CERTS"] = authority
    file = changed(path, "redis_url.yaml", PATIENT, ("cache.example:6380", f"{HOST}:{server.port}"))
    return Place(file, "llm", 300, left_in(server, db=1))


def by_tls(request: pytest.FixtureRequest, path: Path) -> Place:
    server, _ = request.getfixturevalue("encrypted")
    server.ask("FLUSHALL")
    port = ('port: "6380"', f'port: "{server.port}"')
    file = changed(path, "redis_tls.yaml", PATIENT, ("cache.example", HOST), port)
    return Place(file, "llm", 3600, left_in(server))


def in_a_cluster(request: pytest.FixtureRequest, path: Path) -> Place:
    made: RedisCluster = request.getfixturevalue("cluster")
    for server in made.servers:
        server.ask("FLUSHALL")
    first, second = (str(server.port) for server in made.servers[:2])
    os.environ["NODE_2"] = HOST
    file = changed(path, "redis_cluster.yaml", PATIENT, ("7001", first), ("7002", second))
    return Place(file, "llm", 3600, left_in(*made.servers))


def behind_sentinels(request: pytest.FixtureRequest, path: Path) -> Place:
    made: RedisSentinels = request.getfixturevalue("sentinels")
    made.master.ask("FLUSHALL")
    node = ('["localhost", 26379]', json.dumps(made.nodes[0]))
    return Place(changed(path, "redis_sentinel.yaml", PATIENT, node), "llm", 3600, left_in(made.master))


def on_disk(request: pytest.FixtureRequest, path: Path) -> Place:
    directory = path / "answers"

    def read() -> dict[str, float]:
        database = directory / "cache.db"
        with contextlib.closing(sqlite3.connect(database)) as connection:
            rows = connection.execute("SELECT key, expire_time FROM Cache").fetchall()
        return {name: over - time.time() for name, over in rows}

    file = changed(path, "disk.yaml", ("/var/tmp/llm-cache", str(directory)))
    return Place(file, "llm", 3600, read, "disk")


def in_s3(request: pytest.FixtureRequest, path: Path) -> Place:
    moto: S3Server = request.getfixturevalue("moto")
    bucket = f"cache-bucket-{path.name.replace('_', '-').lower()[-40:].strip('-')}"
    client = moto.client()
    client.create_bucket(Bucket=bucket)

    def read() -> dict[str, float]:
        found = {}
        for each in client.list_objects_v2(Bucket=bucket).get("Contents", []):
            head = client.head_object(Bucket=bucket, Key=each["Key"])
            name = each["Key"].removeprefix("answers/").replace("/", ":")
            found[name] = float(head["Metadata"]["llm-expires"]) - time.time()
        return found

    patient = ("  cache_params:\n", "  cache_params:\n    store_timeout: 30\n    timeout: 30\n")
    where = ("https://s3.amazonaws.com", moto.url)
    file = changed(path, "s3.yaml", patient, where, ("cache-bucket", bucket))
    return Place(file, "llm", 3600, read, "s3")


PLACES = {
    "redis": in_redis,
    "redis_from_environment": in_redis_of_the_environment,
    "redis_url": by_url,
    "redis_tls": by_tls,
    "redis_cluster": in_a_cluster,
    "redis_sentinel": behind_sentinels,
    "disk": on_disk,
    "s3": in_s3,
}


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return PLACES[request.param](request, tmp_path)


def test_an_answer_is_kept_where_the_file_says_and_found_by_another_process(
    front, place, upstream, elsewhere
):
    """The other process has the other front, and finds it in the store."""
    client = front.start(place.file)
    miss, hit = client.post(CHAT, ask(), key=None), client.post(CHAT, ask(), key=None)
    assert states(miss, hit) == ["miss", "hit"]
    key = miss.headers["x-litellm-cache-key"]
    assert hit.headers["x-litellm-cache-key"] == key
    wait_for(place.entries, "it is written")  # some are written together, a second later
    [(name, seconds)] = place.entries().items()
    assert name == f"{place.namespace}:{key}"
    assert 0.95 * place.ttl - 60 < seconds <= place.ttl  # ttl_jitter is 0.05
    found, stream = elsewhere.ask(
        front.other, place.file, (CHAT, ask(), None), (CHAT, ask(stream=True), None)
    )
    assert states(found, stream) == ["hit", "hit"]
    assert found.headers["x-llm-cache-tier"] == place.tier
    assert found.text == hit.text == miss.text
    assert upstream.count == 1
    assert upstream.calls[0].headers["authorization"] == f"Bearer {SECRETS['OPENAI_API_KEY']}"


def test_a_cache_in_redis_holds_the_limits_of_all_processes(front, redis_here, upstream, elsewhere, tmp_path):
    rpm = ("model: openai/gpt-4o\n", "model: openai/gpt-4o\n      rpm: 2\n")
    file = changed(tmp_path, "call_types.yaml", PATIENT, rpm)
    client = front.start(file)
    assert states(*[client.post(CHAT, ask(text), key=None) for text in "ab"]) == ["miss", "miss"]
    [refused, hit] = elsewhere.ask(front.other, file, (CHAT, ask("c"), None), (CHAT, ask("a"), None))
    assert error(refused)[:2] == (429, "no_capacity")
    assert 0 < int(refused.headers["retry-after"]) <= 60
    assert states(hit) == ["hit"]
    assert upstream.count == 2


EXAMPLES = {
    "fastapi": ("uvicorn", "examples.fastapi_app.main:app"),
    "flask": ("gunicorn-gthread", "examples.flask_app.main:app"),
}


def test_the_example_apps_share_the_redis_of_a_file(redis_here, upstream, tmp_path):
    file = changed(tmp_path, "call_types.yaml", PATIENT)
    found = []
    for name in EXAMPLES:
        with (
            run_server(*EXAMPLES[name], {"LLM_MIDDLEWARE_CONFIG": str(file)}) as url,
            httpx.Client(base_url=url, timeout=30, trust_env=False) as client,
        ):
            answer = client.post(f"/llm{CHAT}", json=ask())
            found.append((*states(answer), answer.content))
            assert [each["id"] for each in client.get("/llm/models").json()["data"]] == [MODEL]
            assert client.get("/healthz").json() == {"status": "ok"}
    (first, body), (second, same) = found
    assert (first, second) == ("miss", "hit")
    assert body == same
    assert upstream.count == 1


# Memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "ttl"), [("memory.yaml", 600), ("memory_ttl.yaml", 30), ("redis_from_environment.yaml", 3600)]
)
def test_memory_is_that_of_one_process(front, upstream, elsewhere, name, ttl):
    client = front.start(FILES / name)
    miss, hit = client.post(CHAT, ask(), key=None), client.post(CHAT, ask(), key=None)
    assert states(miss, hit) == ["miss", "hit"]
    left = int(hit.headers["cache-status"].rpartition("ttl=")[2])
    assert 0.95 * ttl - 20 < left <= ttl
    assert hit.headers["x-llm-cache-tier"] == "memory"
    assert states(*elsewhere.ask(front.other, FILES / name, (CHAT, ask(), None))) == ["miss"]
    assert upstream.count == 2


# What is cached -----------------------------------------------------------------------------------


def test_c46_c47_a_cache_that_is_off_until_it_is_asked_for(front, upstream):
    client = front.start(FILES / "default_off.yaml")
    use: dict[str, object] = {"cache": {"use-cache": True}}
    asked = [{}, {}, use, use, {}]
    assert states(*[client.post(CHAT, ask(**fields), key=None) for fields in asked]) == [
        "bypass",
        "bypass",
        "miss",
        "hit",
        "bypass",
    ]
    vectors = [client.post(EMBEDDINGS, {"model": MODEL, "input": "a", **each}, key=None) for each in asked]
    assert states(*vectors) == ["bypass", "bypass", "miss", "hit", "bypass"]
    assert upstream.count == 8
    assert logging.getLogger("llm_middleware").level == logging.DEBUG  # set_verbose


ALL = '["acompletion", "atext_completion", "aembedding", "atranscription"]'


@pytest.mark.parametrize(
    ("types", "kept"), [(ALL, "chat text embedding transcription"), ('["aembedding"]', "embedding")]
)
def test_c51_only_the_types_of_calls_that_are_listed_are_cached(
    front, redis_here, upstream, tmp_path, types, kept
):
    client = front.start(changed(tmp_path, "call_types.yaml", PATIENT, (ALL, types)))
    asked = {
        "chat": lambda: client.post(CHAT, ask(), key=None),
        "text": lambda: client.post("/v1/completions", {"model": MODEL, "prompt": "a"}, key=None),
        "embedding": lambda: client.post(EMBEDDINGS, {"model": MODEL, "input": "a"}, key=None),
        "transcription": lambda: transcribe(client),
        "responses": lambda: client.post("/v1/responses", {"model": MODEL, "input": "a"}, key=None),
    }
    found = {name: states(send(), send()) for name, send in asked.items()}
    hit, off = ["miss", "hit"], ["bypass", "bypass"]
    assert found == {name: hit if name in kept.split() else off for name in asked}
    assert len(left_in(redis_here)()) == len(kept.split())


def test_without_types_of_calls_only_keys_and_limits_are_in_redis(
    front, redis_here, upstream, elsewhere, tmp_path
):
    rpm = ("model: openai/gpt-4o\n", "model: openai/gpt-4o\n      rpm: 3\n")
    file = changed(tmp_path, "no_call_types.yaml", rpm)
    client = front.start(file)
    key = client.post("/key/generate", {"rpm_limit": 2}, key="sk-1234").json()["key"]
    assert states(client.post(CHAT, ask(), key=key)) == ["bypass"]
    once, refused, admin, full = elsewhere.ask(
        front.other, file, *[(CHAT, ask(), each) for each in (key, key, "sk-1234", "sk-1234")]
    )
    assert states(once, admin) == ["bypass", "bypass"]
    assert error(refused) == (429, "rate_limit_exceeded", "rpm_limit")  # the key's
    assert 0 < int(refused.headers["retry-after"]) <= 60
    assert error(full)[:2] == (429, "no_capacity")  # the deployment's
    assert upstream.count == 3
    assert left_in(redis_here)() == {}
    kept = redis_here.ask("KEYS", "*")
    assert isinstance(kept, list)
    names = {name.decode() for name in kept}
    assert any(name.startswith("{proxy:keys:") for name in names)
    assert any(name.startswith("{proxy:router:") for name in names)
    assert not any(key.encode() in name for name in kept)


# Keys with controls of their own ------------------------------------------------------------------


@pytest.fixture(scope="module")
def database() -> Iterator[PostgreSQL]:
    with postgresql() as server:
        yield server


@pytest.fixture
def keyed(front: Front, database: PostgreSQL) -> Client:
    """Of the file about keys, whose database is real."""
    os.environ["KEYS_DATABASE"] = database.url
    return front.start(FILES / "key_level.yaml")


def generated(client: Client, **fields: object) -> str:
    made = client.post("/key/generate", fields, key=SECRETS["MASTER_KEY"])
    assert made.status_code == 200, made.text
    key: str = made.json()["key"]
    return key


def asked_by(client: Client, key: str, text: str = "hi", **controls: object) -> httpx.Response:
    fields = {"cache": {name.replace("_", "-"): value for name, value in controls.items()}}
    return client.post(CHAT, ask(text, **(fields if controls else {})), key=key)


def test_c27_a_keys_no_cache_cannot_be_undone(keyed, upstream):
    key = generated(keyed, metadata={"cache": {"no-cache": True}})
    assert states(asked_by(keyed, key), asked_by(keyed, key), asked_by(keyed, key, no_cache=False)) == [
        "miss",
        "miss",
        "miss",
    ]
    assert upstream.count == 3
    # A key without controls of its own decides for itself.
    free = generated(keyed)
    assert states(*[asked_by(keyed, free) for _ in range(2)]) == ["miss", "hit"]
    assert states(asked_by(keyed, free, no_cache=True)) == ["miss"]


def test_c26_r78_a_key_may_set_some_controls(keyed, upstream):
    key = generated(keyed, allowed_cache_controls=["no-cache"])
    assert error(asked_by(keyed, key, ttl=5)) == (403, "key_not_allowed", "cache.ttl")
    assert error(asked_by(keyed, key, no_store=True)) == (403, "key_not_allowed", "cache.no-store")
    assert upstream.count == 0
    assert states(asked_by(keyed, key), asked_by(keyed, key, no_cache=True), asked_by(keyed, key)) == [
        "miss",
        "miss",
        "hit",
    ]


def test_c50_r77_controls_of_key_and_request_are_laid_together(keyed, upstream):
    key = generated(keyed, team_id="r77", metadata={"cache": {"no-store": True}})
    other = generated(keyed, team_id="r77")
    assert states(asked_by(keyed, key, ttl=600), asked_by(keyed, key, ttl=600)) == ["miss", "miss"]
    assert states(asked_by(keyed, other), asked_by(keyed, key, ttl=600)) == ["miss", "hit"]  # of its team
    short = generated(keyed, team_id="r77", metadata={"cache": {"ttl": 5}})
    asked_by(keyed, short, "short", ttl=600)
    hit = asked_by(keyed, other, "short")
    assert states(hit) == ["hit"]
    assert int(hit.headers["cache-status"].rpartition("ttl=")[2]) <= 5


def test_c28_a_key_may_have_a_namespace_of_its_own(keyed):
    own = generated(keyed, team_id="c28", metadata={"cache": {"namespace": "own"}})
    other = generated(keyed, team_id="c28")
    assert states(asked_by(keyed, own), asked_by(keyed, other)) == ["miss", "miss"]
    assert states(asked_by(keyed, other, namespace="own")) == ["hit"]
    assert states(asked_by(keyed, own, namespace="another")) == ["hit"]  # it cannot leave its own


def test_c28_a_key_may_switch_on_a_cache_that_is_off(front, database, tmp_path):
    os.environ["KEYS_DATABASE"] = database.url
    off = ("type: local", "type: local\n    mode: default_off")
    client = front.start(changed(tmp_path, "key_level.yaml", off))
    key = generated(client, metadata={"cache": {"use-cache": True}})
    assert states(asked_by(client, key), asked_by(client, key)) == ["miss", "hit"]
    assert states(asked_by(client, generated(client))) == ["bypass"]


def test_keys_in_a_database_are_those_of_all_processes(front, keyed, elsewhere):
    key = generated(keyed, models=[MODEL])
    file = FILES / "key_level.yaml"
    first, wrong = elsewhere.ask(front.other, file, (CHAT, ask(), key), (CHAT, ask(model="else"), key))
    assert states(first) == ["miss"]
    assert error(wrong) == (403, "key_not_allowed", "model")
    assert keyed.post("/key/delete", {"keys": [key]}, key=SECRETS["MASTER_KEY"]).status_code == 200
    [gone] = elsewhere.ask(front.other, file, (CHAT, ask(), key))
    assert error(gone)[:2] == (401, "invalid_api_key")


# A whole proxy ------------------------------------------------------------------------------------


@dataclass
class Proxy:
    client: Client
    cache: RedisServer
    limits: RedisServer

    def chat(self, text: str, **fields: object) -> httpx.Response:
        return self.client.post(CHAT, ask(text, **fields), key="sk-1234")


@pytest.fixture
def proxy(front: Front, plain, guarded, upstream, hooks_of_the_host, tmp_path) -> Proxy:
    """Azure and Bedrock are the upstream; the Redis of the file's own variables has the answers, that of the
    Router another."""
    for server in (plain, guarded):
        server.ask("FLUSHALL")
    os.environ |= {"ROUTER_REDIS": HOST, "ROUTER_REDIS_PASSWORD": "redis-secret"}
    base = upstream.url.removesuffix("/v1")
    bedrock = "model: bedrock/anthropic.claude-3-haiku-20240307-v1:0\n      aws_region_name: us-east-1\n"
    file = changed(
        tmp_path,
        "proxy.yaml",
        PATIENT,
        ("REDIS_HOST: cache.internal", f"REDIS_HOST: {HOST}"),
        ("REDIS_PORT: 6390", f"REDIS_PORT: {plain.port}"),
        ("redis_port: 1992", f"redis_port: {guarded.port}"),
        ("https://europe.openai.azure.com/", f"{base}/"),
        ("https://canada.openai.azure.com/", f"{base}/"),
        (bedrock, "model: openai/claude-up\n"),
    )
    return Proxy(front.start(file), plain, guarded)


def test_a_proxys_models_variables_and_credentials(proxy, upstream, hooks_of_the_host):
    upstream.fail_next(200, n=2, body=completion("of Azure"))
    first, alias = proxy.chat("a"), proxy.chat("b", model="gpt-4")
    assert [each.json()["choices"][0]["message"]["content"] for each in (first, alias)] == ["of Azure"] * 2
    assert [each.headers["x-llm-model"] for each in (first, alias)] == [MODEL, "gpt-4"]
    keys = {call.path.partition("?")[2]: call.headers["api-key"] for call in upstream.calls}
    known = {
        "api-version=2023-07-01-preview": "eu-secret-from-the-file",
        "api-version=2023-05-15": "ca-secret",
    }
    assert keys.items() <= known.items()
    assert states(proxy.chat("a")) == ["hit"]
    assert first.headers["x-litellm-cache-key"] == proxy.chat("a").headers["x-litellm-cache-key"]
    names = set(left_in(proxy.cache)())
    assert names == {f"llm:{each.headers['x-litellm-cache-key']}" for each in (first, alias)}
    assert max(left_in(proxy.cache)().values()) <= 60
    found = [(each.name, each.cache_hit, each.model) for each in hooks_of_the_host]
    assert found[:3] == [("success", False, MODEL), ("success", False, "gpt-4"), ("success", True, MODEL)]
    wild = proxy.chat("c", model="openai/anything")
    assert (wild.status_code, upstream.calls[-1].json["model"]) == (200, "anything")


def test_a_proxys_fallbacks_retries_and_limits(proxy, upstream):
    """Two retries after the first attempt, then the fallback."""
    upstream.fail_next(500, n=3)
    answer = proxy.chat("a")
    assert answer.status_code == 200
    assert (answer.headers["x-llm-model"], answer.headers["x-llm-fallback"]) == ("claude", "true")
    assert [call.json["model"] for call in upstream.calls][3:] == ["claude-up"]
    assert upstream.count == 4
    with proxy.limits.client(db=3) as client:
        names = [name.decode() for name in client.scan_iter("*")]
    assert names
    assert all(name.startswith("{llm:router:") for name in names)


def test_a_proxys_limits_are_exact_and_end_in_the_fallback(proxy, upstream):
    upstream.fail_next(200, n=12, body=completion("of Azure"))
    answers = [proxy.chat(f"number {number}") for number in range(14)]
    models = [answer.headers["x-llm-model"] for answer in answers]
    assert models == [MODEL] * 12 + ["claude"] * 2
    versions = [call.path.partition("=")[2] for call in upstream.calls[:12]]
    assert sorted(versions) == ["2023-05-15"] * 6 + ["2023-07-01-preview"] * 6


def test_a_proxys_bodies_are_bounded(proxy, upstream):
    assert proxy.chat("a" * (2 << 20)).status_code == 413
    assert proxy.client.post(CHAT, ask(), key=None).status_code == 401
    assert upstream.count == 0


# The short form -----------------------------------------------------------------------------------


def test_the_short_form(front, redis_here, upstream, elsewhere, tmp_path, hooks_of_the_host):
    """Two keys of one user share answers, as it says."""
    file = changed(tmp_path, "short.yaml", ("ttl: 600 }", "ttl: 600, store_timeout: 30 }"))
    client = front.start(file)
    assert client.post("/key/generate", {}, key=SECRETS["MASTER_KEY"]).status_code == 404  # admin: false
    keys = KeyResolver({"type": "sqlite", "path": "keys.db"})
    mine, mine_too, theirs = (keys.generate(user_id=user)["key"] for user in ("me", "me", "they"))
    keys.close()
    asked = [client.post(CHAT, ask(model="gpt"), key=key) for key in (mine, mine_too, theirs)]
    assert states(*asked) == ["miss", "hit", "miss"]
    assert "x-litellm-cache-key" not in asked[0].headers
    digests = {each.headers["x-llm-cache-key"] for each in asked}
    assert set(left_in(redis_here)()) == {f"llm:{digest}" for digest in digests}
    found = [(each.name, each.cache_hit) for each in hooks_of_the_host]
    assert found == [("success", False), ("success", True), ("success", False)]
    assert client.post(CHAT, ask("a" * (1 << 20), model="gpt"), key=mine).status_code == 413
    assert client.post(CHAT, ask(model="gpt"), key="sk-nobodys-key-0123").status_code == 401
    again, wrong = elsewhere.ask(
        front.other, file, (CHAT, ask(model="gpt"), mine_too), (CHAT, ask(model="gpt"), "sk-nobodys-key-01")
    )
    assert states(again) == ["hit"]
    assert error(wrong)[:2] == (401, "invalid_api_key")
    assert upstream.count == 2
    assert (tmp_path / "keys.db").is_file()
