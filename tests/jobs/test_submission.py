"""Jobs as a user sends them to a cluster that runs already: `ray job submit --working-dir .`"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ray_clusters import cluster
from s3_server import free_port
from samples import write_shards

from famt.pipeline.caching.cache import ScoreCache
from famt.pipeline.loading.dataset import load_samples
from famt.train import checkpoint

ROOT = Path(__file__).parents[2]
TOO_MUCH = 600 << 20  # bytes; Ray takes 512 MiB


@pytest.fixture
def checkout(tmp_path):
    """The program's own files, in a folder that has been worked in."""
    folder = tmp_path / "checkout"
    generated = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for part in ("famt", "jobs", "pipeline", "train", "docs", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=generated)
    for name in (".gitignore", ".rayignore", "README.md", "Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    for name in (".venv/lib", ".git/objects", "demo", "runs/first", "shards", "scores", "exported"):
        (folder / name).mkdir(parents=True)
        with open(folder / name / "large.bin", "wb") as file:
            file.truncate(TOO_MUCH)  # sparse: takes no room here
    return folder


@pytest.mark.slow
def test_scoring_and_training_run_by_ray_job_submit_from_a_checkout_full_of_other_things(
    checkout, tmp_path, monkeypatch
):
    """Nodes see the environment of the cluster alone, and of the program what was sent."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.chdir(tmp_path)
    shards = tmp_path / "data"
    write_shards(shards, 8, 8, 8)
    inputs = ["--shards", str(shards), "--cache", str(tmp_path / "cache"), "--spec.grid", "7"]
    port = free_port()

    def submit(*command):
        done = subprocess.run(
            ["ray", "job", "submit", "--address", f"http://127.0.0.1:{port}", "--working-dir", ".",
             "--", "python", *command],
            cwd=checkout, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    with cluster(
        3, include_dashboard=True, dashboard_port=port, dashboard_agent_listen_port=free_port()
    ):
        submit("jobs/precompute_freq.py", *inputs)
        shown = submit(
            "jobs/pretrain.py", *inputs, "--out", str(tmp_path / "run"), "--recipe", "famt",
            "--model", "vit_nano", "--epochs", "2", "--batch-size", "8", "--refresh.every", "1",
            "--workers", "1", "--threads", "1",
        )  # fmt: skip
    assert len(load_samples([str(shards)], ScoreCache(str(tmp_path / "cache")))) == 24
    assert checkpoint.load(tmp_path / "run").step == 6
    assert re.search(r"data +24 images in 3 shards", shown)
