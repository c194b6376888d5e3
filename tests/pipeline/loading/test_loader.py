import dataclasses
import tempfile
from collections import Counter
from itertools import chain, repeat
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import torchvision.transforms.functional as tvf
from PIL import Image
from samples import encode, photo, photo_members, score, tar_bytes, write_tar
from torchvision.transforms import InterpolationMode, RandomResizedCrop

from famt.geometry import crop_maps
from famt.patches import patchify
from famt.pipeline.caching.cache import ScoreCache
from famt.pipeline.errors import CacheError, UserError
from famt.pipeline.loading import loader as loading
from famt.pipeline.loading.dali_graphs import build_pipeline, decoder
from famt.pipeline.loading.dataset import load_samples
from famt.pipeline.loading.loader import CropLoader
from famt.pipeline.loading.resident import crop_loader
from famt.pipeline.options import CentreView, DecodeConfig, LoaderConfig, RandomView, WholeView
from famt.pipeline.scores import ScoreSpec
from famt.pipeline.sharding.shards import list_shard

SMALL = LoaderConfig(
    batch_size=4, image_size=32, shuffle_buffer=8, threads=2, decode=DecodeConfig(on="gpu")
)


def _rows(loader):
    return [row for crops in loader for row in crops.rows.tolist()]


def _table_of(tmp_path, members):
    """A table over one tar of those members."""
    path = write_tar(tmp_path / "only.tar", members)
    cache = ScoreCache(str(tmp_path / "only-cache"), create=True)
    score([path], cache, ScoreSpec())
    return load_samples([str(path)], cache)


