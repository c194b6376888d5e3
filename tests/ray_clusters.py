"""Ray clusters of several nodes on this machine, whose nodes can be lost."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import psutil
from ray.cluster_utils import Cluster


@contextmanager
def cluster(cpus: int, **head: object) -> Iterator[Cluster]:
    """A cluster with a head of so many CPUs; its files, and its address, are its own.

    Args:
        head: more options of its node, as `ray.cluster_utils.Cluster` takes them.
    """
    folder = tempfile.mkdtemp(prefix="famt-ray-")  # short: sockets have paths of 107 bytes at most
    with mock.patch.dict(os.environ, {"RAY_TMPDIR": folder}):
        started = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus, **head})
        try:
            yield started
        finally:
            started.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


def processes(node: object) -> list[psutil.Process]:
    """All processes of a node, its workers among them."""
    found = []
    for kind in node.all_processes.values():
        for each in kind:
            try:
                process = psutil.Process(each.process.pid)
                found += [process, *process.children(recursive=True)]
            except psutil.NoSuchProcess:
                continue
    return found


def lose(cluster: Cluster, node: object) -> None:
    """End all that runs on a node at once, as when its machine is lost."""
    for each in processes(node):
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue
    cluster.remove_node(node, allow_graceful=False)
