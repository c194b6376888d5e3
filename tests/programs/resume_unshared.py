"""A run's ranks, each machine with a folder of its own under the name of the run's."""

import contextlib
import dataclasses
import sys
from pathlib import Path

import torch

from train import resume
from train.config import Pretrain
from train.distributed import ranks

folder = Path(sys.argv[1])
config = Pretrain(**torch.load(folder / "options.pt"))
resume._SEEN_WITHIN = 1.0
with ranks("cpu") as here:
    own = dataclasses.replace(config, out=folder / here.node)
    try:
        with resume.own_folder(own.out) if here.is_main else contextlib.nullcontext():
            resume.resume(own, {}, here)
    except ValueError as error:
        (folder / f"error{here.rank}").write_text(str(error))
