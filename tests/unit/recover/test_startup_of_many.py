# SPDX-License-Identifier: Apache-2.0
"""Real starts of four ranks over real sockets and arenas: they do what the plans of all ranks, put together, say."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from fabrics import Fabrics, loopback_fabrics
from support import POOL, ToyState, capture, find, make_packer, node_folder, spec_of, together
from world import World, found_in, plan_world

from megatron_moetion.clock import SystemClock
from megatron_moetion.config import MoetionConfig
from megatron_moetion.errors import ConfigError, IdentityMismatch
from megatron_moetion.observe.journal import Phases
from megatron_moetion.recover.pinning import Pinning
from megatron_moetion.recover.plan import Choose, NoPlan, RecoveryPlan, choose_newest_experts, choose_same_iteration
from megatron_moetion.recover.startup import Fetched, Startup
from megatron_moetion.replicate.placement import Placement, place
from megatron_moetion.replicate.worker import SystemThreads
from megatron_moetion.store.arena import Arena
from megatron_moetion.store.manifest import Branch, Page
from megatron_moetion.store.retention import Newest
from megatron_moetion.store.sharedfile import create_arena
from megatron_moetion.store.spec import arena_name
from megatron_moetion.units import UnitKind

RANKS = 4
EXPERTS = 2
STABLE, LAST = 2, 5
COPIES = 8


@dataclass(frozen=True, kw_only=True)
class Rank:
    """One rank of the job that starts."""

    startup: Startup
    node: Path


class Job:
    """Ranks that were killed, and what is left of them. Two of them share a node if ``ranks_a_node`` says so."""

    def __init__(self, folder: Path, draw: random.Random, *, ranks_a_node: int, choose: Choose) -> None:
        self.folder, self.draw, self.choose = folder, draw, choose
        self.nodes = [folder / f"node{r // ranks_a_node}" for r in range(RANKS)]
        self.placement: Placement = place([node.name for node in self.nodes], 1)
        self.domains = [""] * RANKS
        self.position = [r % ranks_a_node for r in range(RANKS)]
        self.num_ranks = ranks_a_node
        self.states = [ToyState(num_experts=EXPERTS, seed=r, elements=300, frozen=True) for r in range(RANKS)]
        self.specs = [spec_of(s, r, COPIES, world_size=RANKS) for r, s in enumerate(self.states)]
        self.arenas: dict[tuple[int, int], Arena] = {}
        self.bytes: dict[tuple[int, int, int], bytes] = {}
        """Of each owner's captures, by unit and iteration."""

    def train(self, drop_rate: float) -> None:
        """Iterations of which each rank and holder may lack something; what is stable is everywhere."""
        page = Page(epoch=1, stable=STABLE, lineage=5, branches=(Branch(epoch=1, iteration=0, nonce=3),))
        for owner, spec in enumerate(self.specs):
            for node in {self.placement.node_of[r] for r in (owner, *self.placement.holders[owner])}:
                path = self.folder / f"node{node}" / arena_name(owner)
                path.parent.mkdir(exist_ok=True)
                self.arenas[owner, node] = create_arena(path, spec, page)
        for owner, state in enumerate(self.states):
            packer = make_packer(state.inventory())
            kinds = [u.kind for u in state.inventory().units]
            for iteration in range(STABLE, LAST + 1):
                state.step(iteration)
                for (whose, _), arena in self.arenas.items():
                    if whose != owner:
                        continue
                    lacks = iteration > STABLE and self.draw.random() < drop_rate
                    units = [n for n, kind in enumerate(kinds) if self._is_taken(kind, iteration, lacks)]
                    for record in capture(packer, arena, iteration, units, epoch=1):
                        payload = arena.payload(record.slot).tobytes()
                        assert self.bytes.setdefault((owner, record.unit, iteration), payload) == payload

    def _is_taken(self, kind: UnitKind, iteration: int, lacks: bool) -> bool:
        if iteration == STABLE:
            return True
        if kind is UnitKind.EXPERT and self.choose is choose_newest_experts:
            return self.draw.random() < 0.6
        return kind is not UnitKind.FROZEN and not (lacks and self.draw.random() < 0.5)

    def lose(self, *homes: tuple[int, int]) -> None:
        """These arenas, by owner and node."""
        for owner, node in homes:
            self.arenas.pop((owner, node)).close()
            (self.folder / f"node{node}" / arena_name(owner)).unlink()

    def move(self, by: int) -> None:
        """Memory stays, and ranks come back on other nodes: their arenas are under the names of others."""
        num_nodes = self.placement.num_nodes
        for node in range(num_nodes):
            (self.folder / f"node{node}").rename(self.folder / f"was{node}")
        for node in range(num_nodes):
            (self.folder / f"was{node}").rename(self.folder / f"node{(node + by) % num_nodes}")
        self.arenas = {(owner, (node + by) % num_nodes): arena for (owner, node), arena in self.arenas.items()}

    def know_domains(self, domains: Sequence[str]) -> None:
        """From the next start on nodes have failure domains, by rank."""
        self.domains = list(domains)
        self.placement = place([node.name for node in self.nodes], 1, domains)

    def expected(self) -> World | NoPlan:
        units = [[(name, UnitKind(kind)) for name, kind, _ in spec.units] for spec in self.specs]
        return plan_world(units, found_in(self.arenas), self.placement, self.choose, nonce=100)

    def ranks(self, fabrics: Fabrics, intervals: Sequence[int] = (1,) * RANKS) -> list[Rank]:
        names = [name for name, kind, _ in self.specs[0].units if kind == UnitKind.EXPERT]
        return [
            Rank(
                startup=Startup(
                    config=MoetionConfig(run_id="run", replicas=1, timeout_s=10, interval=intervals[rank]),
                    fabric=fabrics[rank],
                    node=node_folder(node, self.position[rank], self.num_ranks),
                    domain=self.domains[rank],
                    spec=self.specs[rank],
                    pool=POOL,
                    pinning=Pinning(make_packer(self.states[rank].inventory()), SystemThreads(), SystemClock()),
                    choose=self.choose,
                    shared=names if self.choose is choose_newest_experts else (),
                    retention=lambda spec: Newest(),
                    phases=Phases(SystemClock()),
                    probe=lambda point, iteration: None,
                    clock=SystemClock(),
                    nonce=100 + rank,
                ),
                node=node,
            )
            for rank, node in enumerate(self.nodes)
        ]

    def recover(self) -> RecoveryPlan | NoPlan:
        """A start of all ranks up to the new epoch, which does what is expected."""
        world = self.expected()
        for arena in self.arenas.values():
            arena.close()
        with loopback_fabrics(RANKS) as fabrics:
            ranks = self.ranks(fabrics)
            outcomes = together(*(partial(self._start, rank, isinstance(world, World)) for rank in ranks))
        if isinstance(world, NoPlan):
            assert [found for found, _ in outcomes] == [world] * RANKS
            return world
        for rank, (found, fetched) in enumerate(outcomes):
            assert found == world.plan
            assert fetched is not None
            assert fetched.order.to_bytes() == world.orders[rank].to_bytes()
            assert fetched.captured_at == world.captured_at[rank]
        self.check(world)
        return world.plan

    def _start(self, rank: Rank, is_planned: bool) -> tuple[RecoveryPlan | NoPlan, Fetched | None]:
        findings, fetched = rank.startup.survey(1), None
        if is_planned:
            assert isinstance(findings.outcome, RecoveryPlan), findings.outcome
            fetched = rank.startup.fetch(findings, findings.outcome)
            rank.startup.commit(fetched)
            fetched.arenas.close()
        rank.startup.close()
        return findings.outcome, fetched

    def check(self, world: World) -> None:
        """Each rank's arena and its replica list what was ordered, whole and of the new epoch; nothing else is left."""
        homes = {(o, self.placement.node_of[r]) for o in range(RANKS) for r in (o, *self.placement.holders[o])}
        left = {path for folder in {*self.nodes} for path in folder.glob("*.arena")}
        assert left == {self.folder / f"node{node}" / arena_name(owner) for owner, node in homes}
        for owner, node in homes:
            arena = node_folder(self.folder / f"node{node}").open_arena(arena_name(owner))
            page = arena.page
            assert (page.epoch, page.stable, page.lineage, page.branches) == (
                2, world.iteration, 5, world.plan.branches,
            )  # fmt: skip
            assert sorted(page.records.keys) == world.orders[owner].records.keys
            for record in page.records:
                assert arena.payload(record.slot).tobytes() == self.bytes[owner, record.unit, record.iteration]
                found = find(arena, record.unit, record.iteration)
                assert found is not None
                assert found.epoch == 2
            arena.close()


