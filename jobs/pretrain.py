"""Pre-train a vision transformer, with the job that refreshes its scores beside it.

    famt pretrain --data photos --out runs/first
    famt pretrain --shards 'shards/train-*.tar' --cache scores/ --out runs/first
    torchrun --nproc-per-node 8 -m famt pretrain --shards ... --cache ... --out ...
    ray job submit --working-dir . -- python jobs/pretrain.py --workers 16 --gpu \\
        --shards 's3://bucket/imagenet/train-{000000..001281}.tar' --cache s3://bucket/scores \\
        --out /shared/runs/vit-b --model vit_base --batch-size 256 --precision bf16

Trains in this process, in the processes of torchrun, or, with --workers, in workers of Ray Train,
which resume from the last checkpoint when one is lost. All of them must share --out. The refresh
job ends with the training; its output is <out>/refresh.log. Runs without refreshed signals need no
job.

`--recipe` sets defaults that other options override: the name of a recipe below, or a file.

The same command resumes a run from the last checkpoint in --out. SIGTERM, SIGUSR1 and Ctrl-C make
the run write a checkpoint and exit; with --workers it loses the steps since the last one.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
from contextlib import nullcontext
from typing import Any

import ray
import torch
from ray.train import (
    ControllerError,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    WorkerGroupError,
)
from ray.train.torch import TorchTrainer

from famt.jobs import from_images, ray_train_worker
from famt.jobs.cluster import start_ray
from famt.jobs.options import RayPretrain, RefreshWorkers
from famt.jobs.refresh_scores import following
from famt.jobs.refresh_workers import GPU_SHARE
from famt.pipeline.errors import UserError
from famt.train import pretrain
from famt.train.command_line import is_users, parsed, run_program
from famt.train.config import Pretrain
from famt.train.distributed import require_device

_MOST_THREADS = 16  # enough to decode for one GPU, docs/scale.md


def main(args: RayPretrain) -> None:
    """Train to the last epoch.

    Raises:
        UserError: the input is wrong, or workers were lost more often than --max-failures.
    """
    config = Pretrain(
        **{each.name: getattr(args, each.name) for each in dataclasses.fields(Pretrain)}
    )
    if args.data:
        require_device(config.device)
        from_images.prepare(args.data, args.labels, config.out, config.cached_score)
    elif not (args.shards and args.cache):
        raise UserError("give --data, a folder of images; or --shards and --cache")
    elif args.labels:
        raise UserError("--labels needs --data: it lists the classes of its images")
    if args.workers:
        _train_on_ray(args, config)
        return
    if args.gpu:
        raise UserError("--gpu needs --workers; without them, --device chooses")
    is_main = os.environ.get("RANK", "0") == "0"  # of torchrun's ranks
    with following(config.out, beside(args)) if config.refreshes and is_main else nullcontext():
        finished = pretrain.main(config)
    if not (finished and is_main):
        return
    if args.data:
        from_images.finish(config.out)
    else:
        print(f"encoder: famt export {shlex.quote(str(config.out))} --to timm --out <folder>")
        places = ["--checkpoint", str(config.out), "--cache", config.cache]
        print(f"k-NN:    famt evaluate knn {shlex.join(places)} --train <shards> --val <shards>")
    page = [str(config.out), "--out", str(config.out / "report.html")]
    print(f"page:    famt report {shlex.join(page)}")
    inputs = ["--cache", config.cache, "--shards", config.shards[0]]
    figures = ["--checkpoint", str(config.out), *inputs, "--out", str(config.out / "masks.png")]
    print(f"masks:   famt figures {shlex.join(figures)}")


def beside(args: RayPretrain) -> RefreshWorkers:
    """Actors of the refresh beside a training outside Ray: by default one per GPU, or one for every
    second core.

    On a Ray of its own an actor counts as a whole GPU, so that no two meet on one. On a cluster
    the training may hold a share already, and an actor takes the usual one.
    """
    asked = args.refresher
    if asked.workers is not None:
        return asked
    gpus = 0 if args.device == "cpu" else torch.cuda.device_count()
    own_ray = os.environ.get("RAY_ADDRESS", "local") in ("", "local")
    if gpus and own_ray and asked.gpus_per_worker is None:
        return dataclasses.replace(asked, workers=gpus, gpus_per_worker=1.0)
    return dataclasses.replace(asked, workers=gpus or max(1, (os.cpu_count() or 1) // 2))


def _train_on_ray(args: RayPretrain, config: Pretrain) -> None:
    start_ray(log_to_driver=True)
    held = worker_resources(args, ray.nodes())
    config = dataclasses.replace(
        config.absolute(),  # workers have a working directory of their own
        device="cuda" if args.gpu else "cpu",
        threads=config.threads or int(held["CPU"]),
    )
    trainer = TorchTrainer(
        ray_train_worker.train,
        train_loop_config=config,  # type: ignore[arg-type]
        scaling_config=ScalingConfig(
            num_workers=args.workers,
            use_gpu=args.gpu,
            resources_per_worker=held,
        ),
        run_config=RunConfig(
            storage_path=str(config.out / "ray"),
            failure_config=FailureConfig(max_failures=args.max_failures),
            callbacks=[ray_train_worker.EndAtMistakes()],
        ),
    )
    try:
        with following(config.out, args.refresher) if config.refreshes else nullcontext():
            trainer.fit()
    except TrainingFailedError as error:
        cause: Exception = error
        while isinstance(cause, ControllerError):
            cause = cause.controller_failure
        if isinstance(cause, WorkerGroupError):  # its own text is a traceback, which a bug needs
            first = ray_train_worker.raised(next(iter(cause.worker_failures.values())))
            cause = first if is_users(first) else cause
        ray.shutdown()  # so that our message is the last line
        raise UserError(str(cause)) from error


def worker_resources(args: RayPretrain, nodes: list[dict[str, Any]]) -> dict[str, float]:
    """CPUs and GPUs of each worker, less what the refresh needs.

    Args:
        nodes: nodes of the cluster, from `ray.nodes`.

    Raises:
        UserError: no machine has a GPU, and --cpus-per-worker is not given.
    """
    if not args.gpu:
        return {"CPU": args.cpus_per_worker or 1}
    share = args.refresher.gpus_per_worker
    share = GPU_SHARE if share is None else share
    leaves = args.refreshes and share < 0.5  # Ray would put two workers of half a GPU on one
    return {
        "CPU": args.cpus_per_worker or _cores_of_a_gpu(args, nodes),
        "GPU": 1 - share if leaves else 1,
    }


def _cores_of_a_gpu(args: RayPretrain, nodes: list[dict[str, Any]]) -> int:
    machines = [node["Resources"] for node in nodes if node["Alive"]]
    shares = [each["CPU"] // each["GPU"] for each in machines if each.get("GPU")]
    if not shares:
        raise UserError(
            "--gpu: no machine of the cluster has a GPU; give --cpus-per-worker if one will join"
        )
    left = min(shares) - ((args.refresher.cpus_per_worker or 1) if args.refreshes else 0)
    return max(1, min(_MOST_THREADS, int(left)))


if __name__ == "__main__":
    run_program(main, parsed(RayPretrain, __doc__))
