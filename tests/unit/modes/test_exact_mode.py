# SPDX-License-Identifier: Apache-2.0
"""Mode ``exact``: its period as asked for, as bytes or memory allow, or as before a restart; steps that it refuses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
from support import ToyState, blueprint, identity

from megatron_moetion.clock import SystemClock
from megatron_moetion.config import DEFAULT_PERIOD, MAX_PERIOD, MoetionConfig
from megatron_moetion.errors import ConfigError
from megatron_moetion.framework import StepNote, StepReplayer
from megatron_moetion.modes.exact import ExactBlueprint
from megatron_moetion.modes.mode import Blueprint, Site, SnapshotMode, Staged
from megatron_moetion.observe.journal import Journal
from megatron_moetion.replicate.agreement import Agreed
from megatron_moetion.replicate.channel import Combine, Fabric
from megatron_moetion.replicate.pipeline import Skip
from megatron_moetion.select.budget import longer_period, shortest_period
from megatron_moetion.select.rotation import remembered_steps
from megatron_moetion.snapshot.capture import Captured, Contents
from megatron_moetion.snapshot.gradlog import gradient_log
from megatron_moetion.store.manifest import NO_SLOT, Page, Records
from megatron_moetion.store.node import ROOM_SHARE, NodeFolder
from megatron_moetion.store.sharedfile import create_arena
from megatron_moetion.store.spec import arena_name
from megatron_moetion.units import HOST_UNIT, Inventory, Region, Role, Unit, UnitKind

NO_COPIES = cast(Staged, None)
A_RECORD = Records.make(1, unit=0, iteration=1, epoch=0, slot=NO_SLOT)
STATE = (Role.MASTER, Role.EXP_AVG, Role.EXP_AVG_SQ, Role.GRAD)


def agreed(stable: int, recoverable: Mapping[int, bool]) -> Agreed:
    """The result of a round, as far as this mode looks at it."""
    return Agreed(number=0, stable=stable, recoverable=recoverable, votes=0, redundancy=1, notes={}, is_news=True)


def state(elements: int) -> Inventory:
    """One parameter at made-up addresses, and a host state."""
    size = 4 * elements
    regions = tuple(
        Region(unit="dense", tensor="w", role=role, dtype="float32", start=0, nbytes=size, address=(1 + n) << 30)
        for n, role in enumerate(STATE)
    )
    host = Unit(name=HOST_UNIT, kind=UnitKind.HOST, regions=(), reserved_bytes=4096)
    return Inventory(units=(Unit(name="dense", kind=UnitKind.DENSE, regions=regions), host))


class Steps:
    """The part of a replayer that sizes depend on."""

    bytes_a_step = 100

    def __init__(self) -> None:
        self.remembered = 0
        self.note = StepNote()
        self.told: list[bool] = []

    def remember(self, steps: int) -> None:
        self.remembered = steps

    def note_step(self, iteration: int, *, stepped: bool = True) -> StepNote:
        self.told.append(stepped)
        return self.note


class NoWords:
    """A fabric of a rank that has nothing to say."""

    def reducer(self, name: str, members: Sequence[int], combine: Combine) -> None:
        return None


@dataclass
class Memory:
    """A node's store of which only the sizes matter."""

    folder: NodeFolder
    free: float = 1e15

    def room_bytes(self) -> int:
        return int(ROOM_SHARE * (self.free + self.folder.bytes_here()))

    def mode_found(self) -> tuple[str, int]:
        return self.folder.mode_found()


class Ranks:
    """Two ranks, one a node; the second one's state is twice the first one's."""

    def __init__(self, folder: Path) -> None:
        self.nodes: list[Memory] = []
        for rank in range(2):
            (folder / f"node{rank}").mkdir()
            node = NodeFolder(path=folder / f"node{rank}", key=str(rank), position=0, num_ranks=1, clock=SystemClock())
            self.nodes.append(Memory(node))

    def have_room(self, nbytes: float) -> None:
        for node in self.nodes:
            node.free = nbytes

    def settle(
        self,
        elements: Sequence[int] = (64_000, 128_000),
        modes: Sequence[str] = ("exact", "exact"),
        budgets: Sequence[int] = (0, 0),
        **settings: Any,
    ) -> list[SnapshotMode]:
        self.steps = [Steps(), Steps()]
        blueprints: list[Blueprint] = [
            ExactBlueprint(cast(StepReplayer, self.steps[rank])) if mode == "exact" else blueprint(mode, NoTokens())
            for rank, mode in enumerate(modes)
        ]
        sites = [
            Site(
                config=MoetionConfig(mode=modes[rank], snapshot_bytes=budgets[rank], **{"replicas": 1, **settings}),
                identity=identity(owner=rank, mode=modes[rank]),
                inventory=state(elements[rank]),
                node=cast(NodeFolder, self.nodes[rank]),
                local_ranks=2,
                fabric=cast(Fabric, NoWords()),
                expert_peers=(rank,),
                journal=cast(Journal, None),
            )
            for rank in range(2)
        ]
        facts = [json.loads(json.dumps(b.facts(s))) for b, s in zip(blueprints, sites, strict=True)]
        return [b.build(s, facts) for b, s in zip(blueprints, sites, strict=True)]


