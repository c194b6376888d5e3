import pytest

from famt.jobs.tables import GridResult, RowResult, probes_against_cost, table


def log(steps: int, probe: float, held_out: list[float]) -> list[dict]:
    """Of a finished run, at which the monitor looked at equal distances."""
    every = steps // len(held_out)
    look = {"event": "evaluation", "weights": "trained"}
    return [
        {
            "step": 0, "event": "start", "total_steps": steps, "effective_batch": 8,
            "steps_per_epoch": steps // 10, "options": {"epochs": 10},
        },
        {"step": every, "loss": 0.7, "images_per_second": 1.0},
        {"step": steps, "loss": 0.5, "images_per_second": 1.0},
        *(
            {**look, "step": every * n, "evaluator": "monitor", "probe_mean": value}
            for n, value in enumerate(held_out, start=1)
        ),
        {"step": steps, "event": "finished"},
        {**look, "step": steps, "evaluator": "probe", "top1_mean": probe},
    ]  # fmt: skip


@pytest.fixture
def result():
    mae = [log(100, 0.48 + n / 100, [0.2, 0.3, 0.4, 0.49 + n / 100]) for n in range(3)]
    famt = [log(100, 0.5, [0.3, 0.42 + n / 5, 0.55, 0.6]) for n in range(2)]
    rows = {"mae": (1.0, mae), "famt": (0.6, famt), "longer": (0.5, []), "new": (None, [])}
    return GridResult(
        title="Tiny",
        reference="mae",
        rows=[
            RowResult(name=name, epochs=10, cost=cost, logs=logs)
            for name, (cost, logs) in rows.items()
        ],
    )


def cells(text: str) -> list[dict[str, str]]:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def test_the_table_holds_means_errors_costs_and_where_the_reference_is_reached(result):
    mae, famt, *others = cells(table(result))
    assert (mae["seeds"], mae["cost"], mae["reached at"]) == ("3", "1.00", "1.00")
    assert mae["Probe, mean of patches (val)"] == "49.0 ± 0.6"  # 1 / sqrt(3) points
    assert (famt["seeds"], famt["cost"], famt["reached at"]) == ("2 (no claim)", "0.60", "0.30")
    assert [each["epochs"] for each in others] == ["not measured yet"] * 2


def test_the_file_of_logs_gives_the_same_table_anew(result, tmp_path):
    result.write(tmp_path / "tiny.json.gz")
    assert table(GridResult.read(tmp_path / "tiny.json.gz")) == table(result)


def test_the_picture_shows_the_probe_of_each_row_at_the_cost_of_its_run(result):
    (axes,) = probes_against_cost(result).axes  # class tokens were not probed
    points = {
        each.get_label(): [*each.lines[0].get_xydata()[0], len(each.lines[2])]
        for each in axes.containers
    }
    assert axes.get_title() == "mean of patches"
    assert points == {
        "mae (3 seeds)": pytest.approx([1.0, 49.0, 1]),
        "famt (2 seeds)": pytest.approx([0.6, 50.0, 1]),
    }
