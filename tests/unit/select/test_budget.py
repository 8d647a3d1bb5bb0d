# SPDX-License-Identifier: Apache-2.0
"""How many experts a snapshot takes, and slots for them."""

from __future__ import annotations

import math
from typing import Any

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


def limits(total: int, affordable: float = math.inf, **settings: Any) -> tuple[int, int, int]:
    found: Limits = experts_per_snapshot(MoetionConfig(**settings), total, affordable)
    return found.fewest, found.usual, found.most


@pytest.mark.parametrize(
    ("total", "cap", "usual"), [(64, 8, 16), (1, 8, 1), (4, 1, 4), (0, 8, 0), (7, 8, 2), (3, 2, 3)]
)
def test_the_default_is_what_the_cap_needs_up_to_twice_that(total: int, cap: int, usual: int) -> None:
    needed = -(-total // cap)
    assert limits(total, staleness_cap=cap) == (needed, usual, total)
    assert limits(total, staleness_cap=cap, lost_token_budget=0.0) == (needed, usual, usual)


def test_the_budget_of_lost_tokens_may_ask_for_more_but_not_for_more_than_there_is_room_for() -> None:
    assert limits(64, experts_per_snapshot=8) == (8, 8, 64)
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


def test_experts_that_fit_beside_what_every_snapshot_has() -> None:
    units = ToyState(num_experts=6, frozen=True).inventory().units
    experts = [u.nbytes for u in units if u.expert is not None]
    always = sum(u.nbytes for u in units if u.expert is None and u.name != "frozen")
    assert affordable_experts(units, 6, always) == 0
    assert affordable_experts(units, 6, always + 2 * experts[0]) == pytest.approx(2)
    assert affordable_experts(units, 12, always + 2 * experts[0]) == pytest.approx(4), "half of each is on another rank"
    assert affordable_experts([u for u in units if u.expert is None], 0, 1) == math.inf


def test_slots_for_what_is_stable_awaiting_and_in_flight() -> None:
    units = ToyState(num_experts=6, frozen=True).inventory().units
    full = full_copies(units)
    assert {name: n for name, n in full.items() if n != 3} == {"frozen": 1}
    some = popularity_copies(units, 2)
    experts = [n for name, n in some.items() if "experts" in name]
    assert sum(experts) == 6 + 2 * 2
    assert min(experts) == 1
    assert (some["layers.0.dense"], some["host"], some["frozen"]) == (3, 3, 1)
