"""Where settings come from and what becomes of them: text, variables, other types' names, a new default."""

from __future__ import annotations

import asyncio
import enum
import gc
import logging
import threading
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_middleware import CacheManager, ConfigError, default_cache, disable_cache, enable_cache, update_cache
from llm_middleware.caching import default
from llm_middleware.caching.environ import resolved
from llm_middleware.caching.settings import CacheSettings, make_settings, parse_settings
from llm_middleware.stores.redis_settings import COMMON_NAMES, known_names
from tests.services import HOST, RedisServer, redis_server, wait_for
from tests.support import completion

BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


ENVIRON = {"HOST_1": "one", "PORT": "6380", "EMPTY": "", "AGAIN": "os.environ/HOST_1"}


class TestVariables:
    """C120."""

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ("os.environ/HOST_1", "one"),
            ("os.environ/EMPTY", ""),
            ("os.environ/AGAIN", "os.environ/HOST_1"),
            ("at os.environ/HOST_1", "at os.environ/HOST_1"),
            ("OS.ENVIRON/HOST_1", "OS.ENVIRON/HOST_1"),
            ("os.environ", "os.environ"),
            (["a", "os.environ/PORT"], ["a", "6380"]),
            (("os.environ/PORT", 1), ("6380", 1)),
            (
                {"os.environ/PORT": ["x", {"y": ("os.environ/PORT",)}]},
                {"os.environ/PORT": ["x", {"y": ("6380",)}]},
            ),
            (types.MappingProxyType({"a": "os.environ/PORT"}), {"a": "6380"}),
            (None, None),
            (5, 5),
        ],
    )
    def test_a_variable_stands_wherever_it_is_named(self, value, expected):
        assert resolved(value, param="x", environ=ENVIRON) == expected

    def test_all_else_stays_the_object_that_it_is(self):
        for value in (b"os.environ/PORT", print, object(), Path("os.environ/PORT"), {"os.environ/PORT"}):
            assert resolved(value, param="x", environ=ENVIRON) is value

    def test_what_was_given_is_not_changed(self):
        inner = ["os.environ/PORT"]
        given = {"nodes": inner}
        assert resolved(given, param="", environ=ENVIRON) == {"nodes": ["6380"]}
        assert given == {"nodes": ["os.environ/PORT"]}
        assert given["nodes"] is inner

    @pytest.mark.parametrize(
        ("value", "place"),
        [
            ({"password": "os.environ/NONE"}, "password"),
            ({"nodes": [{"host": "os.environ/HOST_1"}, {"host": "os.environ/NONE"}]}, "nodes[1].host"),
            ({"s3_config": {"a": {"b": ("s3cret", "os.environ/NONE")}}}, "s3_config.a.b[1]"),
        ],
    )
    def test_one_that_is_not_set_is_named_with_its_place(self, value, place):
        with pytest.raises(ConfigError) as caught:
            resolved(value, param="", environ=ENVIRON)
        assert caught.value.message == f"{place}: the environment has no NONE"
        assert caught.value.param == place

    def test_the_process_environment_is_the_default(self, monkeypatch):
        monkeypatch.setenv("LLM_CACHE_TEST_TTL", "7")
        assert resolved("os.environ/LLM_CACHE_TEST_TTL", param="ttl") == "7"

    def test_a_manager_reads_them_in_every_setting(self, monkeypatch, tmp_path):
        values = {
            "type": "disk",
            "disk_cache_dir": str(tmp_path / "c"),
            "ttl": "7.5",
            "max_bytes": "1000",
            "secret": "s3cret",
            "enabled": "False",
        }
        for name, text in values.items():
            monkeypatch.setenv(f"LLM_CACHE_TEST_{name}", text)
        given = {name: f"os.environ/LLM_CACHE_TEST_{name}" for name in values}
        settings = CacheManager(**given).settings
        assert (settings.type, settings.disk_cache_dir, settings.ttl) == ("disk", str(tmp_path / "c"), 7.5)
        assert (settings.max_bytes, settings.secret, settings.enabled) == (1000, b"s3cret", False)

    def test_a_manager_reads_those_of_its_connection(self, monkeypatch):
        monkeypatch.setenv("LLM_CACHE_TEST_HOST", "a")
        monkeypatch.setenv("LLM_CACHE_TEST_PORT", "7001")
        node = {"host": "os.environ/LLM_CACHE_TEST_HOST", "port": "os.environ/LLM_CACHE_TEST_PORT"}
        store = CacheManager("redis", redis_startup_nodes=[node, {"host": "b"}])._flow.tiers.store
        assert store.connection.settings.nodes == (("a", 7001), ("b", 6379))

    def test_a_manager_says_what_is_missing(self):
        nodes = [{"host": "os.environ/LLM_CACHE_TEST_NONE"}]
        with pytest.raises(ConfigError) as caught:
            CacheManager("redis", redis_startup_nodes=nodes, password="s3cret")
        assert (
            caught.value.message == "redis_startup_nodes[0].host: the environment has no LLM_CACHE_TEST_NONE"
        )
        with pytest.raises(ConfigError, match=r"^type: the environment has no LLM_CACHE_TEST_NONE$"):
            CacheManager("os.environ/LLM_CACHE_TEST_NONE")

    def test_an_update_reads_them(self, monkeypatch):
        monkeypatch.setenv("LLM_CACHE_TEST_TTL", "7")
        cache = CacheManager(max_bytes=1000)
        cache.update(ttl="os.environ/LLM_CACHE_TEST_TTL", max_bytes="1000")
        assert (cache.settings.ttl, cache.settings.max_bytes) == (7.0, 1000)
        with pytest.raises(ConfigError, match="max_bytes: cannot change in use"):
            cache.update(max_bytes="1001", ttl=8)
        assert cache.settings.ttl == 7.0


