import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from famt.pipeline.errors import UserError
from famt.train import report
from famt.train.log import Log, log_evaluation
from famt.train.program_options import Report
from famt.train.timing import Clock


def made_up_run(
    folder: Path,
    seed: int,
    probe: float,
    steps: int = 60,
    data: str | None = None,
    **options: object,
) -> Path:
    """A run of 60 steps in 6 epochs whose log is by the real `Log`, with nothing trained."""
    folder.mkdir(parents=True)
    clock, noise = Clock(torch.device("cpu")), np.random.default_rng(seed)
    log = Log(folder, 0, steps, 8, clock, "made up")
    log.event(
        0, "start", run=folder.name, epoch=0, steps_per_epoch=10, total_steps=steps,
        effective_batch=8, images=83, data=data,
        options={"seed": seed, "epochs": 6, "join": {"mask_ratio": 0.45}, **options},
    )  # fmt: skip
    for step in range(1, steps + 1):
        if step % 20 == 1:
            log.picture(step - 1, Image.fromarray(noise.integers(0, 255, (90, 120, 3), np.uint8)))
        with clock.stage("forward"):
            pass
        log.step()
        if step % 5 == 0:
            log.point(step, (step - 1) // 10, {"loss": 1 / step + noise.random() / 100})
        if step % 10 == 0:
            found = {"knn_cls": probe * step / steps, "probe_cls": 0.3, "seconds": 1.0}
            log.found(step, "monitor", found, images=512)
    log.event(steps, "finished")
    log.close()
    add_evaluation(folder, steps, "trained", probe)
    add_evaluation(folder, steps // 2, "trained", 0.2)  # of an old checkpoint
    add_evaluation(folder, steps, "untrained", 0.1)
    return folder


def add_evaluation(
    run: Path, step: int, weights: str, value: float, evaluator: str = "probe"
) -> None:
    """Log what an evaluation on 2,000 images found."""
    found = {"top1_cls": value, "val_images": 2000}
    log_evaluation(run, step, evaluator, weights, found, {"val": ["shards/val-*.tar"]})


def without(run: Path, text: str) -> Path:
    """The run, without the lines of its log that have a text."""
    log = run / "log.jsonl"
    kept = [line for line in log.read_text().splitlines() if text not in line]
    log.write_text("".join(f"{line}\n" for line in kept))
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [
        made_up_run(folder / f"{recipe}-{seed}", seed, probe + seed / 100, model=recipe)
        for recipe, probe in (("mae", 0.48), ("<famt>", 0.5))
        for seed in range(2)
    ]


def write_page(runs: list[Path], folder: Path) -> str:
    """The text of a page about runs."""
    return report.main(Report(runs, folder / "page.html")).read_text()


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    return write_page(runs, tmp_path_factory.mktemp("page"))


def cells(page: str, section: str) -> list[list[str]]:
    """The text of a section's table."""
    table = page.partition(f'<section id="{section}">')[2].partition("</table>")[0]
    rows = re.findall(r"<tr.*?>(.*?)</tr>", table, re.S)
    return [
        [
            unescape(re.sub("<[^>]+>", "", cell))
            for cell in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row, re.S)
        ]
        for row in rows
    ]


def charts(page: str) -> list[dict]:
    return [json.loads(unescape(each)) for each in re.findall(r'data-figure="(.*?)"', page)]


def test_seeds_are_one_row_with_mean_and_standard_error(page):
    header, *rows, mae_floor, famt_floor = cells(page, "table")
    assert header[:3] == ["runs", "seeds", "epochs"]
    assert [row[:3] for row in rows] == [["mae", "2", "6"], ["<famt>", "2", "6"]]
    probe = header.index("Probe, class token (test, %)")
    assert [row[probe] for row in rows] == ["48.5 ± 0.5", "50.5 ± 0.5"]
    assert (mae_floor[0], famt_floor[0]) == ("mae, untrained", "<famt>, untrained")
    assert mae_floor[probe] == "10.0 ± 0.0"


def test_a_headline_says_what_on_what_reached_what_in_what_time(runs, tmp_path):
    unfinished = made_up_run(tmp_path / "mae-0", 0, 0.5, model="vit_nano", shards=["a.tar"])
    without(unfinished, '"finished"')
    for folders, expected in (
        (runs[:2], r"mae</strong> \(mae, 2 seeds\), trained on 83 images: Probe, class token "
         r"48\.5 ± 0\.5 % right on 2,000 images of val, untrained 10\.0 ± 0\.0 %; "
         r"6 epochs in \S+ s, finished\."),
        ([unfinished], r"mae-0</strong> \(vit_nano\), trained on 83 images of a.tar: .* 50\.0 %.*; "
         r"6 epochs in \S+ s, not finished, 6 epochs are planned\."),
    ):  # fmt: skip
        assert re.search(expected, unescape(write_page(folders, tmp_path)))


def test_a_headline_takes_an_evaluation_before_a_probe_of_the_monitor(tmp_path):
    watched = ["shards/train-*.tar"]
    run = without(made_up_run(tmp_path / "run", 0, 0.5, monitor=watched), '"probe"')
    expected = "Probe, class token 30.0 % right on a fifth of 512 images of train;"
    assert expected in write_page([run], tmp_path)
    add_evaluation(run, 60, "trained", 0.2, "knn")
    expected = "k-NN, class token 20.0 % right on 2,000 images of val;"
    assert expected in write_page([run], tmp_path)


def test_of_a_single_run_losses_model_recipe_and_changed_options_are_shown(tiny_run, tmp_path):
    page = write_page([tiny_run], tmp_path)
    _, *rows = cells(page, "options")
    assert {row[0] for row in rows} >= {"--model", "--recipe", "--epochs"}
    assert "--join.mask-ratio" not in {row[0] for row in rows}  # as by default
    assert [each["y"] for each in charts(page)] == ["loss", "loss"]  # it was not evaluated


def test_what_fewer_runs_tell_or_seeds_that_come_twice_are_no_three_seeds(tmp_path):
    runs = [made_up_run(tmp_path / f"mae-{n}", seed, 0.5) for n, seed in enumerate((0, 0, 1))]
    without(runs[0], '"probe"')
    page = write_page(runs, tmp_path)
    header, row, _ = cells(page, "table")
    assert row[1] == "2"
    assert row[header.index("Probe, class token (test, %)")] == "50.0 ± 0.0 (of 2)"
    assert "Fewer than three seeds" in page


def test_every_metric_is_drawn_against_epochs_and_against_cost(page):
    drawn = charts(page)
    assert [each["y"] for each in drawn] == ["loss"] * 2 + ["correct, %"] * 4
    assert {each["x"] for each in drawn[::2]} == {"epochs"}
    assert 'title="forward: ' in page
    assert all("training time" in each["x"] for each in drawn[1::2])
    losses, knn = drawn[0]["data"], drawn[2]["data"]
    assert losses[-1]["name"] == "&lt;famt>, seed 1"  # Plotly reads tags
    assert (len(losses), len(knn)) == (4, 2)
    assert knn[0]["x"] == [1, 2, 3, 4, 5, 6]
    assert knn[0]["y"][-1] == pytest.approx(48.5)  # the mean of 48 and 49
    assert knn[0]["error_y"]["array"][-1] == pytest.approx(0.5)


def test_only_what_differs_between_options_is_listed(page):
    assert cells(page, "options")[1:] == [["--model", "mae", "<famt>"]]


def test_a_page_needs_nothing_but_itself_and_stays_small(page):
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert len(page) < 3e6


def test_a_column_is_a_metric_on_a_data_set(tmp_path):
    runs = [made_up_run(tmp_path / f"run-{n}", n, 0.5) for n in range(2)]

    def evaluate(run, value, val, images, digest=None, **options):
        found = {"val_images": images, "train_images": 900, "top1_cls": value}
        if digest:
            found |= {"val_data": digest, "train_data": "0ab"}
        told = {"train": ["train-*.tar"], "val": [val], **options}
        log_evaluation(run, 60, "knn", "trained", found, told)

    evaluate(runs[0], 0.282, "a/val.tar", 1000, "abc")
    evaluate(runs[0], 0.9, "a/few.tar", 39, "def")
    evaluate(runs[1], 0.284, "moved/val.tar", 1000, "abc", batch_size=8)
    evaluate(runs[1], 0.1, "a/val.tar", 1000, "abc", k=1)
    evaluate(runs[1], 0.7, "old.tar", 10)
    evaluate(runs[1], 0.8, "old.tar", 20)
    page = write_page(runs, tmp_path)
    header, row, _ = cells(page, "table")
    figures = {n: row[header.index(f"k-NN, class token (test {n}, %)")] for n in range(1, 6)}
    assert figures == {
        1: "28.3 ± 0.1", 2: "90.0 (of 1)", 3: "10.0 (of 1)", 4: "70.0 (of 1)", 5: "80.0 (of 1)",
    }  # fmt: skip
    told = unescape(page.partition('<ul id="data">')[2].partition("</ul>")[0])
    assert (
        "<em>knn, test 2</em>: 39 images of a/few.tar, learned from 900 images of train-*.tar"
        in told
    )
    assert "<em>knn, test 3</em>: 1,000 images of a/val.tar" in told
    assert told.count("--k 1") == 1
    marks = [each["name"] for each in charts(page)[2]["data"] if each["mode"] == "markers"]
    assert sorted(marks)[:2] == ["run, knn, test 1", "run, knn, test 2"]


def test_looks_of_the_monitor_at_other_images_are_another_column(tmp_path):
    runs = [made_up_run(tmp_path / f"run-{n}", n, 0.5, monitor=[f"{n}.tar"]) for n in range(2)]
    header, row, _ = cells(write_page(runs, tmp_path), "table")
    assert row[header.index("k-NN, class token (monitor 2, %)")] == "50.0 (of 1)"


def test_runs_that_differ_in_what_nothing_depends_on_are_one_row(tmp_path):
    runs = [
        made_up_run(tmp_path / f"run-{n}", n, 0.5, stage=stage, decode={"on": on})
        for n, (stage, on) in enumerate([(None, "gpu"), ("/disk", "cpu")])
    ]
    others = made_up_run(tmp_path / "others", 0, 0.5, data="abc")
    page = write_page([*runs, others], tmp_path)
    assert [row[:2] for row in cells(page, "table")[1:3]] == [["run", "2"], ["others", "1"]]
    assert cells(page, "options")[1:] == [["images trained on (digest)", "–", "abc"]]


def test_a_folder_that_is_no_run_is_named_and_takes_no_other_along(runs, tmp_path, capsys):
    with pytest.raises(UserError, match=f"{tmp_path} is not a run"):
        write_page([tmp_path], tmp_path)
    assert not (tmp_path / "page.html").exists()
    broken = made_up_run(tmp_path / "broken", 0, 0.5)
    with open(broken / "log.jsonl", "a") as log:
        log.write('{"step": 3, "lo\n{"step": 4, "loss": "x"}\n[]\n')
    page = write_page([*runs, tmp_path, broken], tmp_path)
    rows = [row[0] for row in cells(page, "table")[1:]]
    page = unescape(page)
    assert [each for each in rows if "untrained" not in each] == ["mae", "<famt>", "broken"]
    said = capsys.readouterr().err
    for text in (
        f"Left out: {tmp_path} is not a run",
        f"{broken}/log.jsonl: unreadable: 3 lines",
    ):
        assert text in page.partition('<ul id="notes">')[2].partition("</ul>")[0]
        assert text in said


@pytest.mark.slow
def test_a_browser_draws_every_chart_and_picture_without_an_error(page, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no Chromium is installed")
    path = tmp_path / "page.html"
    path.write_text(page + _CHECK)
    done = subprocess.run(
        [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
         "--virtual-time-budget=20000", "--window-size=1400,1000", "--enable-logging=stderr",
         "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    seen = json.loads(unescape(re.search(r'<pre id="seen">(.*?)</pre>', done.stdout)[1]))
    assert seen == {"errors": [], "charts": 6, "drawn": 6, "pictures": 12, "whole": 12}
    assert "CONSOLE" not in done.stderr, done.stderr


# Charts draw once Plotly is unpacked; what a page then shows stands in its text.
_CHECK = """
<pre id="seen"></pre>
<script>
const errors = [];
addEventListener("error", event => errors.push(event.message));
addEventListener("unhandledrejection", event => errors.push(String(event.reason)));
for (const details of document.querySelectorAll("details")) details.open = true;
const waiting = setInterval(() => {
  if (!document.body.dataset.drawn && !errors.length) return;
  clearInterval(waiting);
  const charts = [...document.querySelectorAll("[data-figure]")];
  const pictures = [...document.images];
  document.getElementById("seen").textContent = JSON.stringify({
    errors, charts: charts.length, drawn: charts.filter(c => c.querySelector("svg .trace")).length,
    pictures: pictures.length, whole: pictures.filter(p => p.complete && p.naturalWidth > 0).length,
  });
}, 50);
</script>
"""
