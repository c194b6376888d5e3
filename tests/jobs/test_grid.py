import pytest

from famt.jobs import grid
from famt.jobs.costs import StepCost
from famt.pipeline.errors import UserError

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


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text(GRID.format(out=tmp_path))
    return path


def _epochs(path, **costs):
    found = grid.load(path)
    return {row.name: found.epochs_of(row, {**COSTS, **costs}) for row in found.row}


def test_a_share_of_the_cost_is_spent_on_as_many_epochs_as_it_pays(path):
    # 10 epochs with generations due at 2, 4, 6 and 8 cost 5 + 4 / 2; 7 / 0.7 is 10 again.
    assert _epochs(path) == {"mae": 10, "famt": 10, "longer": 20, "shorter": 10}


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
    assert _epochs(path, longer=StepCost(0.5, plain=1.0))["longer"] == epochs


def test_a_share_that_pays_for_no_epoch_is_named(path):
    path.write_text(path.read_text().replace("cost = 1.0", "cost = 0.02"))
    with pytest.raises(
        UserError, match=r"row 'longer': a cost of 0\.02 is less than half an epoch"
    ):
        _epochs(path)


def test_only_a_row_that_trains_differently_has_other_folders(path, tmp_path):
    recipe = tmp_path / "mine.toml"
    path.write_text(path.read_text().replace("--frequency.source off", f"--recipe {recipe}"))
    folders = []
    for options in ("--fused 0", "--fused 0  # a comment", "--fused 1"):
        recipe.write_text(f'options = "{options}"')
        found = grid.load(path)
        folders.append([found.trainings(row, 10)[0].folder for row in found.row])
    assert folders[0] == folders[1]
    same = [old == new for old, new in zip(folders[1], folders[2], strict=True)]
    assert same == [True, True, False, True]


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ('reference = "mae"', 'reference = "beit"', "reference 'beit' is not the name of a row"),
        ('name = "famt"', 'name = "mae"', "two rows have the same name"),
        ("epochs = 10", "epoch = 10", "epochs Field required; epoch Extra inputs"),
        ("cost = 1.0", "costs = 1.0", r"row\.2\.costs Extra inputs"),
        ("[evaluations]", "[evaluations", "Expected ']'"),
        ('train = ["train.tar"]', 'train = "train.tar"', "train Input should be a valid list"),
        ("seeds = [0, 1, 2]", "seeds = [0, 0, 1]", "a seed is listed twice"),
        ('probe = ""', 'prbe = ""', "evaluations.prbe.* 'knn', 'probe' or 'segment'"),
        ('probe = ""', 'probe = "--pooling cls"', "evaluation 'probe': wrong options"),
        (
            "--frequency.source off",
            "--frequencys.source off",
            "row 'longer': wrong options",
        ),
    ],
)
def test_mistakes_in_a_grid_are_named(path, old, new, error):
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError, match=error) as raised:
        grid.load(path)
    assert str(path) in str(raised.value)
