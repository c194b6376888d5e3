"""Runs of several ranks on machines that are pretended, as a launcher would start them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

_PROGRAMS = Path(__file__).parent / "programs"


def program_file(name: str) -> str:
    """The path of a program in `tests/programs`."""
    return str(_PROGRAMS / f"{name}.py")


def launch(
    program: str, *arguments: str, machines: list[str], **environment: str
) -> list[subprocess.Popen[str]]:
    """Start a file or module in as many ranks as `machines` names, each on the one of that name."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, program_file("on_machine"), machine, program, *arguments],
            env={
                **os.environ, "RANK": str(rank), "WORLD_SIZE": str(len(machines)),
                "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1", **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, machine in enumerate(machines)
    ]  # fmt: skip


def finish(ranks: list[subprocess.Popen[str]], timeout: float = 120) -> None:
    """Wait for all ranks, so many seconds at most; each must end with 0."""
    try:
        for process in ranks:
            _, errors = process.communicate(timeout=timeout)
            assert process.returncode == 0, errors
    finally:
        for process in ranks:
            process.kill()
