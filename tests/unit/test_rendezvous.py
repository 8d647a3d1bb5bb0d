# SPDX-License-Identifier: Apache-2.0
"""Groups that come up again after a restart; settings of torchrun with which they, or a lost node, would not."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import distributed as dist

import megatron_moetion
from megatron_moetion import rendezvous
from megatron_moetion.errors import ChannelError
from megatron_moetion.rendezvous import SHARE_SWITCH, replacement_warning, restart_warning

TWO_NODES = {
    "TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "3",
    "TORCHELASTIC_RUN_ID": "job", "RANK": "0", "WORLD_SIZE": "4",
}  # fmt: skip


@pytest.mark.parametrize(("setting", "said"), [({}, "is not set"), ({SHARE_SWITCH: "0"}, "is 0")])
def test_the_remedy_is_named_in_one_line(setting: dict[str, str], said: str) -> None:
    line = replacement_warning(TWO_NODES | setting)
    assert line is not None
    assert said in line
    assert line.startswith("with --rdzv-backend=c10d")
    assert line.endswith(f"{SHARE_SWITCH}=1 on every node")
    assert "\n" not in line


@pytest.mark.parametrize(
    "environ",
    [
        TWO_NODES | {SHARE_SWITCH: "1", "TORCHELASTIC_USE_AGENT_STORE": "False"},
        TWO_NODES | {"GROUP_WORLD_SIZE": "1"},
        TWO_NODES | {"TORCHELASTIC_MAX_RESTARTS": "0"},
        {"RANK": "0", "WORLD_SIZE": "16"},
        {},
    ],
    ids=["set", "one node", "no restarts", "not torchrun", "alone"],
)
def test_nothing_is_said_otherwise(environ: dict[str, str]) -> None:
    assert replacement_warning(environ) is None


RESTARTABLE = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "3"}


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Iterator[dist.Store]:
    """The store of a torchrun agent, which outlives attempts, and the environment of its one process."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "RANK": "0", "WORLD_SIZE": "1"}
    for name, value in (RESTARTABLE | place).items():
        monkeypatch.setenv(name, value)
    yield store
    if dist.is_initialized():
        dist.destroy_process_group()


def test_a_group_of_torchs_own_is_warned_of_and_one_of_ours_is_not(agent: dist.Store) -> None:
    dist.init_process_group("gloo")
    line = restart_warning(os.environ)
    assert line is not None
    assert "megatron_moetion.init_process_group()" in line
    assert f"{SHARE_SWITCH}=1" in line
    assert restart_warning(RESTARTABLE | {"TORCHELASTIC_MAX_RESTARTS": "0"}) is None
    assert restart_warning({"TORCHELASTIC_MAX_RESTARTS": "3"}) is None, "the store is made anew"
    dist.destroy_process_group()
    megatron_moetion.init_process_group("gloo")
    assert restart_warning(os.environ) is None
    dist.destroy_process_group()
    own = dist.PrefixStore("attempt0", dist.TCPStore("localhost", agent.port, wait_for_workers=False))
    dist.init_process_group("gloo", store=own, rank=0, world_size=1)
    assert restart_warning(os.environ) is None, "a prefix of one's own may well be another one each time"


def test_without_a_group_nothing_is_said() -> None:
    assert restart_warning(RESTARTABLE) is None


def test_each_attempt_has_a_part_of_the_store_to_itself(agent: dist.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for attempt in range(2):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        megatron_moetion.init_process_group("gloo", timeout=timedelta(seconds=20))
        found = dist.group.WORLD
        assert found is not None
        store = found.get_group_store()
        assert not store.check(["left by the attempt before"])
        store.set("left by the attempt before", "1")
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total == 1
        dist.destroy_process_group()


def test_arguments_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: given.append((args, kwargs)))
    store = dist.HashStore()
    megatron_moetion.init_process_group("gloo", "env://", timedelta(minutes=3), 1, 0, store, group_name="g")
    megatron_moetion.init_process_group("gloo", "tcp://localhost:1", world_size=4, rank=2)
    (ours, named), (passed_on, rest) = given
    assert ours == ("gloo",)
    fresh = named.pop("store")
    assert isinstance(fresh, dist.PrefixStore)
    assert named == {"rank": 0, "world_size": 1, "timeout": timedelta(minutes=3), "group_name": "g"}
    assert passed_on == ("gloo", "tcp://localhost:1")
    assert rest == {"world_size": 4, "rank": 2, "store": None}


def test_a_rank_that_does_not_come_is_named_in_time() -> None:
    with pytest.raises(rendezvous.ChannelError, match="rank 0 waits for 1 ranks; 0 have shown up"):
        megatron_moetion.init_process_group("gloo", None, timedelta(seconds=0.2), 2, 0, dist.HashStore())


class Counted:
    """A store that counts what it is asked for."""

    def __init__(self, store: dist.Store) -> None:
        self.requests = 0
        self._store = store

    def __getattr__(self, name: str) -> Any:
        self.requests += 1
        return getattr(self._store, name)


def test_ranks_that_wait_for_each_other_do_not_ask_again_and_again() -> None:
    """Among what dead processes have left: their nonces, an answer, and a ring."""
    host = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for rank in (1, 2):
        host.set(f"moetion/nonce/{rank}", "of a dead process")
    host.set("moetion/ring", "1")
    stores = [Counted(dist.TCPStore("localhost", host.port, wait_for_workers=False)) for _ in range(3)]

    def begin(rank: int) -> str:
        time.sleep((0.8, 0, 0.4)[rank])
        return rendezvous.agree_on_token(stores[rank], rank, 3, timedelta(seconds=20), 0)

    for attempt in range(2):
        with ThreadPoolExecutor(3) as pool:
            tokens = set(pool.map(begin, range(3)))
        assert len(tokens) == 1
        assert tokens.pop().startswith(f"{attempt}-")
        assert all(store.requests <= 30 * (attempt + 1) for store in stores), [store.requests for store in stores]


def test_who_waits_in_vain_says_for_whom() -> None:
    limit, store = timedelta(seconds=0.3), dist.HashStore()
    store.set("moetion/nonce/2", "x")
    with pytest.raises(ChannelError, match="rank 0 waits for 2 ranks; 1 have shown up within the timeout"):
        rendezvous.agree_on_token(store, 0, 3, limit, 0)
    with pytest.raises(ChannelError, match="rank 2 found no rank 0"):
        rendezvous.agree_on_token(dist.HashStore(), 2, 3, limit, 0)


def test_a_connection_to_a_store_that_does_not_come_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    host = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    tries: list[timedelta] = []

    def store(*args: Any, timeout: timedelta, **others: Any) -> dist.Store:
        tries.append(timeout)
        if len(tries) == 1:
            raise dist.DistNetworkError("the client socket has timed out")
        return TCPStore(*args, timeout=timeout, **others)

    TCPStore = dist.TCPStore
    monkeypatch.setattr(dist, "TCPStore", store)
    found = rendezvous.connect_to_store("localhost", host.port, timedelta(seconds=30))
    found.set("key", "value")
    assert host.get("key") == b"value"
    assert tries == [timedelta(seconds=rendezvous.CONNECT_S * times) for times in (1, 2)]
    assert found.timeout == timedelta(seconds=30)


def test_a_store_that_is_not_there_is_given_up_in_time() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(dist.DistNetworkError):
        rendezvous.connect_to_store("127.0.0.1", port, timedelta(seconds=0.5))
    assert time.monotonic() - began < 5
