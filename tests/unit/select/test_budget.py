# SPDX-License-Identifier: Apache-2.0
"""How many experts a snapshot takes, and slots for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from support import ToyState

from megatron_moetion.config import MoetionConfig
from megatron_moetion.errors import ConfigError
from megatron_moetion.select.budget import (
    Limits,
    affordable_experts,
    experts_per_snapshot,
    full_copies,
    popularity_copies,
)
from megatron_moetion.select.shares import Shares
from megatron_moetion.units import Unit, UnitKind


def limits(total: int, affordable: float = math.inf, **settings: Any) -> tuple[int, int, int]:
    found: Limits = experts_per_snapshot(MoetionConfig(**settings), total, affordable)
    return found.fewest, found.usual, found.most


@pytest.mark.parametrize(
    ("total", "cap", "usual"), [(64, 8, 16), (1, 8, 1), (4, 1, 4), (0, 8, 0), (7, 8, 2), (3, 2, 3)]
)
def test_the_default_is_what_the_cap_needs_up_to_twice_that(total: int, cap: int, usual: int) -> None:
    needed = -(-total // cap)
    assert limits(total, staleness_cap=cap) == (needed, usual, max(usual, total // 2))
    assert limits(total, staleness_cap=cap, lost_token_budget=0.0) == (needed, usual, usual)


def test_the_budget_of_lost_tokens_may_ask_for_more_but_not_for_more_than_there_is_room_for() -> None:
    assert limits(64, experts_per_snapshot=8) == (8, 8, 32), "half of them"
    assert limits(64, experts_per_snapshot=40) == (40, 40, 40)
    assert limits(64, experts_per_snapshot=8, max_experts_per_snapshot=64) == (8, 8, 64)
    assert limits(64, experts_per_snapshot=8, max_experts_per_snapshot=20) == (8, 8, 20)
    assert limits(64, max_experts_per_snapshot=4) == (8, 16, 16), "what the windows may call for has room"


def test_a_number_that_cannot_keep_the_cap_is_refused() -> None:
    assert limits(16, experts_per_snapshot=2, lost_token_budget=0.0) == (2, 2, 2)
    assert limits(16, experts_per_snapshot=99) == (16, 16, 16)
    with pytest.raises(ConfigError, match=r"2 x --moetion-staleness-cap 8 is less than the 17 experts"):
        limits(17, experts_per_snapshot=2)


def test_k_from_a_budget_of_bytes() -> None:
    assert limits(16, 3.9, snapshot_bytes=1, lost_token_budget=0.0) == (3, 3, 3)
    assert limits(16, 3.9, snapshot_bytes=1) == (3, 3, 3), "a limit of bytes does not give way to that of lost tokens"
    assert limits(16, math.inf, snapshot_bytes=1) == (16, 16, 16)
    with pytest.raises(ConfigError, match=r"--moetion-snapshot-bytes 1000 \(0 experts\) x --moetion-staleness-cap 8"):
        limits(16, -2.0, snapshot_bytes=1000)


def shares(*nbytes: Sequence[int], usual: int = 1, most: int = 1) -> Shares:
    return Shares.of(np.array(nbytes, dtype=np.int64), usual, most)


def test_experts_that_fit_beside_what_every_snapshot_has() -> None:
    alone = shares([8], [8], [8], [8], [8], [8])
    assert [affordable_experts(alone, [100], n) for n in (99, 100, 107, 108, 116, 1000)] == [-1, 0, 0, 1, 2, 6]
    assert affordable_experts(alone, [100, 90], 116) == 2, "the rank with more of what every snapshot has decides"


def test_one_expert_on_each_of_two_ranks_takes_no_longer_than_one_alone() -> None:
    halves = shares([8, 0], [8, 0], [0, 8], [0, 8])
    assert [halves.busiest_bytes(k) for k in range(5)] == [0, 8, 8, 16, 16]
    assert [affordable_experts(halves, [0, 0], n) for n in (7, 8, 16)] == [0, 2, 4]
    assert shares([0], [0]).busiest_bytes(2) == 0


def test_mode_popularity_takes_two_thirds_of_the_memory_that_full_takes_for_experts() -> None:
    for total in (2, 14, 64):
        units = ToyState(num_experts=total).inventory().units
        experts = [u.name for u in units if u.expert is not None]
        most = experts_per_snapshot(MoetionConfig(), total).most
        found, full = popularity_copies(units, most), full_copies(units)
        assert sum(found[name] for name in experts) <= 2 / 3 * sum(full[name] for name in experts)


@pytest.mark.parametrize("row", [[8, 0], [8, 8]])
def test_a_rank_has_room_for_its_part_of_the_most_experts(row: Sequence[int]) -> None:
    """Four of eight experts on each of two ranks, or a shard of each expert on both."""
    table = [row, row[::-1]] * 4
    found = shares(*table, usual=2, most=4)
    own = sum(each for each, _ in table)
    assert found.most_bytes.tolist() == [own // 2] * 2
    units = [
        Unit(name=str(e), kind=UnitKind.EXPERT, layer=0, expert=e, regions=(), reserved_bytes=64)
        for e in range(own // 8)
    ]
    copies = popularity_copies(units, 4, 8 * found.most_bytes[0])
    assert sum(copies.values()) == 2 * len(units), "one of each, and two halves"


def test_a_rank_with_a_single_expert_has_room_for_it() -> None:
    assert shares([8, 0], [0, 8], usual=1, most=1).most_bytes.tolist() == [8, 8]
    assert shares([8, 0], [8, 0], [8, 0], [0, 8], usual=1, most=2).most_bytes.tolist() == [8, 8]


def test_slots_for_what_is_stable_awaiting_and_in_flight() -> None:
    units = ToyState(num_experts=6, frozen=True).inventory().units
    full = full_copies(units)
    assert {name: n for name, n in full.items() if n != 3} == {"frozen": 1}
    some = popularity_copies(units, 2)
    experts = [n for name, n in some.items() if "experts" in name]
    assert sum(experts) == 6 + 2 * 2
    assert min(experts) == 1
    assert (some["layers.0.dense"], some["host"], some["frozen"]) == (3, 3, 1)
