# SPDX-License-Identifier: Apache-2.0
"""What ranks that share experts tell each other at the start of mode ``popularity``."""

from __future__ import annotations

from typing import Any, cast

import pytest
from fabrics import Fabrics, loopback_fabrics
from support import ToyState, identity, together

from megatron_moetion.config import MoetionConfig
from megatron_moetion.errors import ConfigError
from megatron_moetion.modes.mode import Site
from megatron_moetion.modes.popularity import PopularityBlueprint, PopularityMode
from megatron_moetion.observe.journal import Journal
from megatron_moetion.select.book import ExpertBook, Rules, mean_recent, recent_until
from megatron_moetion.store.node import NodeFolder
from megatron_moetion.units import Inventory, UnitKind

EXPERTS = 16


class Half(ToyState):
    """Of the experts, this rank holds every second one's state; it counts the tokens of all."""

    def __init__(self, rank: int) -> None:
        super().__init__(num_experts=EXPERTS)
        self.rank = rank

    def inventory(self) -> Inventory:
        units = super().inventory().units
        return Inventory(units=tuple(u for u in units if u.expert is None or u.expert % 2 == self.rank))


def site(rank: int, fabrics: Fabrics, **settings: Any) -> Site:
    return Site(
        config=MoetionConfig(mode="popularity", timeout_s=30, **settings),
        identity=identity(owner=rank, mode="popularity"),
        inventory=Half(rank).inventory(),
        node=cast(NodeFolder, None),
        local_ranks=1,
        fabric=fabrics[rank],
        expert_peers=(0, 1),
        journal=cast(Journal, None),
    )


def build(fabrics: Fabrics, **settings: Any) -> list[PopularityMode]:
    blueprints = [PopularityBlueprint(Half(rank)) for rank in range(2)]
    sites = [site(rank, fabrics, **settings) for rank in range(2)]
    facts = [b.facts(s) for b, s in zip(blueprints, sites, strict=True)]
    return together(*(lambda r=r: blueprints[r].build(sites[r], facts) for r in range(2)))  # type: ignore[misc]


def test_arenas_have_room_for_half_of_a_selection_where_two_ranks_share_it() -> None:
    with loopback_fabrics(2) as fabrics:
        for mode in build(fabrics):
            (expert_bytes,) = {u.nbytes for u in mode.inventory.units if u.kind is UnitKind.EXPERT}
            assert dict(mode.spec.slots)[expert_bytes] == 8 + 2 * 4, "eight of sixteen experts, of which each has half"
            assert "2 to 4 of 16 experts each (up to 8, as arenas have room for" in mode.describe()
            assert "MiB of them on each of 2 ranks" in mode.describe()


def test_a_budget_of_bytes_counts_what_the_busiest_rank_sends() -> None:
    with loopback_fabrics(2) as fabrics:
        always = [sum(u.nbytes for u in m.inventory.units if u.expert is None) for m in build(fabrics)]
        (expert_bytes,) = {u.nbytes for u in Half(0).inventory().units if u.expert is not None}
    with loopback_fabrics(2) as fabrics:
        modes = build(fabrics, snapshot_bytes=max(always) + 2 * expert_bytes, staleness_cap=4)
        assert [m.spec.experts for m in modes] == [4, 4], "two on each rank"
    with loopback_fabrics(2) as fabrics, pytest.raises(ConfigError, match=r"\(2 experts\)"):
        build(fabrics, snapshot_bytes=max(always) + expert_bytes, staleness_cap=4)


def test_a_rank_whose_peer_is_in_another_mode_waits_for_nothing() -> None:
    """The run is refused later, with a message that names both modes."""
    with loopback_fabrics(2) as fabrics:
        blueprint, own = PopularityBlueprint(Half(0)), site(0, fabrics)
        found = blueprint.build(own, [blueprint.facts(own), {}])
        assert "ranks" not in found.describe()


def test_after_a_recovery_ranks_know_the_same_of_their_experts_although_one_had_heard_late() -> None:
    """What a rank's host state says of the last interval is its own; choices must not depend on it."""
    names = [f"layers.0.experts.{e}" for e in range(4)]
    rules = Rules(policy="popularity-ema", reserved=1, most=4, staleness_cap=8, interval=1, lost_token_budget=0.0375)
    states = []
    for totals in ([[40, 30, 20, 10], [80, 60, 40, 21]], [[40, 30, 20, 10]]):  # the second rank has yet to hear
        book = ExpertBook(names=names, layers=["layers.0.dense"] * 4, rules=rules)
        book.choose_all(0, [0] * 4)
        for counts in totals:
            book.ledger.update(counts)
        states.append(book.state())
    assert recent_until(states[0]) != recent_until(states[1])

    def add_up(mine: list[list[int]]) -> list[int]:
        return [sum(column) for column in zip(*mine, strict=True)]

    recent = mean_recent(add_up([[*recent_until(state), 1] for state in states]))
    chosen = []
    for state in states:
        book = ExpertBook(names=names, layers=["layers.0.dense"] * 4, rules=rules)
        losses = book.losses(state, {}, 2, [40, 30, 20, 10])
        zeros = [0] * 4
        book.recover(state, losses, totals=[80, 60, 40, 21], lost=zeros, lost_before=zeros, recent=recent)
        chosen.append([book.choose(3 + n, [40, 30, 20, 10], 1) for n in range(6)])
        assert book.ledger.average == [float(max(r, -(-t // 2))) for r, t in zip(recent, [80, 60, 40, 21], strict=True)]
    assert chosen[0] == chosen[1]
