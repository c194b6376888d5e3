import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
from launch import run
from samples import photo_members, score, tar_bytes

from famt.jobs import results
from famt.jobs.grid import load
from famt.jobs.tables import GridResult, table
from famt.pipeline.caching.cache import ScoreCache
from famt.pipeline.scores import ScoreSpec

GRID = """
title = "Tiny"
out = "{out}"
train = ["{data}/train.tar"]
val = ["{data}/val.tar"]
cache = "{data}/cache"
reference = "mae"
seeds = [0]
epochs = 2
options = \"\"\"--model vit_nano --batch-size 4 --log-steps 1 --device cpu --threads 1
--monitor-epochs 1 --spec.grid 7 --attention.source off --frequency.source off\"\"\"

[evaluations]
knn = "--device cpu"

[[row]]
name = "mae"
options = "--join.mask-ratio 0.75 --join.throw-ratio 0"
"""
ROW = '[[row]]\nname = "uniform"\n'
ROOT = Path(__file__).parents[2]
PUBLISHED = sorted((ROOT / "docs").glob("results/*.json.gz"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, first in (("train", 0), ("val", 100)):
        (folder / f"{name}.tar").write_bytes(tar_bytes(photo_members(24, first)))
    cache = ScoreCache(str(folder / "cache"), create=True)
    score([folder / "train.tar", folder / "val.tar"], cache, ScoreSpec(grid=7))
    return folder


def start(grid, *arguments: str, by: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*by, sys.executable, "-m", "famt.jobs.results", str(grid), *arguments],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


def first(path):
    """The first training of a grid."""
    grid = load(path)
    return grid.trainings(grid.row[0], grid.epochs)[0]


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda path: path.name)
def test_a_published_table_is_that_of_its_logs(published):
    name = "paper.md" if published.name.startswith("paper") else "results.md"
    page = (ROOT / "docs" / name).read_text().splitlines()
    lines = [
        each for each in table(GridResult.read(published)).splitlines() if each.startswith("|")
    ]
    start = page.index(lines[2]) - 2
    assert page[start : start + len(lines)] == lines


@pytest.mark.parametrize(("name", "code"), [("plot.svg", 0), ("plot.gif", 2)])
def test_a_published_grid_is_plotted_into_a_file_of_the_kind_its_name_says(tmp_path, name, code):
    with start(PUBLISHED[0], "--plot", str(tmp_path / name)) as process:
        assert process.wait() == code
    assert (tmp_path / name).exists() == (code == 0)


def test_a_run_needs_what_its_log_lacks_of_what_the_grid_asks_for(data, tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text(GRID.format(out=tmp_path, data=data))
    training = first(path)

    def modules():
        return [command[2] for command in training.left()]

    def add(event, **line):
        with open(training.folder / "log.jsonl", "a") as log:
            log.write(json.dumps({"step": 12, "event": event, **line}) + "\n")

    both = ["famt.jobs.pretrain", "famt.train.evaluate"]
    assert modules() == both
    training.folder.mkdir(parents=True)
    add("start", total_steps=12)
    assert modules() == both
    add("finished")
    assert modules() == both[1:]
    asked = {"train": [f"{data}/train.tar"], "val": [f"{data}/val.tar"]}
    for other in (
        {"step": 6, "options": asked, "weights": "trained"},
        {"options": asked, "weights": "untrained"},
        {"options": {**asked, "val": ["other.tar"]}, "weights": "trained"},
        {"options": {**asked, "k": 1}, "weights": "trained"},
    ):
        add("evaluation", evaluator="knn", **other)
    assert modules() == both[1:]
    add("evaluation", evaluator="knn", options=asked, weights="trained", top1_cls=0.5)
    assert modules() == []
    assert [line["top1_cls"] for line in training.log() if "evaluator" in line] == [0.5]


@pytest.mark.slow
def test_a_stop_has_runs_write_a_checkpoint_also_where_a_script_began_them(data, tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text(GRID.format(out=tmp_path, data=data).replace("epochs = 2", "epochs = 2000"))
    # A script's `command &` ignores SIGINT, with all that it starts.
    pieces = start(path, by=("env", "--ignore-signal=INT"))
    deadline = time.monotonic() + 300
    while not [*tmp_path.glob("runs/*/log.jsonl")]:
        assert pieces.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    pieces.terminate()
    pieces.wait()
    assert [*tmp_path.glob("runs/*/*.pt")]


@pytest.mark.parametrize(("gpus", "address"), [(0, "10.0.0.1:6379"), (1, "local"), (8, "local")])
def test_a_run_of_whole_gpus_refreshes_on_them_by_a_ray_of_its_own(
    gpus, address, tmp_path, monkeypatch
):
    command = [sys.executable, "-c", "import os; print(os.environ['RAY_ADDRESS'])"]
    context = Mock(gcs_address="10.0.0.1:6379")
    monkeypatch.setattr(results.ray, "get_runtime_context", lambda: context)
    training = Mock(
        grid=Mock(out=tmp_path), folder=tmp_path / "run", **{"left.return_value": [command]}
    )
    training.log.return_value = []
    assert results.run(training, 1, gpus) == ""
    assert (tmp_path / "output.txt").read_text().splitlines()[-1] == address


@pytest.mark.slow
def test_a_training_that_somebody_else_stops_is_not_evaluated(data, tmp_path, monkeypatch):
    path = tmp_path / "grid.toml"
    path.write_text(GRID.format(out=tmp_path, data=data).replace("epochs = 2", "epochs = 2000"))
    training, started, popen = first(path), [], subprocess.Popen

    def start(command, **options):
        started.append(popen(command, **options))
        return started[-1]

    def stop():
        while not [*tmp_path.glob("runs/*/log.jsonl")]:
            time.sleep(0.1)
        started[0].terminate()

    monkeypatch.setattr(results.subprocess, "Popen", start)
    monkeypatch.setattr(results.ray, "get_runtime_context", lambda: Mock(gcs_address="local"))
    stopper = threading.Thread(target=stop)
    stopper.start()
    assert results.run(training, 1, 0) == ""
    stopper.join()
    assert len(started) == 1
    assert len(training.left()) == 2


@pytest.mark.slow
def test_gpus_that_no_machine_has_are_an_error_at_once(data, tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text(GRID.format(out=tmp_path, data=data))
    done = run("-m", "famt.jobs.results", str(path), "--gpus", "64", code=2)
    assert "no machine has --cpus 1 and --gpus 64" in done.stderr


@pytest.mark.slow
def test_scores_that_a_row_lacks_are_an_error_of_one_line(data, tmp_path):
    path, row = tmp_path / "grid.toml", 'options = "--frequency.source cached --spec.grid 8"\n'
    path.write_text(GRID.format(out=tmp_path, data=data) + ROW + row)
    done = run("-m", "famt.jobs.results", str(path), code=2)
    error = done.stderr.splitlines()[-1]
    assert error.startswith(f"error: {data}/train.tar: ")
    assert "Remedy: famt score" in error


@pytest.mark.slow
def test_a_grid_stopped_at_random_moments_gives_the_table_of_one_run(data, tmp_path):
    grids = {}
    for name in ("whole", "stopped"):
        grids[name] = tmp_path / f"{name}.toml"
        grids[name].write_text(GRID.format(out=tmp_path / name, data=data))
    whole = start(grids["whole"])
    assert whole.wait() == 0, whole.stdout.read()
    draw = random.Random(0)
    for _ in range(10):
        pieces = start(grids["stopped"])
        time.sleep(draw.uniform(2, 15))
        pieces.send_signal(draw.choice([signal.SIGTERM, signal.SIGKILL]))
        pieces.wait()
    for _ in range(5):  # a run whose caller was killed may still hold its folder
        if start(grids["stopped"]).wait() == 0:
            break
    tables = [(tmp_path / name / "results.md").read_text() for name in grids]
    assert tables[0] == tables[1]
    assert "| mae | 1 (no claim) | 2 |" in tables[0]

    grids["whole"].write_text(grids["whole"].read_text() + ROW)
    output = tmp_path / "whole" / "output.txt"
    before = output.stat().st_size
    assert start(grids["whole"]).wait() == 0
    said = output.read_bytes()[before:].decode(errors="replace")
    calls = [line for line in said.splitlines() if line.startswith("$")]
    assert len(calls) == 2
    assert all("uniform-" in call for call in calls)
    logs = sorted((tmp_path / "whole").glob("runs/mae-*/log.jsonl"))
    for log in logs:
        events = [json.loads(line).get("evaluator") for line in log.read_text().splitlines()]
        assert events.count("knn") == 1
