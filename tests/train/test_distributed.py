import torch

from train.distributed import ranks


def test_one_process_is_rank_0_of_1():
    with ranks("cpu") as here:
        assert (here.rank, here.world_size, here.is_main) == (0, 1, True)
        assert here.device == torch.device("cpu")
        assert here.gather({"x": 1}) == [{"x": 1}]
