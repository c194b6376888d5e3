"""Runs as processes: of several ranks on machines that are pretended, and such as are killed."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from s3_server import free_port

from famt.train import checkpoint

KILLS = int(os.environ.get("FAMT_KILLS", "3"))

RAY = {**os.environ, "RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1"}
"""environment of a program with a Ray of its own"""

_TESTS = Path(__file__).parent


def program_file(name: str) -> str:
    """The path of a program in `tests/programs`."""
    return str(_TESTS / "programs" / f"{name}.py")


def run(*command: str, code: int = 0, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a file, or `-m` and a module, with a Ray of its own; it must end with that exit code.

    Args:
        options: of `subprocess.run`.
    """
    options = {"env": RAY, "capture_output": True, "text": True, **options}
    done = subprocess.run([sys.executable, *command], **options)
    assert done.returncode == code, done.stderr
    return done


def until(condition: Callable[[], object], seconds: float = 120) -> None:
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.02)


def launch(
    program: str, *arguments: str, machines: list[str], **environment: str
) -> list[subprocess.Popen[str]]:
    """Start a file or module in as many ranks as `machines` names, each on the one of that name.

    A file may import what helps the tests, as they do.
    """
    port = free_port()
    # The project first: folders of tests have the names of its packages.
    path = [str(_TESTS.parent), str(_TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return [
        subprocess.Popen(
            [sys.executable, program_file("on_machine"), machine, program, *arguments],
            env={
                **os.environ, "RANK": str(rank), "WORLD_SIZE": str(len(machines)),
                "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path),
                **environment,
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


def kill_at_random(command: list[str], out: Path, environment: dict[str, str]) -> None:
    """Start a run `KILLS` times, and SIGKILL it soon after its first new checkpoint."""
    moments = random.Random(0)
    for _ in range(KILLS):
        before = checkpoint.latest(out) if out.exists() else None
        process = subprocess.Popen(
            command,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        while process.poll() is None and (not out.exists() or checkpoint.latest(out) == before):
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.3))
        assert process.poll() is None  # a run that had ended would prove nothing
        # torchrun's workers lead sessions of their own.
        workers = psutil.Process(process.pid).children(recursive=True)
        for each in (process, *workers):
            each.kill()
        process.wait()
        psutil.wait_procs(workers)
