# SPDX-License-Identifier: Apache-2.0
"""Process groups that come up again after a restart, under every rendezvous that ``torchrun`` offers."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
from torch import distributed as dist

from megatron_moetion.errors import ChannelError, ConfigError
from megatron_moetion.pretrain.process import Process

POLL_INTERVAL_S = 0.02
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
    """Initialise the default process group. Returns the attempt number: 0, then 1 after the first restart.

    ``torchrun`` keeps its store over restarts, and keys of the dead attempt would mislead the new one
    (pytorch issues 135712 and 167288). So the processes that are alive agree on a fresh prefix first.
    """
    fresh, attempt = fresh_store(process, timeout)
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


def fresh_store(process: Process, timeout: timedelta) -> tuple[dist.Store, int]:
    """A store for ``init_process_group`` that holds nothing of an earlier attempt, and the number of this one.

    All ranks call it. ``ChannelError`` where some do not come within ``timeout``.
    """
    store = open_store(os.environ, process, timeout)
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    token = agree_on_token(store, process.rank, process.world_size, timeout, restarts)
    return dist.PrefixStore(f"moetion/attempt/{token}", store), int(token.split("-")[0])


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
    have_read, deadline = store.add("moetion/devices/read", 1), time.monotonic() + timeout.total_seconds()
    while rank == 0 and have_read < world_size:  # the store may be this process's own
        _wait(deadline, f"rank 0 waits for {world_size} ranks to read that {problem}; {have_read} have")
        have_read = store.add("moetion/devices/read", 0)
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


def open_store(environ: Mapping[str, str], process: Process, timeout: timedelta) -> dist.Store:
    """The launcher's store, or one that rank 0 hosts at ``MASTER_ADDR:MASTER_PORT``; alone, a local one."""
    if "MASTER_ADDR" not in environ:
        if process.world_size > 1:
            raise ChannelError(f"WORLD_SIZE is {process.world_size}, but MASTER_ADDR is not set; start with torchrun")
        return dist.HashStore()
    launcher_hosts_it = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return dist.TCPStore(
        environ["MASTER_ADDR"],
        int(environ["MASTER_PORT"]),
        is_master=process.rank == 0 and not launcher_hosts_it,
        timeout=timeout,
        wait_for_workers=False,
        multi_tenant=True,
    )


def agree_on_token(store: dist.Store, rank: int, world_size: int, timeout: timedelta, restarts: int) -> str:
    """A string, ``ATTEMPT-UNIQUE``, that exactly the processes alive now share, whatever the store still holds.

    Each process leaves a nonce of its own; rank 0 answers each nonce with the token until every process
    has taken it. An answer to a dead process's nonce is ignored by its successor. Restart counts alone
    would not do: each launcher agent counts only the failures of its own node.
    """
    nonce = uuid.uuid4().hex
    deadline = time.monotonic() + timeout.total_seconds()
    if rank == 0:
        attempt = max(restarts, store.add("moetion/attempts", 1) - 1)
        token = f"{attempt}-{nonce}"
        _answer_all(store, world_size, token, deadline)
        return token
    store.set(f"moetion/nonce/{rank}", nonce)
    key = f"moetion/answer/{rank}"
    while True:
        if store.check([key]):
            answered, _, token = store.get(key).decode().partition(" ")
            if answered == nonce:
                store.add(f"moetion/arrived/{token}", 1)
                return token
        _wait(deadline, f"rank {rank} found no rank 0 to start with")


def _answer_all(store: dist.Store, world_size: int, token: str, deadline: float) -> None:
    answered: dict[int, str] = {}
    while store.add(f"moetion/arrived/{token}", 0) < world_size - 1:
        for peer in range(1, world_size):
            key = f"moetion/nonce/{peer}"
            if not store.check([key]):
                continue
            nonce = store.get(key).decode()
            if answered.get(peer) != nonce:
                store.set(f"moetion/answer/{peer}", f"{nonce} {token}")
                answered[peer] = nonce
        _wait(deadline, f"rank 0 waits for {world_size - 1} ranks; {len(answered)} have shown up")


def _wait(deadline: float, complaint: str) -> None:
    if time.monotonic() > deadline:
        raise ChannelError(f"{complaint} within --distributed-timeout-minutes")
    time.sleep(POLL_INTERVAL_S)
