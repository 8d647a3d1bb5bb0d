# SPDX-License-Identifier: Apache-2.0
"""Carrying out a plan over real arenas and a network of queues: fetch, write back, begin the epoch."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import POOL, Network, ToyState, capture, find, make_arena, make_packer, node_folder, spec_of, together
from world import Left, World, plan_world

from megatron_moetion.errors import ChannelError, CorruptArena
from megatron_moetion.recover.opened import Opened
from megatron_moetion.recover.plan import choose_same_iteration
from megatron_moetion.recover.restore import Mover, verified
from megatron_moetion.recover.survey import survey_store
from megatron_moetion.replicate.placement import place
from megatron_moetion.store.arena import Arena
from megatron_moetion.store.manifest import Branch
from megatron_moetion.store.retention import Newest
from megatron_moetion.store.sharedfile import open_arena
from megatron_moetion.store.spec import ArenaShape
from megatron_moetion.units import UnitKind

PLACEMENT = place(["a", "b"], 1)
HOST_UNIT = 5


class TwoNodes:
    """Two ranks, each on its node, each the other's buddy; iterations 1 and 2 on owners, 1 on buddies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.states = [ToyState(seed=r) for r in range(2)]
        self.packers = [make_packer(s.inventory()) for s in self.states]
        self.specs = [spec_of(s, owner=r) for r, s in enumerate(self.states)]
        self.arenas: dict[tuple[int, int], Arena] = {}  # node, owner
        self.images: dict[int, list[bytes]] = {}
        for owner, (state, packer) in enumerate(zip(self.states, self.packers, strict=True)):
            own, held = (make_arena(folder / str(n), state, owner) for n in (owner, 1 - owner))
            self.arenas.update({(owner, owner): own, (1 - owner, owner): held})
            for iteration in (1, 2):
                state.step(iteration)
                capture(packer, own, iteration)
                if iteration == 1:
                    capture(packer, held, iteration)
                self.images.setdefault(iteration, []).append(image(state))
        for arena in self.arenas.values():
            arena.edit(lambda page: {"stable": 1})
        self.network = Network(2, timeout_s=5)

    def lose(self, node: int, empty: bool = True) -> None:
        """The node's memory goes; a replaced one has empty arenas."""
        for owner in range(2):
            self.arenas.pop((node, owner)).remove()
            if empty:
                self.arenas[node, owner] = make_arena(self.folder / str(node), self.states[owner], owner)

    def plan(self) -> World:
        left = []
        for (node, _), arena in self.arenas.items():
            arena.close()
            path = Path(arena.name)
            opened = Opened(node_folder(path.parent), lambda arena: None)
            shapes = [ArenaShape.of(spec) for spec in self.specs]
            reports = survey_store(opened, [path.name], self.specs[node].identity, shapes, POOL)
            left += [Left(node=node, report=report) for report in reports]
        self.arenas = {at: open_arena(Path(a.name)) for at, a in self.arenas.items()}
        units = [[(name, UnitKind(kind)) for name, kind, _ in s.units] for s in self.specs]
        plan = plan_world(units, [each for each in left if each.report.records], PLACEMENT, choose_same_iteration)
        assert isinstance(plan, World), plan
        return plan

    def mover(self, rank: int, plan: World) -> Mover:
        arenas = {owner: a for (node, owner), a in self.arenas.items() if node == rank}
        return plan.mover(rank, arenas, dict.fromkeys(arenas, Newest()), self.network.channel(rank))

    def carry_out(self, plan: World) -> list[int]:
        movers = [self.mover(r, plan) for r in range(2)]
        received = [0, 0]
        for phase in range(2):
            legs = [plan.legs_at(r)[phase] for r in range(2)]
            for mover, mine in zip(movers, legs, strict=True):
                mover.make_room(mine)
            moved = together(*(lambda m=m, t=t: m.move(t) for m, t in zip(movers, legs, strict=True)))  # type: ignore[misc]
            received = [a + b for a, b in zip(received, moved, strict=True)]
        return received


