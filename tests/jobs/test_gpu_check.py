"""All code of the check runs on a CPU too, and without packages that a GPU machine may lack."""

import os

import pytest
from launch import RAY, run


@pytest.fixture
def bare(tmp_path):
    """Environment of a process that lacks Ray, Plotly and moto."""
    for name in ("ray", "plotly", "moto"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('no {name} here')")
    return {**RAY, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(tmp_path, bare):
    run(
        "-m", "famt.jobs.gpu_check", "--device", "cpu", "--model", "vit_nano", "--minutes", "60",
        "--batch-size", "8", "--photos", "24", "--steps", "2", "--rounds", "1", "--no-tests",
        "--out", str(tmp_path / "gpu.md"), env=bare,
    )  # fmt: skip  # a process of its own, which takes 12 GB
    page = (tmp_path / "gpu.md").read_text()
    assert page.count("passed") == 9
    assert "mean difference 0.000 of 255, worst image 0.000" in page
    assert page.count('"benchmark": "') > 10


def test_without_a_gpu_every_part_is_skipped_with_the_reason(tmp_path, bare):
    environment = {**bare, "CUDA_VISIBLE_DEVICES": ""}
    run("-m", "famt.jobs.gpu_check", "--out", str(tmp_path / "gpu.md"), env=environment)
    assert (tmp_path / "gpu.md").read_text().count("skipped: torch finds no GPU") == 9
