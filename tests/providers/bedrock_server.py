"""A server that reads the signatures of requests to Bedrock, by the book of AWS Signature Version 4."""

from __future__ import annotations

import hashlib
import hmac
import json
import threading
import urllib.parse
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

__all__ = ["ANSWER", "KEYS", "REGION", "Server"]

REGION = "eu-west-1"
KEYS = {"aws_access_key_id": "AKIDEXAMPLE", "aws_secret_access_key": "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLE"}
ANSWER = {
    "output": {"message": {"role": "assistant", "content": [{"text": "yes"}]}},
    "stopReason": "end_turn",
}


def is_signed(path: str, headers: Mapping[str, str], body: bytes, secret: str) -> bool:
    """Whether the signature is right for what the server received (AWS Signature Version 4)."""
    words = dict(word.strip().split("=", 1) for word in headers["authorization"].partition(" ")[2].split(","))
    names = words["SignedHeaders"].split(";")
    canonical = "\n".join(
        [
            "POST",
            urllib.parse.quote(path, safe="/-_.~"),
            "",
            *[f"{name}:{headers[name].strip()}" for name in names],
            "",
            ";".join(names),
            hashlib.sha256(body).hexdigest(),
        ]
    )
    scope = words["Credential"].partition("/")[2]
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    text = "\n".join(["AWS4-HMAC-SHA256", headers["x-amz-date"], scope, digest])
    key = f"AWS4{secret}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    assert scope.split("/")[1:] == [REGION, "bedrock", "aws4_request"]
    assert {"host", "x-amz-date"} <= set(names)
    return hmac.compare_digest(hmac.new(key, text.encode(), "sha256").hexdigest(), words["Signature"])


class Server(ThreadingHTTPServer):
    """Bedrock, as far as signatures go: 403 for a wrong one. ``seen``: the headers of each request."""

    daemon_threads = True
    secret = KEYS["aws_secret_access_key"]

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[Mapping[str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def server_close(self) -> None:
        self.shutdown()
        super().server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.seen.append(headers)
        good = is_signed(self.path, headers, body, self.server.secret)
        answer = json.dumps(ANSWER if good else {"message": "The request signature does not match"}).encode()
        self.send_response(200 if good else 403)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args: object) -> None:
        pass