class TestText:
    """C120: what an environment holds is text."""

    @pytest.mark.parametrize(
        ("name", "text", "value"),
        [
            ("ttl", "60", 60.0),
            ("ttl", " 0.5 ", 0.5),
            ("ttl", ".5", 0.5),
            ("ttl", "1e3", 1000.0),
            ("ttl", "inf", float("inf")),
            ("ttl_jitter", "0", 0.0),
            ("store_timeout", "0.25", 0.25),
            ("max_bytes", "1048576", 1 << 20),
            ("compress_above", "0", 0),
            ("redis_flush_size", "10", 10),
            ("single_flight_lease", "0.1", 0.1),
            *[("enabled", text, True) for text in ("true", "True", "TRUE", "1", " true\n")],
            *[("enabled", text, False) for text in ("false", "False", "0")],
            ("memory_tier", "false", False),
            ("batch_redis_requests", "1", True),
        ],
    )
    def test_it_is_read_as_what_the_setting_is(self, name, text, value):
        got = getattr(make_settings({name: text}), name)
        assert (got, type(got)) == (value, type(value))

    def test_so_are_the_switches_of_the_admission_policy(self):
        policy = make_settings({"admission": {"empty": "false", "tool-calls": "1"}}).policy
        assert (policy["empty"], policy["tool-calls"]) == (False, True)

    @pytest.mark.parametrize(
        ("name", "text", "expected"),
        [
            *[
                ("ttl", text, "seconds >= 0 or None")
                for text in ("", "nan", "1_000", "null", "None", "5s", "-1")
            ],
            ("ttl", "\u0665", "seconds >= 0 or None"),
            ("ttl_jitter", "2", "a share from 0 to 1"),
            *[
                ("max_bytes", text, "a number of bytes >= 0")
                for text in ("", "-1", "1.0", "1e6", "1_0", "1MB")
            ],
            ("max_bytes", "9" * 5000, "a number of bytes >= 0"),
            *[("enabled", text, "True or False") for text in ("", "yes", "on", "t", "2", "none")],
        ],
    )
    def test_no_other_spelling_is_taken(self, name, text, expected):
        with pytest.raises(ConfigError) as caught:
            make_settings({name: text})
        assert caught.value.message == f"{name}: expected {expected}, got {text!r}"


