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
from typing import Annotated, Any

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
from jobs.cluster import start_ray
from jobs.refresh_scores import following
from jobs.refresh_workers import GPU_SHARE, RefreshWorkers
from pipeline.errors import UserError
from train.config import Pretrain, parse
from train.program import run_program

_MOST_THREADS = 16  # decode as many photos as a GPU's step takes, docs/scale.md


@dataclass(frozen=True)
class RayPretrain(Pretrain):
    """A pre-training run and the workers that it runs on."""

    workers: Annotated[int, Ge(1)] = 1
    """ranks; each is a process of its own"""
    gpu: bool = False
    """a GPU for each worker"""
    cpus_per_worker: Annotated[int | None, Ge(1)] = None
    """CPU cores for each worker; also its decoding threads, unless --threads says otherwise. If
    left out, 1 without GPUs, and with them a GPU's share of its machine's cores, 16 at most"""
    max_failures: Annotated[int, Ge(-1)] = 3
    """times that the run is started again after a worker was lost; -1 for any number"""
    refresher: RefreshWorkers = field(default_factory=RefreshWorkers)

    @property
    def follows(self) -> bool:
        """Whether actors beside the training make scores anew."""
        return bool(self.refreshed_kinds) and self.refresh.pin is None


def main(args: RayPretrain) -> None:
    """Train until all epochs are done.

    Raises:
        ValueError: the input is wrong, or workers were lost more often than they may be.
    """
    start_ray(log_to_driver=True)
    held = worker_resources(args, ray.nodes())
    config = Pretrain(
        **{each.name: getattr(args, each.name) for each in dataclasses.fields(Pretrain)}
    )
    config = dataclasses.replace(
        config.absolute(),  # workers have a working directory of their own
        device="cuda" if args.gpu else "cpu",
        threads=config.threads or int(held["CPU"]),
    )
    trainer = TorchTrainer(
        failures.train,
        train_loop_config=config,  # type: ignore[arg-type]
        scaling_config=ScalingConfig(
            num_workers=args.workers,
            use_gpu=args.gpu,
            resources_per_worker=held,
        ),
        run_config=RunConfig(
            storage_path=str(config.out / "ray"),
            failure_config=FailureConfig(max_failures=args.max_failures),
            callbacks=[failures.EndAtMistakes()],
        ),
    )
    beside = following(config.out, args.refresher) if args.follows else nullcontext()
    try:
        with beside:
            trainer.fit()
    except TrainingFailedError as error:
        cause: Exception = error
        while isinstance(cause, ControllerError):
            cause = cause.controller_failure
        ray.shutdown()  # the last words of workers and controller come before ours
        raise UserError(str(cause)) from error


def worker_resources(args: RayPretrain, nodes: list[dict[str, Any]]) -> dict[str, float]:
    """What each worker holds of the cluster; what it leaves, a refresh beside it finds free.

    Args:
        nodes: of the cluster, as `ray.nodes` tells of them.

    Raises:
        ValueError: nothing says how many CPU cores a GPU has for itself.
    """
    if not args.gpu:
        return {"CPU": args.cpus_per_worker or 1}
    share = args.refresher.gpus_per_worker
    share = GPU_SHARE if share is None else share
    beside = args.follows and share < 0.5  # of what holds half a GPU or less, Ray puts two on one
    return {
        "CPU": args.cpus_per_worker or _cores_of_a_gpu(args, nodes),
        "GPU": 1 - share if beside else 1,
    }


def _cores_of_a_gpu(args: RayPretrain, nodes: list[dict[str, Any]]) -> int:
    machines = [node["Resources"] for node in nodes if node["Alive"]]
    shares = [each["CPU"] // each["GPU"] for each in machines if each.get("GPU")]
    if not shares:
        raise UserError(
            "--gpu: no machine of the cluster has a GPU; give --cpus-per-worker if some will come"
        )
    left = min(shares) - (args.refresher.cpus_per_worker if args.follows else 0)
    return max(1, min(_MOST_THREADS, int(left)))


if __name__ == "__main__":
    run_program(lambda arguments: main(parse(arguments, __doc__, RayPretrain)), sys.argv[1:])
