# SPDX-License-Identifier: Apache-2.0
"""The trainer's process group: on devices that go together, and one that comes up again after a restart."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
from torch import distributed as dist

from megatron_moetion.errors import ConfigError
from megatron_moetion.pretrain.process import Process
from megatron_moetion.rendezvous import await_key, fresh_store, open_store

MOST_NAMED = 8
"""Hosts, or stretches of ranks, that an error names before it counts."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """What one rank computes on."""

    host: str
    index: int | None
    """Of its GPU, among those that it sees; None: the CPU."""
    gpu: str = ""
    """What no two GPUs have in common."""


def connect(process: Process, timeout: timedelta, device: Device) -> int:
    """Initialise the default process group. Returns the attempt number: 0, then 1 after the first restart."""
    store = open_store(os.environ, process.rank, process.world_size, timeout)
    fresh, attempt = fresh_store(store, os.environ, process.rank, process.world_size, timeout)
    compare_devices(fresh, process.rank, process.world_size, timeout, device)
    dist.init_process_group(
        "gloo" if device.index is None else "nccl",
        store=fresh,
        rank=process.rank,
        world_size=process.world_size,
        timeout=timeout,
        device_id=None if device.index is None else torch.device("cuda", device.index),
    )
    return attempt


def compare_devices(store: dist.Store, rank: int, world_size: int, timeout: timedelta, device: Device) -> None:
    """Raise the same ``ConfigError`` on all ranks where their devices do not go together. All ranks call it.

    Backends that differ would meet in the first collective, and wait there for ``timeout``.
    """
    store.set(f"moetion/device/{rank}", json.dumps(asdict(device)))
    if rank == 0:
        notes = store.multi_get([f"moetion/device/{peer}" for peer in range(world_size)])
        store.set("moetion/devices", devices_problem([Device(**json.loads(note)) for note in notes]))
    problem = store.get("moetion/devices").decode()
    if not problem:
        return
    if store.add("moetion/devices/read", 1) == world_size:
        store.set("moetion/devices/read-by-all", "1")
    if rank == 0:  # the store may be this process's own
        unread = f"rank 0 waits for {world_size} ranks to read that {problem}"
        await_key(store, "moetion/devices/read-by-all", time.monotonic() + timeout.total_seconds(), unread)
    error = ConfigError(problem)
    error.shared = True
    raise error


def devices_problem(devices: Sequence[Device]) -> str:
    """Why ranks cannot train together on these devices, by rank; empty if they can."""
    on_cpu = [rank for rank, device in enumerate(devices) if device.index is None]
    on_gpu = [rank for rank, device in enumerate(devices) if device.index is not None]
    if on_cpu and on_gpu:
        return (
            f"some ranks would train on GPUs and some on the CPU. GPU: {_named(on_gpu, devices)}. CPU: "
            f"{_named(on_cpu, devices)}. Give all of them GPUs (--device gpu says what is missing where), or none "
            "(--device cpu)"
        )
    users: dict[str, list[int]] = {}
    for rank in on_gpu:
        users.setdefault(devices[rank].gpu, []).append(rank)
    shared = next((ranks for ranks in users.values() if len(ranks) > 1), None)
    if shared is None:
        return ""
    return (
        f"{_named(shared, devices)} see one and the same GPU, {devices[shared[0]].gpu}: start as many ranks as there "
        "are GPUs, show each rank all GPUs of its machine or one of its own in CUDA_VISIBLE_DEVICES, or let all train "
        "on the CPU with --device cpu"
    )


def _named(ranks: Sequence[int], devices: Sequence[Device]) -> str:
    """``ranks 0-7, 16-23 on node0, node2``."""
    hosts = list(dict.fromkeys(devices[rank].host for rank in ranks))
    noun = "ranks" if len(ranks) > 1 else "rank"
    return f"{noun} {_few(list(_stretches(ranks)))} on {_few(hosts)}"


def _few(names: Sequence[str]) -> str:
    rest = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _stretches(ranks: Sequence[int]) -> Iterator[str]:
    first = 0
    for end in range(1, len(ranks) + 1):
        if end == len(ranks) or ranks[end] != ranks[end - 1] + 1:
            yield f"{ranks[first]}-{ranks[end - 1]}" if end - first > 1 else f"{ranks[first]}"
            first = end
