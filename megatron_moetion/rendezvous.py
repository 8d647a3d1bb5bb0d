# SPDX-License-Identifier: Apache-2.0
"""Process groups that come up again after a restart, under every rendezvous that ``torchrun`` offers.

``torchrun`` keeps its store over restarts, and since torch 2.4 its processes share one prefix in it: keys of the dead
attempt mislead the new one (pytorch issues 135712 and 167288). Where the group is gloo's, the ranks of a restart try to
reach processes that are gone, and fail or wait.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from torch import distributed as dist

from megatron_moetion.errors import ChannelError

SHARE_SWITCH = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
HOSTED = "MOETION_STORE_IS_HOSTED"
"""In the environment of ranks whose warm parents host the store; see ``warm``."""
DEFAULT_TIMEOUT = timedelta(minutes=30)
"""Torch's own for gloo."""
CONNECT_S = 4.0
"""For the first connection to a store; another one is tried after it."""
_LOOK_AGAIN_S = 20.0
"""Torch writes two lines whenever a wait runs out."""
_RING = "moetion/ring"
_TORCHS_PREFIX = "default_pg"


def init_process_group(
    backend: str | None = None,
    init_method: str | None = None,
    timeout: timedelta | None = None,
    world_size: int = -1,
    rank: int = -1,
    store: dist.Store | None = None,
    **others: Any,
) -> None:
    """``torch.distributed.init_process_group``, whose group comes up again after a restart. Collective.

    Arguments are torch's and mean the same; ``others`` are handed on (``device_id``, for instance). ``rank`` and
    ``world_size`` are the launcher's where they are not given. The ranks that are alive first agree on a prefix in the
    launcher's store, or in ``store``, that no earlier attempt has used; ``timeout`` (30 minutes by default) bounds that
    wait too. An ``init_method`` other than ``env://`` has a store of its own, and goes to torch as it is.

    Raises ``ChannelError`` where a rank does not come in time, and what torch raises.
    """
    limits: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
    if init_method not in (None, "env://"):
        dist.init_process_group(backend, init_method, world_size=world_size, rank=rank, store=store, **limits, **others)
        return
    timeout = timeout if timeout is not None else DEFAULT_TIMEOUT
    world_size = world_size if world_size >= 0 else int(os.environ.get("WORLD_SIZE", "1"))
    rank = rank if rank >= 0 else int(os.environ.get("RANK", "0"))
    found = store if store is not None else open_store(os.environ, rank, world_size, timeout)
    fresh, _ = fresh_store(found, os.environ, rank, world_size, timeout)
    dist.init_process_group(backend, store=fresh, rank=rank, world_size=world_size, **limits, **others)


