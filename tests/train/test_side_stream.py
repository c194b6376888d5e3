import os
import signal
import threading
from dataclasses import dataclass

import pytest
import torch

from famt.pipeline.loading.loader import CropBatch
from famt.train.side_stream import SideStream, _tensors
from famt.train.stop import Stop


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

    thread = threading.Thread(target=run, daemon=True)
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


@pytest.mark.gpu
def test_memory_of_a_batch_made_in_the_side_stream_is_kept_for_the_main_one():
    device = torch.device("cuda", 0)
    side, main = SideStream(device), torch.cuda.default_stream(device)
    side.join()
    with side:
        inner = CropBatch(torch.ones(2, 4, 4, 3, device=device), *(torch.ones(2),) * 3)
        batch = side.hand_over(Handed(torch.ones(1 << 20, device=device), inner, None))
    assert batch.inner is inner
    side.join()
    with torch.cuda.stream(main):
        torch.cuda._sleep(100_000_000)
        doubled = batch.outer * 2
    del batch
    with side:
        torch.zeros(1 << 20, device=device)  # would take the memory, were it free
    torch.cuda.synchronize()
    assert (doubled == 2).all()


@dataclass(frozen=True)
class Handed:
    outer: torch.Tensor
    inner: CropBatch
    none: None


def test_all_tensors_of_a_batch_are_found():
    inner = CropBatch(*(torch.full((1,), float(n)) for n in range(4)))
    found = [int(each) for each in _tensors(Handed(torch.tensor([9.0]), inner, None))]
    assert found == [9, 0, 1, 2, 3]
