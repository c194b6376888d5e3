import pytest

from famt.pipeline.cache import ScoreCache
from famt.pipeline.errors import CacheError
from famt.pipeline.generations import Generation
from famt.pipeline.scores import ModelScoreSpec


def _generation(run, step, kind="attention"):
    return Generation(run, step, [ModelScoreSpec(kind, 8, 32, f"{step:032x}")], "data", 26)


@pytest.fixture
def generations(tmp_path):
    return ScoreCache(str(tmp_path / "cache"), create=True).generations


def test_generations_of_a_run_come_oldest_first(generations):
    for step in (100, 9, 50):
        generations.publish(_generation("a", step))
    generations.publish(_generation("b", 7))
    assert generations.runs() == ["a", "b"]
    assert generations.of("a") == [_generation("a", step) for step in (9, 50, 100)]
    assert generations.of("nobody") == []


def test_what_a_run_or_another_needs_and_the_newest_are_not_superseded(generations):
    for step in (1, 2, 3, 4):
        generations.publish(_generation("a", step))
    generations.need("a", [3], by="a")
    generations.need("a", [1], by="b")
    assert [each.step for each in generations.superseded("a")] == [2]
    generations.need("a", [], by="b")
    assert [each.step for each in generations.superseded("a")] == [1, 2]


def test_a_run_that_is_over_needs_nothing_but_others_may_still_need_it(generations):
    for step in (1, 2):
        generations.publish(_generation("a", step))
    generations.need("a", [1], by="a")
    assert generations.superseded("a", gone=["a"]) == [_generation("a", 1), _generation("a", 2)]
    generations.need("a", [2], by="c")
    assert generations.superseded("a", gone=["a"]) == [_generation("a", 1)]
    assert generations.superseded("a", gone=["a", "c"]) == generations.of("a")
    assert generations.idle_needs("a", gone=["c"]) == ["generations/a/needed-by-c"]


def test_publishing_again_replaces(generations):
    generations.publish(_generation("a", 1))
    generations.publish(_generation("a", 1, "attention"))
    assert generations.of("a") == [_generation("a", 1, "attention")]


@pytest.mark.parametrize("content", [b"", b"{}", b"null", None], ids=str)
@pytest.mark.parametrize("name", ["00000001.json", "needed-by-a"])
def test_what_is_damaged_is_named_with_the_remedy(generations, tmp_path, name, content):
    generations.publish(_generation("a", 1))
    generations.need("a", [1], by="a")
    path = tmp_path / "cache" / "generations" / "a" / name
    path.write_bytes(path.read_bytes().replace(b"1", b"3") if content is None else content)
    with pytest.raises(CacheError, match=rf"{path} is damaged.*Remove it"):
        generations.superseded("a")
