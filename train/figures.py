"""Pictures of what a run does to images.

    famt figures --checkpoint runs/first --cache scores/ --shards 'shards/val-*.tar' \\
        --out picture.png

One row per image: crop, signals, the weights at the checkpoint's step, the split (masked patches
dark, thrown ones crossed out) and the reconstruction (visible patches are the crop's, grey ones
were not reconstructed). Maps are scaled to each crop. Refreshed scores are computed anew for these
crops by the checkpoint's encoder. Scores that training keeps for each image are shown for the
run's own images; for others, attention is computed anew, and hardness, which only training yields,
is even.
"""

from __future__ import annotations

from pathlib import Path

import torch

from famt.pipeline.caching.cache import ScoreCache
from famt.pipeline.loading.dataset import load_maps, load_samples
from famt.pipeline.loading.loader import CropLoader
from famt.pipeline.options import LoaderConfig
from famt.train.checkpoint import Checkpoint, load, load_model
from famt.train.command_line import parsed, run_program
from famt.train.config import Pretrain
from famt.train.distributed import Ranks
from famt.train.picture import picture_of_crops
from famt.train.program_options import Figures
from famt.train.signals.attention import Live
from famt.train.signals.banked import Banked
from famt.train.signals.cached import Cached
from famt.train.signals.config import AttentionConfig
from famt.train.signals.patch_weights import weigh_crops
from famt.train.signals.signal import Context, Signal


@torch.inference_mode()
def main(config: Figures) -> Path:
    """Draw the picture; returns its path."""
    model = load_model(config.checkpoint)
    run = load(config.checkpoint)
    options = Pretrain.from_description(run.config)
    cache = ScoreCache(config.cache)
    samples = load_samples(config.shards, cache)
    loader = CropLoader(
        samples,
        LoaderConfig(
            batch_size=min(config.images, len(samples)),
            image_size=model.config.image_size,
            view=config.view,
            threads=1,
        ),
        drop_last=True,
        seed=config.seed,
    )
    crops = next(iter(loader))
    alone = Ranks(0, 1, "", torch.device("cpu"))
    context = Context(
        samples=samples,
        sizes=model.config,
        encoder=model.encoder,
        ranks=alone,
        # Asks for the scores, which not all signals need.
        cached=lambda: load_maps(
            load_samples(config.shards, cache, options.spec), cache, options.spec
        ),
        score=options.spec.id,
        seed=options.seed,
        parts=options.accumulate,
        bf16=options.precision == "bf16",
    )
    weighed = weigh_crops(
        options,
        _signals(run, options, context),
        crops,
        epoch=run.epoch,
        step=run.step,
        progress=run.progress,
        look=True,
    )
    config.out.parent.mkdir(parents=True, exist_ok=True)
    picture_of_crops(model, weighed, config.seed).save(config.out)
    print(config.out)
    return config.out


def _signals(run: Checkpoint, options: Pretrain, context: Context) -> list[Signal]:
    """The signals of a run at a checkpoint, for any images."""
    signals: list[Signal] = []
    own = run.config["data"] == context.samples.digest
    for name, slot in options.slots.items():
        state = run.components.get(name, {})
        signal: Signal | None = None
        if slot.is_refreshed:
            if state.get("generation") is not None:
                signal = Live(slot, context)
            elif slot.is_cached:
                signal = Cached(slot, context)
        elif not slot.is_off:
            signal = slot.build(context)
            if isinstance(signal, Banked) and isinstance(slot, AttentionConfig) and not own:
                signal = Live(slot, context)
            elif state:
                signal.load_state_dict(state)
        if signal is not None:
            signal.name = name
            signals.append(signal)
    return signals


if __name__ == "__main__":
    run_program(main, parsed(Figures, __doc__))
