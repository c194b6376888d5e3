import multiprocessing
import os
import subprocess

import pytest
import torch

from famt.train import shared_memory


def _write(packed):
    shared = shared_memory.unpack(packed)
    shared["maps"][1] = 7
    shared["nested"][0].fill_(3)


def test_what_one_process_writes_the_others_read_after_the_name_is_gone():
    value = {
        "maps": torch.rand(3, 4, dtype=torch.float16),
        "nested": [torch.arange(5), "text"],
        "empty": torch.empty(0, 2),
        "strided": torch.arange(12).view(3, 4).T,
    }
    packed = shared_memory.pack(value)
    here = shared_memory.unpack(packed)
    for name in ("maps", "empty", "strided"):
        assert torch.equal(here[name], value[name])
        assert here[name].dtype == value[name].dtype
    child = multiprocessing.get_context("spawn").Process(target=_write, args=(packed,))
    child.start()
    child.join()
    assert child.exitcode == 0
    shared_memory.drop_name(packed)
    assert not os.path.exists(packed.path)
    assert here["maps"][1].tolist() == [7] * 4
    assert torch.equal(here["maps"][0], value["maps"][0])
    assert here["nested"][0].tolist() == [3] * 5
    assert here["nested"][1] == "text"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_too_little_room_is_an_error_that_says_how_to_get_more(tmp_path, monkeypatch):
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount here")
    monkeypatch.setattr(shared_memory, "_FOLDER", str(tmp_path))
    try:
        with pytest.raises(OSError, match=r"has 1 MB free.* share 4 MB there.*--shm-size"):
            shared_memory.pack(torch.zeros(1_000_000))
        assert not list(tmp_path.iterdir())
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
