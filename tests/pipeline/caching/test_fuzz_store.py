"""No damaged object of a cache is ever believed, and no odd name is lost or taken for another.

`FAMT_SEED` chooses what is damaged and how, `FAMT_FUZZ` how often:

    FAMT_SEED=7 FAMT_FUZZ=5000 pytest -m slow -s tests/pipeline/caching/test_fuzz_store.py
"""

import os
import random
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest
from samples import photo_members, score, tar_bytes

from famt.jobs.cache import Gc, Verify, main
from famt.pipeline.caching.cache import ScoreCache
from famt.pipeline.caching.validity import look_up
from famt.pipeline.errors import CacheError
from famt.pipeline.loading.dataset import load_maps, load_samples
from famt.pipeline.scores import ScoreSpec

SEED = int(os.environ.get("FAMT_SEED", "0"))
COUNT = int(os.environ.get("FAMT_FUZZ", "700"))
OTHER = ScoreSpec(kind="lowpass", grid=3)


def _flip(data, rng):
    damaged = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 9))):
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


DAMAGE = {
    "flipped bits": _flip,
    "empty": lambda data, rng: b"",
    "halved": lambda data, rng: data[: len(data) // 2],
    "cut": lambda data, rng: data[: rng.randrange(len(data))],
    "longer": lambda data, rng: data + rng.randbytes(rng.randint(1, 40)),
    "zeros": lambda data, rng: bytes(len(data)),
    "noise": lambda data, rng: rng.randbytes(len(data)),
    "hole": lambda data, rng: data[:20] + bytes(min(64, len(data) - 20)) + data[84:],
    "other JSON": lambda data, rng: rng.choice((b"{}", b"[]", b"null", b"0", b'""', b"[" * 9999)),
    "another's": lambda data, rng: data,
    "lost": lambda data, rng: None,
}


@pytest.fixture
def full(scored, spec):
    """A cache with a second score."""
    score(scored.shards, scored.cache, OTHER)
    return scored


def _everything(full):
    """All that any program reads of the cache, as values to compare."""
    cache = ScoreCache(full.cache.url)
    samples = load_samples(full.shards, cache, full.spec)
    maps = [load_maps(samples, cache, spec).numpy().tobytes() for spec in (full.spec, OTHER)]
    tables = [cache.read_table(shard_id) for shard_id in samples.shard_ids]
    specs = [cache.stored_spec(shard_id, full.spec.id) for shard_id in samples.shard_ids]
    return [
        samples.shard_ids,
        samples.labels.tolist(),
        maps,
        specs,
        [(t.key, t.samples.tolist(), t.rejected, t.bytes, t.damage) for t in tables],
        cache.manifests.folders(),
    ]


@pytest.mark.parametrize("count", [40, pytest.param(COUNT, marks=pytest.mark.slow)])
def test_damaged_objects_are_mended_by_their_remedy_or_change_nothing(full, count):
    rng = random.Random(SEED)
    whole = _everything(full)
    root = Path(full.cache.url)
    before = {path: path.read_bytes() for path in sorted(root.rglob("*.*")) if path.is_file()}
    newest = max(before, key=lambda path: path.as_posix() if "datasets" in path.parts else "")
    outcomes = Counter()
    for _ in range(count):
        path, kind = rng.choice(list(before)), rng.choice(list(DAMAGE))
        damaged = DAMAGE[kind](before[path], rng)
        if kind == "another's":
            damaged = before[rng.choice([each for each in before if each != path])]
        path.unlink() if damaged is None else path.write_bytes(damaged)
        where = f"{kind} in {path.relative_to(root)}"
        message = ""
        try:
            found = _everything(full)
        except CacheError as error:
            message = str(error)
        outcomes[kind, "noticed" if message else "harmless"] += 1
        if message:
            # A lost record or entry is like one that was never there; what is damaged has a name.
            if damaged is not None:
                named, _, remedy = message.partition(" is damaged ")
                doomed = remedy.partition("Remove ")[2].partition(" and ")[0]
                doomed = Path(named if doomed == "it" else doomed)
                assert doomed in (path, path.parent), where
                shutil.rmtree(doomed) if doomed.is_dir() else doomed.unlink()
            assert "famt score" in message, where
            for spec in (full.spec, OTHER):
                score(full.shards, full.cache, spec)
            found = _everything(full)
            objects = [each for each in before if "shards" in each.parts]
            assert all(each.read_bytes() == before[each] for each in objects), where
        else:
            # Nobody reads older manifests; without one the shards are hashed again.
            assert "datasets" in path.parts, where
            assert path != newest or damaged is None, where
        assert found == whole, where
        for each in (root / "datasets").glob("*/*"):
            each.unlink()
        for each, data in before.items():
            each.write_bytes(data)
    print(f"seed {SEED}, {count} damaged objects: {dict(sorted(outcomes.items()))}")


NAMES = [
    "a b.tar", " a.tar", "a .tar", "ä.tar", "a\u0301.tar", "图.tar", "🙂.tar", "\u202ea.tar",
    "a#1.tar", "a.tar#1", "a.tar#", "#1", "a'b.tar", 'a"b.tar', "a`b.tar", "a$HOME.tar", "~.tar",
    "-a.tar", "--.tar", "a%20b.tar", "a%2Fb.tar", "a\\b.tar", "a:b.tar", "a|b.tar", "a;b.tar",
    "a&b.tar", "a=b.tar", "a@b.tar", "a,b.tar", "a(b).tar", "a\tb.tar", "a\nb.tar", ".a.tar",
    "a.TAR", "a" * 200 + ".tar",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("as_folder", [False, True])
def test_odd_names_are_kept_apart_and_never_collected(tmp_path, cache, spec, as_folder):
    """Names of tars, and of the folders that hold them."""
    rng = random.Random(SEED)
    contents = [tar_bytes(photo_members(2, rng.randrange(10**6))) for _ in NAMES]
    paths = []
    for name, data in zip(NAMES, contents, strict=True):
        path = tmp_path / "data" / (f"{name}/0.tar" if as_folder else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        paths.append(path)
    score(paths, cache, spec)
    for path in (tmp_path / "cache").rglob("*"):
        os.utime(path, (time.time() - 1e6,) * 2)
    assert main(Gc(cache.url)) == 0
    urls = [str(path) for path in paths]
    shards = look_up(urls, cache, spec)
    assert shards.stale == {}
    assert [path.read_bytes() for path in paths] == contents
    assert len({record.shard_id for record in shards.records.values()}) == len(NAMES)
    assert len(cache.manifests.folders()) == (len(NAMES) if as_folder else 1)
    assert main(Verify(cache.url, sample=len(NAMES))) == 0
    print(f"seed {SEED}: {len(NAMES)} odd names kept")
