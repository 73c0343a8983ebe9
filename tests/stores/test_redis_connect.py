"""How Redis is reached: every setting and its sources, clients, credentials, and what is never shown."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import json
import logging
import os
import socket
import ssl
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import redis

from llm_middleware.errors import ConfigError, StoreError
from llm_middleware.stores import redis_connect, redis_settings
from llm_middleware.stores.redis import RedisStore
from llm_middleware.stores.redis_connect import RedisConnection
from llm_middleware.stores.redis_credentials import TokenSource, fetch_google_token
from llm_middleware.stores.redis_settings import RedisSettings, read_settings
from llm_middleware.testing import FakeClock
from tests.services import (
    FACES,
    HOST,
    RedisServer,
    SyncFace,
    certificates,
    free_port,
    redis_cluster,
    redis_sentinel,
    redis_server,
    redis_tls,
    wait_for,
)

AMPLE = 10.0  # seconds: a budget that no test uses up
KEY = f"llm:{1:064x}"


def make(settings: dict[str, object], environ: dict[str, str] | None = None, **options) -> RedisStore:
    return RedisStore(RedisConnection.from_settings(settings, environ or {}, **{"budget": AMPLE, **options}))


@pytest.fixture(params=["sync", "async"])
def face(request: pytest.FixtureRequest) -> Iterator[SyncFace]:
    made = FACES[request.param]()
    yield made
    made.close()


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as made:
        yield made


def works(face: SyncFace, settings: dict[str, object], environ: dict[str, str] | None = None) -> bool:
    """Whether a value can be written and read with these settings."""
    store = make(settings, environ)
    try:
        face.do(store, "set", KEY, b"value", 60)
        return face.do(store, "get", KEY) == b"value"
    finally:
        store.close()


def fails(face: SyncFace, settings: dict[str, object], environ: dict[str, str] | None = None) -> str:
    """What it says that reading with these settings fails."""
    store = make(settings, environ)
    with pytest.raises(StoreError) as caught:
        face.do(store, "get", KEY)
    store.close()
    return str(caught.value)


class TestArguments:
    def test_nothing_at_all_is_the_default_server(self) -> None:
        assert read_settings({}, {}) == RedisSettings(topology="standalone")

    def test_they_come_through_as_they_are(self) -> None:
        given = {
            "host": "cache",
            "port": 6380,
            "username": "app",
            "password": "p",
            "db": 2,
            "ssl": True,
            "ssl_cert_reqs": "optional",
            "ssl_ca_certs": "/ca.pem",
            "ssl_check_hostname": False,
            "max_connections": 7,
            "client_name": "x",
            "health_check_interval": 30,
            "socket_keepalive_options": {1: 2},
            "ssl_min_version": ssl.TLSVersion.TLSv1_3,
        }
        assert dict(read_settings(given, {}).arguments) == given

    def test_text_is_read_as_the_argument_needs_it(self) -> None:
        given = {
            "port": "6380",
            "db": " 2 ",
            "ssl": "yes",
            "socket_timeout": "0.5",
            "ssl_cert_reqs": "CERT_NONE",
        }
        expected = {"port": 6380, "db": 2, "ssl": True, "socket_timeout": 0.5, "ssl_cert_reqs": "none"}
        assert dict(read_settings(given, {}).arguments) == expected

    def test_none_is_not_given(self) -> None:
        assert dict(read_settings({"host": None, "password": None}, {"REDIS_HOST": "env"}).arguments) == {
            "host": "env"
        }

    @pytest.mark.parametrize(
        ("name", "nearest"),
        [
            ("hots", "host"),
            ("passwort", "password"),
            ("max_conections", "max_connections"),
            ("startup_nodes", "redis_startup_nodes"),
            ("sentinel_node", "sentinel_nodes"),
            ("gcp_service_acount", "gcp_service_account"),
            ("ssl_ca_cert", "ssl_ca_certs"),
        ],
    )
    def test_an_unknown_one_names_the_nearest(self, name: str, nearest: str) -> None:
        with pytest.raises(
            ConfigError, match=rf"unknown Redis setting '{name}'; did you mean '{nearest}'\?"
        ) as caught:
            read_settings({name: "x"}, {})
        assert caught.value.param == name

    def test_an_unknown_one_far_from_all(self) -> None:
        with pytest.raises(ConfigError, match=r"^unknown Redis setting 'zzzzzzzzzz'$"):
            read_settings({"zzzzzzzzzz": 1}, {})

    @pytest.mark.parametrize(
        ("name", "value", "expected"),
        [
            ("port", "sixty", "a whole number"),
            ("port", 6379.5, "a whole number"),
            ("port", True, "a whole number"),
            ("ssl", "maybe", "true or false"),
            ("ssl", 1, "true or false"),
            ("socket_timeout", "soon", "a number"),
            ("socket_timeout", True, "a number"),
            ("host", 5, "a string"),
            ("service_name", 5, "a string"),
            ("ssl_cert_reqs", "perhaps", "one of 'none', 'optional', 'required'"),
            ("redis_startup_nodes", "[", 'a list of {"host": ..., "port": ...}'),
            ("redis_startup_nodes", [], 'a list of {"host": ..., "port": ...}'),
            ("redis_startup_nodes", [{"port": 1}], 'a list of {"host": ..., "port": ...}'),
            ("sentinel_nodes", [["a"]], "a list of [host, port]"),
            ("sentinel_nodes", [["", 1]], "a list of [host, port]"),
            ("sentinel_nodes", 5, "a list of [host, port]"),
            ("ssl_min_version", "SSLv99", "a value it can have"),
        ],
    )
    def test_a_wrong_value(self, name: str, value: object, expected: str) -> None:
        with pytest.raises(ConfigError) as caught:
            read_settings({name: value, **({"service_name": "m"} if name == "sentinel_nodes" else {})}, {})
        assert caught.value.param == name
        assert caught.value.message.endswith(f"{value!r} is not {expected}")

    def test_a_wrong_secret_is_not_repeated(self) -> None:
        with pytest.raises(ConfigError) as caught:
            read_settings({"password": 123456789}, {})
        assert "123456789" not in str(caught.value)

    @pytest.mark.parametrize(
        "name",
        ["connection_pool", "single_connection_client", "decode_responses", "encoding", "cache", "retry"],
    )
    def test_what_the_cache_sets_itself(self, name: str) -> None:
        with pytest.raises(ConfigError, match=f"{name}: the cache sets this itself"):
            read_settings({name: "x"}, {})

    def test_what_is_as_the_cache_sets_it_may_be_given(self) -> None:
        assert dict(read_settings({"decode_responses": False}, {}).arguments) == {}

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"host": "a", "url": "redis://b"}, "url and host exclude each other"),
            (
                {"sentinel_nodes": [["a", 1]], "redis_startup_nodes": [{"host": "a", "port": 1}]},
                "sentinel_nodes and redis_startup_nodes exclude each other",
            ),
            ({"sentinel_nodes": [["a", 1]]}, "sentinel_nodes needs service_name, the name of the master"),
            ({"service_name": "m"}, "service_name needs sentinel_nodes"),
            ({"redis_startup_nodes": [["a", 1]], "db": 1}, "a Redis Cluster has no database but 0"),
            (
                {"gcp_service_account": "a", "password": "p"},
                "gcp_service_account and password exclude each other",
            ),
            (
                {"credential_provider": object(), "password": "p"},
                "credential_provider and password exclude each other",
            ),
        ],
    )
    def test_what_excludes_each_other(self, settings: dict[str, object], message: str) -> None:
        with pytest.raises(ConfigError) as caught:
            read_settings(settings, {})
        assert caught.value.message == message

    def test_nodes(self) -> None:
        nodes = [{"host": "a", "port": 1}, {"host": "b", "port": "2"}, {"host": "c"}]
        settings = read_settings({"redis_startup_nodes": nodes}, {})
        assert (settings.topology, settings.nodes) == ("cluster", (("a", 1), ("b", 2), ("c", 6379)))
        settings = read_settings({"sentinel_nodes": [["a", 26379], ("b", "26380")], "service_name": "m"}, {})
        assert (settings.topology, settings.nodes, settings.service_name) == (
            "sentinel",
            (("a", 26379), ("b", 26380)),
            "m",
        )

    def test_without_redis_py_the_error_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "redis", None)
        redis_settings._argument_kinds.cache_clear()
        try:
            with pytest.raises(ConfigError, match=r"pip install 'llm-middleware\[redis\]'"):
                RedisConnection.from_settings({}, {})
        finally:
            redis_settings._argument_kinds.cache_clear()

    def test_importing_the_store_does_not_import_redis_py(self) -> None:
        code = "import sys, llm_middleware.stores.redis; print('redis' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "False"


class TestUrl:
    @pytest.mark.parametrize(
        ("url", "expected"),
        [
            ("redis://cache", {"host": "cache", "port": 6379, "ssl": False}),
            ("redis://", {"host": "localhost", "port": 6379, "ssl": False}),
            ("rediss://cache:6380/3", {"host": "cache", "port": 6380, "ssl": True, "db": 3}),
            ("redis://[::1]:6380/", {"host": "::1", "port": 6380, "ssl": False}),
            ("redis://:p%40ss%2Fw%3Ard%23%25@h", {"password": "p@ss/w:rd#%"}),
            ("redis://us%40er:p%C3%A4ss@h", {"username": "us@er", "password": "päss"}),
            ("redis://user@h", {"username": "user"}),
            ("redis://h/2?db=5", {"db": 5}),
            ("redis://h?socket_timeout=0.5&max_connections=3", {"socket_timeout": 0.5, "max_connections": 3}),
            ("rediss://h?ssl_cert_reqs=none&ssl_check_hostname=False", {"ssl_cert_reqs": "none"}),
            ("redis://h?decode_responses=True&encoding=latin-1", {}),
            ("redis://h?client_name=a%20b", {"client_name": "a b"}),
            ("unix:///run/redis.sock?db=2", {"unix_socket_path": "/run/redis.sock", "db": 2}),
            ("unix://user:p%40@/run/a%20b.sock", {"unix_socket_path": "/run/a b.sock", "password": "p@"}),
        ],
    )
    def test_its_parts(self, url: str, expected: dict[str, object]) -> None:
        arguments = dict(read_settings({"url": url}, {}).arguments)
        assert {name: arguments.get(name) for name in expected} == expected
        assert not {"url", "decode_responses", "encoding"} & set(arguments)

    def test_arguments_go_over_its_parts(self) -> None:
        arguments = read_settings({"url": "redis://u:p@h:1/2", "db": 5, "password": "q"}, {}).arguments
        assert (arguments["host"], arguments["db"], arguments["username"], arguments["password"]) == (
            "h",
            5,
            "u",
            "q",
        )

    @pytest.mark.parametrize(
        "url",
        [
            "http://user:s3cret@h",
            "redis:s3cret",
            "redis://user:s3cret#x@h",
            "redis://user:s3cret@h:port",
            "redis://user:s3cret@h:99999",
            "redis://user:s3cret@h/#f",
            "redis://user:s3cret[@h",
            "redis://user:12/s3cret@h",
            "s3cret",
        ],
    )
    def test_a_bad_one_is_not_repeated(self, url: str) -> None:
        """C33."""
        with pytest.raises(ConfigError, match=r"^url: ") as caught:
            read_settings({"url": url}, {})
        assert "s3cret" not in str(caught.value)
        assert caught.value.__suppress_context__ or caught.value.__context__ is None

    def test_an_unknown_argument_in_it(self) -> None:
        with pytest.raises(ConfigError, match="did you mean 'socket_timeout'"):
            read_settings({"url": "redis://h?socket_timout=1"}, {})


class TestEnvironment:
    """C121."""

    @pytest.mark.parametrize(
        ("variable", "text", "name", "value"),
        [
            ("REDIS_HOST", "cache", "host", "cache"),
            ("REDIS_PORT", "6380", "port", 6380),
            ("REDIS_PORT", "tcp://10.0.0.7:6380", "port", 6380),  # as Docker links and Kubernetes set it
            ("REDIS_USERNAME", "app", "username", "app"),
            ("REDIS_PASSWORD", " p ", "password", " p "),
            ("REDIS_SSL", "True", "ssl", True),
            ("REDIS_SSL", "0", "ssl", False),
            ("REDIS_DB", "3", "db", 3),
            ("REDIS_SOCKET_TIMEOUT", "0.1", "socket_timeout", 0.1),
            ("REDIS_SOCKET_KEEPALIVE", "no", "socket_keepalive", False),
            ("REDIS_MAX_CONNECTIONS", "9", "max_connections", 9),
            ("REDIS_CLIENT_NAME", "me", "client_name", "me"),
            ("REDIS_SSL_CERT_REQS", "none", "ssl_cert_reqs", "none"),
            ("REDIS_SSL_CHECK_HOSTNAME", "off", "ssl_check_hostname", False),
            ("REDIS_SSL_MIN_VERSION", "TLSv1_3", "ssl_min_version", ssl.TLSVersion.TLSv1_3),
            ("REDIS_SSL_MIN_VERSION", "TLSv1.2", "ssl_min_version", ssl.TLSVersion.TLSv1_2),
            (
                "REDIS_SSL_INCLUDE_VERIFY_FLAGS",
                "[VERIFY_X509_STRICT, VERIFY_CRL_CHECK_LEAF]",
                "ssl_include_verify_flags",
                [ssl.VerifyFlags.VERIFY_X509_STRICT, ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF],
            ),
            ("REDIS_SOCKET_KEEPALIVE_OPTIONS", '{"4": 30}', "socket_keepalive_options", {4: 30}),
            ("REDIS_PROTOCOL", "2", "protocol", 2),
            ("REDIS_UNIX_SOCKET_PATH", "/s", "unix_socket_path", "/s"),
            ("REDIS_URL", "redis://cache:1", "host", "cache"),
        ],
    )
    def test_each_is_read_in_its_type(self, variable: str, text: str, name: str, value: object) -> None:
        arguments = read_settings({}, {variable: text}).arguments
        assert arguments[name] == value
        assert type(arguments[name]) is type(value)

    def test_every_argument_that_text_can_give(self) -> None:
        given = {
            f"REDIS_{name.upper()}": "1"
            for name, kind in redis_settings._argument_kinds().items()
            if kind in (int, float, str, redis_settings._boolean) and name != "ssl_cert_reqs"
        }
        arguments = read_settings({}, {**given, "REDIS_UNIX_SOCKET_PATH": ""}).arguments
        assert arguments["port"] == 1
        assert arguments["retry_on_timeout"] is True
        assert arguments["lib_name"] == "1"
        assert not set(arguments) & {"decode_responses", "encoding", "single_connection_client"}

    def test_nodes_are_json(self) -> None:
        settings = read_settings({}, {"REDIS_CLUSTER_NODES": '[{"host": "a", "port": 7000}]'})
        assert (settings.topology, settings.nodes) == ("cluster", (("a", 7000),))
        environ = {
            "REDIS_SENTINEL_NODES": '[["a", 26379], ["b", 26379]]',
            "REDIS_SERVICE_NAME": "main",
            "REDIS_SENTINEL_PASSWORD": "sp",
            "REDIS_SENTINEL_USERNAME": "su",
        }
        settings = read_settings({}, environ)
        assert settings == RedisSettings(
            topology="sentinel",
            nodes=(("a", 26379), ("b", 26379)),
            service_name="main",
            sentinel_password="sp",
            sentinel_username="su",
        )

    def test_identity(self) -> None:
        environ = {"REDIS_GCP_SERVICE_ACCOUNT": "a@b", "REDIS_GCP_SSL_CA_CERTS": "/ca.pem"}
        settings = read_settings({}, environ)
        assert settings.gcp_service_account == "a@b"
        assert dict(settings.arguments) == {"ssl": True, "ssl_ca_certs": "/ca.pem"}

    def test_arguments_go_first(self) -> None:
        environ = {"REDIS_HOST": "env", "REDIS_PORT": "1", "REDIS_PASSWORD": "env", "REDIS_DB": "1"}
        arguments = read_settings({"host": "mine", "db": 2}, environ).arguments
        assert dict(arguments) == {"host": "mine", "port": 1, "password": "env", "db": 2}

    @pytest.mark.parametrize(
        "explicit",
        [
            {"host": "mine"},
            {"url": "redis://mine"},
            {"unix_socket_path": "/mine"},
            {"redis_startup_nodes": [["mine", 1]]},
            {"sentinel_nodes": [["mine", 1]], "service_name": "m"},
        ],
    )
    def test_an_address_among_the_arguments_voids_those_of_the_environment(
        self, explicit: dict[str, object]
    ) -> None:
        environ = {
            "REDIS_URL": "redis://env:1",
            "REDIS_HOST": "env",
            "REDIS_UNIX_SOCKET_PATH": "/env",
            "REDIS_CLUSTER_NODES": '[["env", 1]]',
            "REDIS_SENTINEL_NODES": '[["env", 1]]',
            "REDIS_SERVICE_NAME": "env",
        }
        connection = RedisConnection.from_settings(explicit, environ)
        assert "env" not in repr(connection)
        assert "mine" in repr(connection)

    def test_a_url_of_the_environment_gives_way_to_a_host(self) -> None:
        arguments = read_settings({"host": "mine"}, {"REDIS_URL": "rediss://u:p@env:1/3"}).arguments
        assert dict(arguments) == {"host": "mine"}

    def test_in_the_environment_the_url_goes_over_the_rest(self) -> None:
        environ = {
            "REDIS_URL": "redis://url:1",
            "REDIS_HOST": "host",
            "REDIS_PORT": "2",
            "REDIS_PASSWORD": "p",
        }
        assert dict(read_settings({}, environ).arguments) == {
            "host": "url",
            "port": 1,
            "ssl": False,
            "password": "p",
        }

    def test_empty_and_foreign_variables_are_none(self) -> None:
        environ = {
            "REDIS_HOST": "",
            "REDIS_PASSWORD": " ",
            "REDIS_FOO": "x",
            "REDIS_RETRY": "3",
            "REDIS_CACHE": "x",
        }
        assert read_settings({}, environ) == RedisSettings(topology="standalone")

    def test_a_wrong_one_is_named(self) -> None:
        with pytest.raises(
            ConfigError, match=r"port \(or REDIS_PORT in the environment\): 'x' is not a whole number"
        ):
            read_settings({}, {"REDIS_PORT": "x"})
        with pytest.raises(ConfigError, match="REDIS_CLUSTER_NODES in the environment"):
            read_settings({}, {"REDIS_CLUSTER_NODES": "a:1,b:2"})

    def test_the_process_environment_is_the_default(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("REDIS_HOST", "from-the-process")
        assert RedisConnection.from_settings({}).describe()["host"] == "from-the-process"


class TestDescription:
    """C33."""

    def test_facts(self) -> None:
        connection = RedisConnection.from_settings({"url": "rediss://app:s3cret@cache:6380/2"}, {})
        assert connection.describe() == {
            "topology": "standalone",
            "address": "cache:6380",
            "host": "cache",
            "port": 6380,
            "db": 2,
            "tls": True,
            "username": "app",
        }

    def test_facts_of_nodes(self) -> None:
        nodes = {"sentinel_nodes": [["a", 1], ["b", 2]], "service_name": "m", "sentinel_password": "s3cret"}
        facts = RedisConnection.from_settings(nodes, {}).describe()
        assert (facts["topology"], facts["address"], facts["service_name"]) == ("sentinel", "a:1, b:2", "m")
        assert "host" not in facts
        facts = RedisConnection.from_settings({"unix_socket_path": "/s"}, {}).describe()
        assert facts["address"] == "unix:///s"

    @pytest.mark.parametrize(
        "settings",
        [
            {"password": "s3cret"},
            {"url": "redis://:s3cret@h"},
            {"ssl_password": "s3cret", "ssl": True},
            {"sentinel_nodes": [["a", 1]], "service_name": "m", "sentinel_password": "s3cret"},
        ],
    )
    def test_no_secret_is_shown(self, settings: dict[str, object]) -> None:
        connection = RedisConnection.from_settings(settings, {})
        shown = [
            repr(connection),
            str(connection.describe()),
            repr(connection.settings),
            repr(RedisStore(connection)),
        ]
        assert not any("s3cret" in text for text in shown)

    def test_no_secret_is_logged(self, face: SyncFace, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG)
        with redis_server("--requirepass", "s3cret-word", password="s3cret-word") as server:
            address = {"host": HOST, "port": server.port}
            assert works(face, {**address, "password": "s3cret-word"})
            assert "s3cret-wrong" not in fails(face, {**address, "password": "s3cret-wrong"})
        assert "s3cret" not in caplog.text


class TestNothingConnectsEarly:
    """C63."""

    @pytest.fixture
    def listener(self) -> Iterator[socket.socket]:
        with socket.create_server((HOST, 0)) as made:
            made.setblocking(False)
            yield made

    @pytest.mark.parametrize("topology", ["standalone", "url", "cluster", "sentinel", "identity"])
    def test_construction(self, listener: socket.socket, topology: str) -> None:
        port = listener.getsockname()[1]
        settings = {
            "standalone": {"host": HOST, "port": port, "password": "p"},
            "url": {"url": f"redis://{HOST}:{port}/1"},
            "cluster": {"redis_startup_nodes": [{"host": HOST, "port": port}]},
            "sentinel": {"sentinel_nodes": [[HOST, port]], "service_name": "m"},
            "identity": {"host": HOST, "port": port, "gcp_service_account": "a@b"},
        }[topology]
        fetched = []
        connection = RedisConnection.from_settings(settings, {}, fetch_token=fetched.append)
        store = RedisStore(connection)
        store.connection.describe()

        async def startup() -> None:
            connection.async_client()

        asyncio.run(startup())
        if topology != "cluster":
            connection.sync_client()
        store.close()
        with pytest.raises(BlockingIOError):
            listener.accept()
        assert fetched == []


class TestClients:
    def test_what_a_cache_needs_is_set(self, server: RedisServer) -> None:
        connection = RedisConnection.from_settings({"host": HOST, "port": server.port}, {})
        assert (connection.budget, connection.max_connections) == (0.25, 50)

        async def asynchronous() -> redis.asyncio.ConnectionPool:
            return connection.async_client().connection_pool

        for pool in (connection.sync_client().connection_pool, asyncio.run(asynchronous())):
            given = pool.connection_kwargs
            assert (given["socket_timeout"], given["socket_connect_timeout"]) == (0.25, 0.25)
            assert given["retry"].get_retries() == 0
            assert (given["health_check_interval"], given["decode_responses"]) == (0, False)
            assert given["driver_info"] is None
            assert pool.max_connections == 54
        connection.close()

    def test_a_timeout_among_the_settings_is_the_budget(self) -> None:
        connection = RedisConnection.from_settings(
            {"socket_timeout": 3, "max_connections": 5}, {}, budget=1.0
        )
        assert (connection.budget, connection.max_connections) == (3.0, 5)
        assert RedisConnection.from_settings({}, {}, budget=1.0).budget == 1.0

    def test_a_connection_is_one_command(self, face: SyncFace, server: RedisServer) -> None:
        server.ask("CONFIG", "RESETSTAT")
        assert works(face, {"host": HOST, "port": server.port})
        calls = server.calls()
        assert (calls["hello"], calls["set"], calls["get"]) == (2, 1, 1)  # one HELLO is that of `calls`
        assert set(calls) == {"hello", "set", "get", "config|resetstat"}

    def test_databases(self, face: SyncFace, server: RedisServer) -> None:
        server.ask("FLUSHALL")
        assert works(face, {"host": HOST, "port": server.port, "db": 3})
        assert works(face, {"url": f"redis://{HOST}:{server.port}/4"})
        assert works(face, {"host": HOST}, {"REDIS_PORT": str(server.port), "REDIS_DB": "5"})
        assert [server.ask("DBSIZE", db=db) for db in range(6)] == [0, 0, 0, 1, 1, 1]

    def test_any_argument_of_redis_py(self, face: SyncFace, server: RedisServer) -> None:
        store = make(
            {"host": HOST, "port": server.port, "client_name": "the-cache", "socket_keepalive": False}
        )
        face.do(store, "get", KEY)
        assert "the-cache" in {client["name"] for client in server.ask("CLIENT LIST")}
        store.close()

    def test_a_socket_in_the_file_system(self, face: SyncFace, tmp_path: Path) -> None:
        path = str(tmp_path / "s.sock")
        with redis_server("--unixsocket", path):
            assert works(face, {"unix_socket_path": path})
            assert works(face, {"url": f"unix://{path}?db=2"})
            assert works(face, {}, {"REDIS_UNIX_SOCKET_PATH": path})
        assert path in fails(face, {"unix_socket_path": path})

    def test_passwords_and_users(self, face: SyncFace) -> None:
        password, quoted = "p@ss/wörd:#%", "p%40ss%2Fw%C3%B6rd%3A%23%25"
        rules = f"user app on >{password} ~llm:* +@all -@dangerous".split()
        with redis_server(
            "--requirepass", "default-pass", *("--" + rules[0], *rules[1:]), password="default-pass"
        ) as s:
            address = {"host": HOST, "port": s.port}
            assert works(face, {**address, "password": "default-pass"})
            assert works(face, {**address, "username": "app", "password": password})
            assert works(face, {"url": f"redis://app:{quoted}@{HOST}:{s.port}"})
            assert works(face, address, {"REDIS_USERNAME": "app", "REDIS_PASSWORD": password})
            assert works(face, {}, {"REDIS_URL": f"redis://:default-pass@{HOST}:{s.port}"})
            assert works(face, {**address, "password": "default-pass"}, {"REDIS_PASSWORD": "other"})
            assert "to authenticate the client" in fails(face, address)
            assert "wrong" not in fails(face, {**address, "password": "wrong-pass"}).replace("WRONGPASS", "")

    def test_tls(self, face: SyncFace, tmp_path: Path) -> None:
        with redis_tls() as (server, made):
            address = {"host": HOST, "port": server.port, "ssl": True}
            stranger = certificates(tmp_path).authority
            assert works(face, {**address, "ssl_ca_certs": made.authority})
            assert works(face, {**address, "ssl_cert_reqs": "none"})
            assert works(face, {"url": f"rediss://localhost:{server.port}/0?ssl_ca_certs={made.authority}"})
            environ = {"REDIS_HOST": HOST, "REDIS_PORT": str(server.port), "REDIS_SSL": "true"}
            assert works(face, {}, {**environ, "REDIS_SSL_CA_CERTS": made.authority})
            assert works(face, {**address, "gcp_ssl_ca_certs": made.authority})
            assert "CERTIFICATE_VERIFY_FAILED" in fails(face, address)
            assert "CERTIFICATE_VERIFY_FAILED" in fails(face, {**address, "ssl_ca_certs": stranger})
            fails(face, {**address, "ssl": False, "ssl_ca_certs": made.authority})

    def test_tls_for_another_name(self, face: SyncFace, tmp_path: Path) -> None:
        made = certificates(tmp_path, "elsewhere.example")
        options = ["--tls-cert-file", made.certificate, "--tls-key-file", made.key]
        options += ["--tls-ca-cert-file", made.authority, "--tls-auth-clients", "no"]
        unchecked = {"ssl": True, "ssl_ca_certs": made.authority, "ssl_check_hostname": False}
        with redis_server(*options, tls=True, **unchecked) as server:
            address = {"host": HOST, "port": server.port}
            assert works(face, {**address, **unchecked})
            assert "CERTIFICATE_VERIFY_FAILED" in fails(
                face, {**address, "ssl": True, "ssl_ca_certs": made.authority}
            )

    def test_a_cluster_by_environment_with_a_password(self, face: SyncFace) -> None:
        with redis_cluster(3, "--requirepass", "cluster-pass", password="cluster-pass") as cluster:
            environ = {"REDIS_CLUSTER_NODES": json.dumps(cluster.nodes), "REDIS_PASSWORD": "cluster-pass"}
            assert works(face, {}, environ)
            assert works(face, {"redis_startup_nodes": cluster.nodes[2:], "password": "cluster-pass"})
            dead = [{"host": HOST, "port": free_port()}, *cluster.nodes[1:]]
            assert works(face, {"redis_startup_nodes": dead, "password": "cluster-pass"})
            assert "cluster-wrong" not in fails(
                face, {"redis_startup_nodes": cluster.nodes, "password": "cluster-wrong"}
            )

    def test_sentinels_with_a_password_of_their_own(self, face: SyncFace) -> None:
        with redis_sentinel(password="sentinel-pass") as made:
            nodes = {"sentinel_nodes": made.nodes, "service_name": made.service}
            assert works(face, {**nodes, "sentinel_password": "sentinel-pass"})
            environ = {
                "REDIS_SENTINEL_NODES": json.dumps(made.nodes),
                "REDIS_SERVICE_NAME": made.service,
                "REDIS_SENTINEL_PASSWORD": "sentinel-pass",
            }
            assert works(face, {}, environ)
            assert "sentinel-wrong" not in fails(face, {**nodes, "sentinel_password": "sentinel-wrong"})
            assert "No master found for 'other'" in fails(
                face, {**nodes, "service_name": "other", "sentinel_password": "sentinel-pass"}
            )

    def test_an_argument_that_only_the_sync_client_has(self, server: RedisServer) -> None:
        store = make({"host": HOST, "port": server.port, "ssl_validate_ocsp": False})
        assert store.get(KEY) in (None, b"value")
        with pytest.raises(ConfigError, match="ssl_validate_ocsp: redis-py's async client does not take it"):
            asyncio.run(store.aget(KEY))
        store.close()

    def test_a_client_for_other_uses(self, server: RedisServer) -> None:
        """What is beside the store (subscriptions, scripts) uses the same connections, budget and errors."""
        connection = RedisConnection.from_settings({"host": HOST, "port": server.port}, {}, budget=AMPLE)
        with connection.use() as client:
            assert client.execute_command("ECHO", "a") == b"a"
        with pytest.raises(StoreError, match="unknown command"), connection.use() as client:
            client.execute_command("NONSENSE")
        with pytest.raises(StoreError, match="Timeout reading"), connection.use(0.05) as client:
            client.execute_command("BLPOP", "nothing", 0)

        async def asynchronous() -> None:
            async with connection.ause() as client:
                assert await client.execute_command("ECHO", "a") == b"a"
            with pytest.raises(StoreError, match="unknown command"):
                async with connection.ause() as client:
                    await client.execute_command("NONSENSE")
            with pytest.raises(StoreError, match=r"no answer within 0\.05 s"):
                async with connection.ause(0.05) as client:
                    await client.execute_command("BLPOP", "nothing", 0)

        asyncio.run(asynchronous())
        connection.close()

    def test_an_error_of_ours_passes_through(self, server: RedisServer) -> None:
        connection = RedisConnection.from_settings({"host": HOST, "port": server.port}, {})
        mine = ConfigError("mine")
        with pytest.raises(ConfigError) as caught, connection.use():
            raise mine
        assert caught.value is mine
        with pytest.raises(KeyboardInterrupt), connection.use():
            raise KeyboardInterrupt
        assert connection.mine().turns._free.qsize() == 50
        connection.close()


class TestLifetime:
    def test_each_event_loop_has_its_own_client_and_closes_it(self, server: RedisServer) -> None:
        store = make({"host": HOST, "port": server.port, "client_name": "loops"})

        def ours() -> int:
            return sum(client["name"] == "loops" for client in server.ask("CLIENT LIST"))

        async def use(other: asyncio.Event | None = None) -> int:
            await store.aget(KEY)
            client = store.connection.async_client()
            assert client is store.connection.async_client()
            if other is None:
                return ours()
            return await asyncio.to_thread(asyncio.run, use())

        assert asyncio.run(use(asyncio.Event())) == 2
        wait_for(lambda: ours() == 0, "the loops' connections are closed")
        assert asyncio.run(use()) == 1
        wait_for(lambda: ours() == 0, "the loop's connection is closed")
        assert [loop.is_closed() for loop in store.connection.mine()._loops] == [True]

    def test_a_store_that_nobody_closed(self, server: RedisServer) -> None:
        """Dropped between the loop's last work and its end: closed all the same, without a warning."""
        settings = {"host": HOST, "port": server.port, "client_name": "dropped"}
        with asyncio.Runner() as runner:
            store = make(settings)
            runner.run(store.aget(KEY))
            del store
            gc.collect()
        gc.collect()
        wait_for(lambda: "dropped" not in str(server.ask("CLIENT LIST")), "its connection is closed")

    def test_closing_is_for_this_loop_and_may_be_repeated(self, server: RedisServer) -> None:
        store = make({"host": HOST, "port": server.port})

        async def use() -> None:
            await store.aclose()
            await store.aset(KEY, b"value", None)
            client = store.connection.async_client()
            await store.aclose()
            await store.aclose()
            assert await store.aget(KEY) == b"value"
            assert store.connection.async_client() is not client
            store.close()
            assert await store.aget(KEY) == b"value"

        asyncio.run(use())

    def connected(self, server: RedisServer, name: str) -> int:
        return sum(client["name"] == name for client in server.ask("CLIENT LIST"))

    @pytest.fixture
    def complaints(self, caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
        """What is warned of and logged until the end of the test; it must be nothing."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            told: list[str] = []
            yield told
            gc.collect()
        told += [str(warning.message) for warning in caught if warning.category is not DeprecationWarning]
        told += [record.getMessage() for record in caplog.records if record.name == "asyncio"]
        assert told == []

    @pytest.mark.parametrize("topology", ["standalone", "cluster", "sentinel"])
    @pytest.mark.usefixtures("complaints")
    def test_closing_reaches_the_loops_of_other_threads(self, topology: str) -> None:
        with contextlib.ExitStack() as stack:
            if topology == "cluster":
                made = stack.enter_context(redis_cluster(2))
                servers, settings = made.servers, {"redis_startup_nodes": made.nodes}
            elif topology == "sentinel":
                made = stack.enter_context(redis_sentinel())
                servers = [made.master, made.sentinels[0]]
                settings = {"sentinel_nodes": made.nodes, "service_name": made.service}
            else:
                servers = [stack.enter_context(redis_server())]
                settings = {"host": HOST, "port": servers[0].port}
            store = make({**settings, "client_name": "far"})
            held, over = threading.Event(), threading.Event()

            async def use() -> None:
                await store.amset([(f"llm:{number:064x}", b"value", 60) for number in range(9)])
                held.set()
                await asyncio.to_thread(over.wait)

            thread = threading.Thread(target=asyncio.run, args=(use(),))
            thread.start()
            held.wait()
            store.get(KEY)
            assert all(self.connected(server, "far") for server in servers)
            assert len(store.connection.mine()._loops) == 1
            ours = next(iter(store.connection.mine()._loops.values()))
            store.close()
            for server in servers:
                wait_for(lambda server=server: not self.connected(server, "far"), "every client is gone")
            wait_for(lambda: ours not in redis_connect._OPEN, "nothing holds the client")
            over.set()
            thread.join()
            assert len(store.connection.mine()._loops) == 0

    @pytest.mark.usefixtures("complaints")
    @pytest.mark.parametrize("turns", [1, 5])
    def test_what_is_under_way_elsewhere_ends_first(self, server: RedisServer, turns: int) -> None:
        """The one that waits for its turn as well."""
        settings = {"host": HOST, "port": server.port, "client_name": "busy", "max_connections": turns}
        connection = RedisConnection.from_settings(settings, {}, budget=AMPLE)
        began, got = threading.Event(), []

        async def pop() -> None:
            async with connection.ause() as client:
                began.set()
                got.append(await client.execute_command("BLPOP", "under-way", 0))

        async def both() -> None:
            await asyncio.gather(pop(), pop())

        thread = threading.Thread(target=asyncio.run, args=(both(),))
        thread.start()
        began.wait()
        wait_for(lambda: self.connected(server, "busy") == min(turns, 2), "they are connected")
        connection.close()
        server.ask("RPUSH", "under-way", "a", "b")
        thread.join()
        assert sorted(got) == [(b"under-way", b"a"), (b"under-way", b"b")]
        wait_for(lambda: self.connected(server, "busy") == 0, "every client is gone")

    @pytest.mark.usefixtures("complaints")
    def test_closing_while_a_loop_ends(self, server: RedisServer) -> None:
        """At any moment of its end: nothing is left open and nothing is complained of."""
        store = make({"host": HOST, "port": server.port, "client_name": "ending"})
        for number in range(150):
            used, go = threading.Event(), threading.Event()

            async def use(used: threading.Event = used, go: threading.Event = go) -> None:
                await store.aget(KEY)
                used.set()
                go.wait()
                for _ in range(number % 5):  # noqa: B023 - run at once
                    await asyncio.sleep(0)

            thread = threading.Thread(target=asyncio.run, args=(use(),))
            thread.start()
            used.wait()
            if number % 3 == 0:
                store.close()
            go.set()
            if number % 3 == 1:
                store.close()
            elif number % 3 == 2:
                asyncio.run(store.aclose())
            thread.join()
        wait_for(lambda: self.connected(server, "ending") == 0, "every client is gone")
        store.close()

    @pytest.mark.usefixtures("complaints")
    def test_closing_for_a_loop_that_pauses_or_is_over(self, server: RedisServer) -> None:
        store = make({"host": HOST, "port": server.port, "client_name": "pausing"})
        with asyncio.Runner() as runner:
            runner.run(store.aget(KEY))
            store.close()  # takes effect when the loop runs again, here at its end
            assert self.connected(server, "pausing") == 1
        wait_for(lambda: self.connected(server, "pausing") == 0, "its client is gone")
        with asyncio.Runner() as runner:
            runner.run(store.aget(KEY))
            store.close()
            assert runner.run(store.aget(KEY)) in (None, b"value")
            wait_for(lambda: runner.run(self.one(server, "pausing")), "the first client is gone")
        asyncio.run(store.aget(KEY))
        store.close()
        store.close()
        wait_for(lambda: self.connected(server, "pausing") == 0, "every client is gone")

    @pytest.mark.usefixtures("complaints")
    @pytest.mark.parametrize("busy", [False, True])
    def test_a_loop_that_ends_has_no_task_left(self, server: RedisServer, busy: bool) -> None:
        """Whether it was to close its client before, while one has a turn, or is asked to afterwards."""
        settings = {"host": HOST, "port": server.port, "client_name": "ends", "max_connections": 1}
        store = make(settings, budget=0.5)
        loop = asyncio.new_event_loop()
        loop.run_until_complete(store.aget(KEY))
        ours = store.connection.mine()._loops[loop]
        if busy:
            loop.run_until_complete(ours.turns.acquire())
            store.close()
        loop.run_until_complete(loop.shutdown_asyncgens())
        assert asyncio.all_tasks(loop) == set()
        ours.close_soon()
        loop.call_soon(loop.stop)
        loop.run_forever()
        assert asyncio.all_tasks(loop) == set()
        wait_for(lambda: self.connected(server, "ends") == 0, "its client is gone")
        loop.close()
        ours.close_soon()

    async def one(self, server: RedisServer, name: str) -> bool:
        return await asyncio.to_thread(self.connected, server, name) == 1

    @pytest.mark.usefixtures("complaints")
    def test_closing_that_is_cancelled(self, server: RedisServer) -> None:
        connection = RedisConnection.from_settings(
            {"host": HOST, "port": server.port, "client_name": "cancelled"}, {}, budget=AMPLE
        )

        async def hold() -> None:
            async with connection.ause() as client:
                await client.execute_command("BLPOP", "nothing", 0)

        async def use() -> int:
            holder = asyncio.create_task(hold())
            while await asyncio.to_thread(self.connected, server, "cancelled") == 0:
                pass
            closing = asyncio.create_task(connection.aclose())
            await asyncio.sleep(0)
            closing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await closing
            with pytest.raises(StoreError):  # closed all the same
                await holder
            return await asyncio.to_thread(self.connected, server, "cancelled")

        before = len(redis_connect._OPEN)
        assert asyncio.run(use()) == 0
        assert len(redis_connect._OPEN) == before

    def test_many_threads_make_one_client(self, server: RedisServer) -> None:
        store = make({"host": HOST, "port": server.port})
        clients = set()
        barrier = threading.Barrier(16)

        def use() -> None:
            barrier.wait()
            clients.add(store.connection.sync_client())
            store.get(KEY)

        threads = [threading.Thread(target=use) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(clients) == 1
        store.close()

    @pytest.mark.parametrize("topology", ["standalone", "cluster"])
    def test_a_forked_child_has_connections_of_its_own(self, server: RedisServer, topology: str) -> None:
        if topology == "cluster":
            with redis_cluster(1) as cluster:
                self.fork({"redis_startup_nodes": cluster.nodes})
        else:
            self.fork({"host": HOST, "port": server.port})

    def fork(self, settings: dict[str, object]) -> None:
        warned = ["-W", "default::ResourceWarning", "-W", "ignore::DeprecationWarning"]
        done = subprocess.run(
            [sys.executable, *warned, "-c", FORKING, json.dumps(settings)],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=Path(__file__).parents[2],
        )
        assert done.stderr == ""
        before, child, after = (json.loads(line) for line in done.stdout.splitlines())
        assert after == before
        assert len({*before, *child}) == 4


FORKING = """
import asyncio, gc, json, os, sys, threading
from llm_middleware.stores.redis_connect import RedisConnection

settings = {**json.loads(sys.argv[1]), "max_connections": 1}
connection = RedisConnection.from_settings(settings, {}, budget=10)
which = {"target_nodes": "random"} if connection.clustered else {}
loop = asyncio.new_event_loop()

def sync():
    with connection.use() as client:
        return client.execute_command("CLIENT ID", **which)

async def asynchronous():
    gc.collect()
    async with connection.ause() as client:
        return await client.execute_command("CLIENT ID", **which)

def show(ids):
    print(json.dumps([x if isinstance(x, int) else list(x.values())[0] for x in ids]), flush=True)

def hold():
    with connection.use():
        held.set()
        release.wait()

show([sync(), loop.run_until_complete(asynchronous())])
held, release = threading.Event(), threading.Event()
holder = threading.Thread(target=hold)  # whose turn is taken while the process forks
holder.start()
held.wait()
pid = os.fork()
if pid == 0:
    show([sync(), asyncio.run(asynchronous())])
    connection.close()
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
release.set()
holder.join()
show([sync(), loop.run_until_complete(asynchronous())])
loop.run_until_complete(connection.aclose())
loop.close()
connection.close()
"""


class TokenServer:
    """The metadata server and the IAM Credentials API in one. ``token`` is what it gives out."""

    def __init__(self) -> None:
        self.token = "token-1"
        self.expires = "2100-01-01T00:00:00.123456789Z"
        self.asked: list[tuple[str, str | None, object]] = []
        self.broken = False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append((self.path, self.headers["Metadata-Flavor"], None))
                self.answer({"access_token": "machine-token", "expires_in": 3599, "token_type": "Bearer"})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append((self.path, self.headers["Authorization"], body))
                self.answer({"accessToken": outer.token, "expireTime": outer.expires})

            def answer(self, content: object) -> None:
                raw = json.dumps(content).encode()
                self.send_response(503 if outer.broken else 200)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer((HOST, 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)
        self.thread.start()

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.http.server_port}"

    @property
    def given(self) -> int:
        return sum(body is not None for _, _, body in self.asked)

    def fetch(self, account: str) -> tuple[str, float]:
        return fetch_google_token(account, metadata=self.address, credentials=self.address)

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def tokens() -> Iterator[TokenServer]:
    made = TokenServer()
    yield made
    made.close()


class TestGoogleToken:
    @pytest.mark.parametrize("account", ["cache@project.iam", "projects/-/serviceAccounts/cache@project.iam"])
    def test_the_machine_asks_for_the_accounts_token(self, tokens: TokenServer, account: str) -> None:
        assert tokens.fetch(account) == ("token-1", 4102444800.123456)
        scope = {"scope": ["https://www.googleapis.com/auth/cloud-platform"]}
        assert tokens.asked == [
            ("/computeMetadata/v1/instance/service-accounts/default/token", "Google", None),
            (
                "/v1/projects/-/serviceAccounts/cache@project.iam:generateAccessToken",
                "Bearer machine-token",
                scope,
            ),
        ]

    def test_the_metadata_server_may_be_elsewhere(
        self, tokens: TokenServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("GCE_METADATA_HOST", f"{HOST}:{tokens.http.server_port}")
        assert fetch_google_token("a@b", credentials=tokens.address)[0] == "token-1"


class TestTokenSource:
    """When a token is fetched, by a clock that stands still."""

    @pytest.fixture
    def clock(self) -> FakeClock:
        return FakeClock()

    def make(self, clock: FakeClock, life: float = 3600.0):
        fetched: list[str] = []

        def fetch(account: str) -> tuple[str, float]:
            fetched.append(account)
            return f"token-{len(fetched)}", clock() + life

        return TokenSource(fetch, "a@b", clock=clock), fetched

    def test_one_is_kept_until_shortly_before_its_end(self, clock: FakeClock) -> None:
        source, fetched = self.make(clock)
        assert fetched == []
        source.wait()
        for _ in range(3):
            clock.advance(1000)
            assert source.current() == "token-1"
        assert fetched == ["a@b"]
        clock.advance(300)  # 300 s before its end: its successor is fetched, and meanwhile it serves
        assert source.current() in ("token-1", "token-2")
        wait_for(lambda: source.current() == "token-2", "the successor is there")
        assert fetched == ["a@b", "a@b"]

    def test_one_that_is_over_is_not_used(self, clock: FakeClock) -> None:
        source, _ = self.make(clock)
        source.wait()
        clock.advance(3590)
        source._start = lambda: None
        assert source.current() == ""

    def test_short_lives_are_used_for_most_of_their_time(self, clock: FakeClock) -> None:
        source, fetched = self.make(clock, life=40.0)
        source.wait()
        clock.advance(29)
        assert (source.current(), len(fetched)) == ("token-1", 1)
        clock.advance(1)
        wait_for(lambda: source.current() == "token-2", "the successor is there")

    def test_all_who_wait_share_one_fetch(self, clock: FakeClock) -> None:
        release, fetched = threading.Event(), []

        def fetch(account: str) -> tuple[str, float]:
            fetched.append(account)
            release.wait()
            return "token", clock() + 3600

        source = TokenSource(fetch, "a@b", clock=clock)

        async def asynchronous() -> None:
            await asyncio.gather(*[source.await_() for _ in range(5)])

        threads = [threading.Thread(target=source.wait) for _ in range(5)]
        threads.append(threading.Thread(target=asyncio.run, args=(asynchronous(),)))
        for thread in threads:
            thread.start()
        wait_for(lambda: fetched, "the fetch began")
        release.set()
        for thread in threads:
            thread.join()
        assert fetched == ["a@b"]
        assert source.current() == "token"

    def test_a_failure_is_told_and_not_repeated_at_once(self, clock: FakeClock) -> None:
        asked = []

        def fetch(account: str) -> tuple[str, float]:
            asked.append(account)
            raise OSError("identity service is down")

        source = TokenSource(fetch, "a@b", clock=clock)
        for _ in range(3):
            with pytest.raises(StoreError, match="no token for a@b: OSError: identity service is down"):
                source.wait()
            with pytest.raises(StoreError, match="identity service is down"):
                asyncio.run(source.await_())
        assert len(asked) == 1
        clock.advance(1)
        with pytest.raises(StoreError):
            source.wait()
        assert len(asked) == 2

    def test_a_refused_one_is_replaced(self, clock: FakeClock) -> None:
        source, fetched = self.make(clock)
        source.wait()
        source.reject()
        with pytest.raises(StoreError, match="refused"):
            source.wait()
        assert len(fetched) == 1
        clock.advance(1)
        source.wait()
        assert source.current() == "token-2"
        assert source.secrets() == ["token-2"]


class TestServiceAccount:
    """A server whose user's password is the token of the moment."""

    @pytest.fixture
    def guarded(self, tokens: TokenServer) -> Iterator[RedisServer]:
        with redis_server(
            "--user", "admin", "on", ">admin", "~*", "+@all", username="admin", password="admin"
        ) as made:
            made.ask("ACL", "SETUSER", "default", "resetpass", ">token-1")
            yield made

    def make(self, server: RedisServer, tokens: TokenServer, **changes: object) -> RedisStore:
        settings = {"host": HOST, "port": server.port, "gcp_service_account": "cache@project.iam", **changes}
        return make(settings, fetch_token=tokens.fetch)

    def test_the_token_is_the_password_and_is_fetched_once(
        self, face: SyncFace, guarded: RedisServer, tokens: TokenServer
    ) -> None:
        store = self.make(guarded, tokens, max_connections=5)
        assert face.together(*[(store, "set", KEY, b"value", 60)] * 30) == [None] * 30
        assert face.do(store, "get", KEY) == b"value"
        assert tokens.given == 1
        assert "token-1" not in f"{store.connection!r} {face.do(store, 'ping')}"
        store.close()

    def test_a_new_password_is_picked_up(
        self, face: SyncFace, guarded: RedisServer, tokens: TokenServer
    ) -> None:
        store = self.make(guarded, tokens)
        face.do(store, "set", KEY, b"value", 60)
        tokens.token = "token-2"
        guarded.ask("ACL", "SETUSER", "default", "resetpass", ">token-2")
        assert face.do(store, "get", KEY) == b"value"  # connections that are open stay so
        guarded.ask("CLIENT", "KILL", "USER", "default")
        with pytest.raises(StoreError) as caught:
            face.do(store, "get", KEY)
        assert "token-1" not in repr(caught.value)

        def reads() -> bool:
            try:
                return face.do(store, "get", KEY) == b"value"
            except StoreError:
                return False

        wait_for(reads, "the new token is used")
        assert tokens.given == 2
        store.close()

    def test_an_identity_service_that_fails(
        self, face: SyncFace, guarded: RedisServer, tokens: TokenServer
    ) -> None:
        tokens.broken = True
        store = self.make(guarded, tokens)
        with pytest.raises(
            StoreError, match=r"no token for cache@project\.iam: OSError: HTTP 503 from http://"
        ):
            face.do(store, "get", KEY)
        store.close()

    def test_an_identity_service_that_hangs_costs_one_budget(
        self, face: SyncFace, guarded: RedisServer
    ) -> None:
        release = threading.Event()

        def fetch(account: str) -> tuple[str, float]:
            release.wait()
            return "token-1", 4102444800.0

        settings = {"host": HOST, "port": guarded.port, "gcp_service_account": "a@b"}
        store = make(settings, budget=0.25, fetch_token=fetch)
        with pytest.raises(StoreError):
            face.do(store, "get", KEY)
        release.set()
        wait_for(lambda: store.connection.mine().tokens.current(), "the token is there")

        def writes() -> bool:
            try:
                return face.do(store, "set", KEY, b"value", 60) is None
            except StoreError:
                return False

        wait_for(writes, "the token is used")
        store.close()

    def test_in_a_cluster_over_tls_by_environment(
        self, face: SyncFace, tokens: TokenServer, tmp_path: Path
    ) -> None:
        made = certificates(tmp_path)
        options = ["--tls-cert-file", made.certificate, "--tls-key-file", made.key, "--tls-cluster", "yes"]
        options += [
            "--tls-ca-cert-file",
            made.authority,
            "--tls-auth-clients",
            "no",
            "--requirepass",
            "token-1",
        ]
        client = {"ssl": True, "ssl_ca_certs": made.authority, "password": "token-1"}
        with redis_cluster(3, *options, tls=True, **client) as cluster:
            environ = {
                "REDIS_CLUSTER_NODES": json.dumps(cluster.nodes),
                "REDIS_GCP_SERVICE_ACCOUNT": "cache@project.iam",
                "REDIS_GCP_SSL_CA_CERTS": made.authority,
            }
            store = make({}, environ, fetch_token=functools.partial(TokenServer.fetch, tokens))
            keys = [f"llm:{number:064x}" for number in range(20)]
            face.do(store, "mset", [(name, b"value", 60) for name in keys])
            assert face.do(store, "mget", keys) == [b"value"] * 20
            assert tokens.given == 1
            store.close()


def test_the_environment_of_this_process_names_no_redis() -> None:
    """The tests give every setting; a variable of the machine must not decide what they talk to."""
    assert not [name for name in os.environ if name.startswith("REDIS_")]