class TestNewSettings:
    def test_as_they_are_by_default(self):
        made = CacheSettings()
        assert (made.redis_flush_size, made.redis_flush_interval, made.batch_redis_requests) == (
            None,
            1.0,
            False,
        )
        assert (made.single_flight, made.single_flight_lease, made.single_flight_wait) == (
            "shared",
            2.0,
            60.0,
        )

    @pytest.mark.parametrize(
        ("name", "value", "expected"),
        [
            *[("redis_flush_size", v, "a number of entries >= 1 or None") for v in (0, -1, 1.0, True, "x")],
            *[("redis_flush_interval", v, "seconds > 0") for v in (0, -1, None, float("inf"), float("nan"))],
            ("batch_redis_requests", 1, "True or False"),
            *[("single_flight_lease", v, "seconds >= 0.1") for v in (0.09, 0, None, float("inf"))],
            *[("single_flight_wait", v, "seconds >= 0") for v in (-0.1, None, "long")],
        ],
    )
    def test_what_they_refuse(self, name, value, expected):
        with pytest.raises(ConfigError) as caught:
            make_settings({name: value})
        assert caught.value.message == f"{name}: expected {expected}, got {value!r}"

    def test_what_they_take(self):
        least = {"redis_flush_size": 1, "redis_flush_interval": 0.001, "single_flight_lease": 0.1}
        made = make_settings({**least, "single_flight_wait": 0, "single_flight": "process"})
        assert {name: getattr(made, name) for name in least} == least
        assert (made.single_flight_wait, made.single_flight) == (0.0, "process")
        assert make_settings({"single_flight_wait": float("inf")}).single_flight_wait == float("inf")
        with pytest.raises(ConfigError, match=r"single_flight: expected .* did you mean 'process'\?"):
            make_settings({"single_flight": "proces"})

    def test_a_mode_as_litellm_has_it(self):
        class Mode(str, enum.Enum):  # noqa: UP042 - as LiteLLM's is
            default_off = "default_off"

        mode = make_settings({"mode": Mode.default_off}).mode
        assert (mode, type(mode)) == ("default_off", str)


LITELLM = {
    "ttl": 60,
    "namespace": "n",
    "mode": "default_off",
    "supported_call_types": ["acompletion"],
    "default_in_memory_ttl": 5,
    "default_in_redis_ttl": 6,
    "redis_flush_size": 10,
    "disk_cache_dir": "cache",
}
REDIS = {
    "max_connections": 9,
    "host": "h",
    "port": "6380",
    "password": "s3cret",
    "ssl": "true",
    "ssl_cert_reqs": "required",
    "ssl_check_hostname": "false",
}
CLUSTER = {"redis_startup_nodes": [{"host": "h", "port": "7001"}]}
SENTINEL = {"service_name": "m", "sentinel_nodes": [["h", 26379]], "sentinel_password": "s3cret"}
GCP = {"gcp_service_account": "a@b", "gcp_ssl_ca_certs": "/ca.pem"}
S3 = {
    "s3_bucket_name": "bucket",
    "s3_region_name": "r",
    "s3_api_version": "2006-03-01",
    "s3_path": "p",
    "s3_use_ssl": "true",
    "s3_verify": "false",
    "s3_endpoint_url": "http://h",
    "s3_aws_access_key_id": "id",
    "s3_aws_secret_access_key": "s3cret",
    "s3_aws_session_token": "s3cret",
    "s3_config": {},
}
ALL = {**LITELLM, **REDIS, **CLUSTER, **SENTINEL, **GCP, **S3}
NEITHER = ("default_in_redis_ttl", "redis_flush_size")


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "llm_middleware"]


