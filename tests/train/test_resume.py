import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
from launch import finish, launch, program_file
from runs import log_events
from samples import RANKS

from famt.pipeline.errors import UserError
from famt.pipeline.options import ELASTIC, FREE, Checked, Since, annotated
from famt.train import checkpoint
from famt.train.checkpoint import Checkpoint, resume
from famt.train.config import Pretrain
from famt.train.evaluate.evaluators.finetune import Finetune
from famt.train.pretrain import main
from famt.train.run_folder import BusyError, own_folder

CIRCUMSTANCES = {"device": "cpu", "world_size": 1, "data": "photos"}


@dataclass(frozen=True)
class Inner(Checked):
    rate: float = 0.1
    note: Annotated[str, FREE] = "slow"


@dataclass(frozen=True)
class Options(Checked):
    """Options of each kind: free, elastic and fixed, and one of each inside."""

    out: Annotated[Path, FREE]
    resume: Annotated[Literal["auto", "never"], FREE] = "auto"
    elastic: Annotated[bool, FREE] = False
    width: int = 8
    batch: Annotated[int, ELASTIC] = 4
    inner: Inner = Inner()
    paced: Annotated[Inner, ELASTIC] = Inner()

    def describe(self):
        return {**dataclasses.asdict(self), "out": str(self.out)}


@pytest.fixture
def options(tmp_path):
    return Options(tmp_path)


def _save(options, step=3):
    state = Checkpoint(
        run="run-a", step=step, epoch=1, method="mae", sizes={}, components={}, ranks=[],
        config={**options.describe(), **CIRCUMSTANCES},
    )  # fmt: skip
    return checkpoint.save(options.out, state, keep=9)


def _resume(options, **circumstances):
    return resume(options, CIRCUMSTANCES | circumstances, RANKS)


def test_a_folder_without_a_checkpoint_is_a_fresh_run(options):
    assert _resume(options) == (None, True)


def test_the_latest_checkpoint_is_gone_on_from_with_the_next_batch(options):
    _save(options, 3)
    _save(options, 7)
    found, exact = _resume(options)
    assert (found.step, exact) == (7, True)


@pytest.mark.parametrize(
    "other", [{"elastic": True}, {"inner": Inner(note="fast")}, {"paced": Inner(note="fast")}]
)
def test_what_nothing_learned_depends_on_may_differ(options, other):
    _save(options)
    assert _resume(dataclasses.replace(options, **other))[1]


@pytest.mark.parametrize(
    ("other", "circumstances", "named"),
    [
        ({"batch": 5}, {}, r"batch: 4 -> 5"),
        ({"paced": Inner(rate=0.2)}, {}, r"paced\.rate: 0\.1 -> 0\.2"),
        ({}, {"world_size": 2}, r"world_size: 1 -> 2"),
        ({}, {"data": "paintings"}, "other training images"),
    ],
)
def test_what_is_elastic_is_gone_on_with_from_its_epoch_if_asked_for(
    options, other, circumstances, named
):
    _save(options)
    changed = dataclasses.replace(options, **other)
    with pytest.raises(UserError, match=rf"other options \({named}\); .* or --elastic to resume"):
        _resume(changed, **circumstances)
    found, exact = _resume(dataclasses.replace(changed, elastic=True), **circumstances)
    assert (found.step, exact) == (3, False)


@pytest.mark.parametrize(
    ("other", "circumstances", "named"),
    [
        ({"width": 9}, {}, r"width: 8 -> 9"),
        ({"inner": Inner(rate=0.2), "batch": 5}, {}, r"batch: 4 -> 5; inner\.rate: 0\.1 -> 0\.2"),
        ({}, {"device": "cuda"}, r"device: cpu -> cuda"),
    ],
)
def test_another_run_is_refused_even_if_elastic(options, other, circumstances, named):
    _save(options)
    with pytest.raises(
        UserError, match=rf"other options \({named}\); use the same options, or anot[^;]*$"
    ):
        _resume(dataclasses.replace(options, elastic=True, **other), **circumstances)


def test_an_option_that_is_new_counts_as_what_there_was_before_it(options):
    @dataclass(frozen=True)
    class Newer(Options):
        added: Annotated[int, Since(before=0)] = 7

    newer = Newer(options.out, added=0)
    _save(options)
    assert _resume(newer)[1]
    with pytest.raises(UserError, match=r"other options \(added: 0 -> 7\)"):
        _resume(dataclasses.replace(newer, added=7))


