import json

import pytest

from famt.pipeline.errors import UserError
from famt.train import run_log
from famt.train.log import log_evaluation


def start(step=0, epoch=0, steps_per_epoch=10, batch=8, total=40, **options):
    return {
        "step": step, "event": "start", "epoch": epoch, "steps_per_epoch": steps_per_epoch,
        "total_steps": total, "effective_batch": batch, "options": {"epochs": 4, **options},
    }  # fmt: skip


def point(step, loss=1.0, rate=4.0, **times):
    return {"step": step, "loss": loss, "images_per_second": rate, **times}


def write(folder, *lines):
    folder.mkdir(exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_real_run_tells_its_options_losses_and_pictures(tiny_run):
    run = run_log.read(tiny_run)
    assert run.finished
    assert (run.options["model"], run.options["join.mask_ratio"]) == ("vit_nano", 0.45)
    assert [point.step for point in run.points] == [1, 2, 3, 4]
    assert [point.epoch for point in run.points] == [0.5, 1.0, 1.5, 2.0]
    assert sum(run.stages.values()) == pytest.approx(1, abs=0.02)
    (first, start), (last, end) = run_log.pictures(tiny_run, 6)
    assert (first, last) == (0, 4)
    crops = (0, 0, start.width // 7, start.height)  # the left column
    assert start.crop(crops) == end.crop(crops)
    assert start != end


def test_pauses_cost_nothing_and_a_run_is_finished_by_its_last_checkpoint(tmp_path):
    lines = start(), point(20), start(20, 2), point(40)
    assert not run_log.read(write(tmp_path, *lines)).finished  # before its last checkpoint
    run = run_log.read(write(tmp_path, *lines, {"step": 40, "event": "finished"}))
    assert [each.seconds for each in run.points] == [40, 80]  # 20 steps of 8 images at 4 a second
    assert [run.seconds(step) for step in (0, 10, 20, 30, 40)] == [0, 20, 40, 60, 80]
    assert run.finished


@pytest.mark.parametrize(
    ("lines", "epochs"),
    [
        ([point(10), start(15, 1), point(20)], [1, 2]),  # a resume within an epoch
        ([point(10), start(20, 2, steps_per_epoch=5, total=30), point(25)], [1, 3]),
        # At step 18, in epoch 1, a restart goes back to the epoch's beginning: 8 steps more in all.
        ([point(10), start(18, 1, total=48), point(28), point(48)], [1, 2, 4]),
    ],
)
def test_epochs_count_on_over_resumes_and_elastic_restarts(tmp_path, lines, epochs):
    run = run_log.read(write(tmp_path, start(), *lines))
    assert [each.epoch for each in run.points] == epochs


def test_stages_are_weighed_by_the_time_that_they_were_measured_over(tmp_path):
    slow, fast = {"rate": 1.0, "time/join": 0.5}, {"rate": 3.0, "time/join": 0.1}
    run = run_log.read(write(tmp_path, start(), point(10, **slow), point(20, **fast)))
    assert run.stages["join"] == pytest.approx((0.5 * 80 + 0.1 * 80 / 3) / (80 + 80 / 3))


def test_a_line_that_a_kill_cut_off_is_left_out_and_takes_no_other_along(tmp_path):
    folder = write(tmp_path, start(), point(10))
    with open(folder / "log.jsonl", "a") as log:
        log.write('{"step": 20, "los')
    run = run_log.read(folder)
    assert (len(run.points), run.corrupt) == (1, 0)  # it may be about to be written
    log_evaluation(folder, 10, "knn", "trained", {"top1_cls": 0.5}, {"k": 5})
    run = run_log.read(folder)
    (found,) = run.found
    assert run.corrupt == 1
    assert (found.values, found.options) == ({"top1_cls": 0.5}, {"k": 5})


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        (None, "is not a run: it has no log.jsonl; give the --out of a training"),
        ([], "has no start of a run"),
        ([start()], "has not reached its first log point"),
        ([{"epoch": 1}], "has no start of a run"),
    ],
)
def test_a_folder_that_tells_no_history_is_named(tmp_path, lines, error):
    folder = tmp_path / "there"
    if lines is not None:
        write(folder, *lines)
    with pytest.raises(UserError, match=error) as raised:
        run_log.read(folder)
    assert str(folder) in str(raised.value)
