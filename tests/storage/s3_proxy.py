"""A proxy between a client and an S3 server that spoils requests: as a throttled, broken or lossy network would."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

Fate = str
"""Of one request: "pass", "slow down" (503, not handed on), "drop" (the connection ends before it is handed on),
"lose" (handed on, and the connection ends before the answer), "half" (the answer breaks off), "expired" (403).
"""

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
EXPIRED = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"


class Proxy(ThreadingHTTPServer):
    """`fate` is asked for each request, by method and path with query. `seen` counts fates. `with` it."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, endpoint: str, fate: Callable[[str, str], Fate]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = urlsplit(endpoint).netloc
        self.fate = fate
        self.seen: Counter[Fate] = Counter()
        self.sent_bytes = self.arrived_bytes = 0
        """Of bodies that were handed on; those of them that the server has said to have."""
        self._lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Proxy:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def decide(self, method: str, path: str) -> Fate:
        with self._lock:
            fate = self.fate(method, path)
            self.seen[fate] += 1
            return fate

    def note(self, sent: int = 0, arrived: int = 0) -> None:
        with self._lock:
            self.sent_bytes += sent
            self.arrived_bytes += arrived

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Broken connections are what it is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, format: str, *args: Any) -> None: ...

    def _run(self) -> None:
        fate = self.server.decide(self.command, self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if fate == "drop":
            self.close_connection = True
        elif fate in ("slow down", "expired"):
            self._answer(*((503, SLOW_DOWN) if fate == "slow down" else (403, EXPIRED)))
        else:
            self._hand_on(fate, body)

    def _hand_on(self, fate: Fate, body: bytes) -> None:
        self.server.note(sent=len(body))
        connection = HTTPConnection(self.server.target, timeout=60)
        try:
            # What was signed names the host that the client meant.
            headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            data = answer.read()
            self.server.note(arrived=len(body) if answer.status == 200 and self.command == "PUT" else 0)
        except OSError:
            fate = "lose"
        finally:
            connection.close()
        if fate == "lose":
            self.close_connection = True
            return
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding"):
                self.send_header(name, value)
        if answer.getheader("Content-Length") is None:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fate == "half":
            data = data[: len(data) // 2]
            self.close_connection = True
        if self.command != "HEAD":
            self.wfile.write(data)

    def _answer(self, status: int, data: bytes) -> None:
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _run
