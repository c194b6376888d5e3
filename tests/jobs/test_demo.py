import os

import pytest
from launch import run
from samples import encode, photo


@pytest.mark.slow
def test_a_flat_folder_is_trained_on_without_a_probe(tmp_path):
    (tmp_path / "photos").mkdir()
    for n in range(20):
        (tmp_path / "photos" / f"{n}.jpg").write_bytes(encode(photo(n)))
    done = run(
        "jobs/demo.py", "--data", str(tmp_path / "photos"), "--out", str(tmp_path / "demo"),
        "--images-seen", "32",
    )  # fmt: skip
    assert "has fewer than two classes; it needs a folder per class" in done.stdout
    assert list((tmp_path / "demo").glob("run-*/run/checkpoint-*.pt"))
    said = dict(line.split(":", 1) for line in done.stdout.splitlines() if ":" in line)
    assert os.path.exists(said["page"].strip())
    assert os.path.exists(said["picture"].strip())
