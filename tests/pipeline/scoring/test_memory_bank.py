import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from famt.pipeline.loading.loader import CropBatch
from famt.pipeline.scoring.memory_bank import MapBank

WHOLE = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
NO_FLIP = torch.tensor([False])


def _crops(rows, windows=WHOLE, flips=NO_FLIP):
    count = len(rows)
    nothing = torch.empty(count, 0)
    return CropBatch(nothing, torch.tensor(rows), windows.expand(count, 4), flips.expand(count))


def _write(bank, row, scores, window=WHOLE, flip=NO_FLIP, step=0):
    bank.write(_crops([row], window, flip).views, scores, step)


def test_what_a_whole_image_showed_is_read_back():
    bank = MapBank(5, 8)
    scores = torch.rand(1, 64) + 0.1
    _write(bank, 3, scores)
    read = bank.read(_crops([3, 1]), 8)
    torch.testing.assert_close(read[:1], scores / scores.mean(), rtol=1e-3, atol=1e-3)
    assert torch.equal(read[1], torch.ones(64))


def test_a_crop_is_read_back_through_its_own_view():
    bank = MapBank(1, 14)
    window, flip = torch.tensor([[0.5, 0.0, 0.5, 0.5]]), torch.tensor([True])
    scores = torch.rand(1, 49) + 0.1
    _write(bank, 0, scores, window, flip)
    read = bank.read(_crops([0], window, flip), 7)
    torch.testing.assert_close(read, scores / scores.mean(), rtol=1e-3, atol=1e-3)
    elsewhere = bank.maps[0].clone()
    elsewhere[7:, :7] = 1
    assert torch.equal(elsewhere, torch.ones(14, 14, dtype=torch.float16))


def test_a_crop_keeps_the_level_that_its_part_of_the_image_has():
    bank = MapBank(1, 14)
    object_left = torch.ones(1, 14, 14)
    object_left[:, :, :7] = 3
    _write(bank, 0, object_left.flatten(1))
    window = torch.tensor([[0.0, 0.0, 1.0, 0.5]])  # a crop of the object alone, all alike
    _write(bank, 0, torch.full((1, 49), 0.01), window)
    assert torch.allclose(bank.maps[0, :, :7].float(), torch.tensor(1.5), atol=1e-3)
    assert torch.allclose(bank.maps[0, :, 7:].float(), torch.tensor(0.5), atol=1e-3)


@settings(max_examples=30)
@given(st.integers(0, 999), st.booleans())
def test_several_views_of_a_row_are_taken_up_one_after_the_other(seed, partly):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, 4, (12,), generator=generator)
    size = torch.rand(12, 2, generator=generator) * 0.8 + 0.2
    windows = torch.cat([torch.rand(12, 2, generator=generator) * (1 - size), size], 1)
    flips = torch.rand(12, generator=generator) < 0.5
    views = CropBatch(torch.empty(12, 0), rows, windows, flips).views
    scores = torch.rand(12, 49, generator=generator) + 0.1
    known = torch.rand(12, 49, generator=generator) < 0.5 if partly else None
    at_once, one_by_one = MapBank(4, 14), MapBank(4, 14)
    at_once.write(views, scores, 5, known)
    for n in range(12):
        part = slice(n, n + 1)
        one_by_one.write(views.take(part), scores[part], 5, known[part] if partly else None)
    torch.testing.assert_close(at_once.maps, one_by_one.maps, atol=2e-3, rtol=2e-3)
    assert torch.equal(at_once.written_at, one_by_one.written_at)


def test_every_row_is_looked_at_before_a_second_view_of_one():
    bank = MapBank(3, 7)
    bank.write(_crops([0]).views, torch.ones(1, 49), 7)
    bank.write(_crops([2]).views, torch.ones(1, 49), 4)
    rows = torch.tensor([0, 0, 1, 1, 2, 2])
    assert bank.oldest(rows, 4).tolist() == [2, 4, 0, 3]
    assert bank.oldest(rows, 6).tolist() == [2, 4, 0, 3, 5, 1]


@settings(max_examples=30)
@given(st.integers(0, 999))
def test_maps_stay_positive_with_mean_1_whatever_is_written(seed):
    generator = torch.Generator().manual_seed(seed)
    bank = MapBank(1, 7)
    for step in range(20):
        size = torch.rand(1, 2, generator=generator) * 0.9 + 0.1
        corner = torch.rand(1, 2, generator=generator) * (1 - size)
        scores = torch.rand(1, 16, generator=generator) ** 8 * 100
        _write(bank, 0, scores, torch.cat([corner, size], 1), torch.tensor([step % 2 == 0]), step)
    assert (bank.maps >= 0).all()
    torch.testing.assert_close(bank.maps.float().mean(), torch.tensor(1.0), rtol=2e-3, atol=0)


