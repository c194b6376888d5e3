"""Stage shards; says when it begins, and where they are."""

import sys
from pathlib import Path

from pipeline import stage
from pipeline.cache import ScoreCache
from pipeline.table import load_samples

cache_url, folder, *shards = sys.argv[1:]
stage._CHUNK = 64 << 10  # so that a small tar too is fetched in pieces
cache = ScoreCache(cache_url)
samples = load_samples(shards, cache)
print("begins", flush=True)
for path in stage.stage_shards(samples, cache, Path(folder)):
    print(path)
