import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import program_file

from famt.patches import unpatchify
from famt.pipeline.errors import CacheError
from famt.pipeline.options import RandomView
from famt.pipeline.sharding.patterns import expand_shards
from famt.train.command_line import parsed, run_program
from famt.train.config import Pretrain


def _exit(main):
    with pytest.raises(SystemExit) as stopped:
        run_program(main, None)
    return stopped.value.code


def test_a_program_exits_with_its_code():
    assert _exit(lambda _: 1) == 1
    assert _exit(lambda _: None) == 0
    assert _exit(lambda _: 0.97) == 0  # an accuracy, not a code


@pytest.mark.parametrize("kind", [CacheError, FileNotFoundError])
def test_a_users_error_is_its_message_alone(kind, capsys):
    def main(_):
        raise kind("train-7.tar: gone. Remedy: look elsewhere")

    assert _exit(main) == 2
    assert capsys.readouterr().err == "error: train-7.tar: gone. Remedy: look elsewhere\n"


def test_too_little_memory_is_a_message_with_a_remedy(capsys):
    assert _exit(lambda _: torch.empty(1 << 60)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: not enough memory: lower --batch-size; ")
    assert error.count("\n") == 1


def test_a_defect_shows_where_it_is():
    def main(_):
        raise KeyError("x")

    with pytest.raises(KeyError):
        run_program(main, None)


def test_a_wrong_value_is_a_message_where_this_project_refuses_it(capsys):
    assert _exit(lambda _: expand_shards(["train-{0.tar"])) == 2
    assert capsys.readouterr().err.startswith("error: train-{0.tar: ")


@pytest.mark.parametrize(
    "defect",
    [
        lambda _: int("x"),
        lambda _: np.zeros(3).reshape(2, 2),
        lambda _: RandomView(area=(0.1, 0.2, 0.3)),  # in a file of this project, unpacking
        lambda _: unpatchify(torch.ones(1, 3, 12), 2),  # a contract of this project's own
    ],
)
def test_a_wrong_value_of_the_programs_own_shows_where_it_is(defect):
    with pytest.raises(ValueError):  # noqa: PT011
        run_program(defect, None)


def test_a_terminal_that_knows_ascii_alone_is_shown_escapes():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    command = [sys.executable, program_file("print_a_name")]
    result = subprocess.run(command, env=environment, capture_output=True)
    assert (result.returncode, result.stdout) == (0, b"\\xe4\n")


def test_a_ctrl_c_is_one_line(capsys):
    def main(_):
        raise KeyboardInterrupt

    assert _exit(main) == 130
    assert capsys.readouterr().err == "stopped by Ctrl-C\n"


@pytest.mark.parametrize(
    "program",
    [
        ["-m", "famt"],
        ["-m", "famt.train.evaluate", "knn"],
        ["-m", "famt.train.report"],
        ["-m", "famt.train.pretrain"],
    ],
)
def test_a_page_that_nobody_reads_to_its_end_is_no_error(program):
    root = Path(__file__).parents[2]
    started = subprocess.Popen(
        [sys.executable, *program, "--help"],
        cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    started.stdout.close()
    assert (started.stderr.read(), started.wait()) == ("", 141)


def test_a_broken_connection_is_no_page_that_nobody_reads(capsys):
    def main(_):
        raise BrokenPipeError(32, "Broken pipe", "store")

    assert _exit(main) == 2
    assert "Broken pipe: 'store'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("program", "name"),
    [
        (["-m", "famt.train.evaluate", "knn"], "famt evaluate knn"),
        (["-m", "famt", "evaluate", "knn"], "famt evaluate knn"),
        (["jobs/cache.py", "ls"], "python jobs/cache.py ls"),
    ],
)
def test_a_program_calls_itself_as_one_types_it(program, name):
    root = Path(__file__).parents[2]
    wrong = subprocess.run(
        [sys.executable, *program, "--nonsense"], cwd=root, capture_output=True, text=True
    )
    assert wrong.returncode == 2
    assert f"{name} --help" in " ".join(wrong.stderr.replace("│", " ").split())


def test_a_tilde_that_the_shell_left_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    words = ["--shards", "~/a~/*.tar", "~x", "--cache=~/b", "--out=~"]
    monkeypatch.setattr("sys.argv", ["famt pretrain", *words])
    options = parsed(Pretrain, None)
    assert options.shards == ["/home/me/a~/*.tar", "~x"]
    assert (options.cache, str(options.out)) == ("/home/me/b", "/home/me")
