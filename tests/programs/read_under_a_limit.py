"""Read all samples of shards in a process whose limits of open files are given, soft and hard."""

import resource
import sys

from famt.pipeline.caching.cache import ScoreCache
from famt.pipeline.loading.dataset import load_samples
from famt.pipeline.loading.loader import CropLoader
from famt.pipeline.options import LoaderConfig

cache, soft, hard, *shards = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_NOFILE, (int(soft), int(hard)))
table = load_samples(shards, ScoreCache(cache))
config = LoaderConfig(16, image_size=32, threads=1, shuffle_buffer=4)
rows = [row for crops in CropLoader(table, config, drop_last=False) for row in crops.rows.tolist()]
print(len(set(rows)))
