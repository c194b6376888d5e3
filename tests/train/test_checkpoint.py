import dataclasses
import os
import random
import signal
import subprocess
import sys

import pytest
import torch
from launch import program_file

from famt.mae import MaskedAutoencoder
from famt.models import MODELS
from famt.pipeline.errors import UserError
from famt.train import checkpoint
from famt.train.checkpoint import Checkpoint

SEED, FLIPS = int(os.environ.get("FAMT_SEED", "0")), int(os.environ.get("FAMT_FLIPS", "300"))


def _state(step, model=None):
    return Checkpoint(
        run="run-a",
        step=step,
        epoch=0,
        method="mae",
        sizes=dataclasses.asdict(MODELS["vit_nano"]),
        components={
            "model": (model or MaskedAutoencoder(MODELS["vit_nano"])).state_dict(),
            "optimisation": {"ema": None, "optimizer": {"param_groups": [{"betas": (0.9, 1)}]}},
        },
        ranks=[
            {
                "loader": {"setup": "x", "epoch": 1, "step": 2, "dali": b"\x00bytes"},
                "generator": torch.Generator().get_state(),
            }
        ],
        config={"seed": 0, "shards": ["a"]},
    )


def test_a_checkpoint_comes_back_whole(tmp_path):
    torch.manual_seed(0)
    model = MaskedAutoencoder(MODELS["vit_nano"])
    path = checkpoint.save(tmp_path, _state(7, model), keep=2)
    loaded = checkpoint.load(path)
    assert (loaded.step, loaded.ranks[0]["loader"]["dali"]) == (7, b"\x00bytes")
    assert loaded.components["optimisation"]["optimizer"]["param_groups"][0]["betas"] == (0.9, 1)
    for name, value in checkpoint.load_model(tmp_path).state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def test_the_last_two_are_kept(tmp_path):
    for step in (5, 50, 500):
        checkpoint.save(tmp_path, _state(step), keep=2)
    assert [p.name for p in sorted(tmp_path.iterdir())] == [
        "checkpoint-00000050.pt",
        "checkpoint-00000500.pt",
    ]
    assert checkpoint.latest(tmp_path).name == "checkpoint-00000500.pt"


def test_a_partial_file_is_never_taken_for_a_checkpoint(tmp_path):
    (tmp_path / "checkpoint-00000009.partial").write_bytes(b"half")
    assert checkpoint.latest(tmp_path) is None
    with pytest.raises(FileNotFoundError, match=r"no checkpoint-\*\.pt"):
        checkpoint.load(tmp_path)


def test_another_file_is_refused_by_name(tmp_path):
    torch.save({"weights": torch.ones(1)}, tmp_path / "checkpoint-00000001.pt")
    with pytest.raises(UserError, match="not a whole checkpoint"):
        checkpoint.load(tmp_path)
    for content in (b"PK\x03\x04 cut off", b"hello", b""):
        (tmp_path / "checkpoint-00000001.pt").write_bytes(content)
        with pytest.raises(UserError, match="not a whole checkpoint"):
            checkpoint.load(tmp_path)


def test_another_format_is_refused(tmp_path):
    path = checkpoint.save(tmp_path, _state(1), keep=2)
    state = torch.load(path)
    torch.save({**state, "format": 99}, path)
    with pytest.raises(checkpoint.FormatError, match=r"00000001\.pt has format 99.*; use the v"):
        checkpoint.load(tmp_path)


def test_a_flipped_bit_anywhere_is_refused_or_changes_nothing(tmp_path):
    small = dataclasses.replace(_state(1), components={"model": {"w": torch.rand(600)}})
    path = checkpoint.save(tmp_path, small, keep=2)
    content, draw, refused = path.read_bytes(), random.Random(SEED), 0
    for _ in range(FLIPS):
        flipped = bytearray(content)
        flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        try:
            loaded = checkpoint.load(path)
        except UserError as error:
            assert "00000001.pt is not a whole checkpoint" in str(error)  # noqa: PT017
            refused += 1
        else:  # padding between records
            assert torch.equal(loaded.model["w"], small.model["w"])
            assert loaded.ranks[0]["loader"] == small.ranks[0]["loader"]
            assert torch.equal(loaded.ranks[0]["generator"], small.ranks[0]["generator"])
    assert refused > FLIPS // 3


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(tmp_path)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no right to mount here")
    try:
        checkpoint.save(tmp_path, _state(1), keep=2)
        (tmp_path / "ballast").write_bytes(b"\0" * (1 << 20))
        with pytest.raises(OSError, match=r"00000002\.pt: could not be written"):
            checkpoint.save(tmp_path, _state(2), keep=2)
        assert checkpoint.latest(tmp_path).name == "checkpoint-00000001.pt"
        assert checkpoint.load(tmp_path).step == 1
        assert not list(tmp_path.glob("*.partial"))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_writer_that_is_killed_leaves_the_previous_one(tmp_path):
    checkpoint.save(tmp_path, _state(1), keep=2)
    killed = subprocess.run([sys.executable, program_file("die_while_saving"), str(tmp_path)])
    assert killed.returncode == -signal.SIGKILL
    assert checkpoint.load(tmp_path).step == 1
