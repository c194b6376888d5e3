import itertools

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from tensorboard.summary.writer.event_file_writer import AtomicCounter

from famt.train import log as log_module
from famt.train.log import Log, evaluation_table, log_evaluation
from famt.train.timing import Clock


def test_a_run_that_is_begun_again_at_its_end_keeps_what_stands_there(tmp_path, monkeypatch):
    # Files of one second sort by this number's digits, so one of ten would come before one of nine.
    monkeypatch.setattr(event_file_writer, "_global_uid", AtomicCounter(100))

    def again(step):
        return Log(tmp_path, step, 4, 8, Clock(torch.device("cpu")), "train")

    log = again(0)
    for step in (2, 4):
        log.point(step, 0, {"loss": 1 / step})
    log.found(4, "monitor", {"knn_cls": 0.25})
    log.close()
    log_evaluation(tmp_path, 4, "knn", "trained", {"top1_cls": 0.5}, {})

    def drawn():
        board = EventAccumulator(str(tmp_path)).Reload()
        names = ("loss", "monitor/knn_cls", "knn/top1_cls")
        return {name: [each.step for each in board.Scalars(name)] for name in names}

    again(4).close()
    assert drawn() == {"loss": [2, 4], "monitor/knn_cls": [4], "knn/top1_cls": [4]}
    log = again(2)  # what came after the step that a run goes on from is no part of its story
    log.found(3, "monitor", {"knn_cls": 0.25})
    log_evaluation(tmp_path, 3, "knn", "trained", {"top1_cls": 0.5}, {})
    log.close()
    assert drawn() == {"loss": [2], "monitor/knn_cls": [3], "knn/top1_cls": [3]}


@pytest.mark.parametrize(
    ("seconds", "total", "steps", "duration", "ahead"),
    [
        (2.0, 6021, 21, "3 h 20 min", "6000 steps of 2 s"),
        (0.5, 46, 21, "12 s", "25 steps of 0.5 s"),
        (45.0, 10003, 3, "5 d 5 h", "10000 steps of 45 s"),
    ],
)
def test_how_long_a_run_will_take_is_said_once(
    tmp_path, monkeypatch, capsys, seconds, total, steps, duration, ahead
):
    now = [0.0]
    monkeypatch.setattr(log_module.time, "perf_counter", lambda: now[0])
    log = Log(tmp_path, 0, total, 8, Clock(torch.device("cpu")), "train")
    now[0] = 500.0  # the first step opens files and compiles
    for step in range(1, steps + 9):
        log.step()
        if step == steps - 1:
            assert "to go" not in capsys.readouterr().err
        now[0] += seconds
    log.close()
    rest = "to go at this rate, refreshes and evaluations not counted"
    assert capsys.readouterr().err.count(f"about {duration} {rest}: {ahead}\n") == 1


def test_an_evaluation_is_shown_in_percent_with_its_standard_error():
    line = {
        "evaluate": "probe", "checkpoint": "run/checkpoint-00000003.pt", "weights": "trained",
        "step": 3, "train_images": 25000, "train_data": "0ab", "val_images": 10000,
        "val_data": "1cd", "top1_cls": 0.50234, "stderr_cls": 0.005, "held_out_top1_cls": 0.504,
        "learning_rate_cls": 0.03,
    }  # fmt: skip
    assert evaluation_table(line, 10).splitlines() == [
        "probe of run/checkpoint-00000003.pt (trained weights, step 3)",
        "10000 images to test on, 25000 to learn from",
        "  top-1, class token             50.2 ± 0.5 %",
        "  top-1, held out, class token   50.4 %",
        "  learning rate, class token    0.03",
        "  chance, 10 classes             10.0 %",
    ]


@pytest.mark.parametrize(("terminal", "drawn"), [(True, range(15, 50)), (False, range(1, 6))])
def test_a_bar_in_a_file_is_drawn_seldom(tmp_path, monkeypatch, capsys, terminal, drawn):
    monkeypatch.setattr(log_module.sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setattr("tqdm.std.time", itertools.count().__next__)  # a second at each look
    log = Log(tmp_path, 0, 100, 8, Clock(torch.device("cpu")), "train")
    for step in range(20):
        log.step()
        log.point(step, 0, {"loss": 1.0})
    log.close()
    assert capsys.readouterr().err.count("train:") in drawn