def test_an_unshuffled_epoch_is_every_sample_once_in_order_and_a_row_shows_its_image(table):
    config = dataclasses.replace(SMALL, shuffle_buffer=0, view=WholeView())
    loader = CropLoader(table, config, drop_last=False)
    assert _rows(loader) == _rows(loader) == list(range(26))
    for crops in loader:
        for image, row in zip(crops.images, crops.rows.tolist(), strict=True):
            whole = Image.fromarray(photo(row)).resize((32, 32), Image.Resampling.BICUBIC)
            assert np.abs(image.numpy().astype(int) - np.array(whole)).mean() < 6
            assert table.labels[row] == row % 3


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [4, 5])
def test_ranks_together_see_every_sample_once_an_epoch(table, world_size, batch_size):
    config = dataclasses.replace(SMALL, batch_size=batch_size)
    loaders = [
        CropLoader(table, config, drop_last=False, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for _ in range(3):
        assert sorted(chain.from_iterable(map(_rows, loaders))) == list(range(26))


def test_a_rank_needs_no_tars_but_those_of_its_share(table, scored):
    """Nor does one without samples trouble anybody: DALI refuses an empty index."""
    rows = []
    for rank, shards in enumerate(((0,), (0, 1), (1, 2), (2,))):
        for number, path in enumerate(map(Path, scored.shards)):
            path.rename(path.with_suffix(".away")) if number not in shards else None
        rows += _rows(CropLoader(table, SMALL, drop_last=False, rank=rank, world_size=4))
        for path in scored.folder.glob("*.away"):
            path.rename(path.with_suffix(".tar"))
    assert sorted(rows) == list(range(26))


def test_shards_whose_images_are_all_quarantined_are_passed_over(tmp_path, scored, spec):
    path = scored.folder / "train-000001a.tar"
    path.write_bytes(tar_bytes([("bad.jpg", b"garbage")]))
    score([path], scored.cache, spec)
    table = load_samples([str(scored.folder)], scored.cache)
    assert len(table.urls) == 4
    assert sorted(_rows(CropLoader(table, SMALL, drop_last=False))) == list(range(26))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("crops_per_image", [1, 2])
def test_full_batches_leave_a_counted_remainder(table, world_size, crops_per_image):
    seen = set()
    config = dataclasses.replace(SMALL, crops_per_image=crops_per_image)
    loaders = [
        CropLoader(table, config, drop_last=True, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for _ in range(8):
        epoch = Counter()
        for loader in loaders:
            batches = [crops.rows.tolist() for crops in loader]
            assert {len(rows) for rows in batches} == {4}
            assert len(batches) == loader.steps_per_epoch
            epoch.update(chain.from_iterable(batches))
        assert set(epoch.values()) == {crops_per_image}
        assert len(epoch) == 26 - loaders[0].remainder
        seen |= set(epoch)
    assert seen == set(range(26))  # no sample is in the remainder for ever


def test_epochs_are_shuffled_anew_and_seeds_repeat(table):
    first, again, other = (
        CropLoader(table, SMALL, drop_last=False, seed=seed) for seed in (1, 1, 2)
    )
    one = _rows(first)
    assert one == _rows(again)
    assert one not in (_rows(first), _rows(other))


def test_ranks_draw_their_own_crops(table):
    loaders = [CropLoader(table, SMALL, drop_last=True, rank=n, world_size=2) for n in range(2)]
    assert not torch.equal(*(next(iter(each)).windows for each in loaders))


def test_several_crops_of_one_decode_follow_one_another(table):
    config = dataclasses.replace(SMALL, batch_size=8, crops_per_image=2)
    loader = CropLoader(table, config, drop_last=False, rank=1, world_size=2)
    seen = []
    for _ in range(2):
        batches = list(loader)
        assert [len(crops.rows) for crops in batches] == [8, 8, 8, 2]
        rows = torch.cat([crops.rows for crops in batches]).view(-1, 2)
        assert torch.equal(rows[:, 0], rows[:, 1])
        seen.append(set(rows[:, 0].tolist()))
        pairs = torch.cat([crops.windows for crops in batches]).view(-1, 2, 4)
        assert (pairs[:, 0] != pairs[:, 1]).any(1).all()
        flips = torch.cat([crops.flips for crops in batches]).view(-1, 2)
        assert (flips[:, 0] != flips[:, 1]).any()
    assert [len(rows) for rows in seen] == [13, 13]
    assert seen[0] == seen[1] == set(range(13, 26))  # a rank's share stays the same


@pytest.mark.parametrize("steps", [1, 5, 6, 9])
@pytest.mark.parametrize(
    "options", [{}, {"crops_per_image": 2}, {"resident": True}], ids=["one crop", "two", "held"]
)
def test_a_state_goes_on_with_the_very_next_batch(table, steps, options):
    config = dataclasses.replace(SMALL, **options)
    loader, again = (crop_loader(table, config, drop_last=True, seed=3) for _ in range(2))
    # Epoch after epoch, without end.
    batches, resumed = (chain.from_iterable(repeat(each)) for each in (loader, again))
    for _ in range(steps):
        next(batches)
    again.load_state_dict(loader.state_dict())
    for _ in range(10):
        expected, actual = next(batches), next(resumed)
        for name in ("images", "rows", "windows", "flips"):
            assert torch.equal(getattr(expected, name), getattr(actual, name))


def test_a_loader_leaves_no_index_that_a_kill_would_leave(table, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    loader = CropLoader(table, SMALL, drop_last=True)
    assert not list((tmp_path / "temporary").iterdir())
    assert len(_rows(loader)) == len(_rows(loader)) > 0


@pytest.mark.parametrize(
    ("changed", "keywords", "shards"),
    [
        ({}, {"world_size": 2}, 3),
        ({}, {"seed": 9}, 3),
        ({}, {}, 2),
        ({"batch_size": 3}, {}, 3),
        ({"crops_per_image": 2}, {}, 3),
        ({"resident": True}, {}, 3),
        ({"view": RandomView(flip=0.25)}, {}, 3),
    ],
)
def test_a_state_of_another_set_up_is_refused(table, scored, changed, keywords, shards):
    state = CropLoader(table, SMALL, drop_last=True).state_dict()
    table = load_samples(scored.shards[:shards], scored.cache)
    config = dataclasses.replace(SMALL, **changed)
    other = CropLoader(table, config, drop_last=True, **keywords)
    with pytest.raises(UserError, match="belongs to other shards"):
        other.load_state_dict(state)


def test_a_state_outlives_an_option_of_views_that_is_added_later(table):
    older = CropLoader(table, SMALL, drop_last=True)
    it = iter(older)
    next(it)
    state = older.state_dict()
    later = dataclasses.make_dataclass(
        "RandomView", [("grey", float, 0.0)], bases=(RandomView,), frozen=True
    )
    newer = CropLoader(table, dataclasses.replace(SMALL, view=later()), drop_last=True)
    newer.load_state_dict(state)
    assert torch.equal(next(iter(newer)).images, next(it).images)
    changed = dataclasses.replace(SMALL, view=later(grey=0.5))
    with pytest.raises(UserError, match="belongs to other shards"):
        CropLoader(table, changed, drop_last=True).load_state_dict(state)


def test_a_batch_stays_as_it_was_while_others_are_read(table):
    loader = CropLoader(table, SMALL, drop_last=True)
    held = [(crops.images, crops.images.clone()) for _ in range(3) for crops in loader]
    assert all(torch.equal(image, copy) for image, copy in held)


def test_a_gpu_batch_is_asked_for_in_the_stream_in_which_it_is_taken(table, monkeypatch):
    """DALI lets that stream alone wait for the pixels: it must not be one of an earlier batch."""
    asked = []

    class OnCpu:
        def __init__(self, graph, table, rows, config, device, **options):
            self.pipeline = build_pipeline(
                graph, table, rows, config, torch.device("cpu"), **options
            )

        def run(self, stream):
            asked.append(stream)
            return self.pipeline.run()

    monkeypatch.setattr(loading, "build_pipeline", OnCpu)
    crops = iter(CropLoader(table, SMALL, drop_last=True, device="cuda"))
    for stream in ("main", "side"):
        monkeypatch.setattr(torch.cuda, "current_stream", {torch.device("cuda"): stream}.get)
        next(crops)
    assert asked == ["main", "side"]


def test_too_few_samples_for_a_batch_is_an_error(table):
    with pytest.raises(UserError, match=r"over 1 rank make no batch of .* lower --batch-size"):
        CropLoader(table, dataclasses.replace(SMALL, batch_size=27), drop_last=True)


def test_quarantined_samples_never_reach_the_loader(tmp_path):
    good = photo_members(3)
    members = [*good[:2], ("bad.jpg", b"garbage"), ("cut.jpg", good[0][1][:200]), *good[2:]]
    table = _table_of(tmp_path, members)
    loader = CropLoader(table, dataclasses.replace(SMALL, batch_size=2), drop_last=False)
    assert sorted(_rows(loader)) == [0, 1, 2]
    assert table.key(1).endswith("only.tar:img0001")


def test_centre_and_whole_views(tmp_path):
    table = _table_of(tmp_path, photo_members(2, height=40, width=60))
    config = dataclasses.replace(SMALL, batch_size=2, shuffle_buffer=0)
    for view, expected in (
        (WholeView(), [0, 0, 1, 1]),
        (CentreView(1.0), [0, 10 / 60, 1, 40 / 60]),
        (CentreView(0.5), [10 / 40, 20 / 60, 20 / 40, 20 / 60]),
    ):
        loader = CropLoader(table, dataclasses.replace(config, view=view), drop_last=True)
        crops = next(iter(loader))
        torch.testing.assert_close(crops.windows, torch.tensor([expected] * 2).float())
        assert not crops.flips.any()


@pytest.mark.parametrize("crops_per_image", [1, 2])  # a decoded region, or a cut of the whole
def test_crops_are_torchvisions_of_the_same_windows(tmp_path, crops_per_image):
    pictures = [photo(n, 180, 240) for n in range(8)]
    members = [(f"{n}.png", encode(p, "PNG")) for n, p in enumerate(pictures)]
    table = _table_of(tmp_path, members)
    config = dataclasses.replace(SMALL, image_size=64, crops_per_image=crops_per_image)
    for interpolation in ("bicubic", "bilinear"):
        options = dataclasses.replace(config, interpolation=interpolation)
        for crops in CropLoader(table, options, drop_last=True):
            for image, row, window, flip in zip(
                crops.images, crops.rows.tolist(), crops.windows, crops.flips, strict=True
            ):
                top, left, height, width = (
                    round(float(v)) for v in window * torch.tensor([180, 240, 180, 240])
                )
                expected = tvf.resized_crop(
                    Image.fromarray(pictures[row]), top, left, height, width, [64, 64],
                    InterpolationMode(interpolation),
                )  # fmt: skip
                expected = tvf.hflip(expected) if flip else expected
                difference = np.abs(np.array(expected).astype(int) - image.numpy())
                assert difference.mean() < 1.0


def test_random_windows_are_distributed_as_torchvisions(tmp_path):
    table = _table_of(tmp_path, photo_members(50, height=200, width=300))
    config = dataclasses.replace(SMALL, batch_size=50, image_size=8, view=RandomView((0.2, 1.0)))
    loader = CropLoader(table, config, drop_last=True, seed=5)
    windows = torch.cat([crops.windows for _ in range(30) for crops in loader])
    torch.manual_seed(0)
    picture = Image.new("RGB", (300, 200))
    theirs = torch.tensor([
        RandomResizedCrop.get_params(picture, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(1500)
    ]) / torch.tensor([200, 300, 200, 300])  # fmt: skip
    for statistic in (
        lambda w: w[:, 2] * w[:, 3],
        lambda w: w[:, 3] / w[:, 2],
        lambda w: w[:, 0] / (1 - w[:, 2]).clamp_min(1e-6),
        lambda w: w[:, 1] / (1 - w[:, 3]).clamp_min(1e-6),
    ):
        samples = [statistic(w).numpy() for w in (windows, theirs)]
        assert scipy.stats.ks_2samp(*samples).statistic < 0.07


def _position_picture(height, width):
    """Red says how far right a pixel lies, green how far down: 0 to 255 across the picture."""
    picture = np.zeros((height, width, 3), np.float64)
    picture[..., 0] = (np.arange(width) + 0.5)[None, :] / width * 255
    picture[..., 1] = (np.arange(height) + 0.5)[:, None] / height * 255
    return picture.round().astype(np.uint8)


_UNDO = {  # how a camera stores an upright picture under each EXIF orientation
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p),
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: np.rot90(p, -1),
}


@pytest.mark.parametrize("crops_per_image", [1, 3])
def test_the_joined_map_says_where_the_crop_was_cut(tmp_path, crops_per_image):
    """End to end through DALI: maps of the x and y positions against pixels that encode them."""
    members = []
    for n, (height, width) in enumerate([(256, 256), (200, 400), (500, 250)] * 8):
        exif = Image.Exif()
        orientation = n % 8 + 1
        exif[0x0112] = orientation
        stored = np.ascontiguousarray(_UNDO[orientation](_position_picture(height, width)))
        members.append((f"{n}.jpg", encode(stored, quality=100, subsampling=0, exif=exif)))
    table = _table_of(tmp_path, members)
    fine = 256  # cells of the maps: so fine that they are the position itself
    position = (torch.arange(fine) + 0.5) / fine
    ramps = {"x": position.expand(fine, fine), "y": position[:, None].expand(fine, fine)}
    grid, patch = 14, 16
    config = LoaderConfig(
        batch_size=24,
        image_size=grid * patch,
        shuffle_buffer=0,
        threads=2,
        crops_per_image=crops_per_image,
    )
    inner = slice(1, -1)  # resampling blurs into the edge of a crop
    seen = set()
    loader = CropLoader(table, config, drop_last=True, seed=4)
    for crops in (c for _ in range(4) for c in loader):
        shown = patchify(crops.images, patch).float().unflatten(-1, (-1, 3)).mean(2) / 255
        for channel, axis in enumerate("xy"):
            maps = ramps[axis].expand(24, -1, -1)
            joined = crop_maps(maps, crops.windows, crops.flips, grid)
            pictured = shown[..., channel].view(-1, grid, grid)
            a_patch = crops.windows[:, 3 - channel] / grid
            error = (joined - pictured).abs() / a_patch[:, None, None]
            assert error[:, inner, inner].max() < 0.1
        seen |= {
            (row % 8, bool(flip))
            for row, flip in zip(crops.rows.tolist(), crops.flips, strict=True)
        }
    assert len(seen) == 16  # every orientation, flipped and not


@pytest.mark.gpu
def test_pixels_survive_until_a_stream_that_lags_has_read_them(table):
    stream, sums = torch.cuda.Stream(), {}
    for lag in (0, 20_000_000):  # clock cycles, some 10 ms
        loader = CropLoader(table, SMALL, drop_last=True, device="cuda", seed=7)
        found = []
        with torch.cuda.stream(stream):
            for _ in range(20):
                for batch in loader:
                    torch.cuda._sleep(lag)
                    found.append(batch.images.long().sum())
                    del batch
                    if not lag:
                        torch.cuda.synchronize()
        sums[lag] = torch.stack(found).tolist()
    assert sums[0] == sums[20_000_000]


@pytest.mark.parametrize(
    ("on", "image_size", "device"),
    [("auto", 224, "mixed"), ("auto", 64, "cpu"), ("gpu", 64, "mixed"), ("cpu", 224, "cpu")],
)
def test_a_gpu_decodes_large_images_and_what_it_is_told_to(on, image_size, device):
    config = LoaderConfig(image_size=image_size, decode=DecodeConfig(on=on))
    assert decoder(config, on_gpu=True)["device"] == device
    assert decoder(config, on_gpu=False)["device"] == "cpu"


@pytest.mark.gpu
def test_a_gpu_decodes_the_same_crops_and_keeps_them(table):
    batches = {}
    for device in ("cpu", "cuda"):
        loader = CropLoader(table, SMALL, drop_last=True, device=device, seed=7)
        batches[device] = list(loader)
    for cpu, gpu in zip(batches["cpu"], batches["cuda"], strict=True):
        assert gpu.images.device.type == "cuda"
        assert torch.equal(cpu.rows, gpu.rows)
        torch.testing.assert_close(cpu.windows, gpu.windows)
        difference = (cpu.images.float() - gpu.images.cpu().float()).abs().mean()
        assert difference < 0.5  # another decoder and another resampling kernel


@pytest.mark.parametrize(
    ("content", "sample"),
    [
        (lambda jpeg: jpeg[:-150].ljust(len(jpeg), b"\0"), "img0003: DALI can't decode"),
        (lambda jpeg: bytes(len(jpeg)), "an image of these shards: DALI can't decode"),
    ],
)
def test_an_image_that_ends_an_epoch_is_named_with_the_remedy(scored, content, sample):
    path = Path(scored.shards[0])
    data = bytearray(path.read_bytes())
    place = list_shard(bytes(data)).samples[3]
    table = load_samples(scored.shards[:1], scored.cache)
    jpeg = bytes(data[place.offset : place.offset + place.size])
    data[place.offset : place.offset + place.size] = content(jpeg)
    path.write_bytes(data)
    config = LoaderConfig(5, image_size=16, shuffle_buffer=0, threads=1)
    loader = CropLoader(table, config, drop_last=False)
    with pytest.raises(CacheError, match=rf"{sample}.*--retry-bad --shards .* --cache"):
        list(loader)


@pytest.mark.parametrize("change", [Path.unlink, lambda tar: tar.write_bytes(b"")])
def test_a_tar_that_goes_while_it_is_read_is_named_with_the_remedy(table, scored, change):
    loader = CropLoader(table, SMALL, drop_last=True)
    next(iter(loader))
    for tar in scored.shards:
        change(Path(tar))
    with pytest.raises(OSError, match=r"\.tar.*: moved or changed while .*; put back"):
        [list(loader) for _ in range(9)]
