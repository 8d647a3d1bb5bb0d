# SPDX-License-Identifier: Apache-2.0
"""The machine of a run, as arguments."""

from __future__ import annotations

import atexit
import os
import secrets
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_moetion.clock import Clock, SystemClock
from megatron_moetion.config import MoetionConfig
from megatron_moetion.observe.fault import make_probe, parse_faults
from megatron_moetion.observe.process import process_start
from megatron_moetion.persist.process import WriterProcess
from megatron_moetion.persist.saver import Writer
from megatron_moetion.replicate.link import Timing
from megatron_moetion.replicate.speed import PROBE_BYTES
from megatron_moetion.replicate.worker import SystemThreads, Threads
from megatron_moetion.snapshot.packer import HostPool, Packer, device_packer
from megatron_moetion.store.hostmemory import HostMemory
from megatron_moetion.store.node import NodeFolder, open_node
from megatron_moetion.store.numa import numa_node
from megatron_moetion.units import Inventory

Probe = Callable[[str, int], None]
"""Called with the name of each point where a fault can be injected, and the iteration (-1: none)."""


def _make_probe(config: MoetionConfig, attempt: int, rank: int) -> Probe:
    return make_probe(parse_faults(config.inject_fault), attempt, rank)


def _make_packer(inventory: Inventory, config: MoetionConfig, pool: HostPool, rank: int) -> Packer:
    device = device_packer(
        inventory, config.chunk_bytes, rank=rank, num_sms=config.pack_sms, timeout_s=config.timeout_s
    )
    return Packer(inventory, config.chunk_bytes, pool, device)


def _host_memory(pci_bus_id: str, num_threads: int) -> HostMemory:
    return HostMemory(num_threads=num_threads, node=numa_node(pci_bus_id))


def at_good_end(action: Callable[[], None]) -> None:
    """Have something done when the interpreter ends, except where an exception that nobody caught ends it."""
    atexit.register(lambda: None if getattr(sys, "last_value", None) is not None else action())


@dataclass(frozen=True, kw_only=True)
class Host:
    """The machine of a run: one real implementation of each part, which tests and simulations replace by others."""

    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    name: str = field(default_factory=socket.gethostname)
    """Of this machine."""
    clock: Clock = field(default_factory=SystemClock)
    threads: Threads = field(default_factory=SystemThreads)
    open_node: Callable[[MoetionConfig, str, Mapping[str, str], int, Clock], NodeFolder] = open_node
    """From settings, run id, environment, world size and clock: this node's shared memory."""
    make_packer: Callable[[Inventory, MoetionConfig, HostPool, int], Packer] = _make_packer
    """From the units that captures are made of, settings, the threads that pack, and this rank."""
    host_memory: Callable[[str, int], HostMemory] = _host_memory
    """From the address of this rank's GPU on the PCI bus ("" without one) and a number of threads."""
    make_probe: Callable[[MoetionConfig, int, int], Probe] = _make_probe
    """From settings, attempt and rank."""
    links: Timing | None = None
    """Bounds of the waits of replication; None: as settings say."""
    link_probe_bytes: int = PROBE_BYTES
    """Most that a rank sends at a start to see how fast its link is."""
    nonce: Callable[[], int] = lambda: secrets.randbits(32)
    process_start: Callable[[], float] = process_start
    """Unix time, seconds."""
    start_writer: Callable[[Mapping[str, Any]], Writer] = WriterProcess
    """From its settings: the process that writes this rank's part of checkpoints on disk."""
    at_exit: Callable[[Callable[[], None]], object] = at_good_end
    """Have something done when the interpreter ends in good order."""
    end: Callable[[int], object] = os._exit
    """End this process at once, with an exit code."""
