# SPDX-License-Identifier: Apache-2.0
"""Ranks that would train on devices that do not go together learn it before they form a process group."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest
from torch import distributed as dist

from megatron_moetion.errors import ConfigError
from megatron_moetion.pretrain.rendezvous import Device, compare_devices, devices_problem
from megatron_moetion.rendezvous import agree_on_token

TIMEOUT = timedelta(seconds=20)


def gpus(ranks: int, host: str = "node0") -> list[Device]:
    return [Device(host=host, index=i, gpu=f"{host}-{i}") for i in range(ranks)]


def cpus(ranks: int, host: str) -> list[Device]:
    return [Device(host=host, index=None)] * ranks


def test_devices_of_one_kind_go_together() -> None:
    assert devices_problem(gpus(8) + gpus(8, "node1")) == ""
    assert devices_problem(cpus(8, "node0")) == ""


def test_each_rank_may_see_its_own_gpu_only() -> None:
    """As under ``srun --gpus-per-task=1``: the GPUs differ, their indices do not."""
    own = [replace(device, index=0) for device in gpus(8)]
    assert devices_problem(own) == ""


def test_a_gpu_that_ranks_share_is_named_with_them() -> None:
    shared = [Device(host="node1", index=0, gpu="GPU-7")] * 3
    problem = devices_problem(gpus(2) + shared)
    assert problem.startswith("ranks 2-4 on node1 see one and the same GPU, GPU-7: ")
    assert "--device cpu" in problem


def test_a_mixture_is_refused_by_rank_and_host() -> None:
    problem = devices_problem(gpus(2) + cpus(2, "node1") + gpus(2, "node2"))
    assert "GPU: ranks 0-1, 4-5 on node0, node2. CPU: ranks 2-3 on node1." in problem
    assert "--device gpu" in problem


def test_many_are_counted() -> None:
    problem = devices_problem([d for n in range(12) for d in (*gpus(1, f"gpu{n}"), *cpus(1, f"cpu{n}"))])
    assert (
        "ranks 0, 2, 4, 6, 8, 10, 12, 14 and 4 more on gpu0, gpu1, gpu2, gpu3, gpu4, gpu5, gpu6, gpu7 and 4 more"
        in problem
    )


def start(devices: Sequence[Device]) -> list[ConfigError | None]:
    """What each rank gets, from the launcher's store on, in the order of ``connect``."""
    host = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)

    def rank(number: int) -> ConfigError | None:
        store = dist.TCPStore("localhost", host.port, is_master=False, wait_for_workers=False)
        token = agree_on_token(store, number, len(devices), TIMEOUT, 0)
        try:
            compare_devices(dist.PrefixStore(token, store), number, len(devices), TIMEOUT, devices[number])
        except ConfigError as error:
            return error
        return None

    with ThreadPoolExecutor(len(devices)) as pool:
        return list(pool.map(rank, range(len(devices))))


def test_all_ranks_raise_one_error() -> None:
    errors = start(gpus(2) + cpus(1, "node1"))
    assert len({str(error) for error in errors}) == 1
    assert all(error is not None and error.shared for error in errors)
    assert start(gpus(3)) == [None] * 3


def test_the_rank_that_hosts_the_store_leaves_last() -> None:
    """Without a launcher's store rank 0 has it: gone before the others have read, they would find a lost peer."""
    store = dist.HashStore()
    devices = gpus(1) + cpus(1, "node1")
    left = threading.Event()

    def host() -> None:
        with pytest.raises(ConfigError):
            compare_devices(store, 0, 2, TIMEOUT, devices[0])
        left.set()

    thread = threading.Thread(target=host)
    thread.start()
    store.set("moetion/device/1", '{"host": "node1", "index": null, "gpu": ""}')
    assert store.get("moetion/devices")
    assert not left.wait(0.3)
    with pytest.raises(ConfigError):
        compare_devices(store, 1, 2, TIMEOUT, devices[1])
    thread.join()
    assert left.is_set()


def test_a_single_process_compares_with_nobody() -> None:
    compare_devices(dist.PrefixStore("0-x", dist.HashStore()), 0, 1, TIMEOUT, gpus(1)[0])
