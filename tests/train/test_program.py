import os
import subprocess
import sys

import pytest

from pipeline.manifest import CacheError
from train.program import run_program


def _exit(main):
    with pytest.raises(SystemExit) as stopped:
        run_program(main, None)
    return stopped.value.code


def test_a_program_exits_with_its_code():
    assert _exit(lambda _: 1) == 1
    assert _exit(lambda _: None) == 0
    assert _exit(lambda _: 0.97) == 0  # an accuracy, not a code


@pytest.mark.parametrize("kind", [CacheError, FileNotFoundError, ValueError])
def test_a_users_error_is_its_message_alone(kind, capsys):
    def main(_):
        raise kind("train-7.tar: gone. Remedy: look elsewhere")

    assert _exit(main) == 2
    assert capsys.readouterr().err == "error: train-7.tar: gone. Remedy: look elsewhere\n"


def test_a_defect_shows_where_it_is():
    def main(_):
        raise KeyError("x")

    with pytest.raises(KeyError):
        run_program(main, None)


def test_a_terminal_that_knows_ascii_alone_is_shown_escapes():
    program = "from train.program import run_program; run_program(print, 'ä')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True)
    assert (result.returncode, result.stdout) == (0, b"\\xe4\n")
