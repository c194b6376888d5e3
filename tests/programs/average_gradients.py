"""Three steps on a batch that the ranks have a part of each."""

import sys
from pathlib import Path

import torch

from famt.pipeline.loading.loader import Views
from famt.pipeline.loading.masking import PatchBatch
from famt.sampling import PatchSplit
from famt.train.config import OptimiserConfig, Pretrain
from famt.train.distributed import join_ranks
from famt.train.pretrain import Run
from famt.train.signals.config import AttentionConfig, FrequencyConfig

VIEWS = Views(torch.arange(8), torch.ones(8, 4), torch.zeros(8, dtype=torch.bool))

folder = Path(sys.argv[1])
options = torch.load(folder / "options.pt")
with join_ranks("cpu") as ranks:
    run = Run(
        Pretrain(
            shards=options["shards"],
            cache=options["cache"],
            out=folder / f"run{ranks.world_size}",
            model="vit_nano",
            batch_size=8 // ranks.world_size,
            device="cpu",
            frequency=FrequencyConfig("off"),
            attention=AttentionConfig("off"),
            accumulate=options["accumulate"] // ranks.world_size,
            optimiser=OptimiserConfig(base_learning_rate=0.05, warmup_epochs=0),
            threads=1,
            compile=options["compile"] and ranks.world_size > 1,
        ),
        ranks,
    )
    for _ in range(3):
        generator = torch.Generator().manual_seed(run.step)
        split = torch.rand(8, 64, generator=generator).argsort(1).split([28, 26, 10], dim=1)
        pixels = torch.randint(0, 256, (8, 38, 48), dtype=torch.uint8, generator=generator)
        whole = PatchBatch(pixels[:, :10], pixels[:, 10:], PatchSplit(*split), VIEWS)
        run.forward_backward(whole.chunk(ranks.world_size)[ranks.rank])
        with torch.no_grad():  # Adam would blow rounding up where a gradient is all but 0
            for parameter in run.model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
        run.optimisation.optimizer.zero_grad()
        run.optimisation.step += 1
    if ranks.is_main:
        torch.save(run.model.state_dict(), folder / f"weights{ranks.world_size}.pt")