def image(state: ToyState) -> bytes:
    return b"".join(a.tobytes() for a in state.arrays.values()) + state.counts.tobytes()


@pytest.mark.parametrize("lost", [None, 0, 1])
def test_every_rank_comes_back_bit_for_bit(tmp_path: Path, lost: int | None) -> None:
    nodes = TwoNodes(tmp_path)
    if lost is not None:
        nodes.lose(lost)
    plan = nodes.plan()
    target = 2 if lost is None else 1
    assert plan.iteration == target
    received = nodes.carry_out(plan)
    full = sum(nbytes for _, _, nbytes in nodes.specs[0].units)
    assert received == ([full, full] if lost is None else [2 * full if n == lost else 0 for n in range(2)])
    for rank, (state, packer) in enumerate(zip(nodes.states, nodes.packers, strict=True)):
        for array in state.arrays.values():
            array[:] = -1
        own = nodes.arenas[rank, rank]
        records = verified(POOL, own, plan.orders[rank])
        for record in records:
            packer.scatter(record.unit, own.payload(record.slot))
        host = bytes(own.payload(next(r.slot for r in records if r.unit == HOST_UNIT)))
        assert image(state) == nodes.images[target][rank]
        assert host.rstrip(b"\0") == f"host state of {target}".encode()
        nodes.mover(rank, plan).begin_epoch()
    again = nodes.plan()
    assert (again.iteration, again.plan.history_epoch, again.fetches, again.copies) == (target, 1, [], [])
    for arena in nodes.arenas.values():
        assert (arena.page.epoch, arena.page.stable, arena.page.branches) == (
            1, target, (Branch(epoch=1, iteration=target),),
        )  # fmt: skip
        assert {r.iteration for r in arena.page.records} == {target}


@pytest.mark.parametrize("lost", [0, 1])
def test_a_node_lost_while_replicas_catch_up_leaves_the_stable_iteration(tmp_path: Path, lost: int) -> None:
    """T = 2 is on its owners only. Room was made on the buddies, nothing has arrived, and a node goes (G6)."""
    nodes = TwoNodes(tmp_path)
    plan = nodes.plan()
    assert (plan.iteration, plan.plan.safe) == (2, 1)
    for rank in range(2):
        nodes.mover(rank, plan).make_room(plan.legs_at(rank)[1])
    nodes.lose(lost, empty=False)
    assert nodes.plan().iteration == 1


def test_a_capture_that_arrives_damaged_is_not_listed(tmp_path: Path) -> None:
    nodes = TwoNodes(tmp_path)
    nodes.lose(1)
    plan = nodes.plan()
    largest = max(nbytes for _, _, nbytes in nodes.specs[0].units)
    nodes.network.damage = lambda source, target, size: 5 if size == largest else None
    nodes.network.timeout_s = 0.5
    with pytest.raises(ChannelError, match=r"unit .* of rank \d arrived damaged from rank 0"):
        nodes.carry_out(plan)
    for owner in range(2):
        listed = {r.unit for r in nodes.arenas[1, owner].page.records}
        assert all(nodes.specs[owner].units[u][2] != largest for u in listed)
    nodes.network = Network(2, timeout_s=5)
    assert nodes.plan().iteration == 1


def test_nothing_is_written_back_unless_everything_verifies(tmp_path: Path) -> None:
    nodes = TwoNodes(tmp_path)
    plan = nodes.plan()
    state, arena = nodes.states[0], nodes.arenas[0, 0]
    last = find(arena, HOST_UNIT, 2)
    assert last is not None
    arena.payload(last.slot)[3] ^= 1
    before = image(state)
    state.arrays["dense"][:] = 5
    wrong = image(state)
    with pytest.raises(CorruptArena, match="the capture of host changed after it was surveyed"):
        verified(POOL, arena, plan.orders[0])
    assert image(state) == wrong != before
    arena.edit(lambda page: {"records": ()})
    with pytest.raises(CorruptArena, match="has gone"):
        verified(POOL, arena, plan.orders[0])
