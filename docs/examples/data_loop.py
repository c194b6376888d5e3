"""Your own training loop on FAMT's shards, scores and sampling, without its trainer.

python docs/examples/data_loop.py 'shards/train-*.tar' scores
"""

import sys

import torch

from famt.mae import MaskedAutoencoder
from famt.models import ModelConfig
from famt.patches import normalise
from famt.pipeline.loading.batches import famt_loader
from famt.pipeline.options import LoaderConfig
from famt.pipeline.scores import ScoreSpec


def main(shards, cache, epochs=1, batch_size=64, grid=14):
    sizes = ModelConfig(image_size=64, patch_size=8, width=192, depth=4, heads=3, decoder_depth=2)
    model = MaskedAutoencoder(sizes)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    batches = famt_loader(
        [shards], cache, patches=sizes, loader=LoaderConfig(batch_size=batch_size),
        spec=ScoreSpec(grid=grid), encoder=model.encoder, epochs=epochs,
    )  # fmt: skip
    for step, batch in enumerate(batches):
        patches = batch.patches
        loss, _ = model(normalise(patches.visible), normalise(patches.masked), patches.split)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
