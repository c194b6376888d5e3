from contextlib import ExitStack
from threading import Timer

import pytest

from famt.train.run_folder import BusyError, await_folder, own_folder, written_whole


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "told.json"
    path.write_text("before")
    return path


def test_until_it_is_whole_a_file_reads_as_before(path):
    with written_whole(path) as file:
        file.write(b"after")
        file.flush()
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert list(path.parent.iterdir()) == [path]


def test_what_can_not_be_written_leaves_what_was_there_and_is_named(path):
    def write():
        with written_whole(path) as file:
            file.write(b"half")
            raise OSError("gone")

    with pytest.raises(OSError, match=r"told\.json: could not be written, .* MB were free \(gone"):
        write()
    assert path.read_text() == "before"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_is_waited_for_until_its_process_leaves_but_no_longer_than_told(tmp_path):
    folder, others = tmp_path / "run", ExitStack()
    await_folder(folder, 60)
    assert not folder.exists()
    others.enter_context(own_folder(folder))
    (folder / "log.jsonl").touch()
    await_folder(folder, 0.1)
    with pytest.raises(BusyError), own_folder(folder):
        pass
    Timer(0.3, others.close).start()
    await_folder(folder, 60)
    with own_folder(folder):
        pass
