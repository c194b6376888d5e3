import json
import shutil
from pathlib import Path

import pytest

from famt.pipeline.errors import UserError
from famt.pipeline.loading.dataset import load_samples
from famt.pipeline.sharding.dataset_json import check_dataset


def describe(folder: Path, **splits: list[str]) -> None:
    told = {"classes": [], "splits": {name: {"shards": each} for name, each in splits.items()}}
    (folder / "dataset.json").write_text(json.dumps(told))


def test_a_folder_of_several_splits_is_refused_and_a_pattern_is_not(scored):
    for n in (1, 2):
        shutil.move(scored.shards[n], scored.folder / f"val-{n:06d}.tar")
    describe(scored.folder, train=["train-000000.tar"], val=["val-000001.tar", "val-000002.tar"])
    folder = str(scored.folder)
    with pytest.raises(UserError, match="holds the splits train and val: say which") as refused:
        load_samples([folder], scored.cache)
    for pattern, count in (("train-*.tar", 10), ("*.tar", 26)):
        assert f"'{folder}/{pattern}'" in str(refused.value)
        assert len(load_samples([f"{folder}/{pattern}"], scored.cache)) == count


def test_a_folder_that_holds_one_of_its_splits_alone_is_taken(scored):
    names = [Path(each).name for each in scored.shards]
    describe(scored.folder, train=names, val=["val-000000.tar"])
    assert len(load_samples([str(scored.folder)], scored.cache)) == 26


def test_a_new_folder_has_no_splits_yet(tmp_path):
    assert check_dataset(str(tmp_path / "new"), ["a"]) == {"classes": ["a"], "splits": {}}


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b'{"classes": 1, "splits": {}}'])
def test_a_damaged_description_is_named_with_the_remedy(tmp_path, content):
    (tmp_path / "dataset.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"{tmp_path}/dataset\.json is damaged; restore or remove"):
        check_dataset(str(tmp_path), ["a"])
