"""All code of the check runs on a CPU too, and without packages that a GPU machine may lack."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch import RAY, run

_SMALL = [
    "-m", "famt.jobs.gpu_check", "--device", "cpu", "--model", "vit_nano", "--batch-size", "8",
    "--photos", "24", "--steps", "2", "--rounds", "1",
]  # fmt: skip


@pytest.fixture
def bare(tmp_path):
    """Environment of a process that lacks Ray, Plotly and moto."""
    for name in ("ray", "plotly", "moto"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('no {name} here')")
    return {**RAY, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(tmp_path, bare):
    out = tmp_path / "gpu.md"  # a process of its own, which takes 12 GB
    run(*_SMALL, "--minutes", "60", "--out", str(out), env=bare)
    page = out.read_text()
    assert page.count("passed, ") == 11
    assert "mean difference 0.000 of 255, worst image 0.000" in page
    assert page.count('"benchmark": "') > 10


def test_without_a_gpu_every_part_is_skipped_with_the_reason(tmp_path, bare):
    environment = {**bare, "CUDA_VISIBLE_DEVICES": ""}
    run("-m", "famt.jobs.gpu_check", "--out", str(tmp_path / "gpu.md"), env=environment)
    assert (tmp_path / "gpu.md").read_text().count("skipped: torch finds no GPU") == 11


@pytest.mark.slow
def test_a_kill_loses_no_line_and_the_end_of_the_budget_leaves_out_the_rest(tmp_path, bare):
    out = tmp_path / "gpu.md"
    command = [sys.executable, *_SMALL, "--no-tests", "--minutes", "60", "--out", str(out)]
    killed = subprocess.Popen(command, env=bare)
    while killed.poll() is None and '"benchmark": "' not in _text(out):
        time.sleep(0.1)
    assert killed.poll() is None
    killed.kill()
    killed.wait()
    assert "mean difference" in _text(out)
    run(*_SMALL, "--no-tests", "--minutes", "0.001", "--out", str(out), env=bare)
    assert _text(out).count("skipped: --minutes 0.001 are over") == 11


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""
