import json

import pytest

from famt.train.signals.record import Record


@pytest.fixture
def path(tmp_path):
    """Of a record of four epochs of 10 steps: generations 10 and 20 were taken up at 1 and 3."""
    path = tmp_path / "generations.json"
    record = Record(path, "run-a")
    assert record.new
    for epoch, generation in enumerate([None, 10, 10, 20]):
        record.write(epoch, 10 * epoch, generation)
    return path


def test_what_was_written_down_is_there_again(path):
    record = Record(path, "run-a")
    assert not record.new
    assert [record.at(epoch) for epoch in range(5)] == [
        (True, None), (True, 10), (True, 10), (True, 20), (False, None),
    ]  # fmt: skip


def test_another_run_in_the_folder_begins_anew(path):
    record = Record(path, "run-b")
    assert record.new
    assert record.at(0) == (False, None)


@pytest.mark.parametrize(
    ("step", "needed"),
    [(0, {None, 10, 20}), (10, {None, 10, 20}), (11, {10, 20}), (30, {10, 20}), (31, {20})],
)
def test_generations_since_a_checkpoint_are_those_that_a_resume_repeats(path, step, needed):
    assert Record(path, "run-a").since(step) == needed


def test_epochs_to_be_begun_otherwise_are_forgotten(path):
    record = Record(path, "run-a")
    record.forget_from(2)
    assert record.at(1) == (True, 10)
    assert record.at(2) == record.at(3) == (False, None)
    record.write(2, 21, 11)
    assert Record(path, "run-a").at(2) == (True, 11)


@pytest.mark.parametrize("text", ['{"0": nu', "[]", "{}", '"run-a"'])
def test_a_damaged_file_is_named(path, text):
    path.write_text(text)
    with pytest.raises(ValueError, match=r"generations\.json is damaged; remove it"):
        Record(path, "run-a")


def test_a_write_that_was_cut_off_leaves_the_record_before_it(path):
    path.with_name(f"{path.name}.partial").write_text('{"run"')
    assert json.loads(path.read_text())["run"] == "run-a"
    assert Record(path, "run-a").at(3) == (True, 20)
