"""What must stay as it is while code is moved: a digest a line, to compare before and after.

    python tests/golden.py > before.txt    # one or two minutes on two CPU cores
    python tests/golden.py | diff before.txt -

It covers the final weights of four short runs, the score maps of tars made on the spot, and the
published tables, made anew from their logs. Every option that a run learns by is spelled
out, so that defaults may change. The digests hold for one machine and one set of libraries.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import torch
from samples import score, write_shards

from famt.jobs.tables import GridResult, table
from famt.pipeline.caching.cache import ScoreCache
from famt.pipeline.loading.dataset import load_maps, load_samples
from famt.pipeline.scores import ScoreSpec
from famt.pixel_kinds import PIXEL_KINDS
from famt.train import checkpoint

ROOT = Path(__file__).parents[1]

COMMON = """
--model vit_nano --image-size 32 --patch-size 4 --decoder-width 48 --decoder-depth 1
--decoder-heads 3 --epochs 3 --plain-epochs 0 --crops-per-image 1 --accumulate 1
--normalise-targets True --optimiser.base-learning-rate 0.02 --optimiser.warmup-epochs 1
--optimiser.weight-decay 0.05 --optimiser.clip-norm 0 --optimiser.ema-decay 0 --view.area 0.2 1
--view.aspect-ratio 0.75 1.3333 --view.flip 0.5 --interpolation bicubic --shuffle-buffer 16
--precision fp32 --device cpu --threads 1 --log-steps 4 --picture-epochs 0 --seed 3
--frequency.exponent 1 --frequency.cached-exponent 0.25 --attention.exponent 1
--attention.kind attention --attention.every 4 --hardness.source off --refresh.every 1
--spec.kind border_geodesic --spec.grid 8 --spec.pixels-per-cell 4 --join.visible lightest
--join.thrown heaviest --join.blend 1 1 --join.predicted random --join.loss-exponent 0
--frequency.kind token_frequency
"""
RANDOM = "--frequency.source off --attention.source off"
RUNS = {
    "famt": """--method mae --decoder self --unit 1 --fused --batch-size 8 --refresh.wait
        --frequency.source cached-then-refreshed --attention.source rolling
        --join.mask-ratio 0.45 --join.throw-ratio 0.4 --join.predicted-share 1""",
    "uniform": f"""--method mae --decoder cross --unit 1 --fused 0 --batch-size 8 {RANDOM}
        --join.mask-ratio 0.45 --join.throw-ratio 0.45 --join.predicted-share 0.5""",
    "simmim": f"""--method simmim --decoder self --unit 2 --fused --batch-size 8 {RANDOM}
        --join.mask-ratio 0.6 --join.throw-ratio 0 --join.predicted-share 1""",
    "two ranks": """--method mae --decoder self --unit 1 --fused --batch-size 4
        --frequency.source cached --attention.source rolling
        --join.mask-ratio 0.45 --join.throw-ratio 0.4 --join.predicted-share 1""",
}


def main() -> None:
    """Print the digests as JSON lines."""
    torch.set_num_threads(1)  # sums of several differ in their last bits
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tars = write_shards(folder, 32, 32)
        found = chain(_maps(tars, folder / "cache"), _weights(tars, folder), _tables())
        for name, digest in found:
            print(json.dumps({"of": name, "sha256": digest}), flush=True)


def _maps(tars: list[Path], url: Path) -> Iterator[tuple[str, str]]:
    cache = ScoreCache(str(url), create=True)
    for kind in PIXEL_KINDS:
        spec = ScoreSpec(kind=kind, grid=8, pixels_per_cell=4)
        score(tars, cache, spec)
        maps = load_maps(load_samples([*map(str, tars)], cache, spec), cache, spec)
        yield f"maps {kind}", hashlib.sha256(maps.numpy().tobytes()).hexdigest()


def _weights(tars: list[Path], folder: Path) -> Iterator[tuple[str, str]]:
    for name, options in RUNS.items():
        out = folder / name.replace(" ", "-")
        ranks = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
        with _refreshing(out) if "--refresh.wait" in options else contextlib.nullcontext():
            _call(
                *(ranks if name == "two ranks" else []), "famt.train.pretrain", *COMMON.split(),
                *options.split(), "--shards", *map(str, tars), "--cache", str(folder / "cache"),
                "--out", str(out),
            )  # fmt: skip
        digest = hashlib.sha256()
        for key, value in sorted(checkpoint.load(out).model.items()):
            digest.update(f"{key} {value.dtype} {list(value.shape)} ".encode())
            digest.update(value.numpy().tobytes())
        yield f"weights {name}", digest.hexdigest()


def _tables() -> Iterator[tuple[str, str]]:
    for published in sorted((ROOT / "docs" / "results").glob("*.json.gz")):
        text = table(GridResult.read(published))
        name = published.name.partition(".")[0]
        yield f"table {name}", hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def _refreshing(out: Path) -> Iterator[None]:
    """The job that scores with the encoders of a run, beside it."""
    job = subprocess.Popen(
        [sys.executable, "-m", "famt.jobs.refresh_scores", "--follow", str(out), "--workers", "1"],
        env=_environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield
    finally:
        job.terminate()
        job.wait()


def _call(module: str, *arguments: str) -> None:
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, env=_environment(), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{module} ended with {done.returncode}:\n{done.stderr[-4000:]}")


def _environment() -> dict[str, str]:
    return {
        **os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "RAY_ADDRESS": "local",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }  # fmt: skip


if __name__ == "__main__":
    main()