class NoTokens(ToyState):
    """A rank without experts."""

    def __init__(self) -> None:
        super().__init__(num_experts=0)


@pytest.fixture
def ranks(tmp_path: Path) -> Ranks:
    return Ranks(tmp_path)


def test_where_there_is_room_the_period_is_the_usual_one(ranks: Ranks) -> None:
    found = ranks.settle()
    assert [s.spec.identity.period for s in found] == [DEFAULT_PERIOD] * 2
    assert [s.note for s in found] == [None, None]
    assert [steps.remembered for steps in ranks.steps] == [remembered_steps(DEFAULT_PERIOD)] * 2
    assert found[0].spec.identity.layout == found[0].inventory.fingerprint


def test_the_tightest_node_says_how_short_the_period_must_be(ranks: Ranks) -> None:
    usual = ranks.settle()
    # Two ranks of this machine, two arenas each; as large as the largest one's, whose replica they may have to hold.
    room = 4 * usual[1].spec.nbytes / 0.9
    ranks.nodes[0].free, ranks.nodes[1].free = room - 1, room
    found = ranks.settle()
    assert [s.spec.identity.period for s in found] == [DEFAULT_PERIOD - 1] * 2
    takes = 4 * usual[1].spec.nbytes / 2**30
    assert found[0].note == found[1].note
    assert found[0].note is not None
    assert "the period is 7, not 8" in found[0].note
    assert f"period 8 takes {takes:.2f} GiB" in found[0].note
    assert found[1].spec.nbytes < usual[1].spec.nbytes
    ranks.have_room(1)
    assert [s.spec.identity.period for s in ranks.settle()] == [2, 2], "making the arenas says that they do not fit"
    assert [s.spec.identity.period for s in ranks.settle(period=12)] == [12, 12], "what was asked for is not changed"


def leave(node: Path, owner: int, found: SnapshotMode, stable: int) -> None:
    create_arena(node / arena_name(owner), found.spec, Page(stable=stable)).close()


def test_a_restart_keeps_the_period_of_the_arenas_that_are_there_whatever_asked_for_it(
    ranks: Ranks, tmp_path: Path
) -> None:
    before = ranks.settle(period=5)[1]
    leave(tmp_path / "node1", 1, before, stable=0)
    (tmp_path / "node0" / arena_name(0)).write_bytes(b"damaged")
    ranks.have_room(1)  # the arenas themselves have taken it
    again = ranks.settle()
    assert [s.spec.identity.period for s in again] == [5, 5]
    assert [s.note for s in again] == [None, None]
    assert again[1].spec == before.spec
    assert ranks.settle(period=5)[1].spec == before.spec
    assert [node.mode_found() for node in ranks.nodes] == [("", 0), ("exact", 5)]


def test_what_a_start_that_failed_has_left_says_nothing_and_counts_as_room(ranks: Ranks, tmp_path: Path) -> None:
    usual = ranks.settle()
    leave(tmp_path / "node1", 1, ranks.settle(period=16)[1], stable=-1)
    left = (tmp_path / "node1" / arena_name(1)).stat().st_size
    whole = 4 * usual[1].spec.nbytes / 0.9 + 1
    ranks.nodes[0].free, ranks.nodes[1].free = whole, whole - left
    assert [s.spec.identity.period for s in ranks.settle()] == [DEFAULT_PERIOD] * 2


def test_the_host_state_has_room_for_the_steps_that_its_period_may_replay(ranks: Ranks) -> None:
    for period in (4, 8):
        host = next(u for u in ranks.settle(period=period)[0].inventory.units if u.kind is UnitKind.HOST)
        assert host.reserved_bytes == 4096 + 100 * remembered_steps(period)
    assert remembered_steps(8) - remembered_steps(4) == 8


