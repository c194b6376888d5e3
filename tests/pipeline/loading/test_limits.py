import os
import resource
import subprocess
import sys

import psutil
import pytest
from launch import program_file
from samples import photo_members, score, tar_bytes

from famt.pipeline.loading import limits

TARS = int(os.environ.get("FAMT_TARS", "300"))


@pytest.mark.slow
def test_shards_beyond_the_soft_limit_of_open_files_are_read(tmp_path, cache, spec):
    (tmp_path / "shards").mkdir()
    shards = [tmp_path / "shards" / f"{n:06d}.tar" for n in range(TARS)]
    for n, shard in enumerate(shards):
        shard.write_bytes(tar_bytes(photo_members(1, n)))
    score(shards, cache, spec)
    command = [
        sys.executable,
        program_file("read_under_a_limit"),
        cache.url,
        "256",
        str(TARS + 999),
    ]
    read = subprocess.run(
        [*command, str(tmp_path / "shards")], capture_output=True, text=True, timeout=300
    )
    assert (read.stdout, read.returncode) == (f"{TARS}\n", 0), read.stderr


def test_a_limit_that_can_not_be_raised_is_an_error_that_says_how(monkeypatch):
    def refuse(*_):
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    with pytest.raises(OSError, match=rf"open no more than {soft} .*`ulimit -n \d+`"):
        limits.allow_open_files(soft)
    limits.allow_open_files(0)


def test_memory_that_caches_files_counts_as_free():
    assert limits.free_memory() == pytest.approx(psutil.virtual_memory().available, rel=0.3)
