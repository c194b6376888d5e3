"""The `famt` command: a word for each program of the project."""

from __future__ import annotations

import runpy
import sys

# Word: (module, what it does). Nothing heavy is imported before a word is known.
COMMANDS = {
    "shards": ("famt.jobs.make_shards", "put folders of images into tar shards"),
    "score": ("famt.jobs.precompute_freq", "compute the frequency scores of shards into a cache"),
    "pretrain": ("famt.jobs.pretrain", "pre-train a vision transformer, with all that it needs"),
    "evaluate": ("famt.train.evaluate", "k-NN, probe, segmentation or fine-tuning of an encoder"),
    "export": ("famt.train.export", "an encoder for timm or transformers"),
    "embed": ("famt.train.embed", "features of every image, as Parquet or NumPy"),
    "report": ("famt.train.report", "one page that compares runs"),
    "figures": ("famt.train.figures", "pictures of what is masked and thrown"),
    "refresh": ("famt.jobs.refresh_scores", "scores by a model: beside a run elsewhere, or once"),
    "cache": ("famt.jobs.cache", "list, check and clean a score cache"),
    "results": ("famt.jobs.results", "train and compare a declared grid of runs"),
    "benchmark": ("famt.jobs.benchmark", "speed of each part, beside its bound"),
    "gpu-check": ("famt.jobs.gpu_check", "what only a GPU can show, before a long run"),
    "demo": ("famt.jobs.demo", "the whole path on small images, in minutes"),
}

_USAGE = """usage: famt COMMAND [OPTIONS]

Pre-train vision transformers by masked image modelling, with patches masked and thrown by their
frequency content and the model's own attention.

{commands}

  famt shards --source photos --out shards
  famt score --shards shards --cache scores
  famt pretrain --shards shards --cache scores --out runs/first

`famt COMMAND --help` tells more. On eight GPUs: torchrun --nproc-per-node 8 -m famt pretrain ..."""


def main() -> None:
    """Run the program that the first word names, with the words after it."""
    word, *rest = sys.argv[1:] or ["--help"]
    if word in ("-h", "--help"):
        commands = "\n".join(f"  {name:10} {text}" for name, (_, text) in COMMANDS.items())
        print(_USAGE.format(commands=commands))
        return
    if word not in COMMANDS:
        print(f"error: no command {word!r}; `famt --help` lists them", file=sys.stderr)
        sys.exit(2)
    module, _ = COMMANDS[word]
    sys.argv = [sys.argv[0], *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
