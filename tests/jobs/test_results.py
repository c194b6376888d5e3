import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from samples import photo_members, score, tar_bytes

from famt.jobs import costs, results
from famt.jobs.costs import StepCost
from famt.jobs.grid import load, table
from famt.jobs.results import histories, left
from famt.pipeline.cache import ScoreCache
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
TABLES = sorted((ROOT / "docs").glob("results/*/results.md"))


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


def test_a_grid_that_nothing_was_done_of_needs_every_command(data, tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text(GRID.format(out=tmp_path, data=data) + ROW)
    grid = load(path, lambda file, runs, reference: dict.fromkeys(runs, StepCost(1.0)))
    modules = [[command[2] for command in left(grid, row, 0)] for row in grid.rows]
    assert modules == [["famt.jobs.pretrain", "famt.train.evaluate"]] * 2


@pytest.mark.parametrize("published", TABLES, ids=lambda path: path.parent.name)
def test_a_published_table_is_that_of_the_logs_beside_it_and_stands_on_the_page(
    published, monkeypatch
):
    def refuse(*_):
        raise AssertionError("steps of a published grid are to be timed anew")

    monkeypatch.setattr(costs, "_measure", refuse)
    folder = published.parent
    grid = load(ROOT / "docs" / "grids" / f"{folder.name}.toml", out=folder)
    runs = {row.name: histories(grid, row) for row in grid.rows}
    told = table(grid, runs)
    assert told == published.read_text()
    page = (ROOT / "docs" / "results.md").read_text().splitlines()
    assert {line for line in told.splitlines() if line.startswith("|")} <= set(page)


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


@pytest.mark.slow
def test_a_training_that_somebody_else_stops_is_not_evaluated(data, tmp_path, monkeypatch):
    path = tmp_path / "grid.toml"
    path.write_text(GRID.format(out=tmp_path, data=data).replace("epochs = 2", "epochs = 2000"))
    grid = load(path, lambda file, runs, reference: dict.fromkeys(runs, StepCost(1.0)))
    started = []

    def start(command, *_, **__):
        started.append(subprocess.Popen(command))
        return started[-1]

    def stop():
        while not [*tmp_path.glob("runs/*/log.jsonl")]:
            time.sleep(0.1)
        started[0].terminate()

    monkeypatch.setattr(results, "_start", start)
    stopper = threading.Thread(target=stop)
    stopper.start()
    assert results._run._function(grid, grid.rows[0], 0, 1, 0, None) == ""
    stopper.join()
    assert [each.args[2] for each in started] == ["famt.jobs.pretrain"]
    assert len(left(grid, grid.rows[0], 0)) == 2


@pytest.mark.slow
def test_gpus_that_no_machine_has_are_an_error_at_once(data, tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text(GRID.format(out=tmp_path, data=data))
    command = [sys.executable, "-m", "famt.jobs.results", str(path), "--gpus", "64"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "no machine has the 1 CPU core(s) and 64 GPU(s) of --cpus and --gpus" in done.stderr


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
