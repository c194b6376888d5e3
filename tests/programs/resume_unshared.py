"""A run's ranks, each machine with a folder of its own under the name of the run's."""

import contextlib
import json
import sys
from pathlib import Path

from famt.pipeline.errors import UserError
from famt.train import checkpoint
from famt.train.config import Pretrain
from famt.train.distributed import join_ranks
from famt.train.run_folder import own_folder

folder = Path(sys.argv[1])
checkpoint.SEEN_WITHIN = 1.0
with join_ranks("cpu") as ranks:
    own = Pretrain(shards=["x"], cache="y", out=folder / ranks.node)
    try:
        with own_folder(own.out) if ranks.is_main else contextlib.nullcontext():
            checkpoint.resume(own, json.loads(sys.argv[2]), ranks)
    except UserError as error:
        (folder / f"error{ranks.rank}").write_text(str(error))
