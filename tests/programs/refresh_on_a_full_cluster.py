"""A refresh while an actor holds every CPU of the cluster, as a training would."""

import sys
from pathlib import Path

import ray

from famt.jobs import refresh_workers
from famt.jobs.options import RefreshScores
from famt.jobs.refresh_scores import main


@ray.remote(num_cpus=2)
class Training:
    def ready(self) -> bool:
        return True


refresh_workers._PATIENCE = 2.0
ray.init(num_cpus=2, log_to_driver=False)
training = Training.remote()
ray.get(training.ready.remote())
sys.exit(main(RefreshScores(checkpoint=Path(sys.argv[1]), out=Path(sys.argv[2]), json=True)))
