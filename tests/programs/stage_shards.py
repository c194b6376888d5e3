"""Stage shards, and say where they are and how many bytes were fetched."""

import sys
from pathlib import Path

from pipeline import stage
from pipeline.cache import ScoreCache
from pipeline.table import load_samples

cache_url, folder, *shards = sys.argv[1:]
stage._CHUNK = 64 << 10  # so that a small tar too is fetched in pieces
cache = ScoreCache(cache_url)
for path in stage.stage_shards(load_samples(shards, cache), cache, Path(folder)):
    print(path)
