"""The `famt` command: a subcommand for each program."""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pkgutil import resolve_name


@dataclass(frozen=True)
class Command:
    """A program.

    Attributes:
        module: of its `main`, below `famt`.
        options: class that `main` takes, `module:name`; parsed before the program is imported,
            which takes seconds. "" if the program parses its own.
        about: one line for `--help`.
    """

    module: str
    options: str
    about: str

    @property
    def path(self) -> str:
        """The module's full name."""
        return f"famt.{self.module}"


_JOBS, _TRAIN, _EVALUATE = "jobs.options", "train.program_options", "train.evaluate.evaluators"

# fmt: off
COMMANDS = {
    "shards": Command("jobs.make_shards", f"{_JOBS}:MakeShards",
        "put folders of images into tar shards"),
    "score": Command("jobs.precompute_freq", f"{_JOBS}:PrecomputeFreq",
        "compute the frequency scores of shards into a cache"),
    "pretrain": Command("jobs.pretrain", f"{_JOBS}:RayPretrain",
        "pre-train a vision transformer, with all that it needs"),
    "evaluate": Command("train.evaluate.__main__", f"{_EVALUATE}:Evaluate",
        "k-NN, probe, segmentation or fine-tuning of an encoder"),
    "export": Command("train.export", f"{_TRAIN}:Export",
        "an encoder for timm or transformers"),
    "embed": Command("train.embed", f"{_TRAIN}:Embed",
        "features of every image, as Parquet or NumPy"),
    "report": Command("train.report", f"{_TRAIN}:Report", "one page that compares runs"),
    "figures": Command("train.figures", f"{_TRAIN}:Figures",
        "pictures of what is masked and thrown"),
    "refresh": Command("jobs.refresh_scores", f"{_JOBS}:RefreshScores",
        "scores by a model: beside a run elsewhere, or once"),
    "cache": Command("jobs.cache", "", "list, check and clean a score cache"),
    "recipes": Command("train.recipe", "train.recipe:Recipes",
        "what can be trained, and its options"),
    "results": Command("jobs.results", f"{_JOBS}:Results",
        "train and compare a declared grid of runs"),
    "benchmark": Command("jobs.benchmark", "", "speed of each part, beside its bound"),
    "gpu-check": Command("jobs.gpu_check", "", "what only a GPU can show, before a long run"),
    "demo": Command("jobs.demo", f"{_JOBS}:Demo", "the whole path on small images, in minutes"),
}
# fmt: on

_USAGE = """usage: famt COMMAND [OPTIONS]

Pre-train vision transformers by masked image modelling, with patches masked and thrown by their
frequency content and the model's own attention.

{commands}

  famt pretrain --data photos --out runs/first              from images to an encoder, or by steps:

  famt shards --source photos --out shards
  famt score --shards shards --cache scores
  famt pretrain --shards shards --cache scores --out runs/first

`famt COMMAND --help` tells more. On eight GPUs: torchrun --nproc-per-node 8 -m famt pretrain ..."""


def called() -> str:
    """How the running program is called on a command line, such as `famt report`."""
    if sys.argv[0].startswith("famt "):  # set by `main`
        return sys.argv[0]
    spec = sys.modules["__main__"].__spec__
    if spec is None:  # by its path
        return f"python {sys.argv[0]}"
    name = spec.name.removesuffix(".__main__")
    words = {each.path.removesuffix(".__main__"): word for word, each in COMMANDS.items()}
    return f"famt {words[name]}" if name in words else f"python -m {name}"


def unknown(word: str, known: Iterable[str]) -> str:
    """The beginning of a message on a command that there is not."""
    alike = get_close_matches(word, known, 1)
    return f"no command {word!r}" + (f", did you mean {alike[0]}?" if alike else ";")


def main() -> None:
    """Run the program that the first argument names, with the other arguments."""
    word, *rest = sys.argv[1:] or ["--help"]
    if word in ("-h", "--help"):
        commands = "\n".join(f"  {name:10} {each.about}" for name, each in COMMANDS.items())
        try:
            print(_USAGE.format(commands=commands), flush=True)
        except BrokenPipeError:  # nobody reads on, as after `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(128 + signal.SIGPIPE)
        return
    if word not in COMMANDS:
        print(f"error: {unknown(word, COMMANDS)} `famt --help` lists them", file=sys.stderr)
        sys.exit(2)
    try:
        if COMMANDS[word].options:
            sys.argv = [f"famt {word}", *rest]
            resolve_name("famt.train.command_line:run_command")(COMMANDS[word])
        else:
            sys.argv = [sys.argv[0], *rest]
            runpy.run_module(COMMANDS[word].path, run_name="__main__", alter_sys=True)
    except KeyboardInterrupt:  # while it was imported
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
