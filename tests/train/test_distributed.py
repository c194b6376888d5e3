import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from train.distributed import ranks


def test_one_process_is_rank_0_of_1():
    with ranks("cpu") as here:
        assert (here.rank, here.world_size, here.is_main) == (0, 1, True)
        assert here.device == torch.device("cpu")
        assert here.gather({"x": 1}) == [{"x": 1}]
        assert here.share(lambda: "made") == "made"


def _run(code, tmp_path, nodes):
    """Run `code` in as many processes as `nodes` names, each on the machine of that name."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            env={
                **os.environ, "RANK": str(rank), "WORLD_SIZE": str(len(nodes)),
                "LOCAL_RANK": "0", "GROUP_RANK": node, "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, node in enumerate(nodes)
    ]  # fmt: skip
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


_SHARED = """
import sys, torch
from pathlib import Path
from train.distributed import ranks
with ranks("cpu") as here:
    made = []
    def make():
        made.append(1)
        return {"tensor": torch.zeros(4), "name": "x"}
    shared = here.share(make)
    shared["tensor"][here.rank] = 1 + here.rank
    here.gather(None)
    Path(sys.argv[1], str(here.rank)).write_text(f"{len(made)} {shared['tensor'].tolist()}")
    try:
        here.share(lambda: 1 / 0)
    except ZeroDivisionError:
        Path(sys.argv[1], f"error{here.rank}").touch()
"""


@pytest.mark.slow
def test_ranks_of_a_machine_share_one_memory_and_machines_do_not(tmp_path):
    _run(_SHARED, tmp_path, ["a", "a", "b"])
    assert (tmp_path / "0").read_text() == "1 [1.0, 2.0, 0.0, 0.0]"
    assert (tmp_path / "1").read_text() == "0 [1.0, 2.0, 0.0, 0.0]"
    assert (tmp_path / "2").read_text() == "1 [0.0, 0.0, 3.0, 0.0]"
    assert len(list(tmp_path.glob("error*"))) == 3


_EXCHANGED = """
import sys, torch
from pathlib import Path
from famt.mae import MODELS, MaskedAutoencoder
from pipeline.loader import CropBatch
from train.attention import LiveAttention, RollingAttention
from train.config import RollingConfig
from train.distributed import ranks
with ranks("cpu") as here:
    torch.manual_seed(0)
    encoder = MaskedAutoencoder(MODELS["vit_nano_32"]).encoder
    rolling = RollingAttention(LiveAttention(encoder, "famt"), 9, 8, RollingConfig(1), here)
    images = torch.randint(0, 256, (9, 32, 32, 3), dtype=torch.uint8)
    for step in range(2):
        rows = torch.arange(9)[here.rank + 4 * step :: 3][: 2 - step]
        windows = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(len(rows), 4)
        flips = torch.zeros(len(rows), dtype=torch.bool)
        rolling(CropBatch(images[rows], rows, windows, flips), step)
        rolling.exchange(step + 1)
    torch.save(rolling.bank.state(), Path(sys.argv[1], f"{here.rank}.pt"))
