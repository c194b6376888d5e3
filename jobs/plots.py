"""The picture of a grid's results: what each row reaches, and what it costs."""

from __future__ import annotations

from itertools import cycle

from matplotlib.figure import Figure

from famt.jobs.tables import GridResult, measured_places, values_at, whole_costs
from famt.pipeline.wording import counted
from famt.train.comparison import mean_and_error

_PROBE, _VAL = "Probe, ", " (val)"


def probes_against_cost(result: GridResult) -> Figure:
    """Each row's linear probes on val against the cost of a run, a panel for each pooling.

    Points are means over seeds, with standard errors where there are several. A row without a cost
    or a probe is left out.
    """
    costs = whole_costs(result)
    places = {
        name.removeprefix(_PROBE).removesuffix(_VAL): place
        for name, place in measured_places(result).items()
        if name.startswith(_PROBE) and name.endswith(_VAL)
    }
    figure = Figure(figsize=(3 + 3.5 * len(places), 3.8), layout="constrained")
    for number, (pooling, place) in enumerate(places.items(), start=1):
        axes = figure.add_subplot(1, len(places), number)
        axes.set_title(pooling, fontsize=10)
        axes.set_xlabel(f"cost of a run, {result.reference} = 1")
        if number == 1:
            axes.set_ylabel("linear probe on val, %")
        for row, marker in zip(result.rows, cycle("os^vD<>Pp*hX"), strict=False):
            values = values_at(row.runs, place)
            if row.name in costs and values:
                mean, error = mean_and_error([100 * each for each in values])
                label = f"{row.name} ({counted(len(values), 'seed')})"
                axes.errorbar(costs[row.name], mean, error, fmt=marker, capsize=3, label=label)
    if figure.axes:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", fontsize=8)
    return figure