class TestNames:
    @pytest.mark.parametrize(
        ("type_", "given", "idle"),
        [
            ("local", ALL, [*REDIS, *CLUSTER, *SENTINEL, *GCP, *S3, *NEITHER, "disk_cache_dir"]),
            ("disk", ALL, [*REDIS, *CLUSTER, *SENTINEL, *GCP, *S3, *NEITHER]),
            ("s3", ALL, [*REDIS, *CLUSTER, *SENTINEL, *GCP, *NEITHER, "disk_cache_dir"]),
            ("redis", {**LITELLM, **REDIS, **S3}, [*S3, "disk_cache_dir"]),
            ("redis", {**LITELLM, **CLUSTER, "password": "p"}, ["disk_cache_dir"]),
            ("redis", {"port": 1, **SENTINEL}, []),
            ("redis", {"host": "h", **GCP}, []),
        ],
    )
    def test_every_name_of_litellm_is_taken_with_every_type(self, caplog, type_, given, idle):
        cache = CacheManager(type_, **given)
        assert cache.settings.type == type_
        told = warned(caplog)
        assert len(told) == (1 if idle else 0)
        if idle:
            begin, names = told[0].split(": ")
            assert begin == f"type={type_!r} does not use these cache settings"
            assert sorted(names.split(", ")) == sorted(idle)
        assert "s3cret" not in caplog.text

    def test_what_is_not_set_is_not_warned_of(self, caplog):
        CacheManager(host=None, password=None, s3_config=None, redis_flush_size=None)
        assert warned(caplog) == []

    def test_they_reach_the_connection(self):
        settings, connection = parse_settings("redis", {**LITELLM, **REDIS, **S3})
        assert connection == REDIS
        assert (settings.ttl, settings.mode, settings.redis_flush_size) == (60.0, "default_off", 10)
        _, connection = parse_settings("s3", {**LITELLM, **REDIS, **S3, "timeout": 1})
        assert connection == {**S3, "timeout": 1}
        assert parse_settings("disk", ALL)[1] == {}

    @pytest.mark.parametrize("type_", ["local", "disk", "redis", "s3"])
    @pytest.mark.parametrize(
        ("name", "hint"),
        [
            ("tll", "; did you mean 'ttl'?"),
            ("hook", "; did you mean 'hooks'?"),
            ("redis_flush_sizes", "; did you mean 'redis_flush_size'?"),
            ("similarity_threshold", ""),
            ("xyzzy", ""),
        ],
    )
    def test_an_unknown_one_is_refused_with_every_type(self, type_, name, hint):
        with pytest.raises(ConfigError) as caught:
            CacheManager(type_, **{name: "s3cret"})
        assert caught.value.message == f"unknown cache setting {name!r}{hint}"
        assert caught.value.param == name

    def test_a_misspelt_one_of_the_connection(self):
        with pytest.raises(ConfigError, match=r"^unknown cache setting 'hosst'; did you mean 'host'\?$"):
            CacheManager("redis", hosst="a")
        with pytest.raises(
            ConfigError, match=r"^unknown cache setting 's3_bucket'; did you mean 's3_bucket_name'\?$"
        ):
            CacheManager("s3", s3_bucket="a")

    def test_names_that_mean_a_redis_are_names_of_a_redis(self):
        assert set(known_names()) >= COMMON_NAMES


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as made:
        yield made


@pytest.fixture
def fresh_default(monkeypatch):
    monkeypatch.setattr(default, "_default", None)
    yield
    default_cache().close()


