"""Compare epochs read through a store that fails now and then with the same tars on a disk.

    PYTHONPATH=.:tests python tests/programs/read_from_a_failing_store.py \\
        <fault> <every> <epochs> <seed> [<images a tar>]

Faults are those of `tests/faulty_proxy.py`. Every batch must be the same, to the bit; the last line
says how many there were, and how often the loader had to go on in a new pipeline.
"""

import os
import sys
import tempfile
from pathlib import Path
from unittest import mock

import boto3
import faulty_proxy
import torch
from s3_server import environment, free_port, serve
from samples import photo_members, tar_bytes

from famt.pipeline.caching.cache import ScoreCache
from famt.pipeline.loading import loader
from famt.pipeline.loading.dataset import load_samples

fault, every, epochs, seed, *images = sys.argv[1:]
count = int(images[0]) if images else 20
pauses = (0.1, 0.2, 0.4, 0.8)

with tempfile.TemporaryDirectory() as folder, serve(free_port()) as store:
    os.environ.update(environment(store))
    client = boto3.client("s3")
    client.create_bucket(Bucket="images")
    for number in range(3):
        data = tar_bytes(photo_members(count, count * number))
        Path(folder, f"{number}.tar").write_bytes(data)
        client.put_object(Bucket="images", Key=f"{number}.tar", Body=data)
    cache = ScoreCache(f"{folder}/cache", create=True)
    tables = [load_samples([f"{at}/{{0..2}}.tar"], cache) for at in (folder, "s3://images")]
    config = loader.LoaderConfig(batch_size=5, image_size=32, shuffle_buffer=8, threads=2)
    with (
        faulty_proxy.before(store, fault, int(every), int(seed)) as endpoint,
        mock.patch.object(loader, "_PAUSES", pauses),
        mock.patch.object(
            loader.CropLoader, "_build", autospec=True, side_effect=loader.CropLoader._build
        ) as build,
    ):
        os.environ.update(environment(endpoint))
        local, remote = (
            loader.CropLoader(table, config, drop_last=True, seed=int(seed)) for table in tables
        )
        batches = 0
        for _ in range(int(epochs)):
            seen = []
            for expected, crops in zip(local, remote, strict=True):
                for name, value in vars(expected).items():
                    assert torch.equal(getattr(crops, name), value), name
                seen += crops.rows.tolist()
                batches += 1
            assert len(set(seen)) == len(seen) == 5 * local.steps_per_epoch
    print(f"{batches} equal batches, {build.call_count - 2} new pipelines")
