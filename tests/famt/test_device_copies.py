import pytest
import torch

from famt.device_copies import Fetched, send

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_tensor_arrives_and_comes_back_as_it_was(device):
    tensor = torch.rand(5, 3)
    there = send(tensor, torch.device(device))
    assert there.device.type == device
    back = Fetched(there * 2).get()
    assert back.device.type == "cpu"
    assert torch.equal(back, tensor * 2)


@pytest.mark.gpu
def test_the_host_waits_for_no_copy():
    tensor, device = torch.rand(5, 3), torch.device("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        fetched = Fetched(send(tensor, device))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(fetched.get(), tensor)