"""


@pytest.mark.slow
def test_banks_are_the_same_on_all_machines_after_an_exchange(tmp_path):
    _run(_EXCHANGED, tmp_path, ["a", "a", "b"])
    banks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    for bank in banks[1:]:
        assert all(torch.equal(bank[name], banks[0][name]) for name in bank)
    assert banks[0]["refreshed"].tolist() == [0, 0, 0, 0, 1, 1, 1, -1, -1]


_AVERAGED = """
import sys, torch
from pathlib import Path
from famt.sampling import PatchSplit
from pipeline.join import JoinConfig, PatchBatch
from train.config import OptimiserConfig, Pretrain
from train.distributed import ranks
from train.pretrain import Run
folder = Path(sys.argv[1])
options = torch.load(folder / "options.pt")
with ranks("cpu") as here:
    run = Run(Pretrain(
        shards=options["shards"], cache=options["cache"], out=folder / f"run{here.world_size}",
        model="vit_nano_32", batch_size=8 // here.world_size, device="cpu", attention="off",
        join=JoinConfig(frequency_exponent=0),
        accumulate=options["accumulate"] // here.world_size,
        optimiser=OptimiserConfig(base_learning_rate=0.05, warmup_epochs=0), threads=1,
    ), here)
    run.model.train()
    for _ in range(3):
        generator = torch.Generator().manual_seed(run.step)
        split = torch.rand(8, 64, generator=generator).argsort(1).split([28, 26, 10], dim=1)
        pixels = torch.randint(0, 256, (8, 38, 48), dtype=torch.uint8, generator=generator)
        whole = PatchBatch(pixels[:, :10], pixels[:, 10:], PatchSplit(*split),
                           torch.arange(8), torch.arange(8))
        run.forward_backward(whole.chunk(here.world_size)[here.rank])
        with torch.no_grad():  # Adam would blow rounding up where a gradient is all but 0
            for parameter in run.model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
        run.optimizer.zero_grad()
        run.step += 1
    if here.is_main:
        torch.save(run.model.state_dict(), folder / f"weights{here.world_size}.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [2, 4])
def test_two_ranks_train_as_one_with_the_doubled_batch(scored, tmp_path, accumulate):
    options = {
        "shards": scored.shards, "cache": scored.cache.url, "accumulate": accumulate,
    }  # fmt: skip
    torch.save(options, tmp_path / "options.pt")
    _run(_AVERAGED, tmp_path, ["a"])
    _run(_AVERAGED, tmp_path, ["a", "a"])
    one, two = (torch.load(Path(tmp_path, f"weights{n}.pt")) for n in (1, 2))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-6, rtol=1e-5)


_PERIODIC = """
import sys, time, torch
from pathlib import Path
from famt.mae import MODELS, MaskedAutoencoder
from pipeline.generations import Generation
from pipeline.loader import CropBatch
from pipeline.refresh import refresh_shards
from pipeline.scores import ModelScoreSpec, encoder_digest
from pipeline.table import load_table
from pipeline.cache import ScoreCache
from train.config import PeriodicConfig, Pretrain
from train.distributed import ranks
from train.refresh import PeriodicAttention
from train.streams import Stop
folder = Path(sys.argv[1])
options = torch.load(folder / "options.pt")
with ranks("cpu") as here:
    config = Pretrain(shards=options["shards"], cache=options["cache"], out=folder,
                      model="vit_nano_32", attention="periodic", periodic=PeriodicConfig(every=9))
    cache = ScoreCache(config.cache)
    table = here.share(lambda: load_table(config.shards, cache, None))
    torch.manual_seed(0)
    encoder = MaskedAutoencoder(MODELS["vit_nano_32"]).encoder.eval()
    periodic = PeriodicAttention(config, "run-a", table, 8, here)
    periodic.begin_epoch(0, 0, encoder, Stop(), None)
    first = periodic.current
    if here.is_main:
        spec = ModelScoreSpec("famt", 8, 32, encoder_digest(encoder.state_dict()))
        list(refresh_shards(encoder, table.urls, cache, spec, batch_size=8, threads=1,
                            device=torch.device("cpu")))
        cache.generations.publish(Generation("run-a", 0, spec, table.digest, len(table)))
    for epoch in range(1, 200):
        periodic.begin_epoch(epoch, epoch, encoder, Stop(), None)
        if periodic.current:
            break
        time.sleep(0.1)
    rows = torch.arange(26)
    windows = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(26, 4)
    crops = CropBatch(torch.zeros(26, 1, 1, 3), rows, windows, torch.zeros(26, dtype=torch.bool))
    torch.save((first, epoch, periodic.current.step, periodic.read(crops, 0)),
               folder / f"{here.rank}.pt")
    periodic.close(finished=True)
"""


@pytest.mark.slow
def test_ranks_of_all_machines_take_a_generation_up_at_the_same_epoch(scored, tmp_path):
    options = {"shards": scored.shards, "cache": scored.cache.url}
    torch.save(options, tmp_path / "options.pt")
    _run(_PERIODIC, tmp_path, ["a", "a", "b"])
    first, *others = (torch.load(tmp_path / f"{rank}.pt") for rank in range(3))
    assert first[:3] == (None, first[1], 0)
    assert first[3].std() > 0
    for other in others:
        assert other[:3] == first[:3]
        assert torch.equal(other[3], first[3])
