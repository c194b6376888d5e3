"""A run whose rank 1 has a loss that is no number at its second step; each rank tells its error."""

import sys
from pathlib import Path

import torch

from famt.train.config import Pretrain
from famt.train.distributed import join_ranks
from famt.train.pretrain import Run
from famt.train.signals.config import AttentionConfig, FrequencyConfig
from famt.train.stop import Stop


class Poisoned(Run):
    def forward_backward(self, batch):
        loss = super().forward_backward(batch)
        if self.step == 0:
            Path(folder, f"loss{self.ranks.rank}.txt").write_text(repr(loss.item()))
        return loss * float("nan") if (self.step, self.ranks.rank) == (1, 1) else loss


folder = Path(sys.argv[1])
options = torch.load(folder / "options.pt")
with join_ranks("cpu") as ranks:
    run = Poisoned(
        Pretrain(
            shards=options["shards"],
            cache=options["cache"],
            out=folder / "run",
            model="vit_nano",
            batch_size=4,
            device="cpu",
            frequency=FrequencyConfig("off"),
            attention=AttentionConfig("off"),
            threads=1,
            log_steps=1,
        ),
        ranks,
    )
    try:
        with Stop() as stop:
            run.train(stop)
    except FloatingPointError as error:
        Path(folder, f"{ranks.rank}.txt").write_text(str(error))
