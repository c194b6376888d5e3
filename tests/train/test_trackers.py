"""Trackers beside TensorBoard, read back from what they wrote."""

import dataclasses
import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from PIL import Image
from s3_server import free_port

from famt.pipeline.errors import UserError
from famt.train import trackers
from famt.train.log import Log, log_evaluation
from famt.train.pretrain import main as pretrain
from famt.train.run_folder import own_folder
from famt.train.timing import Clock
from famt.train.trackers import Tolerant, Tracked


def _story(folder, tracker):
    """A run of four steps, resumed from its second, and evaluated, also while it trains."""
    tracked = Tracked(tracker, f"run-{tracker}", {"track": tracker, "join": {"mask_ratio": 0.5}})

    def begin(step):
        log = Log(folder, step, 4, 8, Clock(torch.device("cpu")), "train", tracked)
        log.event(step, "start", run=tracked.run, options=tracked.options)
        return log

    folder.mkdir()
    log = begin(0)
    log.picture(0, Image.new("RGB", (8, 6), "red"))
    for step in (2, 4):
        log.point(step, 0, {"loss": 1 / step})
    log.close()
    log = begin(2)
    log.point(4, 0, {"loss": 0.125})
    log.found(4, "monitor", {"knn_cls": 0.25})
    log.close()
    with own_folder(folder):
        log_evaluation(folder, 3, "knn", "trained", {"top1_cls": 0.1}, {})
    log_evaluation(folder, 4, "knn", "trained", {"top1_cls": 0.5, "pooling": "cls"}, {})


_EXPECTED = {
    "loss": [(2, 0.5), (4, 0.25), (4, 0.125)],
    "monitor/knn_cls": [(4, 0.25)],
    "knn/top1_cls": [(4, 0.5)],
}


def _records(path: Path):
    """Records of a W&B file: a log of LevelDB's kind, in blocks of 32 KiB, after 7 bytes."""
    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_wandb_gets_what_tensorboard_gets_under_one_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    for name, value in (("MODE", "offline"), ("PROJECT", "mine"), ("SILENT", "true")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    _story(tmp_path / "first", "wandb")
    found, runs, metrics = {name: [] for name in _EXPECTED}, set(), set()
    pictures = list((tmp_path / "first" / "wandb").rglob("crops_*.png"))
    files = (tmp_path / "first" / "wandb").rglob("*.wandb")
    for path in sorted(files, key=lambda each: each.stat().st_mtime_ns):
        for data in _records(path):
            record = Record.FromString(data)
            if record.HasField("run"):
                runs.add((record.run.run_id, record.run.project, record.run.display_name))
            if record.HasField("metric"):
                metrics.add(record.metric.step_metric)
            line = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
            for name in found.keys() & line.keys():
                found[name].append((json.loads(line["step"]), json.loads(line[name])))
    assert runs == {("run-wandb", "mine", "first")}
    assert metrics == {"step"}
    assert found == _EXPECTED
    with Image.open(pictures[0]) as picture:
        assert picture.size == (8, 6)


@pytest.mark.slow
def test_mlflow_gets_what_tensorboard_gets_under_one_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("mlflow.server")
    uri = f"http://127.0.0.1:{free_port()}"
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1",
        "--port", uri.rpartition(":")[2], "--workers", "1",
        "--backend-store-uri", f"sqlite:///{tmp_path}/runs.db",
        "--artifacts-destination", str(tmp_path / "artifacts"),
    ]  # fmt: skip
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    output = open(tmp_path / "server.log", "w")  # noqa: SIM115
    server = subprocess.Popen(
        command, env={**os.environ, "PATH": path}, stdout=output, stderr=output,
        start_new_session=True,
    )  # fmt: skip
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{uri}/health").close()
                break
            except OSError:
                time.sleep(0.1)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
        _story(tmp_path / "first", "mlflow")
        client = mlflow.MlflowClient(uri)
        experiment = client.get_experiment_by_name("mine").experiment_id
        (run,) = client.search_runs([experiment])
        assert run.info.run_name == "first"
        assert run.data.params["join.mask_ratio"] == "0.5"
        for name, values in _EXPECTED.items():
            history = client.get_metric_history(run.info.run_id, name)
            told = sorted((each.step, -each.value) for each in history)
            assert told == sorted((step, -value) for step, value in values)
            if name == "knn/top1_cls":
                assert len(told) == 2 - 1  # none while the run trained
        assert any(
            "crops" in each.path for each in client.list_artifacts(run.info.run_id, "images")
        )
    finally:
        os.killpg(server.pid, 9)
        server.wait()
        output.close()


def test_a_tracker_that_fails_is_warned_of_once_and_training_goes_on(config, monkeypatch, capsys):
    sent = []

    class Failing:
        def __init__(self, folder, tracked):
            assert tracked.options["model"] == "vit_nano"

        def scalars(self, values, step):
            sent.append(step)
            if step > 1:
                raise ConnectionError("no route\nto host")

        def picture(self, name, picture, step):
            sent.append(name)

        close = None

    monkeypatch.setattr(trackers, "WandB", Failing)
    monkeypatch.setattr(trackers, "find_spec", lambda _: True)
    pretrain(dataclasses.replace(config, track="wandb", epochs=1))
    assert sent == ["crops", 1, 2]
    told = capsys.readouterr().err
    assert told.count("warning: wandb failed") == 1
    assert "(no route to host)" in told


def test_a_tracker_that_can_not_begin_is_warned_of(capsys):
    def unreachable():
        raise ConnectionError

    board = Tolerant("mlflow", unreachable)
    board.scalars({"loss": 1.0}, 1)
    board.close()
    assert capsys.readouterr().err.count("warning: mlflow failed") == 1


def test_a_missing_package_is_named_with_the_command_that_installs_it(config, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"--track mlflow: .* pip install 'famt\[mlflow\]'"):
        pretrain(dataclasses.replace(config, track="mlflow"))
