"""Tokens instead of passwords: those that are signed with AWS credentials and those of Entra ID."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, parse_qsl, quote, urlsplit

import pytest

from llm_middleware.errors import ConfigError, StoreError
from llm_middleware.stores.redis import RedisStore
from llm_middleware.stores.redis_connect import RedisConnection
from llm_middleware.stores.redis_credentials import (
    AwsIam,
    EntraId,
    TokenSource,
    fetch_entra_token,
    sign_aws_token,
    token_source,
)
from llm_middleware.stores.redis_settings import RedisSettings, read_settings
from tests.services import FACES, HOST, Certificates, RedisServer, SyncFace, redis_server, redis_tls, wait_for

KEY = f"llm:{1:064x}"
AWS = {
    "aws_iam_auth": True,
    "aws_iam_user_name": "app",
    "aws_iam_cache_name": "My-Cache",
    "aws_iam_region": "eu-west-1",
    "ssl": True,
}
IAM = AwsIam(user="app", cache="My-Cache", region="eu-west-1")


@pytest.fixture(params=["sync", "async"])
def face(request: pytest.FixtureRequest) -> Iterator[SyncFace]:
    made = FACES[request.param]()
    yield made
    made.close()


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cret-key")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "session/token+")


class TestAwsSettings:
    def test_by_arguments(self) -> None:
        settings = read_settings(AWS, {})
        assert settings.aws_iam == IAM
        assert dict(settings.arguments) == {"ssl": True, "username": "app"}

    def test_by_environment(self) -> None:
        environ = {f"REDIS_{name.upper()}": str(value) for name, value in AWS.items()}
        made = read_settings(
            {}, {**environ, "REDIS_AWS_IAM_SERVERLESS": "True", "AWS_REGION": "other"}
        ).aws_iam
        assert made == AwsIam(user="app", cache="My-Cache", region="eu-west-1", serverless=True)

    @pytest.mark.parametrize(
        ("environ", "region"),
        [({"AWS_REGION": "a", "AWS_DEFAULT_REGION": "b"}, "a"), ({"AWS_DEFAULT_REGION": "b"}, "b")],
    )
    def test_the_region_of_the_process(self, environ: dict[str, str], region: str) -> None:
        assert read_settings({**AWS, "aws_iam_region": None}, environ).aws_iam.region == region

    def test_switched_off(self) -> None:
        settings = read_settings({**AWS, "aws_iam_auth": "false", "password": "p"}, {})
        assert settings.aws_iam is None
        assert dict(settings.arguments) == {"ssl": True, "password": "p"}

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"aws_iam_user_name": None}, "aws_iam_auth needs aws_iam_user_name"),
            ({"aws_iam_cache_name": ""}, "aws_iam_auth needs aws_iam_cache_name"),
            ({"aws_iam_region": None}, "aws_iam_auth needs aws_iam_region"),
            ({"ssl": False}, "aws_iam_auth needs ssl: the token is for connections over TLS only"),
            ({"password": "p"}, "aws_iam_auth and password exclude each other"),
            ({"gcp_service_account": "a@b"}, "gcp_service_account and aws_iam_auth exclude each other"),
            ({"azure_redis_ad_token": True}, "aws_iam_auth and azure_redis_ad_token exclude each other"),
            (
                {"aws_iam_auth": "perhaps"},
                "aws_iam_auth (or REDIS_AWS_IAM_AUTH in the environment): 'perhaps' is not true or false",
            ),
        ],
    )
    def test_what_does_not_go(self, changes: dict[str, object], message: str) -> None:
        with pytest.raises(ConfigError) as caught:
            read_settings({**AWS, **changes}, {})
        assert caught.value.message == message


def signature(host: str, query: str) -> str:
    """What AWS computes for a presigned request (Signature Version 4), from the parts of its URL."""
    given = dict(parse_qsl(query))
    date, region, service, kind = given["X-Amz-Credential"].split("/")[1:]
    parts = [
        f"{quote(k, safe='-_.~')}={quote(v, safe='-_.~')}" for k, v in given.items() if k != "X-Amz-Signature"
    ]
    empty = hashlib.sha256(b"").hexdigest()
    request = "\n".join(["GET", "/", "&".join(sorted(parts)), f"host:{host}\n", "host", empty])
    scope = f"{date}/{region}/{service}/{kind}"
    digest = hashlib.sha256(request.encode()).hexdigest()
    text = "\n".join(["AWS4-HMAC-SHA256", given["X-Amz-Date"], scope, digest])
    key = b"AWS4s3cret-key"
    for part in (date, region, service, kind):
        key = hmac.digest(key, part.encode(), "sha256")
    return hmac.new(key, text.encode(), "sha256").hexdigest()


@pytest.mark.usefixtures("credentials")
class TestAwsToken:
    @pytest.mark.parametrize("serverless", [False, True])
    def test_it_is_a_signed_request(self, serverless: bool) -> None:
        identity = AwsIam(user="a user", cache="My-Cache", region="eu-west-1", serverless=serverless)
        began = time.time()
        token, expires = sign_aws_token("a user", identity=identity)
        assert 900 <= expires - began < 930
        assert token.startswith("my-cache/?")
        url = urlsplit("https://" + token)
        asked = {name: values[0] for name, values in parse_qs(url.query).items()}
        date = asked.pop("X-Amz-Date")
        assert asked.pop("X-Amz-Signature") == signature("my-cache", url.query)
        kind = {"ResourceType": "ServerlessCache"} if serverless else {}
        assert asked == {
            "Action": "connect",
            "User": "a user",
            "X-Amz-Algorithm": "AWS4-HMAC-SHA256",
            "X-Amz-Credential": f"AKIDEXAMPLE/{date[:8]}/eu-west-1/elasticache/aws4_request",
            "X-Amz-Expires": "900",
            "X-Amz-SignedHeaders": "host",
            "X-Amz-Security-Token": "session/token+",
            **kind,
        }

    def test_it_is_what_the_settings_ask_for(self) -> None:
        tokens = token_source(read_settings({**AWS, "aws_iam_serverless": "1"}, {}))
        tokens.wait()
        assert tokens.current().startswith("my-cache/?Action=connect&User=app&ResourceType=ServerlessCache&")
        assert token_source(read_settings({}, {})) is None

    def test_it_is_renewed_before_its_end(self) -> None:
        late, signed = 0.0, []

        def sign(user: str) -> tuple[str, float]:
            signed.append(user)
            token, expires = sign_aws_token(user, identity=IAM)
            return f"{token}&{len(signed)}", expires + late

        tokens = TokenSource(sign, "app", clock=lambda: time.time() + late)
        tokens.wait()
        first = tokens.current()
        late = 600.0
        assert (tokens.current(), len(signed)) == (first, 1)
        late = 700.0  # a quarter of its life is left: it serves while its successor is signed
        assert tokens.current()
        wait_for(lambda: tokens.current().endswith("&2"), "the successor is there")
        assert signed == ["app", "app"]

    def test_without_credentials(
        self, face: SyncFace, monkeypatch: pytest.MonkeyPatch, tmp_path: object
    ) -> None:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
            monkeypatch.setenv(name, f"{tmp_path}/none")
        store = RedisStore(RedisConnection.from_settings(AWS, {}, budget=10.0))
        with pytest.raises(StoreError, match="no token for app: OSError: no AWS credentials found"):
            face.do(store, "get", KEY)
        store.close()


@pytest.mark.usefixtures("credentials")
class TestAwsUser:
    """A server over TLS whose user's password is the token of the moment."""

    @pytest.fixture
    def guarded(self) -> Iterator[tuple[RedisServer, Certificates]]:
        admin = {"username": "admin", "password": "admin"}
        with redis_tls("--user", "admin", "on", ">admin", "~*", "+@all", **admin) as (server, made):
            server.ask("ACL", "SETUSER", "app", "on", "~llm:*", "+@all")
            yield server, made

    def test_the_token_is_the_password(
        self, face: SyncFace, guarded: tuple[RedisServer, Certificates]
    ) -> None:
        server, made = guarded
        signed: list[str] = []

        def sign(user: str) -> tuple[str, float]:
            token, expires = sign_aws_token(user, identity=IAM)
            signed.append(f"{token}&{len(signed)}")
            server.ask("ACL", "SETUSER", user, "resetpass", f">{signed[-1]}")
            return signed[-1], expires if len(signed) > 1 else time.time() + 40.0

        given = {**AWS, "host": HOST, "port": server.port, "ssl_ca_certs": made.authority}
        connection = RedisConnection.from_settings(given, {}, budget=10.0, fetch_token=sign)
        store = RedisStore(connection)
        face.do(store, "set", KEY, b"value", 60)
        assert face.do(store, "get", KEY) == b"value"
        assert len(signed) == 1
        assert {client["user"] for client in server.ask("CLIENT LIST")} == {"admin", "app"}
        assert signed[0] not in f"{connection!r} {face.do(store, 'ping')}"
        tokens = connection.mine().tokens
        tokens._clock = lambda: time.time() + 31.0  # a quarter of its life is left
        assert face.do(store, "get", KEY) == b"value"
        wait_for(lambda: len(signed) == 2 and tokens.current() == signed[1], "the successor is there")
        assert face.do(store, "get", KEY) == b"value"  # connections that are open stay so
        server.ask("CLIENT", "KILL", "USER", "app")
        wait_for(lambda: self.reads(face, store), "whoever connects now shows the successor")
        assert len(signed) == 2
        face.do(store, "close")

    def reads(self, face: SyncFace, store: RedisStore) -> bool:
        try:
            return face.do(store, "get", KEY) == b"value"
        except StoreError:
            return False


