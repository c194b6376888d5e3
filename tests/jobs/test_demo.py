import os
import subprocess
import sys

import pytest
from samples import encode, photo


@pytest.mark.slow
def test_a_flat_folder_is_trained_on_without_a_probe(tmp_path):
    (tmp_path / "photos").mkdir()
    for n in range(20):
        (tmp_path / "photos" / f"{n}.jpg").write_bytes(encode(photo(n)))
    done = subprocess.run(
        [sys.executable, "jobs/demo.py", "--data", str(tmp_path / "photos"),
         "--out", str(tmp_path / "demo"), "--images-seen", "32"],
        env={**os.environ, "RAY_ADDRESS": "local"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "has fewer than two classes; it needs a folder per class" in done.stdout
    assert list((tmp_path / "demo").glob("run-*/run/checkpoint-*.pt"))
    said = dict(line.split(":", 1) for line in done.stdout.splitlines() if ":" in line)
    assert os.path.exists(said["page"].strip())
    assert os.path.exists(said["picture"].strip())
