import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from launch import finish, launch, program_file

from famt.train import distributed
from famt.train.distributed import join_ranks


def test_one_process_is_rank_0_of_1():
    with join_ranks("cpu") as ranks:
        assert (ranks.rank, ranks.world_size, ranks.is_main) == (0, 1, True)
        assert ranks.device == torch.device("cpu")
        assert ranks.gather({"x": 1}) == [{"x": 1}]
        assert ranks.share(lambda: "made") == "made"


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPU here")
def test_a_gpu_that_torch_can_not_use_is_told_of_unless_it_is_hidden(tmp_path, capsys, monkeypatch):
    def warned(device):
        with join_ranks(device) as ranks:
            assert ranks.device == torch.device("cpu")
        return "an NVIDIA GPU that torch" in capsys.readouterr().err

    driver = tmp_path / "version"
    monkeypatch.setattr(distributed, "_DRIVER", driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert not warned("auto")
    driver.touch()
    assert warned("auto")
    assert not warned("cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not warned("auto")


def _run(program, tmp_path, machines):
    # On a busy machine compiling takes minutes.
    finish(launch(program_file(program), str(tmp_path), machines=machines), timeout=900)


@pytest.mark.slow
def test_ranks_of_a_machine_share_one_memory_and_machines_do_not(tmp_path):
    _run("share_tensors", tmp_path, ["a", "a", "b"])
    assert (tmp_path / "0").read_text() == "1 [1.0, 2.0, 0.0, 0.0]"
    assert (tmp_path / "1").read_text() == "0 [1.0, 2.0, 0.0, 0.0]"
    assert (tmp_path / "2").read_text() == "1 [0.0, 0.0, 3.0, 0.0]"
    assert len(list(tmp_path.glob("error*"))) == 3


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_too_little_shared_memory_is_an_error_that_says_how_to_get_more(tmp_path, monkeypatch):
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount here")
    monkeypatch.setattr(distributed, "_SHARED_MEMORY", str(tmp_path))
    try:
        with pytest.raises(OSError, match=r"has only 1 MB free.*--shm-size"):
            distributed._write_shared(torch.zeros(1_000_000))
        assert not list(tmp_path.iterdir())
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("deed", "doer", "code", "cause"),
    [
        ("dies", 0, -signal.SIGKILL, "was lost"),
        ("dies", 2, -signal.SIGKILL, "was lost"),
        ("errs", 0, 2, "failed: no such thing"),
        ("errs", 1, 2, "failed: no such thing"),
        ("has a defect", 1, 1, "failed: a defect"),
    ],
)
def test_a_rank_that_fails_or_dies_ends_the_others_who_name_it(deed, doer, code, cause):
    ranks = launch(program_file("keep_in_touch"), deed, str(doer), machines=["a", "a", "b"])
    said = [process.communicate(timeout=120)[1] for process in ranks]
    assert [each.returncode for each in ranks] == [code if n == doer else 2 for n in range(3)]
    name = f"error: rank {doer} (process {ranks[doer].pid} on {os.uname().nodename}) {cause}\n"
    for rank in {0, 1, 2} - {doer}:
        assert said[rank].endswith(name)


@pytest.mark.slow
def test_banks_are_the_same_on_all_machines_after_an_exchange(tmp_path):
    _run("exchange_banks", tmp_path, ["a", "a", "b"])
    banks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    for bank in banks[1:]:
        assert bank.keys() == banks[0].keys()
        for name, value in banks[0].items():
            same = torch.equal(bank[name], value) if torch.is_tensor(value) else bank[name] == value
            assert same, name
    assert banks[0]["refreshed"].tolist() == [0, 0, 0, 0, 1, 1, 1, -1, -1]


@pytest.mark.slow
@pytest.mark.parametrize(("accumulate", "compiled"), [(2, False), (4, False), (4, True)])
def test_two_ranks_train_as_one_with_the_doubled_batch(scored, tmp_path, accumulate, compiled):
    options = {"shards": scored.shards, "cache": scored.cache.url}
    options |= {"accumulate": accumulate, "compile": compiled}
    torch.save(options, tmp_path / "options.pt")
    _run("average_gradients", tmp_path, ["a"])
    _run("average_gradients", tmp_path, ["a", "a"])
    one, two = (torch.load(Path(tmp_path, f"weights{n}.pt")) for n in (1, 2))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_ranks_of_all_machines_take_a_generation_up_at_the_same_epoch(scored, tmp_path):
    options = {"shards": scored.shards, "cache": scored.cache.url}
    torch.save(options, tmp_path / "options.pt")
    _run("take_up_generation", tmp_path, ["a", "a", "b"])
    first, *others = (torch.load(tmp_path / f"{rank}.pt") for rank in range(3))
    assert first[:2] == (None, 7)
    assert first[2].std() > 0
    for other in others:
        assert other[:2] == first[:2]
        assert torch.equal(other[2], first[2])
