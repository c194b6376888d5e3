import pytest

from pipeline.cache import ScoreCache
from pipeline.generations import Generation
from pipeline.manifest import CacheError
from pipeline.scores import ModelScoreSpec


def _generation(run, step, kind="famt"):
    return Generation(run, step, ModelScoreSpec(kind, 8, 32, f"{step:032x}"), "data", 26)


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
    generations.forget(_generation("a", 2))
    assert [each.step for each in generations.of("a")] == [1, 3, 4]


def test_a_run_that_is_dropped_leaves_nothing(generations):
    generations.publish(_generation("a", 1))
    generations.publish(_generation("b", 1))
    generations.need("a", [1], by="c")
    generations.drop("a")
    assert generations.runs() == ["b"]
    assert generations.of("a") == generations.superseded("a") == []


def test_publishing_again_replaces(generations):
    generations.publish(_generation("a", 1))
    generations.publish(_generation("a", 1, "attention"))
    assert generations.of("a") == [_generation("a", 1, "attention")]


def test_a_generation_of_a_newer_format_is_refused(generations, tmp_path):
    generations.publish(_generation("a", 1))
    path = tmp_path / "cache" / "generations" / "a" / "00000001.json"
    path.write_text(path.read_text().replace('"format": ', '"format": 9'))
    with pytest.raises(CacheError, match="format"):
        generations.of("a")
