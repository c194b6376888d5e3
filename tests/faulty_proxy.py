"""A proxy before an object store on loopback that fails now and then, as stores do under load.

    python tests/faulty_proxy.py <port> <port of the store> <fault> <every> <seed>

Of the reads of tars one in `every`, drawn by `seed`, meets the fault: `500`, `503` (no body),
`500-body`, `503-body`, `truncated` (half of the body), `drop` (no answer) or `delay`.
"""

import http.client
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random

from s3_server import free_port, serving

FAULTS = ("500", "503", "500-body", "503-body", "truncated", "drop", "delay")
BODY = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>busy</Message></Error>"


@contextmanager
def before(endpoint: str, fault: str, every: int, seed: int) -> Iterator[str]:
    """Put a proxy before a store on loopback; yields its endpoint."""
    port = free_port()
    store = endpoint.rpartition(":")[2]
    with serving([__file__, str(port), store, fault, str(every), str(seed)], port) as url:
        yield url


def serve(port: int, store: int, fault: str, every: int, seed: int) -> None:
    """Serve for ever."""
    chance = Random(seed)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            """Ask the store and pass its answer on, unless the fault strikes."""
            is_read = self.command == "GET" and ".tar" in self.path
            strikes = is_read and chance.randrange(every) == 0
            sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if strikes and fault == "drop":
                self.close_connection = True
                return
            if strikes and fault == "delay":
                time.sleep(1)
            if strikes and fault[:1] == "5":
                self.answer(int(fault[:3]), {}, BODY if fault.endswith("body") else b"")
                return
            connection = http.client.HTTPConnection("127.0.0.1", store)
            connection.request(self.command, self.path, sent, dict(self.headers))
            response = connection.getresponse()
            body = response.read()
            cut = len(body) // 2 if strikes and fault == "truncated" else len(body)
            self.answer(response.status, dict(response.headers), body, cut)
            connection.close()

        def answer(
            self, status: int, headers: dict[str, str], body: bytes, cut: int | None = None
        ) -> None:
            """Send a response; a body that is cut ends the connection."""
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                    self.send_header(name, value)
            if "content-length" not in {name.lower() for name in headers}:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[:cut])
            self.close_connection = cut is not None and cut < len(body)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = forward

        def log_message(self, *arguments: object) -> None:
            """Stay silent."""

    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
