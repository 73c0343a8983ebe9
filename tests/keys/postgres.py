"""A real PostgreSQL for the tests, on a free port of the loopback address: ``apt-get install postgresql``."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg

from tests.services import HOST, Process, free_port, program, wait_for

__all__ = ["PostgreSQL", "postgresql"]


class PostgreSQL(Process):
    """``url``: SQLAlchemy's."""

    def __init__(self, popen: subprocess.Popen[bytes], port: int) -> None:
        super().__init__(popen)
        self.port = port
        self.url = f"postgresql://tester@{HOST}:{port}/postgres"

    def ask(self, statement: str) -> list[tuple[object, ...]]:
        with psycopg.connect(self.url, autocommit=True) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []


def _program(name: str) -> str:
    """Debian keeps the server's programs out of PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(found[-1]) if found else program(name, "postgresql")


@contextlib.contextmanager
def postgresql() -> Iterator[PostgreSQL]:
    """An empty server that trusts everybody. It refuses to run as root, so then it runs as Debian's user."""
    user = "postgres" if os.geteuid() == 0 else None
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="postgres-") as path:
        if user is not None:
            shutil.chown(path, user)
        data = f"{path}/data"
        made = subprocess.run(
            [_program("initdb"), "-D", data, "-U", "tester", "-A", "trust", "--no-sync", "-E", "UTF8"],
            user=user,
            cwd=path,
            capture_output=True,
            text=True,
        )
        assert made.returncode == 0, made.stderr
        options = {"listen_addresses": HOST, "port": port, "unix_socket_directories": "", "fsync": "off"}
        command = [
            _program("postgres"),
            "-D",
            data,
            *(f"--{name}={value}" for name, value in options.items()),
        ]
        server = PostgreSQL(
            subprocess.Popen(
                command, user=user, cwd=path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            ),
            port,
        )
        try:
            wait_for(lambda: _answers(server), f"postgres at port {port}")
            yield server
        finally:
            server.stop()


def _answers(server: PostgreSQL) -> bool:
    assert server.running, "postgres ended"
    try:
        return bool(server.ask("SELECT 1"))
    except psycopg.OperationalError:
        return False
