import os
import signal
import threading

import pytest
import torch

from train.streams import SideStream, Stop


def test_a_signal_is_noted_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with Stop() as stop:
        assert not stop.asked
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_thread_that_may_not_handle_signals_runs_without():
    asked = []

    def run():
        with Stop() as stop:
            asked.append(stop.asked)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert asked == [False]


def test_on_a_cpu_the_side_stream_is_the_only_one():
    side = SideStream(torch.device("cpu"))
    with side:
        result = torch.ones(2) * 3
    side.join()
    side.weights_are_ready()
    assert result.tolist() == [3, 3]


_LONG = 2_000_000_000  # clock cycles, about a second


@pytest.mark.gpu
def test_a_batch_is_made_while_the_main_stream_computes():
    side = SideStream(torch.device("cuda"))
    side.weights_are_ready()
    torch.cuda._sleep(_LONG)
    main_is_done = torch.cuda.current_stream().record_event()
    with side:
        made = torch.ones(1000, device="cuda") * 2
        made_is_done = torch.cuda.current_stream().record_event()
    made_is_done.synchronize()
    assert not main_is_done.query()
    side.join()
    assert made.sum().item() == 2000  # which waits for the main stream


@pytest.mark.gpu
def test_a_batch_waits_for_the_weights_and_the_update_for_the_batch():
    side = SideStream(torch.device("cuda"))
    weights = torch.zeros(1, device="cuda")
    torch.cuda._sleep(_LONG)
    weights += 1
    side.weights_are_ready()
    with side:
        read = weights.clone()
        torch.cuda._sleep(_LONG)
        later = weights.clone()
    side.join()
    weights += 1
    assert (read.item(), later.item(), weights.item()) == (1, 1, 2)