def jwt(oid: str, number: int = 0) -> str:
    parts = ({"alg": "none"}, {"oid": oid, "number": number})
    return (
        ".".join(base64.urlsafe_b64encode(json.dumps(p).encode()).decode().rstrip("=") for p in parts) + ".x"
    )


class Entra:
    """The token endpoint and the metadata service in one. ``asked``: path, query, ``Metadata``, form."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, str], str | None, dict[str, str]]] = []
        self.token = jwt("object-1")
        self.broken = False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer({}, {"access_token": outer.token, "expires_in": "3599"})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                self.answer(dict(parse_qsl(body)), {"access_token": outer.token, "expires_in": 3599})

            def answer(self, form: dict[str, str], content: object) -> None:
                url = urlsplit(self.path)
                outer.asked.append((url.path, dict(parse_qsl(url.query)), self.headers["Metadata"], form))
                raw = json.dumps(content).encode()
                self.send_response(400 if outer.broken else 200)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer((HOST, 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)
        self.thread.start()

    def fetch(self, identity: EntraId) -> tuple[str, float]:
        address = f"http://{HOST}:{self.http.server_port}"
        return fetch_entra_token("x", identity=identity, metadata=address, authority=address)

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def entra() -> Iterator[Entra]:
    made = Entra()
    yield made
    made.close()


class TestEntra:
    def test_settings(self) -> None:
        assert read_settings({"azure_redis_ad_token": "true"}, {}).entra_id == EntraId()
        environ = {"REDIS_AZURE_AD_TOKEN": "True", "AZURE_CLIENT_ID": "c", "AZURE_TENANT_ID": "t"}
        made = read_settings({}, {**environ, "AZURE_CLIENT_SECRET": "s3cret"})
        assert made.entra_id == EntraId(client="c", tenant="t", secret="s3cret")
        assert made.secrets() == ["s3cret"]
        assert "s3cret" not in repr(made)
        assert read_settings({}, {"AZURE_CLIENT_ID": "c", "AZURE_CLIENT_SECRET": "s"}) == RedisSettings(
            topology="standalone"
        )

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"azure_client_secret": "s3cret"}, "azure_client_secret needs azure_client_id"),
            (
                {"azure_client_secret": "s3cret", "azure_client_id": "c"},
                "azure_client_secret needs azure_tenant_id",
            ),
            ({"password": "p"}, "azure_redis_ad_token and password exclude each other"),
        ],
    )
    def test_what_does_not_go(self, changes: dict[str, object], message: str) -> None:
        with pytest.raises(ConfigError) as caught:
            read_settings({"azure_redis_ad_token": True, **changes}, {})
        assert caught.value.message == message

    def test_a_service_principal(self, entra: Entra) -> None:
        began = time.time()
        token, expires = entra.fetch(EntraId(client="c", tenant="t/1", secret="s3&cret"))
        assert token == entra.token
        assert 3599 <= expires - began < 3630
        form = {
            "grant_type": "client_credentials",
            "client_id": "c",
            "client_secret": "s3&cret",
            "scope": "https://redis.azure.com/.default",
        }
        assert entra.asked == [("/t%2F1/oauth2/v2.0/token", {}, None, form)]

    @pytest.mark.parametrize("client", [None, "c"])
    def test_a_managed_identity(self, entra: Entra, client: str | None) -> None:
        assert entra.fetch(EntraId(client=client, tenant="t"))[0] == entra.token
        query = {"api-version": "2018-02-01", "resource": "https://redis.azure.com/"}
        query |= {"client_id": "c"} if client else {}
        assert entra.asked == [("/metadata/identity/oauth2/token", query, "true", {})]

    def test_a_refusal_shows_no_secret(self, entra: Entra) -> None:
        entra.broken = True
        with pytest.raises(OSError, match=r"^HTTP 400 from http://") as caught:
            entra.fetch(EntraId(client="c", tenant="t", secret="s3cret"))
        assert "s3cret" not in repr(caught.value)

    @pytest.mark.parametrize("username", [None, "given"])
    def test_the_token_is_the_password_of_its_object(
        self, face: SyncFace, entra: Entra, username: str | None
    ) -> None:
        with redis_server() as server:
            server.ask("ACL", "SETUSER", username or "object-1", "on", f">{entra.token}", "~*", "+@all")
            given = {"host": HOST, "port": server.port, "azure_redis_ad_token": True, "username": username}
            connection = RedisConnection.from_settings(
                given, {}, budget=10.0, fetch_token=lambda _: entra.fetch(EntraId())
            )
            store = RedisStore(connection)
            face.do(store, "set", KEY, b"value", 60)
            assert face.do(store, "get", KEY) == b"value"
            assert (username or "object-1") in {client["user"] for client in server.ask("CLIENT LIST")}
            assert len(entra.asked) == 1
            store.close()
