import dataclasses

import pytest

from famt.jobs import grid
from famt.jobs.costs import StepCost
from famt.train.history import Basis, Found, History, Point

GRID = """
title = "Tiny"
out = "{out}"
train = ["train.tar"]
val = ["val.tar"]
cache = "scores"
reference = "mae"
seeds = [0, 1, 2]
epochs = 10
options = "--recipe famt --model vit_nano"

[evaluations]
probe = ""

[[row]]
name = "mae"
options = "--recipe mae"

[[row]]
name = "famt"
options = "--frequency.source cached"

[[row]]
name = "longer"
options = "--frequency.source off"
cost = 1.0

[[row]]
name = "shorter"
cost = 0.7
options = "--refresh.every 2"
"""
COSTS = {
    "mae": StepCost(1.0),
    "famt": StepCost(0.6),
    "longer": StepCost(0.5),
    "shorter": StepCost(0.5, refresh=0.5),
}


ASKED = {"train": ["train.tar"], "val": ["val.tar"]}
BASIS = Basis("train and val", "val")


def load(path):
    return grid.load(path, lambda file, runs, reference: {name: COSTS[name] for name in runs})


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text(GRID.format(out=tmp_path))
    return path


def run(tmp_path, steps: int, probe: float, held_out: list[float]) -> History:
    """Finished; the monitor looked at equal distances."""
    every = steps // len(held_out)
    found = [
        Found(every * n, n, "monitor", "trained", {"probe_mean": value}, {}, BASIS)
        for n, value in enumerate(held_out, start=1)
    ]
    found.append(Found(steps, 10, "probe", "trained", {"top1_mean": probe}, ASKED, BASIS))
    return History(tmp_path, {}, [Point(steps, 10, 60.0, 0.5)], found, {}, steps, True, None, 0)


def cells(text: str) -> list[dict[str, str]]:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def test_a_share_of_the_cost_is_spent_on_as_many_epochs_as_it_pays(path):
    rows = load(path).rows
    assert [row.epochs for row in rows[:3]] == [10, 10, 20]
    assert [row.cost for row in rows[:3]] == [1.0, 0.6, 0.5]
    # 10 epochs with generations due at 2, 4, 6 and 8 cost 5 + 4 / 2; 7 / 0.7 is 10 again.
    assert (rows[3].epochs, rows[3].cost) == (10, pytest.approx(0.7))


@pytest.mark.parametrize(
    ("options", "epochs"),
    [
        ("--batch-size 128", 40),  # half as many steps an epoch, each for half of the cost
        ("--batch-size 32", 10),
        ("--crops-per-image 4", 5),
        ("--plain-epochs 5", 15),  # 5 at the whole cost, 10 at half of it
    ],
)
def test_a_share_of_the_cost_minds_how_many_steps_an_epoch_has_and_what_each_costs(
    path, options, epochs
):
    path.write_text(path.read_text().replace("--frequency.source off", options))
    costs = {**COSTS, "longer": StepCost(0.5, plain=1.0)}
    found = grid.load(path, lambda file, runs, reference: costs)
    assert found.rows[2].epochs == epochs


def test_rows_that_are_not_timed_yet_have_no_epochs_to_speak_of(path, tmp_path):
    found = grid.load(path, lambda file, runs, reference: {"mae": COSTS["mae"]})
    text = grid.table(found, {row.name: [] for row in found.rows})
    assert [each["epochs"] for each in cells(text)] == ["not measured yet"] * 4


def test_only_evaluations_of_the_last_step_that_the_grid_asks_for_count(path, tmp_path):
    found = load(path)
    history = run(tmp_path, 100, 0.5, [0.4])
    others = [
        Found(50, 5, "probe", "trained", {"top1_mean": 0.1}, ASKED, BASIS),
        Found(100, 10, "probe", "untrained", {"top1_mean": 0.2}, ASKED, BASIS),
        Found(
            100, 10, "probe", "trained", {"top1_mean": 0.3}, {**ASKED, "val": ["other.tar"]}, BASIS
        ),
        Found(100, 10, "probe", "trained", {"top1_mean": 0.4}, {**ASKED, "epochs": 3}, BASIS),
        Found(100, 10, "knn", "trained", {"top1_mean": 0.6}, ASKED, BASIS),
    ]
    mixed = dataclasses.replace(history, found=[*history.found, *others])
    assert found.judged(mixed) == history


def test_the_table_holds_means_errors_costs_and_where_the_reference_is_reached(path, tmp_path):
    runs = {
        "mae": [
            run(tmp_path, 100, 0.48 + n / 100, [0.2, 0.3, 0.4, 0.49 + n / 100]) for n in range(3)
        ],
        "famt": [run(tmp_path, 100, 0.5, [0.3, 0.42 + n / 5, 0.55, 0.6]) for n in range(2)],
        "longer": [],
        "shorter": [],
    }
    mae, famt, longer, _ = cells(grid.table(load(path), runs))
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
    assert same == [False, True, True, True]


def test_a_recipe_file_that_changes_what_is_trained_gives_other_folders(path, tmp_path):
    recipe = tmp_path / "mine.toml"
    path.write_text(path.read_text().replace("--frequency.source off", f"--recipe {recipe}"))
    folders = []
    for options in ("--fused 0", "--fused 0  # a comment", "--fused 1"):
        recipe.write_text(f'options = "{options}"')
        found = load(path)
        folders.append(found.folder(found.rows[2], 0))
    assert folders[0] == folders[1] != folders[2]


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ('reference = "mae"', 'reference = "beit"', "reference 'beit' is no row"),
        ('name = "famt"', 'name = "mae"', "two rows have one name"),
        ("epochs = 10", "epoch = 10", "missing or unknown"),
        ("cost = 1.0", "costs = 1.0", "unknown keys of a row"),
        ("[evaluations]", "[evaluations", "grid.toml"),
        ('train = ["train.tar"]', 'train = "train.tar"', "train must be a list of str"),
        ("seeds = [0, 1, 2]", "seeds = 3", "seeds must be a list of int"),
        ("seeds = [0, 1, 2]", "seeds = [0, 0, 1]", "one stands twice"),
        ('probe = ""', 'prbe = ""', "evaluation 'prbe': there are knn, probe"),
        ('probe = ""', 'probe = "--pooling cls"', "evaluation 'probe': its options are wrong"),
        (
            "--frequency.source off",
            "--frequencys.source off",
            "row 'longer': its options are wrong",
        ),
        ("cost = 1.0", "cost = 0.02", "row 'longer': a cost of 0.02 pays for no epoch"),
    ],
)
def test_mistakes_in_a_grid_are_named(path, old, new, error):
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=error) as raised:
        load(path)
    assert str(path) in str(raised.value)
