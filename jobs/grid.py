"""A grid of runs: the TOML file, its rows and seeds, and the commands of each run."""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import BaseModel, Field, ValidationError, model_validator

from famt.jobs.costs import StepCost
from famt.pipeline.errors import UserError
from famt.pipeline.options import FREE
from famt.train import run_log
from famt.train.command_line import naming, parse
from famt.train.config import Pretrain, TrainingOptions
from famt.train.evaluate.evaluation import Evaluation
from famt.train.evaluate.evaluators import EVALUATORS

Names = Annotated[list[str], Field(min_length=1)]
_OF_RUNS = tuple(n for n, kind in EVALUATORS.items() if not issubclass(kind, TrainingOptions))


class Row(BaseModel, extra="forbid", frozen=True):
    """A recipe of a grid; docs/results-grids.md describes the keys."""

    name: str
    options: str = ""
    cost: Annotated[float, Field(gt=0)] | None = None


class Grid(BaseModel, extra="forbid", frozen=True):
    """A grid; docs/results-grids.md describes the keys."""

    title: str
    out: Path
    train: Names
    val: Names
    cache: str
    epochs: Annotated[int, Field(ge=1)]
    seeds: Annotated[list[int], Field(min_length=1)]
    options: str = ""
    evaluations: dict[Literal[_OF_RUNS], str] = {}  # type: ignore[valid-type]
    reference: str
    row: list[Row]

    @model_validator(mode="after")
    def _check(self) -> Grid:
        """Find mistakes now that would otherwise surface after hours."""
        names = [row.name for row in self.row]
        if len(set(names)) < len(names):
            raise ValueError("two rows have the same name")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed is listed twice")
        if self.reference not in names:
            raise ValueError(f"reference {self.reference!r} is not the name of a row")
        for name in self.evaluations:
            self.evaluation(name)
        for row in self.row:
            self.config(row)
        return self

    def arguments(self, row: Row, epochs: int | None = None) -> list[str]:
        """Command line of a row's runs, without --out and --seed; `epochs` None: the grid's."""
        return [
            "--shards", *self.train, "--cache", self.cache, "--epochs", str(epochs or self.epochs),
            *shlex.split(self.options), *shlex.split(row.options),
        ]  # fmt: skip

    def config(self, row: Row, epochs: int | None = None) -> Pretrain:
        """Options of a row's runs.

        Raises:
            UserError: an option is wrong; names the row.
        """
        with naming(f"row {row.name!r}"):
            return parse([*self.arguments(row, epochs), "--out", str(self.out)], None)

    def trainings(self, row: Row, epochs: int) -> list[Training]:
        """The runs of a row, one per seed."""
        # Option values, not the recipe's name: its file may change.
        differing = self.config(row, epochs).differing()
        learned = [(name, value) for name, value, notes in differing if FREE not in notes]
        text = json.dumps([self.train, learned])
        digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
        folders = {seed: self.out / "runs" / f"{row.name}-{digest}-{seed}" for seed in self.seeds}
        return [Training(self, row, epochs, seed, folder) for seed, folder in folders.items()]

    def evaluation(self, name: str, checkpoint: str = "") -> tuple[list[str], Evaluation]:
        """Command line of an evaluation, and its options.

        Raises:
            UserError: an option is wrong; names the evaluation.
        """
        arguments = [
            "--checkpoint", checkpoint, "--cache", self.cache, "--train", *self.train,
            "--val", *self.val, *shlex.split(self.evaluations[name]),
        ]  # fmt: skip
        with naming(f"evaluation {name!r}"):
            return arguments, tyro.cli(EVALUATORS[name], args=arguments)

    def epochs_of(self, row: Row, costs: Mapping[str, StepCost]) -> int:
        """Epochs of a row: the grid's, or the number whose cost is nearest to the row's `cost`.

        Raises:
            UserError: the nearest number is 0.
        """
        if row.cost is None:
            return self.epochs
        reference = next(each for each in self.row if each.name == self.reference)
        budget = row.cost * _spent(costs[reference.name], self.config(reference))
        cost, config, epochs = costs[row.name], self.config(row), 0

        def missed(epochs: int) -> float:
            spent = _spent(cost, replace(config, epochs=epochs)) if epochs else 0.0
            return abs(spent - budget)

        while missed(epochs + 1) < missed(epochs):
            epochs += 1
        if not epochs:
            raise UserError(f"row {row.name!r}: a cost of {row.cost} is less than half an epoch")
        return epochs


def load(path: Path, out: Path | None = None) -> Grid:
    """Read a grid; `out` overrides its own.

    Raises:
        FileNotFoundError: no such file.
        UserError: a key or an option is missing, unknown or wrong; names file and key.
    """
    try:
        declared = tomllib.loads(path.read_text())
        return Grid.model_validate(declared | ({"out": out} if out else {}))
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, each['loc']))} {each['msg']}" for each in error.errors()]
        raise UserError(f"{path}: {'; '.join(wrong)}; see docs/results-grids.md") from None
    except (UserError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: {error}") from None


def _spent(cost: StepCost, run: Pretrain) -> float:
    """Cost of a run, in reference steps for each image of the data set."""
    return cost.of(run) * run.epochs * run.crops_per_image / run.batch_size


@dataclass(frozen=True)
class Training:
    """A run of a grid: a row and a seed. Its folder depends on every option that matters."""

    grid: Grid
    row: Row
    epochs: int
    seed: int
    folder: Path

    @property
    def config(self) -> Pretrain:
        """Options of the run, except --out and --seed."""
        return self.grid.config(self.row, self.epochs)

    def log(self) -> list[dict[str, Any]]:
        """Lines of the log; of evaluations only those of the last step that the grid asks for."""
        try:
            lines, _ = run_log.read_lines(self.folder)
        except UserError:  # no log yet
            return []
        asked = {name: self.grid.evaluation(name)[1] for name in self.grid.evaluations}
        kept = []
        for line in lines:
            if line.get("event") == "evaluation" and line["evaluator"] != "monitor":
                wanted = asked.get(line["evaluator"])
                if wanted is None or (wanted.weights, wanted.conditions(), _steps(lines)) != (
                    line["weights"], line["options"], line["step"],
                ):  # fmt: skip
                    continue
                line["weights"] = "trained"  # averaged ones too, if the grid asks for them
            kept.append(line)
        return kept

    def left(self, gpus: int = 0) -> list[list[str]]:
        """Commands still to run: the training, then each evaluation that the log lacks."""
        log, python, commands = self.log(), [sys.executable, "-m"], []
        finished = any(line.get("event") == "finished" for line in log)
        if not finished:
            ranks = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus), "-m"]
            commands.append([
                *python, *(ranks if gpus > 1 else []), "famt.jobs.pretrain",
                *self.grid.arguments(self.row, self.epochs), "--out", str(self.folder),
                "--seed", str(self.seed), "--monitor", *self.grid.train,
            ])  # fmt: skip
        done = {line["evaluator"] for line in log if line.get("event") == "evaluation"}
        for name in self.grid.evaluations:
            if not finished or name not in done:
                arguments, _ = self.grid.evaluation(name, str(self.folder))
                commands.append([*python, "famt.train.evaluate", name, *arguments])
        return commands


def _steps(lines: list[dict[str, Any]]) -> int:
    """Steps of the whole run, according to its last start."""
    return next(int(each["total_steps"]) for each in reversed(lines) if "total_steps" in each)