def fresh_store(
    store: dist.Store, environ: Mapping[str, str], rank: int, world_size: int, timeout: timedelta
) -> tuple[dist.Store, int]:
    """A part of the store that no earlier attempt has used, and the attempt's number: 0, then 1 after a restart.

    Collective. ``ChannelError`` where a rank does not come in time.
    """
    restarts = int(environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    token = agree_on_token(store, rank, world_size, timeout, restarts)
    return dist.PrefixStore(f"moetion/attempt/{token}", store), int(token.split("-")[0])


def replacement_warning(environ: Mapping[str, str]) -> str | None:
    """One line where ``torchrun`` may restart this job but cannot take in another node for a lost one.

    With torch 2.13 a node that joins a ``c10d`` rendezvous later waits for an address that is published only at the
    first start; after a minute it and the survivors end. With the variable set, the address is published at each start.
    Workers are not told which rendezvous it is, so the line says for which one it holds.
    """
    several_nodes = int(environ.get("GROUP_WORLD_SIZE", "1")) > 1
    if not (several_nodes and _restarts_share_a_store(environ)):
        return None
    return (
        f"with --rdzv-backend=c10d no other node can join for a lost one: {SHARE_SWITCH} is "
        f"{environ.get(SHARE_SWITCH, 'not set')}; start torchrun with {SHARE_SWITCH}=1 on every node"
    )


def restart_warning(environ: Mapping[str, str]) -> str | None:
    """One line where ``torchrun`` may restart this job and its gloo group would not come up again; asks the store.

    Only this process's default group is looked at, so a rank can say it for all.
    """
    group = dist.group.WORLD
    if group is None or not _restarts_share_a_store(environ) or "gloo" not in str(dist.get_backend(group)):
        return None
    if not _is_torchs_own(group.get_group_store()):
        return None
    return (
        "a restart by torchrun will fail or hang in init_process_group, because gloo's keys of this attempt stay in "
        "torchrun's store (pytorch #135712): call megatron_moetion.init_process_group() instead of torch's, with the "
        f"same arguments, or start torchrun with {SHARE_SWITCH}=1"
    )


def _restarts_share_a_store(environ: Mapping[str, str]) -> bool:
    """Whether ``torchrun`` may start these processes again, with the store that they use now."""
    shares_store = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return shares_store and int(environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def _is_torchs_own(store: dist.Store) -> bool:
    """Whether a group's store is what torch's ``init_process_group`` makes: one prefix for all attempts."""
    above: Any = store
    below = getattr(above, "underlying_store", None)
    while (deeper := getattr(below, "underlying_store", None)) is not None:
        above, below = below, deeper
    if below is None:
        return False
    probe = f"moetion/probe/{uuid.uuid4().hex}"
    try:
        above.set(probe, "1")
        return bool(below.check([f"{_TORCHS_PREFIX}/{probe}"]))
    except RuntimeError:  # a store that has gone: whoever needs it says so
        return False


def open_store(
    environ: Mapping[str, str], rank: int, world_size: int, timeout: timedelta, connect_s: float = CONNECT_S
) -> dist.Store:
    """The launcher's store, or one that rank 0 hosts at ``MASTER_ADDR:MASTER_PORT``; alone, a local one."""
    if "MASTER_ADDR" not in environ:
        if world_size > 1:
            raise ChannelError(f"WORLD_SIZE is {world_size}, but MASTER_ADDR is not set; start with torchrun")
        return dist.HashStore()
    is_there = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or HOSTED in environ
    if is_there or rank != 0:
        return connect_to_store(environ["MASTER_ADDR"], int(environ["MASTER_PORT"]), timeout, connect_s)
    return dist.TCPStore(
        environ["MASTER_ADDR"],
        int(environ["MASTER_PORT"]),
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        multi_tenant=True,
    )


def connect_to_store(host: str, port: int, timeout: timedelta, connect_s: float = CONNECT_S) -> dist.Store:
    """A store that somebody else hosts, whose waits end after ``timeout``; ``RuntimeError`` where there is none.

    Torch (2.13) may wait in vain for a connection to a store that is there, about one in a hundred on a machine with
    much to do, and then for as long as it is allowed to. The next one comes at once.
    """
    deadline, limit_s = time.monotonic() + timeout.total_seconds(), connect_s
    while True:
        left_s = max(deadline - time.monotonic(), 0.1)
        try:
            limit = timedelta(seconds=min(limit_s, left_s))
            store = dist.TCPStore(host, port, timeout=limit, wait_for_workers=False)
        except dist.DistNetworkError:
            if time.monotonic() >= deadline:
                raise
            limit_s *= 2  # torch writes some lines each time, and a host may be late
        else:
            store.set_timeout(timeout)
            return store


def agree_on_token(store: dist.Store, rank: int, world_size: int, timeout: timedelta, restarts: int) -> str:
    """A string, ``ATTEMPT-UNIQUE``, that exactly the processes alive now share, whatever the store still holds.

    Each process leaves a nonce of its own, rings, and waits for the answer to this nonce. Rank 0 waits for rings and
    answers each nonce with the token until every process has taken it. An answer to a dead process's nonce is one that
    nobody waits for. Restart counts alone would not do: each launcher agent counts only the failures of its own node.
    ``ChannelError`` where a process does not come within ``timeout``.
    """
    nonce = uuid.uuid4().hex
    deadline = time.monotonic() + timeout.total_seconds()
    if rank == 0:
        attempt = max(restarts, store.add("moetion/attempts", 1) - 1)
        token = f"{attempt}-{nonce}"
        _answer_all(store, world_size, token, deadline)
        return token
    store.set(f"moetion/nonce/{rank}", nonce)
    store.set(_RING, "1")
    answer = f"moetion/answer/{nonce}"
    await_key(store, answer, deadline, f"rank {rank} found no rank 0 to start with")
    token = store.get(answer).decode()
    store.delete_key(answer)
    if store.add(f"moetion/arrived/{token}", 1) == world_size - 1:
        store.set(_RING, "1")
    return token


def _answer_all(store: dist.Store, world_size: int, token: str, deadline: float) -> None:
    answered: dict[int, str] = {}
    unseen = set(range(1, world_size))
    while store.add(f"moetion/arrived/{token}", 0) < world_size - 1:
        unseen = {peer for peer in unseen if not store.check([f"moetion/nonce/{peer}"])}
        for peer in set(range(1, world_size)) - unseen:
            nonce = store.get(f"moetion/nonce/{peer}").decode()
            if answered.get(peer) != nonce:
                store.set(f"moetion/answer/{nonce}", token)
                answered[peer] = nonce
        # A ring may be lost with whoever rang, or be heard by an earlier rank 0: it looks again by itself, too.
        until = min(deadline, time.monotonic() + _LOOK_AGAIN_S)
        if not has_come(store, _RING, until - time.monotonic()):
            complaint = f"rank 0 waits for {world_size - 1} ranks; {len(answered)} have shown up"
            if until == deadline:
                raise ChannelError(_too_late(complaint))
            continue
        store.delete_key(_RING)  # before the next look: who rings after it is heard again


def await_key(store: dist.Store, key: str, deadline: float, complaint: str) -> None:
    """Wait until the store has the key; ``ChannelError`` with the complaint after the deadline (monotonic, s)."""
    if not has_come(store, key, deadline - time.monotonic()):
        raise ChannelError(_too_late(complaint))


def _too_late(complaint: str) -> str:
    return f"{complaint} within the timeout of the process group (--distributed-timeout-minutes, or timeout=)"


def has_come(store: dist.Store, key: str, limit_s: float) -> bool:
    """Wait until the store has the key, at most so long; whether it has. It is one request, which the store answers."""
    try:
        store.wait([key], timedelta(seconds=max(limit_s, 0.001)))
    except dist.DistStoreError as error:
        if "timeout" in str(error).lower() or "timed out" in str(error).lower():
            return False
        raise
    return True
