"""No object of a cache is believed in another's place."""

import itertools
import shutil
from pathlib import Path

import pytest
from samples import photo_members, score, tar_bytes

from famt.pipeline.cache import ScoreCache
from famt.pipeline.errors import CacheError
from famt.pipeline.table import load_maps, load_samples


@pytest.fixture
def twins(tmp_path, spec):
    """The entries of two tars with as many images each, and how to read all that is in them."""
    tars = [tmp_path / f"{n}.tar" for n in range(2)]
    for n, tar in enumerate(tars):
        tar.write_bytes(tar_bytes(photo_members(3, first=3 * n)))
    cache = ScoreCache(str(tmp_path / "cache"), create=True)
    score(tars, cache, spec)

    def read():
        samples = load_samples([str(each) for each in tars], cache, spec)
        maps = load_maps(samples, cache, spec).numpy()
        specs = [cache.stored_spec(each, spec.id) for each in samples.shard_ids]
        keys = [samples.keys(n) for n in range(2)]
        offsets = [samples.offsets(n) for n in range(2)]
        return keys, offsets, samples.labels.tolist(), specs, maps.tobytes()

    return cache, tars, spec, read


def test_every_swap_of_two_objects_is_noticed_and_mended_by_its_remedy(twins):
    cache, tars, spec, read = twins
    whole = read()
    files = [path for path in Path(cache.url, "shards").rglob("*") if path.is_file()]
    objects = {path: path.read_bytes() for path in sorted(files)}
    assert len(objects) == 14
    pairs = itertools.combinations(objects, 2)
    swaps = [(one, other) for one, other in pairs if objects[one] != objects[other]]
    for one, other in swaps:
        one.write_bytes(objects[other])
        other.write_bytes(objects[one])
        for _ in range(2):  # an error names one object, and both may lie in entries of their own
            try:
                score(tars, cache, spec)
                read()
            except CacheError as error:
                named, _, remedy = str(error).partition(" is damaged ")
                assert Path(named) in (one, other)
                shutil.rmtree(remedy.partition("Remove ")[2].partition(" and ")[0])
        score(tars, cache, spec)
        assert read() == whole
        assert {path: path.read_bytes() for path in objects} == objects, (one, other)
    print(f"{len(swaps)} swaps of {len(objects)} objects")


def test_a_manifest_in_the_place_of_another_is_refused(tmp_path, spec):
    cache = ScoreCache(str(tmp_path / "cache"), create=True)
    for n in range(2):
        (tmp_path / f"data{n}").mkdir()
        (tmp_path / f"data{n}/0.tar").write_bytes(tar_bytes(photo_members(2, first=n)))
        score([tmp_path / f"data{n}/0.tar"], cache, spec)
    one, other = Path(cache.url, "datasets").glob("*/*.json")
    shutil.copy(one, other)
    with pytest.raises(CacheError, match=rf"{other} is damaged .*Remove it"):
        cache.manifests.folders()
