"""The `famt` command: a word for each program of the project."""

from __future__ import annotations

import runpy
import signal
import sys
from dataclasses import dataclass
from pkgutil import resolve_name


@dataclass(frozen=True)
class Command:
    """A program.

    Attributes:
        about: what it does, in a line.
        main: its function of its options, `module:name`.
        options: their type. A command line is parsed before the module of `main` is imported, which
            takes seconds, so options that are in another module are quick to ask for. "" where the
            program parses for itself.
    """

    about: str
    main: str
    options: str = ""


COMMANDS = {
    "shards": Command("put folders of images into tar shards", "famt.jobs.make_shards:main"),
    "score": Command(
        "compute the frequency scores of shards into a cache", "famt.jobs.precompute_freq:main"
    ),
    "pretrain": Command(
        "pre-train a vision transformer, with all that it needs",
        "famt.jobs.pretrain:main",
        "famt.jobs.options:RayPretrain",
    ),
    "evaluate": Command(
        "k-NN, probe, segmentation or fine-tuning of an encoder",
        "famt.train.evaluate.__main__:run",
        "famt.train.evaluate.options:Evaluate",
    ),
    "export": Command(
        "an encoder for timm or transformers",
        "famt.train.export:main",
        "famt.train.options:Export",
    ),
    "embed": Command(
        "features of every image, as Parquet or NumPy",
        "famt.train.embed:main",
        "famt.train.options:Embed",
    ),
    "report": Command("one page that compares runs", "famt.train.report:main"),
    "figures": Command(
        "pictures of what is masked and thrown",
        "famt.train.figures:main",
        "famt.train.options:Figures",
    ),
    "refresh": Command(
        "scores by a model: beside a run elsewhere, or once", "famt.jobs.refresh_scores:main"
    ),
    "cache": Command("list, check and clean a score cache", "famt.jobs.cache:main"),
    "results": Command("train and compare a declared grid of runs", "famt.jobs.results:main"),
    "benchmark": Command("speed of each part, beside its bound", "famt.jobs.benchmark:main"),
    "gpu-check": Command("what only a GPU can show, before a long run", "famt.jobs.gpu_check:main"),
    "demo": Command("the whole path on small images, in minutes", "famt.jobs.demo:main"),
}

_USAGE = """usage: famt COMMAND [OPTIONS]

Pre-train vision transformers by masked image modelling, with patches masked and thrown by their
frequency content and the model's own attention.

{commands}

  famt shards --source photos --out shards
  famt score --shards shards --cache scores
  famt pretrain --shards shards --cache scores --out runs/first

`famt COMMAND --help` tells more. On eight GPUs: torchrun --nproc-per-node 8 -m famt pretrain ..."""


def program_of(command: Command) -> str:
    """The module of a program."""
    return command.main.partition(":")[0]


def called() -> str:
    """How the program that runs is called on a command line: `famt report`, say."""
    if sys.argv[0].startswith("famt "):  # as `main` has it
        return sys.argv[0]
    spec = sys.modules["__main__"].__spec__
    if spec is None:  # by its path
        return f"python {sys.argv[0]}"
    name = spec.name.removesuffix(".__main__")
    words = {program_of(each).removesuffix(".__main__"): word for word, each in COMMANDS.items()}
    return f"famt {words[name]}" if name in words else f"python -m {name}"


def main() -> None:
    """Run the program that the first word names, with the words after it."""
    word, *rest = sys.argv[1:] or ["--help"]
    if word in ("-h", "--help"):
        commands = "\n".join(f"  {name:10} {each.about}" for name, each in COMMANDS.items())
        print(_USAGE.format(commands=commands))
        return
    if word not in COMMANDS:
        print(f"error: no command {word!r}; `famt --help` lists them", file=sys.stderr)
        sys.exit(2)
    try:
        if COMMANDS[word].options:
            sys.argv = [f"famt {word}", *rest]
            resolve_name("famt.train.program:run_command")(COMMANDS[word])
        else:
            sys.argv = [sys.argv[0], *rest]
            runpy.run_module(program_of(COMMANDS[word]), run_name="__main__", alter_sys=True)
    except KeyboardInterrupt:  # while it was imported
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
