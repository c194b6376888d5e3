"""Pre-train on a Ray cluster, and go on from the last checkpoint when a worker is lost.

    ray job submit --working-dir . -- python jobs/pretrain.py --workers 16 --gpu \\
        --shards 's3://bucket/imagenet/train-{000000..001281}.tar' --cache s3://bucket/scores \\
        --out /shared/runs/vit-b --model vit_base --batch-size 256 --precision bf16

The same training as `python -m train.pretrain`, with the same options, in Ray Train's workers. The
folder of the run must be on a file system that all of them share: it is where a lost worker's
successors find the checkpoint. Scores that follow the model are made by actors beside it, on what
the workers leave free.
"""

from __future__ import annotations

import dataclasses
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Annotated

import ray
from annotated_types import Ge
from ray.train import (
    ControllerError,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
)
from ray.train.torch import TorchTrainer

from jobs import failures
from jobs.refresh_scores import RefreshWorkers, following
from train.config import Pretrain, parse
from train.program import run_program


@dataclass(frozen=True)
class RayPretrain(Pretrain):
    """A pre-training run and the workers that it runs on."""

    workers: Annotated[int, Ge(1)] = 1
    """ranks; each is a process of its own"""
    gpu: bool = False
    """a GPU for each worker"""
    cpus_per_worker: Annotated[int, Ge(1)] = 1
    """CPU cores for each worker; also its decoding threads, unless --threads says otherwise"""
    max_failures: Annotated[int, Ge(-1)] = 3
    """times that the run is started again after a worker was lost; -1 for any number"""
    refresher: RefreshWorkers = field(default_factory=RefreshWorkers)


def main(args: RayPretrain) -> None:
    """Train until all epochs are done.

    Raises:
        ValueError: the input is wrong, or workers were lost more often than they may be.
    """
    config = Pretrain(
        **{each.name: getattr(args, each.name) for each in dataclasses.fields(Pretrain)}
    )
    config = dataclasses.replace(
        config.absolute(),  # workers have a working directory of their own
        device="cuda" if args.gpu else "cpu",
        threads=config.threads or args.cpus_per_worker,
    )
    ray.init(ignore_reinit_error=True)
    trainer = TorchTrainer(
        failures.train,
        train_loop_config=config,  # type: ignore[arg-type]
        scaling_config=ScalingConfig(
            num_workers=args.workers,
            use_gpu=args.gpu,
            resources_per_worker={"CPU": args.cpus_per_worker, **({"GPU": 1} if args.gpu else {})},
        ),
        run_config=RunConfig(
            storage_path=str(config.out / "ray"),
            failure_config=FailureConfig(max_failures=args.max_failures),
            callbacks=[failures.EndAtMistakes()],
        ),
    )
    beside = following(config.out, args.refresher) if config.refreshed_kinds else nullcontext()
    try:
        with beside:
            trainer.fit()
    except TrainingFailedError as error:
        cause: Exception = error
        while isinstance(cause, ControllerError):
            cause = cause.controller_failure
        ray.shutdown()  # the last words of workers and controller come before ours
        raise ValueError(str(cause)) from error


if __name__ == "__main__":
    run_program(lambda arguments: main(parse(arguments, __doc__, RayPretrain)), sys.argv[1:])
