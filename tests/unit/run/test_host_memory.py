# SPDX-License-Identifier: Apache-2.0
"""A run's arenas get the memory that the host is asked for, and the start says how."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
from pathlib import Path

import pytest
from session_job import Job, TroubledPacker
from support import ToyState, on_device

from megatron_moetion.config import MoetionConfig
from megatron_moetion.run.host import Host
from megatron_moetion.snapshot.packer import HostPool, Packer
from megatron_moetion.store.hostmemory import HostMemory, Linux
from megatron_moetion.store.numa import NumaNode
from megatron_moetion.units import Inventory


class Refusing(Linux):
    """A kernel that lets nobody choose nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.numa = self  # type: ignore[assignment]

    def prefer(self, address: int, nbytes: int, node: int) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    def nodes_of(self, addresses: list[int]) -> list[int]:
        return [1] * len(addresses)


def started(folder: Path, caplog: pytest.LogCaptureFixture, memory: HostMemory, attempt: int = 0) -> list[str]:
    """What a start logs about arenas, and with ``report`` the events."""
    asked: list[tuple[str, int]] = []

    def host_memory(pci_bus_id: str, num_threads: int) -> HostMemory:
        asked.append((pci_bus_id, num_threads))
        return memory

    caplog.clear()
    job = Job(folder, attempt=attempt, host={"host_memory": host_memory}, report=str(folder / "events"))
    with caplog.at_level(logging.INFO):
        job.start()
    job.train(1)
    job.crash()
    assert [bus for bus, _ in asked] == ["", ""], "there is no GPU here"
    assert all(1 <= n <= 16 for _, n in asked)
    return [r.getMessage().split(": ", 1)[1] for r in caplog.records if "NUMA" in r.getMessage()]


def test_the_start_says_how_the_arena_got_its_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    memory = HostMemory(num_threads=2, node=NumaNode(number=1, note="NUMA node 1"), kernel=Refusing())
    for attempt in range(2):
        refusal, line = started(tmp_path, caplog, memory, attempt)
        assert refusal == "the kernel does not let this process choose NUMA node 1: Operation not permitted"
        assert re.match(r"arena 0\.0 GiB: populated \d+\.\d s \(2 threads; huge pages: no, ", line)
        assert line.endswith("; NUMA node 1)"), "nothing is pinned for state in host memory"
    events = [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]
    memories = [e for e in events if e["event"] == "host_memory"]
    assert [(e["attempt"], e["num_threads"], e["numa"], e["pin_s"]) for e in memories] == [
        (0, 2, "NUMA node 1", None),
        (1, 2, "NUMA node 1", None),
    ]
    (began,) = [e for e in events if e["event"] == "began"]
    assert list(began["phases_s"]) == ["survey", "network", "load", "arenas", "pin", "baseline"]
    (recovered,) = [e for e in events if e["event"] == "recovered"]
    assert {"survey", "verify", "pin", "restore"} <= recovered["phases_s"].keys()


class OnDevice(ToyState):
    """State in the memory of the model of a device."""

    def inventory(self) -> Inventory:
        return on_device(super().inventory())


def test_the_start_says_how_long_the_arena_took_to_pin(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for attempt in range(2):
        job = Job(tmp_path, attempt=attempt, state=OnDevice, report=str(tmp_path / "events"))
        with caplog.at_level(logging.INFO):
            job.start()
        job.train(1)
        job.crash()
    lines = [r.getMessage() for r in caplog.records if "arena 0.0 GiB" in r.getMessage()]
    assert len(lines) == 2
    assert all(re.search(r"\), pinned \d+\.\d s$", line) for line in lines)
    events = [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]
    assert [e["pin_s"] >= 0 for e in events if e["event"] == "host_memory"] == [True, True]


class WithGpu(TroubledPacker):
    """A packer whose device has an address."""

    pci_bus_id = "0000:17:00.0"


class GpuJob(Job):
    """A job on a machine with a GPU, as far as memory is concerned."""

    def _make_packer(self, inventory: Inventory, config: MoetionConfig, pool: HostPool, rank: int) -> Packer:
        return WithGpu(inventory, config.chunk_bytes, pool, None)


def test_memory_is_asked_for_near_the_ranks_gpu(tmp_path: Path) -> None:
    asked: list[str] = []

    def host_memory(pci_bus_id: str, num_threads: int) -> HostMemory:
        asked.append(pci_bus_id)
        return HostMemory(num_threads=num_threads)

    job = GpuJob(tmp_path, host={"host_memory": host_memory})
    assert asked == ["0000:17:00.0"] * 2
    for prepared in job.prepared:
        prepared.close()


def test_a_machine_without_a_gpu_has_no_wish() -> None:
    memory = Host().host_memory("", 5)
    assert (memory.num_threads, memory.node.number, memory.node.note) == (5, None, "")
