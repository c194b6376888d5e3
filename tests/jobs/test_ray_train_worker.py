import errno

import obstore.exceptions
import pytest

from famt.jobs.ray_train_worker import is_mistake
from famt.pipeline.errors import CacheError, UserError
from famt.train.run_folder import BusyError


@pytest.mark.parametrize(
    "error",
    [
        UserError("--epochs"),
        CacheError("no scores"),
        FileNotFoundError("tars"),
        FloatingPointError(),
    ],
)
def test_wrong_input_is_not_tried_again(error):
    assert is_mistake(error)


@pytest.mark.parametrize(
    "error",
    [
        BusyError("in use"),
        OSError(errno.ESTALE, "stale file handle"),
        obstore.exceptions.GenericError("503"),
        RuntimeError("CUDA error"),
        ValueError("a defect"),
    ],
)
def test_a_failing_disk_or_store_a_held_folder_and_a_defect_are_tried_again(error):
    assert not is_mistake(error)


def test_what_a_message_explains_counts_too():
    error = OSError("the shards can't be listed")
    error.__cause__ = OSError(errno.EIO, "input/output error")
    assert not is_mistake(error)
