import os
import signal
import time

import pytest
from launch import launch, program_file

PROMPTLY = 60  # seconds: two or three, and what four processes take to end on a busy machine


def _start(tmp_path, machines, deed):
    program = program_file("keep_in_touch")
    processes = launch(program, str(tmp_path), deed, machines=machines)
    while len(list(tmp_path.glob("rank*"))) < len(machines):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    time.sleep(0.3)  # into the gathers
    return processes


def _ends(processes):
    """Exit codes and what was said on stderr, of ranks that end promptly."""
    started = time.monotonic()
    try:
        said = [process.communicate(timeout=PROMPTLY)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert time.monotonic() - started < PROMPTLY
    return [process.returncode for process in processes], said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("machines", "deed", "killed"),
    [
        (["a", "a"], "nothing", 0),
        (["a", "a"], "main writes to a slow disk", 1),
        (["a", "a", "b", "b"], "nothing", 0),
        (["a", "a", "b", "b"], "main writes to a slow disk", 2),
        (["a", "a", "b", "b"], "main waits", 3),
    ],
)
def test_a_killed_rank_ends_the_others_who_name_it(tmp_path, machines, deed, killed):
    processes = _start(tmp_path, machines, deed)
    lost = processes[killed]
    lost.kill()
    codes, said = _ends(processes)
    name = f"error: rank {processes.index(lost)} (process {lost.pid} on {os.uname().nodename})"
    for process, code, text in zip(processes, codes, said, strict=True):
        if process is not lost:
            assert code == 2
            assert text.endswith(f"{name} was lost\n")
            assert "Traceback" not in text


@pytest.mark.slow
@pytest.mark.parametrize("deed", ["rank 1 errs", "rank 1 has a defect"])
def test_the_first_rank_that_fails_ends_the_others_with_its_error(tmp_path, deed):
    processes = _start(tmp_path, ["a", "a", "b"], deed)
    codes, said = _ends(processes)
    error = {"rank 1 errs": "no such thing", "rank 1 has a defect": "a defect"}[deed]
    assert codes == [2, 2 if deed == "rank 1 errs" else 1, 2]
    for rank in (0, 2):
        assert f"error: rank 1 (process {processes[1].pid} on " in said[rank]
        assert said[rank].endswith(f") failed: {error}\n")
    assert ("Traceback" in said[1]) == (deed == "rank 1 has a defect")


@pytest.mark.slow
@pytest.mark.parametrize(("deed", "asked"), [("nothing", 0), ("nothing", 3), ("main waits", 1)])
def test_a_signal_to_one_rank_is_heard_by_all(tmp_path, deed, asked):
    processes = _start(tmp_path, ["a", "a", "b", "b"], deed)
    processes[asked].send_signal(signal.SIGTERM)
    assert _ends(processes)[0] == [0, 0, 0, 0]
