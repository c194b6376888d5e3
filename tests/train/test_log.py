import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from famt.train.log import Log, log_evaluation
from famt.train.timing import Clock


def test_a_run_that_is_begun_again_at_its_end_keeps_what_stands_there(tmp_path):
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
