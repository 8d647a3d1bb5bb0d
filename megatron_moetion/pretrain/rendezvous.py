# SPDX-License-Identifier: Apache-2.0
"""Process groups that come up again after a restart, under every rendezvous that ``torchrun`` offers."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping
from datetime import timedelta

import torch
from torch import distributed as dist

from megatron_moetion.errors import ChannelError
from megatron_moetion.pretrain.launch import Place

POLL_INTERVAL_S = 0.02


def connect(place: Place, timeout: timedelta, backend: str) -> int:
    """Initialise the default process group. Returns the attempt number: 0, then 1 after the first restart.

    ``torchrun`` keeps its store over restarts, and keys of the dead attempt would mislead the new one
    (pytorch issues 135712 and 167288). So the processes that are alive agree on a fresh prefix first.
    """
    store = open_store(os.environ, place, timeout)
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    token = agree_on_token(store, place.rank, place.world_size, timeout, restarts)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(f"moetion/attempt/{token}", store),
        rank=place.rank,
        world_size=place.world_size,
        timeout=timeout,
        device_id=torch.device("cuda", place.local_rank) if backend == "nccl" else None,
    )
    return int(token.split("-")[0])


def open_store(environ: Mapping[str, str], place: Place, timeout: timedelta) -> dist.Store:
    """The launcher's store, or one that rank 0 hosts at ``MASTER_ADDR:MASTER_PORT``; alone, a local one."""
    if "MASTER_ADDR" not in environ:
        if place.world_size > 1:
            raise ChannelError(f"WORLD_SIZE is {place.world_size}, but MASTER_ADDR is not set; start with torchrun")
        return dist.HashStore()
    launcher_hosts_it = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return dist.TCPStore(
        environ["MASTER_ADDR"],
        int(environ["MASTER_PORT"]),
        is_master=place.rank == 0 and not launcher_hosts_it,
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
