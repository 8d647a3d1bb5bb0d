# SPDX-License-Identifier: Apache-2.0
"""The period of mode ``exact``: as asked for, as bytes or memory allow, and as it was before a restart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from support import Network, ToyFabric, identity, together

from megatron_moetion import sizing
from megatron_moetion.config import DEFAULT_PERIOD, MAX_PERIOD, MoetionConfig
from megatron_moetion.errors import ConfigError
from megatron_moetion.select.budget import longer_period, shortest_period
from megatron_moetion.select.rotation import remembered_steps
from megatron_moetion.sizing import Sizing
from megatron_moetion.snapshot.gradlog import gradient_log
from megatron_moetion.store.arena import Arena
from megatron_moetion.store.manifest import Page
from megatron_moetion.store.node import NodeFolder, period_found
from megatron_moetion.store.spec import arena_name
from megatron_moetion.units import HOST_UNIT, Inventory, Region, Role, Unit, UnitKind

STATE = (Role.MASTER, Role.EXP_AVG, Role.EXP_AVG_SQ, Role.GRAD)
Settle = Callable[..., list[Sizing]]


def state(elements: int) -> Inventory:
    """One parameter at made-up addresses, and a host state."""
    size = 4 * elements
    regions = tuple(
        Region(unit="dense", tensor="w", role=role, dtype="float32", start=0, nbytes=size, address=(1 + n) << 30)
        for n, role in enumerate(STATE)
    )
    host = Unit(name=HOST_UNIT, kind=UnitKind.HOST, regions=(), reserved_bytes=4096)
    return Inventory(units=(Unit(name="dense", kind=UnitKind.DENSE, regions=regions), host))


@pytest.fixture
def settle(tmp_path: Path) -> Settle:
    """Two ranks, one a node, settle; the second one's state is twice the first one's."""
    for rank in range(2):
        (tmp_path / f"node{rank}").mkdir()

    def settled(
        elements: Sequence[int] = (64_000, 128_000),
        modes: Sequence[str] = ("exact", "exact"),
        budgets: Sequence[int] = (0, 0),
        **settings: Any,
    ) -> list[Sizing]:
        network = Network(2, timeout_s=5)

        def one(rank: int) -> Sizing:
            return Sizing.settle(
                config=MoetionConfig(mode=modes[rank], snapshot_bytes=budgets[rank], **settings),
                fabric=ToyFabric(network, rank),
                node=NodeFolder(path=tmp_path / f"node{rank}", key=str(rank), position=0, num_ranks=1),
                identity=identity(owner=rank, mode=modes[rank]),
                inventory=state(elements[rank]),
                num_experts=0,
                bytes_a_step=100,
                environment={"LOCAL_WORLD_SIZE": "2"},
            )

        return together(*(lambda r=r: one(r) for r in range(2)))  # type: ignore[misc]

    return settled


def have_room(monkeypatch: pytest.MonkeyPatch, nbytes: float) -> None:
    monkeypatch.setattr(sizing, "free_bytes", lambda folder: nbytes)


def test_where_there_is_room_the_period_is_the_usual_one(settle: Settle) -> None:
    found = settle()
    assert [s.spec.identity.period for s in found] == [DEFAULT_PERIOD] * 2
    assert [s.note for s in found] == ["", ""]
    assert [len(s.log.groups) for s in found if s.log] == [DEFAULT_PERIOD] * 2
    assert found[0].spec.identity.layout == found[0].inventory.fingerprint


def test_the_tightest_node_says_how_short_the_period_must_be(settle: Settle, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = settle()
    # Two ranks of this machine, two arenas each; as large as the largest one's, whose replica they may have to hold.
    room = 4 * usual[1].spec.nbytes / 0.9
    monkeypatch.setattr(sizing, "free_bytes", lambda folder: room - (folder.name == "node0"))
    found = settle()
    assert [s.spec.identity.period for s in found] == [DEFAULT_PERIOD - 1] * 2
    takes = 4 * usual[1].spec.nbytes / 2**30
    assert found[0].note == found[1].note
    assert "the period is 7, not 8" in found[0].note
    assert f"period 8 takes {takes:.2f} GiB" in found[0].note
    assert found[1].spec.nbytes < usual[1].spec.nbytes
    have_room(monkeypatch, 1)
    assert [s.spec.identity.period for s in settle()] == [2, 2], "that it does not fit is said when arenas are made"
    assert [s.spec.identity.period for s in settle(period=12)] == [12, 12], "what was asked for is not changed"


def leave(node: Path, owner: int, found: Sizing, stable: int) -> None:
    Arena.create(node / arena_name(owner), found.spec, Page(stable=stable)).close()


def test_a_restart_keeps_the_period_of_the_arenas_that_are_there_whatever_asked_for_it(
    settle: Settle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = settle(period=5)[1]
    leave(tmp_path / "node1", 1, before, stable=0)
    (tmp_path / "node0" / arena_name(0)).write_bytes(b"damaged")
    have_room(monkeypatch, 1)  # the arenas themselves have taken it
    again = settle()
    assert [s.spec.identity.period for s in again] == [5, 5]
    assert [s.note for s in again] == ["", ""]
    assert again[1].spec == before.spec
    assert settle(period=5)[1].spec == before.spec
    nodes = [NodeFolder(path=tmp_path / f"node{r}", key="", position=0, num_ranks=1) for r in range(2)]
    assert [period_found(n) for n in nodes] == [0, 5]


def test_what_a_start_that_failed_has_left_says_nothing_and_counts_as_room(
    settle: Settle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usual = settle()
    leave(tmp_path / "node1", 1, settle(period=16)[1], stable=-1)
    left = (tmp_path / "node1" / arena_name(1)).stat().st_size
    whole = 4 * usual[1].spec.nbytes / 0.9 + 1
    monkeypatch.setattr(sizing, "free_bytes", lambda folder: whole - left * (folder.name == "node1"))
    assert [s.spec.identity.period for s in settle()] == [DEFAULT_PERIOD] * 2


def test_the_host_state_has_room_for_the_steps_that_its_period_may_replay(settle: Settle) -> None:
    for period in (4, 8):
        host = next(u for u in settle(period=period)[0].inventory.units if u.kind is UnitKind.HOST)
        assert host.reserved_bytes == 4096 + 100 * remembered_steps(period)
    assert remembered_steps(8) - remembered_steps(4) == 8


def test_a_budget_of_bytes_gives_the_shortest_period_that_keeps_it_on_all_ranks(settle: Settle) -> None:
    larger = gradient_log(state(128_000), 1)
    always = 4096 + 100 * remembered_steps(MAX_PERIOD)
    found = settle(budgets=[larger.log_bytes + always + larger.state_bytes // 11] * 2)
    assert [s.spec.identity.period for s in found] == [12, 12]
    with pytest.raises(ConfigError, match=rf"must be captured within {MAX_PERIOD} iterations"):
        settle(budgets=[larger.log_bytes] * 2)


def test_ranks_whose_settings_differ_get_as_far_as_being_told(settle: Settle) -> None:
    found = settle(modes=("exact", "full"))
    assert [s.spec.identity.period for s in found] == [DEFAULT_PERIOD, 0]
    found = settle(modes=("popularity", "exact"), budgets=(2_000_000, 2_000_000))
    assert [s.log is None for s in found] == [True, False]
    found = settle(budgets=(0, 2_000_000))
    assert found[0].spec.identity.period == DEFAULT_PERIOD


def test_what_would_fit_the_links_is_named_with_what_it_takes() -> None:
    log = gradient_log(state(1 << 20), 8)
    always = 4096
    assert shortest_period(log, log.log_bytes + always + log.state_bytes / 16) == 16
    assert longer_period(log, log.log_bytes + always + log.state_bytes / 16, 2) == (
        "here --moetion-period 16 would fit, and take 64.0 MiB more memory"
    )
    assert "--moetion-period 9 would fit" in longer_period(log, log.log_bytes + always + log.state_bytes / 8, 2)
    for none in (longer_period(log, log.log_bytes, 2), longer_period(gradient_log(state(1 << 20), 64), 1e12, 2)):
        assert "no --moetion-period would fit, since gradients are 4.2 MB of it" in none
