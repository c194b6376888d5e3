"""The whole pipeline in minutes: images, shards, scores, training, probe, a picture, a page.

    famt demo
    famt demo --data photos/      # a folder of images or of class folders

Prints the accuracy of a probe on the trained encoder and on an untrained one. Images without
classes are trained on too, without the probe.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import ray

from famt.jobs import make_shards, precompute_freq
from famt.jobs.cluster import start_ray
from famt.jobs.options import Demo, MakeShards, PrecomputeFreq, RefreshWorkers
from famt.jobs.refresh_scores import following
from famt.pipeline.caching.cache import ScoreCache
from famt.pipeline.loading.dataset import load_samples
from famt.pipeline.options import RandomView
from famt.pipeline.sharding.patterns import expand_shards
from famt.pipeline.sharding.sources import DIGITS
from famt.pipeline.wording import counted
from famt.train import figures, pretrain, report
from famt.train.command_line import parse, parsed, run_program
from famt.train.config import Pretrain
from famt.train.evaluate.evaluators.probe import Probe
from famt.train.evaluate.run import run as evaluate
from famt.train.program_options import Figures, Report


def main(demo: Demo) -> None:
    """Run each stage through the function behind its command."""
    started = time.monotonic()
    demo.out.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=demo.out))
    shards, cache, run = folder / "shards", str(folder / "scores"), folder / "run"
    train, val = [f"{shards}/train-*.tar"], [f"{shards}/val-*.tar"]

    with _stage("1. images into webdataset shards"):
        make_shards.main(
            MakeShards(source=demo.data, out=str(shards), holdout=0.2, samples_per_shard=500)
        )
    with _stage("2. frequency scores by Ray into the cache"):
        start_ray()
        precompute_freq.main(PrecomputeFreq(shards=[*train, *val], cache=cache, max_bad=1.0))
    labels = load_samples(train, ScoreCache(cache)).labels
    images = len(labels)
    recipe: Pretrain = parse(
        ["--recipe", "digits", "--shards", *train, "--cache", cache, "--out", str(run)], None
    )
    config = replace(
        recipe,
        epochs=max(1, round(demo.images_seen / images)),
        batch_size=min(recipe.batch_size, images),
        # Mirrored digits are no digits; mirrored photos are photos.
        view=recipe.view if demo.data == DIGITS else RandomView(),
    )
    with (
        _stage("3. FAMT pre-training, with a job beside it that refreshes its scores"),
        following(run, RefreshWorkers(workers=1)),
    ):
        pretrain.main(config)
    ray.shutdown()
    accuracy = {}
    for name in ("trained", "untrained") if len(labels.unique()) > 1 else ():
        with _stage(f"4. probe of the {name} encoder"):
            probe = Probe(
                checkpoint=str(run), cache=cache, train=train, val=val,
                untrained=name == "untrained",
                poolings=("cls", "mean"),  # attentive pooling takes as long as the training
            )  # fmt: skip
            accuracy[name] = float(evaluate(probe)["top1"])
    with _stage("5. a picture, and a page of the run"):
        picture = figures.main(
            Figures(checkpoint=run, cache=cache, shards=val, out=folder / "pictures" / "split.png")
        )
        page = report.main(Report([run], folder / "report.html"))
    minutes = (time.monotonic() - started) / 60
    print(
        f"\nprobe, top-1 on {counted(len(expand_shards(val)), 'held-out shard')}: "
        f"{accuracy['trained']:.1%} trained, {accuracy['untrained']:.1%} untrained"
        if accuracy
        else f"\nno probe: {demo.data} has fewer than two classes; it needs a folder per class"
    )
    print(
        f"page:    {page}\npicture: {picture}\ncurves:  tensorboard --logdir {run}\n"
        f"encoder: famt export {run} --to timm --out {folder / 'exported'}\n"
        f"took {minutes:.1f} minutes"
    )


@contextmanager
def _stage(name: str) -> Iterator[None]:
    print(f"\n=== {name}", flush=True)
    started = time.monotonic()
    yield
    print(f"    {time.monotonic() - started:.1f} s", flush=True)


if __name__ == "__main__":
    run_program(main, parsed(Demo, __doc__))
