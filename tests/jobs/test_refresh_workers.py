import pytest

from famt.jobs.options import RefreshWorkers
from famt.jobs.refresh_workers import Place
from famt.pipeline.errors import UserError

CPUS, GPUS = {"CPU": 64.0}, {"CPU": 64.0, "GPU": 8.0}


@pytest.mark.parametrize(
    ("asked", "device", "cluster", "gpus"),
    [
        (None, "cuda", GPUS, 0.25),
        (None, "cuda", CPUS, 0),
        (None, "cpu", GPUS, 0),
        (None, None, GPUS, 0),  # an encoder that no run trains
        (0.5, "cpu", GPUS, 0.5),
        (0.0, "cuda", GPUS, 0),
    ],
)
def test_a_refresh_computes_on_gpus_where_its_run_does(asked, device, cluster, gpus):
    assert Place.of(RefreshWorkers(gpus_per_worker=asked), device, cluster) == Place(1, gpus)


@pytest.mark.parametrize(
    ("cpus", "gpus", "told", "cores"),
    [(112, 8, None, 4), (16, 1, None, 4), (32, 8, None, 2), (8, 8, None, 1), (112, 8, 7, 7)],
)
def test_an_actor_of_a_whole_gpu_decodes_with_up_to_four_cores_and_half_of_those_there_are(
    cpus, gpus, told, cores
):
    asked = RefreshWorkers(gpus_per_worker=1.0, cpus_per_worker=told)
    assert Place.of(asked, "cuda", {"CPU": cpus, "GPU": gpus}) == Place(cores, 1.0)


def test_there_is_room_for_as_many_actors_as_cpus_and_shares_of_gpus_are_free():
    assert Place(1, 0.0).room({"CPU": 3.5}) == 3
    assert Place(2, 0.25).room({"CPU": 64.0, "GPU": 2.0}) == 8
    assert Place(2, 0.25).room({"CPU": 3.0, "GPU": 2.0}) == 1
    assert Place(1, 0.25).room({"CPU": 3.0}) == 0


@pytest.mark.parametrize(
    ("asked", "cluster"),
    [
        ({"cpus_per_worker": 65}, GPUS),
        ({"gpus_per_worker": 9.0}, GPUS),
        ({"gpus_per_worker": 1.0}, CPUS),
    ],
)
def test_what_the_whole_cluster_has_no_room_for_is_refused(asked, cluster):
    with pytest.raises(UserError, match="too small for a worker"):
        Place.of(RefreshWorkers(**asked), "cuda", cluster)
