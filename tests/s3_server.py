"""A real S3 API, by HTTP on loopback: moto in a process of its own."""

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def serve(port: int) -> Iterator[str]:
    """Serve an empty store and yield its endpoint; what was put is lost at the end.

    Not a thread of this process: DALI holds the interpreter while it waits for S3.
    """
    with serving(["-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port) as endpoint:
        yield endpoint


@contextmanager
def serving(program: list[str], port: int) -> Iterator[str]:
    """Run a Python program that answers as moto does, and yield its endpoint once it answers."""
    command = [sys.executable, *program]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    endpoint = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{endpoint}/moto-api/").close()
                break
            except OSError:
                time.sleep(0.1)
        yield endpoint
    finally:
        server.kill()
        server.wait()


def environment(endpoint: str) -> dict[str, str]:
    """What points obstore, DALI and boto3 at that endpoint."""
    return {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
    }
