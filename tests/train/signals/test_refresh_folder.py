import pytest

from famt.pipeline.errors import UserError
from famt.train.signals.refresh_folder import Epochs, RefreshFolder


@pytest.fixture
def folder(tmp_path):
    """Of a run of four epochs of 10 steps: generations 10 and 20 were taken up at 1 and 3."""
    folder = RefreshFolder(tmp_path)
    epochs = Epochs(folder, "run-a")
    assert epochs.new
    for epoch, generation in enumerate([None, 10, 10, 20]):
        epochs.write(epoch, 10 * epoch, generation)
    return folder


def test_what_was_written_down_is_there_again(folder):
    folder.path.joinpath("epochs.json.partial").write_text('{"run"')  # of a write that was cut off
    epochs = Epochs(folder, "run-a")
    assert not epochs.new
    assert [epochs.at(epoch) for epoch in range(5)] == [
        (True, None), (True, 10), (True, 10), (True, 20), (False, None),
    ]  # fmt: skip


def test_another_run_in_the_folder_begins_anew(folder):
    epochs = Epochs(folder, "run-b")
    assert epochs.new
    assert epochs.at(0) == (False, None)


@pytest.mark.parametrize(
    ("step", "needed"), [(0, {10, 20}), (10, {10, 20}), (30, {10, 20}), (31, {20})]
)
def test_generations_since_a_checkpoint_are_those_that_a_resume_repeats(folder, step, needed):
    assert Epochs(folder, "run-a").generations_since(step) == needed


def test_epochs_to_be_begun_otherwise_are_forgotten(folder):
    epochs = Epochs(folder, "run-a")
    epochs.forget_from(2)
    epochs.write(2, 21, 11)
    again = Epochs(folder, "run-a")
    assert [again.at(epoch) for epoch in (1, 2, 3)] == [(True, 10), (True, 11), (False, None)]


@pytest.mark.parametrize("text", ['{"0": nu', "[]", "{}", '"run-a"', '{"run": "run-a"}'])
def test_a_damaged_file_is_named(folder, text):
    folder.path.joinpath("epochs.json").write_text(text)
    with pytest.raises(UserError, match=r"epochs\.json is damaged; remove it"):
        Epochs(folder, "run-a")


def test_the_newest_encoder_is_due_until_its_generation_is_there(folder):
    assert folder.due() is None
    for step in (9, 10, 100):
        folder.encoder(step).touch()
    folder.generation(10).touch()
    assert folder.due() == 100
    folder.generation(100).touch()
    assert folder.due() is None
    folder.generation(100).unlink()
    assert folder.due() == 100


def test_encoders_go_with_the_reasons_why_they_failed(folder):
    for step in (9, 10, 100):
        folder.encoder(step).touch()
        folder.failure(step).touch()
    folder.remove_encoders(10)
    assert folder.encoders() == [100]
    folder.finish()
    assert {each.name for each in folder.path.iterdir()} == {"epochs.json", "finished"}


def test_a_run_is_followed_as_long_as_one_of_its_followers_lives(folder):
    assert not folder.is_followed()
    with folder.followed():
        with folder.followed():
            assert folder.is_followed()
        assert folder.is_followed()
    assert not folder.is_followed()
