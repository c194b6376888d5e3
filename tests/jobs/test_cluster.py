import os
import resource
import subprocess
import sys
from unittest.mock import Mock

import pytest
from ray_clusters import cluster
from s3_server import free_port

from famt.jobs.cluster import start_ray


def test_a_cluster_that_was_named_and_does_not_answer_is_told_of_at_once(monkeypatch):
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConnectionError, match=rf"{address} .*refused.* RAY_ADDRESS=local"):
        start_ray()


def test_a_ray_that_does_not_start_is_reported(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setattr("ray.init", Mock(side_effect=Exception("timed out")))
    with pytest.raises(ConnectionError, match=r"Ray does not start on this machine \(timed out\)"):
        start_ray()


def _start(address, limits=lambda: None):
    """What a program that starts Ray has of CPUs, and what it says."""
    program = "import ray; from famt.jobs.cluster import start_ray; start_ray(); {}".format(
        "print(int(ray.cluster_resources()['CPU']))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**environment, **address},
        capture_output=True, text=True, check=True, preexec_fn=limits,
    )  # fmt: skip
    return done.stdout, done.stderr


@pytest.mark.slow
def test_only_a_cluster_that_was_named_is_joined():
    """One that runs on the machine is somebody's, and `ray.init` alone would join it."""
    with cluster(99) as other:  # which Ray takes for the machine's, by RAY_TMPDIR
        address = other.address
        alone, joined = _start({}), _start({"RAY_ADDRESS": address})
    assert alone == (f"{os.cpu_count()}\n", "starting Ray and its workers on this machine\n")
    assert joined == ("99\n", f"joined the Ray cluster {address} (RAY_ADDRESS={address})\n")


@pytest.mark.slow
def test_a_home_that_can_not_be_written_is_no_hindrance():
    out, _ = _start({"HOME": "/proc/none"})
    assert int(out) == os.cpu_count()


@pytest.mark.slow
def test_a_limit_of_addresses_is_no_hindrance():
    most = 6_000_000_000
    out, _ = _start({}, lambda: resource.setrlimit(resource.RLIMIT_AS, (most, most)))
    assert int(out) == os.cpu_count()
