"""Processes find one another, exchange values and agree on the moment of an action."""

import os
import random
import threading
import time

import pytest

from mlx_pretrain.errors import InputError
from mlx_pretrain.parallel import cluster
from mlx_pretrain.parallel.cluster import find, find_shard
from mlx_pretrain.parallel.membership import Hub, Member, Place
from tests.e2e.hosts import free_port

LAUNCHERS = ("JAX_COORD", "JAX_NUM_P", "JAX_PROCESS", "SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "CUDA_VISIBLE")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(LAUNCHERS):
            monkeypatch.delenv(name)


def test_a_process_on_its_own_joins_nothing():
    assert find() is None
    assert (cluster.size(), cluster.process(), cluster.is_main(), cluster.shard()) == (1, 0, True, (0, 1))
    assert cluster.gather("x") == ["x"] and cluster.share(3) == 3


@pytest.mark.parametrize(
    "variables, place",
    [
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}, Place("a:1", 3, 2)),
        # Each of two GPUs of a node has its own process.
        ({"SLURM_JOB_ID": "4096", "SLURM_STEP_NODELIST": "node[007-010],b1", "SLURM_NTASKS": "10", "SLURM_PROCID": "3",
          "SLURM_LOCALID": "1", "SLURM_STEP_NUM_NODES": "5"}, Place("node007:61440", 10, 3, [1])),
        ({"SLURM_JOB_ID": "4096", "SLURM_STEP_NODELIST": "a", "SLURM_NTASKS": "1", "SLURM_PROCID": "0",
          "SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": "1"}, None),
        ({"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911", "OMPI_COMM_WORLD_SIZE": "4",
          "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
          "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, Place("10.96.0.1:62624", 4, 1, [0])),
        # One process a node has all its devices, and so has one that the launcher gave a single GPU.
        ({"SLURM_JOB_ID": "4096", "SLURM_STEP_NODELIST": "a,b", "SLURM_NTASKS": "2", "SLURM_PROCID": "1",
          "SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": "2"}, Place("a:61440", 2, 1)),
        ({"SLURM_JOB_ID": "4096", "SLURM_STEP_NODELIST": "a,b", "SLURM_NTASKS": "4", "SLURM_PROCID": "1",
          "SLURM_LOCALID": "1", "SLURM_STEP_NUM_NODES": "2", "CUDA_VISIBLE_DEVICES": "1"}, Place("a:61440", 4, 1)),
    ],
)
def test_launchers_tell(monkeypatch, variables, place):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert find() == place


def test_slices_of_tpu_hosts_on_gke_tell(monkeypatch):
    from jax._src.clusters import cloud_tpu_cluster
    from jax._src.clusters import cluster as jax_cluster

    for module in (cloud_tpu_cluster, jax_cluster):  # there is no TPU here
        monkeypatch.setattr(module, "running_in_cloud_tpu_vm", True)
    for name, value in {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "1",
                        "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080", "MEGASCALE_NUM_SLICES": "2",
                        "MEGASCALE_SLICE_ID": "1"}.items():
        monkeypatch.setenv(name, value)
    assert find() == Place("localhost:8482", 8, 5)


def test_a_platform_that_tells_half_is_named(monkeypatch):
    monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", "1531576320.0;tcp://10.96.0.1:34911")
    with pytest.raises(InputError, match=r"does not give .*OMPI_COMM_WORLD_SIZE.*--coordinator"):
        find()


@pytest.mark.parametrize(
    "told, message",
    [
        (("a:1", 2, None), "must be given together"),
        (("a", 2, 0), "must look like HOST:PORT"),
        (("a:1", 2, 2), "numbered from 0"),
    ],
)
def test_wrong_places_are_refused(told, message):
    with pytest.raises(InputError, match=message):
        find(*told)


def test_shards_come_from_the_flag_or_a_slurm_array(monkeypatch):
    assert find_shard() is None and find_shard("2/5") == (2, 5)
    for text in ("5/5", "1", "a/b", "-1/2", "1/0"):
        with pytest.raises(InputError, match="must look like I/N"):
            find_shard(text)
    for name, value in {"ID": "7", "MIN": "3", "STEP": "2", "COUNT": "4"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    assert find_shard() == (2, 4) and find_shard("0/2") == (0, 2)


def run_members(n: int, work) -> list:
    """Runs `work(member, number)` in a thread for each of `n` connected members; returns the results."""
    address, results = f"localhost:{free_port()}", [None] * n
    hub = Hub(Place(address, n, 0), 10.0)

    def member(number: int) -> None:
        joined = Member(Place(address, n, number), 10.0)
        results[number] = work(joined, number)
        joined.leave()

    threads = [threading.Thread(target=member, args=(number,), daemon=True) for number in range(n)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20
    for thread in threads:
        thread.join(deadline - time.monotonic())
    assert not any(thread.is_alive() for thread in threads), "the members wait for one another for good"
    assert hub is not None
    return results


def test_values_arrive_in_order_of_processes():
    results = run_members(3, lambda member, number: [member.gather([number, step]) for step in range(20)])
    assert results == [[[[number, step] for number in range(3)] for step in range(20)]] * 3


@pytest.mark.parametrize("seed", range(6))
def test_an_action_is_due_at_the_same_boundary_for_all(seed):
    """Members that are at different steps, and exchange values between them, agree without waiting for good."""
    requester, at = seed % 4, 5 + 7 * seed

    def work(member, number):
        chance, seen = random.Random(100 * seed + number), []
        for step in range(80):
            time.sleep(chance.random() * 2e-3)
            if step % 8 == 3:
                member.gather(step)
            if number == requester and step == at:
                member.request("SIGTERM")
            if number == (requester + 1) % 4 and step == 2:
                member.request("checkpoint")
            seen += [(step, action) for action in member.boundary()]
        return seen

    results = run_members(4, work)
    assert all(result == results[0] for result in results)
    due = {action: step for step, action in results[0]}
    assert len(results[0]) == 2 and due["SIGTERM"] >= at and due["checkpoint"] >= 2


def test_a_second_process_of_the_same_number_and_another_count_are_refused():
    address = f"localhost:{free_port()}"
    Hub(Place(address, 2, 0), 3.0)
    errors = []

    def join(place):
        try:
            Member(place, 1.0)
        except InputError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=join, args=(place,), daemon=True)
               for place in (Place(address, 2, 0), Place(address, 2, 0), Place(address, 3, 1))]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join(15)
    assert any("process 0 has joined already" in error for error in errors), errors
    assert any("process 1 was told of 3 processes, process 0 of 2" in error for error in errors), errors
    assert any("1 of 2 processes did not come within 3 s: 1" in error for error in errors), errors
