"""A run whose rank 1 has a loss that is no number at its second step; each rank tells its error."""

import sys
from pathlib import Path

import torch

from train.config import Pretrain
from train.distributed import ranks
from train.pretrain import Run
from train.signals.config import AttentionConfig, ContentConfig
from train.streams import Stop


class Poisoned(Run):
    def forward_backward(self, batch):
        loss = super().forward_backward(batch)
        if self.step == 0:
            Path(folder, f"loss{self.here.rank}.txt").write_text(repr(loss.item()))
        return loss * float("nan") if (self.step, self.here.rank) == (1, 1) else loss


folder = Path(sys.argv[1])
options = torch.load(folder / "options.pt")
with ranks("cpu") as here:
    run = Poisoned(
        Pretrain(
            shards=options["shards"],
            cache=options["cache"],
            out=folder / "run",
            model="vit_nano",
            batch_size=4,
            device="cpu",
            content=ContentConfig("off"),
            attention=AttentionConfig("off"),
            threads=1,
            log_steps=1,
        ),
        here,
    )
    try:
        with Stop(here.lifeline) as stop:
            run.train(stop)
    except FloatingPointError as error:
        Path(folder, f"{here.rank}.txt").write_text(str(error))