class Loop:
    """An event loop that runs in a thread until the test is over; what it complains of is kept."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.complaints: list[object] = []
        self.loop.set_exception_handler(lambda _, context: self.complaints.append(context))
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def run(self, work):
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    def close(self) -> None:
        async def last() -> None:
            await asyncio.get_running_loop().shutdown_asyncgens()

        self.run(last())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture
def loop():
    made = Loop()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield made
        made.close()
        gc.collect()
    assert made.complaints == []
    assert [str(warning.message) for warning in caught if warning.category is ResourceWarning] == []


def clients(server: RedisServer, name: str) -> int:
    return sum(client["name"] == name for client in server.ask("CLIENT LIST"))


LISTENING = {"NULL", "hello", "client|setname", "subscribe", "ssubscribe", "psubscribe", "ping"}


def askers(server: RedisServer, name: str) -> int:
    """The clients that ask for entries: another may listen for what other processes say."""
    last = [client["cmd"] for client in server.ask("CLIENT LIST") if client["name"] == name]
    return sum(command not in LISTENING for command in last)


@pytest.mark.usefixtures("fresh_default")
class TestDefault:
    """C124."""

    def connected(self, server: RedisServer, name: str, **settings: object) -> CacheManager:
        given = {
            "host": HOST,
            "port": server.port,
            "client_name": name,
            "store_timeout": 10,
            "memory_tier": False,
        }
        return enable_cache("redis", **given, **settings)

    def use(self, cache: CacheManager, loop: Loop) -> tuple[str, str]:
        """One fetch by each face; what the cache did for it."""
        status = cache.fetch(BODY, lambda body: completion("sync")).cache.status

        async def fetch() -> str:
            return (
                await cache.afetch({**BODY, "model": "other"}, lambda body: completion("async"))
            ).cache.status

        return status, loop.run(fetch())

    def test_a_second_one_wins_and_the_first_is_disconnected(self, server, loop):
        server.ask("FLUSHALL")
        first = self.connected(server, "first")
        assert self.use(first, loop) == ("miss", "miss")
        assert askers(server, "first") == 2
        second = self.connected(server, "second")
        assert default_cache() is second
        wait_for(lambda: clients(server, "first") == 0, "the first one's clients are gone")
        assert self.use(second, loop) == ("hit", "hit")
        assert askers(server, "second") == 2
        enable_cache()
        wait_for(lambda: clients(server, "second") == 0, "the second one's clients are gone")

    def test_closing_from_one_loop_disconnects_every_other(self, server, loop):
        cache = self.connected(server, "many")
        other = Loop()
        self.use(cache, loop)
        self.use(cache, other)
        assert askers(server, "many") == 3
        loop.run(cache.aclose())
        wait_for(lambda: clients(server, "many") == 0, "every client is gone")
        assert self.use(cache, other)[0] == "hit"
        loop.run(asyncio.to_thread(cache.close))
        wait_for(lambda: clients(server, "many") == 0, "every client is gone again")
        other.close()
        assert other.complaints == []

    def test_disabled_and_enabled_again(self, server, loop):
        server.ask("FLUSHALL")
        cache = self.connected(server, "switched")
        assert self.use(cache, loop) == ("miss", "miss")
        disable_cache()
        assert self.use(default_cache(), loop) == ("bypass", "bypass")
        again = self.connected(server, "again")
        assert self.use(again, loop) == ("hit", "hit")
        wait_for(lambda: clients(server, "switched") == 0, "the first one's clients are gone")

    def test_an_update_with_a_type_makes_another(self, server, loop):
        server.ask("FLUSHALL")
        first = self.connected(server, "first", ttl=5, namespace="one")
        self.use(first, loop)
        local = update_cache("local", ttl=7)
        assert default_cache() is local is not first
        assert (local.settings.type, local.settings.ttl, local.settings.namespace) == ("local", 7.0, "llm")
        wait_for(lambda: clients(server, "first") == 0, "the first one's clients are gone")
        assert self.use(local, loop) == ("miss", "miss")
        assert self.use(local, loop) == ("hit", "hit")
        back = update_cache(type="local")
        assert self.use(back, loop) == ("miss", "miss")  # nothing of the old memory is served

    def test_an_update_of_the_connection_makes_another(self, server, loop):
        server.ask("FLUSHALL")
        first = self.connected(server, "first", namespace="one")
        self.use(first, loop)
        second = update_cache(host=HOST, port=server.port, client_name="second", db=1, store_timeout=10)
        assert default_cache() is second is not first
        assert second.settings.type == "redis"
        assert self.use(second, loop) == ("miss", "miss")
        assert (server.ask("DBSIZE"), server.ask("DBSIZE", db=1)) == (2, 2)
        wait_for(lambda: clients(server, "first") == 0, "the first one's clients are gone")

    def test_an_update_of_other_settings_keeps_it(self, server, loop):
        first = self.connected(server, "kept")
        self.use(first, loop)
        assert update_cache(ttl="9", mode="default_off") is first is default_cache()
        assert (first.settings.ttl, first.settings.mode) == (9.0, "default_off")
        assert askers(server, "kept") == 2

    @pytest.mark.parametrize(
        "wrong",
        [
            {"ttl": -1},
            {"tll": 1},
            {"type": "redos"},
            {"type": "redis", "hosst": "a"},
            {"type": "redis", "port": "x"},
            {"type": "local", "ttl": -1},
            {"port": "x"},
            {"host": "os.environ/LLM_CACHE_TEST_NONE"},
            {"type": "s3"},
            {"max_bytes": 5},
        ],
    )
    def test_wrong_settings_leave_everything_as_it_was(self, server, loop, wrong):
        first = self.connected(server, "stays")
        self.use(first, loop)
        before = first.settings
        with pytest.raises(ConfigError):
            update_cache(**wrong)
        assert default_cache() is first
        assert first.settings == before
        assert self.use(first, loop) == ("hit", "hit")
        assert askers(server, "stays") == 2

    def test_a_former_one_that_cannot_be_closed_from_here(self, caplog):
        class AsyncOnly:
            async def aget(self, key: str) -> None:
                return None

            async def aset(self, key: str, value: bytes, ttl: float | None) -> None:
                pass

        enable_cache(store=AsyncOnly())
        caplog.set_level(logging.WARNING)
        second = enable_cache()
        assert default_cache() is second
        assert len(told := warned(caplog)) == 1
        assert told[0].startswith(
            "the former default cache was not closed: StoreError: AsyncOnly has no sync"
        )