def test_the_longest_unseen_come_first():
    bank = MapBank(6, 2)
    rows = torch.arange(6)
    for step, row in enumerate((4, 1, 0)):
        _write(bank, row, torch.ones(1, 4), step=step)
    assert bank.oldest(rows, 6).tolist() == [2, 3, 5, 4, 1, 0]
    assert bank.oldest(torch.tensor([0, 4, 1]), 2).tolist() == [1, 2]
    assert bank.coverage == 0.5


def test_scores_that_say_nothing_are_not_written():
    bank = MapBank(3, 2)
    scores = torch.tensor([[1.0, float("nan"), 1, 1], [0, 0, 0, 0], [1, 2, 3, 4]])
    bank.write(_crops([0, 1, 2]).views, scores, 5)
    assert bank.written_at.tolist() == [-1, -1, 5]
    assert torch.equal(bank.maps[:2], torch.ones(2, 2, 2, dtype=torch.float16))


def test_banks_that_merge_each_others_news_are_equal():
    first, second = MapBank(4, 2), MapBank(4, 2)
    _write(first, 0, torch.rand(1, 4), step=3)
    _write(first, 1, torch.rand(1, 4), step=4)
    _write(second, 2, torch.rand(1, 4), step=4)
    news = first.news(), second.news()
    second.merge(*news[0])
    first.merge(*news[1])
    assert torch.equal(first.maps, second.maps)
    assert first.written_at.tolist() == second.written_at.tolist() == [3, 4, 4, -1]


def test_news_are_what_was_refreshed_since_the_last_news_also_of_a_bank_that_was_saved():
    first, second, again = (MapBank(4, 2) for _ in range(3))
    _write(first, 0, torch.rand(1, 4), step=3)
    assert first.news()[0].tolist() == [0]
    assert first.news()[0].tolist() == []
    _write(first, 1, torch.rand(1, 4), step=4)
    second.merge(*first.news())
    assert second.news()[0].tolist() == []  # others know it already
    again.load_state_dict(second.state_dict())
    assert torch.equal(again.maps, second.maps)
    assert torch.equal(again.written_at, second.written_at)
    assert again.news()[0].tolist() == []
    _write(again, 2, torch.rand(1, 4), step=5)
    assert again.news()[0].tolist() == [2]


def test_a_row_that_was_refreshed_later_is_not_overwritten():
    stale, fresh = MapBank(2, 2), MapBank(2, 2)
    _write(stale, 0, torch.rand(1, 4), step=3)
    _write(stale, 1, torch.rand(1, 4), step=8)
    _write(fresh, 0, torch.rand(1, 4), step=7)
    kept, taken = fresh.maps[0].clone(), stale.maps[1].clone()
    fresh.merge(*stale.news())
    assert torch.equal(fresh.maps, torch.stack([kept, taken]))
    assert fresh.written_at.tolist() == [7, 8]


@settings(max_examples=30)
@given(st.integers(0, 999))
def test_known_patches_alone_are_written_at_their_cells(seed):
    generator = torch.Generator().manual_seed(seed)
    bank, side, grid = MapBank(1, 12), 4, 12
    _write(bank, 0, torch.rand(1, 144, generator=generator) + 0.1)
    before = bank.maps[0].double()
    # A window of whole cells: every patch covers 2 x 2 of them.
    top, left = torch.randint(0, 5, (2,), generator=generator).tolist()
    window = torch.tensor([[top / grid, left / grid, 8 / grid, 8 / grid]])
    known = torch.rand(1, 16, generator=generator) < 0.4
    known[0, 3] = True
    scores = torch.rand(1, 16, generator=generator) + 0.1
    bank.write(_crops([0], window, torch.tensor([True])).views, scores, 7, known)
    cells = {
        n: [
            (top + 2 * (n // side) + y, left + 2 * (3 - n % side) + x)
            for y in (0, 1)
            for x in (0, 1)
        ]
        for n in known[0].nonzero().flatten().tolist()
    }
    mean = sum(float(scores[0, n]) for n in cells) / len(cells)
    level = sum(float(before[cell]) for each in cells.values() for cell in each) / (4 * len(cells))
    expected = before.clone()
    for n, each in cells.items():
        for cell in each:
            expected[cell] = float(scores[0, n]) / mean * level
    expected /= expected.mean()
    torch.testing.assert_close(bank.maps[0].double(), expected, rtol=3e-3, atol=3e-3)