RULES = [choose_same_iteration, choose_newest_experts]


@pytest.mark.parametrize("choose", RULES)
@pytest.mark.parametrize("ranks_a_node", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_left_and_wherever_it_is_ranks_do_what_the_plan_of_all_says(
    tmp_path: Path, seed: int, ranks_a_node: int, choose: Choose
) -> None:
    draw = random.Random(seed)
    job = Job(tmp_path, draw, ranks_a_node=ranks_a_node, choose=choose)
    job.train(0.4)
    job.move(draw.randrange(job.placement.num_nodes))
    lost = draw.sample(sorted(job.arenas), k=draw.randint(0, 2))
    job.lose(*lost)
    outcome = job.recover()
    gone = {o for o in range(RANKS) if all(owner != o for owner, _ in job.arenas)}
    assert isinstance(outcome, NoPlan if gone else RecoveryPlan)
    if isinstance(outcome, RecoveryPlan):
        assert outcome.iteration >= STABLE


def test_every_rank_on_another_node_with_nothing_but_its_own_arena_left(tmp_path: Path) -> None:
    job = Job(tmp_path, random.Random(0), ranks_a_node=1, choose=choose_newest_experts)
    job.train(0.0)
    job.lose(*(home for home in sorted(job.arenas) if job.placement.node_of[home[0]] != home[1]))
    job.move(2)
    outcome = job.recover()
    assert isinstance(outcome, RecoveryPlan)
    assert outcome.iteration >= STABLE


@pytest.mark.parametrize("lost", [[], [(0, 0), (1, 0)]])
def test_groups_that_change_at_a_restart_take_their_replicas_along(tmp_path: Path, lost: list[tuple[int, int]]) -> None:
    """Failure domains are known now, or a spare stands in another one; ``lost``: it has nothing."""
    job = Job(tmp_path, random.Random(0), ranks_a_node=1, choose=choose_same_iteration)
    job.train(0.0)
    before = job.placement.groups
    job.lose(*lost)
    job.know_domains(["rack1", "rack1", "rack2", "rack2"])
    assert (before, job.placement.groups) == (((0, 1), (2, 3)), ((0, 2), (1, 3)))
    outcome = job.recover()
    assert isinstance(outcome, RecoveryPlan)
    assert outcome.iteration == LAST


def test_one_rank_of_a_node_tells_its_failure_domain_to_all(tmp_path: Path) -> None:
    job = Job(tmp_path, random.Random(0), ranks_a_node=1, choose=choose_same_iteration)
    job.train(0.0)
    job.know_domains(["s1/r1", "s1/r1", "s2/r1", "s2/r1"])
    for arena in job.arenas.values():
        arena.close()

    def survey(rank: Rank) -> Placement:
        findings = rank.startup.survey(1)
        rank.startup.close()
        return findings.placement

    with loopback_fabrics(RANKS) as fabrics:
        found = together(*(partial(survey, rank) for rank in job.ranks(fabrics)))
    assert found == [job.placement] * RANKS
    assert job.placement.domains == (("s1", "r1"), ("s1", "r1"), ("s2", "r1"), ("s2", "r1"))


def test_an_arena_of_another_model_is_refused_by_all_whoever_finds_it(tmp_path: Path) -> None:
    job = Job(tmp_path, random.Random(0), ranks_a_node=1, choose=choose_same_iteration)
    job.train(0.0)
    job.lose((1, 1))
    other = ToyState(num_experts=EXPERTS, elements=600)
    create_arena(tmp_path / "node1" / arena_name(1), spec_of(other, 1, COPIES, world_size=RANKS), Page(stable=1))
    for arena in job.arenas.values():
        arena.close()

    def start(rank: Rank) -> str:
        with pytest.raises(IdentityMismatch) as refusal:
            rank.startup.survey(1)
        rank.startup.close()
        return str(refusal.value)

    with loopback_fabrics(RANKS) as fabrics:
        said = set(together(*(partial(start, rank) for rank in job.ranks(fabrics))))
    (text,) = said
    assert "node1/rank00001.arena belongs to something else (layout: the model" in text


def test_the_first_rank_that_was_started_differently_is_named_by_all(tmp_path: Path) -> None:
    job = Job(tmp_path, random.Random(0), ranks_a_node=1, choose=choose_same_iteration)
    job.train(0.0)

    def start(rank: Rank) -> str:
        with pytest.raises(ConfigError) as refusal:
            rank.startup.survey(1)
        rank.startup.close()
        return str(refusal.value)

    with loopback_fabrics(RANKS) as fabrics:
        said = set(together(*(partial(start, rank) for rank in job.ranks(fabrics, intervals=(1, 1, 3, 2)))))
    assert said == {
        "ranks 0 and 2 were started differently: interval is 1 on one and 3 on the other; give all ranks the same "
        "settings"
    }