@pytest.mark.parametrize(
    ("options", "digest"),
    [
        (Pretrain(shards=[], cache="", out=Path()), "b9f5a21d1552"),
        (Finetune(checkpoint="", train=[], val=[], cache="", out=Path()), "1515622b5439"),
    ],
    ids=["pretrain", "finetune"],
)
def test_no_option_is_added_without_saying_what_there_was_before_it(options, digest):
    names = [
        name
        for name, _, notes in annotated(options)
        if FREE not in notes and not any(isinstance(note, Since) for note in notes)
    ]
    found = hashlib.sha256(" ".join(sorted(names)).encode()).hexdigest()[:12]
    assert (checkpoint.FORMAT, found) == (3, digest), (
        "a new option takes a note Since(before=...); to rename or remove one, raise FORMAT"
    )


def test_what_an_exact_continuation_needs_must_be_there(options):
    _save(options)
    with pytest.raises(UserError, match=r"exactly without the maps; --elastic resumes"):
        resume(options, CIRCUMSTANCES, RANKS, lambda _: ["the maps"])
    elastic = dataclasses.replace(options, elastic=True)
    assert not resume(elastic, CIRCUMSTANCES, RANKS, lambda _: ["the maps"])[1]
    assert resume(elastic, CIRCUMSTANCES, RANKS, lambda _: [])[1]


def test_never_resuming_refuses_a_folder_with_checkpoints(options):
    never = dataclasses.replace(options, resume="never")
    assert _resume(never) == (None, True)
    _save(options)
    with pytest.raises(UserError, match="--resume never"):
        _resume(never)


def test_damaged_checkpoints_are_set_aside_unless_nothing_is_left(options, capsys):
    paths = [_save(options, step) for step in (3, 5, 7)]
    for path in paths[1:]:
        path.write_bytes(path.read_bytes()[:-100])
    found, exact = _resume(options)
    assert (found.step, exact) == (3, True)
    assert {path.name for path in options.out.glob("*.damaged")} == {
        "checkpoint-00000005.damaged",
        "checkpoint-00000007.damaged",
    }
    assert "is damaged; resuming from checkpoint-00000003.pt" in capsys.readouterr().err
    events = log_events(options.out, "damaged checkpoint")
    assert [(line["step"], line["file"]) for line in events] == [
        (3, "checkpoint-00000007.damaged"),
        (3, "checkpoint-00000005.damaged"),
    ]
    paths[0].write_bytes(b"")
    with pytest.raises(UserError, match="no earlier checkpoint is whole"):
        _resume(options)


def test_a_folder_belongs_to_one_process_at_a_time(tmp_path):
    folder = tmp_path / "new" / "run"
    with (
        own_folder(folder),
        pytest.raises(BusyError, match=rf"in use by process {os.getpid()} on"),
        own_folder(folder),
    ):
        pass
    with own_folder(folder):
        pass


def test_a_file_is_no_folder_of_a_run(tmp_path):
    (tmp_path / "run").touch()
    with (
        pytest.raises(UserError, match=r"run is a file; give a folder"),
        own_folder(tmp_path / "run"),
    ):
        pass


def test_what_a_killed_writer_left_is_removed_by_the_next_run(options):
    folder = options.out
    (folder / "refresh").mkdir()
    left = [folder / "checkpoint-00000009.partial", folder / "refresh" / "encoder-3.partial"]
    for path in left:
        path.write_bytes(b"half")
    _save(options)
    with own_folder(folder):
        assert not any(path.exists() for path in left)
    assert checkpoint.load(folder).step == 3


@pytest.mark.slow
def test_a_folder_that_a_machine_does_not_see_is_named_on_all_ranks(tmp_path):
    (tmp_path / "a").mkdir()
    _save(Pretrain(shards=["x"], cache="y", out=tmp_path / "a"), 7)
    program = program_file("resume_unshared")
    of_run = json.dumps(CIRCUMSTANCES)
    finish(launch(program, str(tmp_path), of_run, machines=["a", "a", "b"]))
    for rank in range(3):
        assert "checkpoint-00000007.pt did not appear on b within 1 s; --out must be" in (
            (tmp_path / f"error{rank}").read_text()
        )


def test_a_run_that_fails_before_it_begins_leaves_no_folder(config):
    wrong = dataclasses.replace(config, shards=[f"{config.out}/none.tar"], out=config.out / "new")
    with pytest.raises(FileNotFoundError, match="no such shards"):
        main(wrong)
    assert not wrong.out.exists()
    with own_folder(wrong.out):
        (wrong.out / "log.jsonl").touch()
    assert sorted(each.name for each in wrong.out.iterdir()) == ["lock", "log.jsonl"]
