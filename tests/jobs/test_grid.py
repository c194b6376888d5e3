import json

import pytest

from jobs.grid import load, table
from train.history import Found, History, Point

GRID = """
title = "Tiny"
out = "{out}"
train = ["train.tar"]
val = ["val.tar"]
cache = "scores"
costs = "{out}/steps.jsonl"
reference = "mae"
seeds = [0, 1, 2]
epochs = 10
options = "--model vit_nano"

[evaluations]
probe = ""

[[row]]
name = "mae"
options = "--recipe mae"

[[row]]
name = "famt"
cost = ["famt self", "rolling"]

[[row]]
name = "longer"
cost = ["famt self"]
equal_cost = true
"""
STEPS = [
    {"unit": "ms an image of a step of famt self, vit_nano, fp32", "ratio": 0.5},
    {"unit": "ms an image of a step with rolling, vit_nano", "ratio": 1.2},
    {"unit": "MB that a step adds at its peak, famt self", "ratio": 0.1},
]


@pytest.fixture
def path(tmp_path):
    (tmp_path / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in STEPS))
    path = tmp_path / "grid.toml"
    path.write_text(GRID.format(out=tmp_path))
    return path


def run(tmp_path, steps: int, probe: float, held_out: list[float]) -> History:
    """Finished; the monitor looked at equal distances."""
    every = steps // len(held_out)
    found = [
        Found(every * n, n, "monitor", "trained", {"probe_mean": value})
        for n, value in enumerate(held_out, start=1)
    ]
    found.append(Found(steps, 10, "probe", "trained", {"top1_mean": probe}))
    return History(tmp_path, {}, [Point(steps, 10, 60.0, 0.5)], found, {}, steps, True)


def cells(text: str) -> list[dict[str, str]]:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def test_costs_are_products_of_measured_ratios(path):
    assert [row.cost for row in load(path).rows] == [1.0, 0.6, 0.5]


def test_equal_cost_spends_what_is_saved_on_epochs(path):
    grid = load(path)
    assert [grid.epochs_of(row) for row in grid.rows] == [10, 10, 20]


def test_the_table_holds_means_errors_costs_and_where_the_reference_is_reached(path, tmp_path):
    grid = load(path)
    runs = {
        "mae": [run(tmp_path, 100, 0.48 + n / 100, [0.2, 0.3, 0.4, 0.5]) for n in range(3)],
        "famt": [run(tmp_path, 100, 0.5, [0.3, 0.5, 0.55, 0.6]) for _ in range(2)],
        "longer": [],
    }
    mae, famt, longer = cells(table(grid, runs))
    assert (mae["seeds"], mae["cost"], mae["reached at"]) == ("3", "1.00", "1.00")
    assert mae["Probe, mean of patches (val)"] == "49.0 ± 0.6"  # 1 / sqrt(3) points
    assert (famt["seeds"], famt["cost"], famt["reached at"]) == ("2 (no claim)", "0.60", "0.30")
    assert longer["epochs"] == "not measured yet"


def test_only_a_row_that_trains_differently_has_other_folders(path):
    before = load(path)
    path.write_text(path.read_text().replace("--recipe mae", "--recipe mae --fused 0"))
    after = load(path)
    same = [
        before.folder(old, 0) == after.folder(new, 0)
        for old, new in zip(before.rows, after.rows, strict=True)
    ]
    assert same == [False, True, True]


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ('reference = "mae"', 'reference = "beit"', "reference 'beit' is no row"),
        ('name = "famt"', 'name = "mae"', "two rows have one name"),
        ('"rolling"', '"live"', "no measured step 'live' for row 'famt'"),
        ("epochs = 10", "epoch = 10", "missing or unknown"),
        ("equal_cost", "equal", "unknown keys of a row"),
        ("steps.jsonl", "none.jsonl", "no measured steps"),
        ("[evaluations]", "[evaluations", "grid.toml"),
    ],
)
def test_mistakes_in_a_grid_are_named(path, old, new, error):
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=error):
        load(path)