def test_a_budget_of_bytes_gives_the_shortest_period_that_keeps_it_on_all_ranks(ranks: Ranks) -> None:
    larger = gradient_log(state(128_000), 1)
    always = 4096 + 100 * remembered_steps(MAX_PERIOD)
    found = ranks.settle(budgets=[larger.log_bytes + always + larger.state_bytes // 11] * 2)
    assert [s.spec.identity.period for s in found] == [12, 12]
    with pytest.raises(ConfigError, match=rf"must be captured within {MAX_PERIOD} iterations"):
        ranks.settle(budgets=[larger.log_bytes] * 2)


def test_ranks_whose_settings_differ_get_as_far_as_being_told(ranks: Ranks) -> None:
    found = ranks.settle(modes=("exact", "full"))
    assert [s.spec.identity.period for s in found] == [DEFAULT_PERIOD, 0]
    found = ranks.settle(modes=("popularity", "exact"), budgets=(2_000_000, 2_000_000))
    assert [s.name for s in found] == ["popularity", "exact"]
    found = ranks.settle(budgets=(0, 2_000_000))
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


def test_a_step_that_cannot_be_replayed_is_no_reason_to_stop(ranks: Ranks) -> None:
    mode = ranks.settle()[0]
    mode.baseline(4, NO_COPIES)
    assert mode.note_step(5, before=4) is None
    contents, remark = mode.contents(5)
    assert isinstance(contents, Contents)
    assert remark is None
    mode.packed(Captured(records=A_RECORD))
    assert mode.note_step(7, before=5) is None
    skip, remark = mode.contents(7)
    assert skip == Skip(reason="gap"), "5 may still become stable"
    assert remark is not None
    assert remark.text.startswith("all state is captured anew: after iteration 5 came 7")
    mode.packed(Captured())
    mode.settle(agreed(5, {5: True}))
    ranks.steps[0].note = StepNote(problem="two steps")
    assert mode.note_step(8, before=7) is None
    contents, remark = mode.contents(8)
    assert isinstance(contents, Contents)
    assert (len(contents.optional), contents.logs, contents.zero) == (DEFAULT_PERIOD, (), ())
    assert remark is not None
    assert remark.text == "all state is captured anew: two steps"


def test_the_replayer_hears_that_the_loop_took_no_step(ranks: Ranks) -> None:
    mode = ranks.settle()[0]
    mode.baseline(4, NO_COPIES)
    mode.note_step(5, before=4, stepped=False)
    mode.note_step(6, before=5)
    assert ranks.steps[0].told == [False, True]


def test_an_iteration_that_was_there_before_cannot_be_captured(ranks: Ranks) -> None:
    mode = ranks.settle()[0]
    for iteration, before in ((4, 4), (3, 4)):
        assert mode.note_step(iteration, before) == f"after iteration {before} came {iteration}"


# -- what a snapshot holds -----------------------------------------------------------------------------------


def test_whether_gradients_are_zeros_or_were_overwritten_is_asked_when_their_copies_are_there(ranks: Ranks) -> None:
    """Not in the training thread, which would wait for the device."""
    mode = ranks.settle()[0]
    mode.baseline(4, NO_COPIES)
    logs = mode.inventory.of_kind(UnitKind.LOG)
    check = lambda: "gradients were overwritten"
    ranks.steps[0].note = StepNote(check=check)
    assert mode.note_step(5, before=4) is None
    contents, _ = mode.contents(5)
    assert isinstance(contents, Contents)
    assert (contents.logs, contents.zero) == (logs, ())
    assert contents.problem is check
    mode.packed(Captured(records=A_RECORD))
    ranks.steps[0].note = StepNote(skipped=True)
    mode.note_step(6, before=5)
    contents, _ = mode.contents(6)
    assert isinstance(contents, Contents)
    assert (contents.logs, contents.zero) == ((), logs), "a skipped step has none"


@pytest.mark.parametrize("is_zero", [True, False])
def test_slices_whose_gradients_turned_out_to_be_zeros_are_left_out_of_a_turn(ranks: Ranks, is_zero: bool) -> None:
    mode = ranks.settle()[0]
    mode.baseline(0, NO_COPIES)
    logs = mode.inventory.of_kind(UnitKind.LOG)
    for iteration in range(1, 2 * DEFAULT_PERIOD + 2):
        mode.note_step(iteration, before=iteration - 1)
        mode.contents(iteration)
        mode.packed(Captured(records=A_RECORD, zero=frozenset(logs if is_zero else ())))
        mode.settle(agreed(iteration, {iteration: True}))
    assert (mode.scalars()["moetion/spared-bytes"] > 0) == is_zero
