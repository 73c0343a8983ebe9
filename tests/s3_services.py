"""Two S3 servers, each in a process of its own on a free port: moto's, and OpenStack Swift's.

moto knows every request but believes every signature; Swift checks signatures, and is a real object store.
Both keep what they are given until they are stopped.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest

from tests.services import telling_port

__all__ = ["S3Server", "clean_environment", "moto", "moto_server", "swift", "swift_server"]

TESTS = Path(__file__).parent

# Prints its port once it listens. Its own log lines go to stderr.
_MOTO = """
import logging
from werkzeug.serving import WSGIRequestHandler, make_server
from moto.server import DomainDispatcherApplication, create_backend_app

WSGIRequestHandler.protocol_version = "HTTP/1.1"
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = make_server("127.0.0.1", 0, DomainDispatcherApplication(create_backend_app), threaded=True)
print(server.server_port, flush=True)
server.serve_forever()
"""

# All of Swift in one process, its data and configuration in the directory given. The ports are taken before
# the rings, which name them, are made.
_SWIFT = """
import os, sys, warnings
warnings.simplefilter("ignore")
import eventlet
eventlet.monkey_patch()
from eventlet import wsgi

home = sys.argv[1]
stores = ["account", "container", "object"]
filters = "catch_errors cache listing_formats bulk s3api tempauth slo dlo".split()

def write(name, *lines):
    with open(os.path.join(home, name), "w") as file:
        file.write("\\n".join(lines) + "\\n")

write("swift.conf", "[swift-hash]", "swift_hash_path_suffix = a", "swift_hash_path_prefix = b")
common = ["[DEFAULT]", f"swift_dir = {home}", "log_level = ERROR"]
for name in stores:
    storage = [f"devices = {home}/devices", "mount_check = false"]
    write(f"{name}.conf", *common, *storage, f"[pipeline:main]", f"pipeline = {name}-server")
    with open(os.path.join(home, f"{name}.conf"), "a") as file:
        file.write(f"[app:{name}-server]\\nuse = egg:swift#{name}\\n")
sections = []
for name in filters:
    sections += [f"[filter:{name}]", f"use = egg:swift#{'memcache' if name == 'cache' else name}"]
    sections += ["user_test_tester = testing .admin"] if name == "tempauth" else []
pipeline = ["[pipeline:main]", f"pipeline = {' '.join(filters)} proxy-server"]
proxy = ["[app:proxy-server]", "use = egg:swift#proxy", "account_autocreate = true"]
proxy += ["conn_timeout = 30", "node_timeout = 60"]  # its own half a second is short for a busy machine
write("proxy.conf", *common, *pipeline, *sections, *proxy)
os.makedirs(f"{home}/devices/disk")

from swift.common import utils
utils.SWIFT_CONF_FILE = f"{home}/swift.conf"
from swift.common.http_protocol import SwiftHttpProtocol
from swift.common.ring import RingBuilder
from swift.common.storage_policy import reload_storage_policies
from swift.common.wsgi import loadapp
reload_storage_policies()

sockets = {name: eventlet.listen(("127.0.0.1", 0)) for name in [*stores, "proxy"]}
for name in stores:
    builder = RingBuilder(4, 1, 0)
    port = sockets[name].getsockname()[1]
    place = {"id": 0, "region": 1, "zone": 1, "weight": 1.0, "device": "disk"}
    builder.add_dev({**place, "ip": "127.0.0.1", "port": port})
    builder.rebalance()
    builder.get_ring().save(f"{home}/{name}.ring.gz")
served = []
for name, socket in sockets.items():
    app = loadapp(f"{home}/{name}.conf")
    log = open(os.devnull, "w")
    served.append(eventlet.spawn(wsgi.server, socket, app, log, protocol=SwiftHttpProtocol))
print(sockets["proxy"].getsockname()[1], flush=True)
for server in served:
    server.wait()
"""


@dataclass(frozen=True, slots=True)
class S3Server:
    """A running server and the account on it."""

    name: str
    url: str
    access_key_id: str
    secret_access_key: str
    pid: int

    def client(self) -> Any:
        """boto3's own client, to see what a store has done, and to do what it does not."""
        return boto3.client(
            "s3",
            region_name="us-east-1",
            endpoint_url=self.url,
            aws_access_key_id=self.access_key_id,
            aws_secret_access_key=self.secret_access_key,
        )

    def settings(self, bucket: str, **changes: object) -> dict[str, object]:
        """The settings of a store on this server, with time enough for a machine that is busy."""
        return {
            "s3_bucket_name": bucket,
            "s3_region_name": "us-east-1",
            "s3_endpoint_url": self.url,
            "s3_aws_access_key_id": self.access_key_id,
            "s3_aws_secret_access_key": self.secret_access_key,
            "timeout": 30,
            **changes,
        }


@pytest.fixture(scope="session")
def moto() -> Iterator[S3Server]:
    with moto_server() as server:
        yield server


@pytest.fixture(scope="session")
def swift() -> Iterator[S3Server]:
    with swift_server() as server:
        yield server


@contextmanager
def moto_server() -> Iterator[S3Server]:
    with telling_port([sys.executable, "-c", _MOTO], clean_environment(), TESTS) as (port, pid):
        yield S3Server("moto", f"http://127.0.0.1:{port}", "key-of-moto", "secret-of-moto", pid)


@contextmanager
def swift_server() -> Iterator[S3Server]:
    """Makes Swift's own virtual environment, inside of this one, where there is none yet."""
    home = Path(sys.prefix, "swift")
    environment = {**os.environ, "PYTHON": sys.executable}
    subprocess.run(
        [TESTS / "make_swift_venv.sh", home], env=environment, stdout=subprocess.DEVNULL, check=True
    )
    python = home / "bin" / "python"
    with (
        tempfile.TemporaryDirectory(prefix="swift") as data,
        telling_port([python, "-c", _SWIFT, data], clean_environment(), TESTS) as (port, pid),
    ):
        yield S3Server("swift", f"http://127.0.0.1:{port}", "test:tester", "testing", pid)


def without_aws(patch: pytest.MonkeyPatch) -> None:
    """Make this process's environment a `clean_environment`."""
    clean = clean_environment()
    for name in set(os.environ) - set(clean):
        patch.delenv(name)
    for name, value in clean.items():
        patch.setenv(name, value)


def clean_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Without what boto3 would take from it: credentials, endpoints, certificates. No file and no instance
    metadata is looked at either."""
    kept = {name: value for name, value in environment.items() if not name.startswith("AWS_")}
    nowhere = dict.fromkeys(("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"), os.devnull)
    return {**kept, **nowhere, "AWS_EC2_METADATA_DISABLED": "true", "NO_PROXY": "127.0.0.1"}
