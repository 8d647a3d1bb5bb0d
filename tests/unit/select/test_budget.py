# SPDX-License-Identifier: Apache-2.0
"""How many experts a snapshot takes, and slots for them."""

from __future__ import annotations

import pytest
from support import ToyState

from megatron_moetion.config import MoetionConfig
from megatron_moetion.errors import ConfigError
from megatron_moetion.select.budget import copies, experts_per_snapshot


@pytest.mark.parametrize(
    ("total", "cap", "expected"), [(64, 8, 16), (1, 8, 1), (4, 1, 4), (0, 8, 0), (7, 8, 2), (3, 2, 3)]
)
def test_the_default_is_what_the_cap_needs_up_to_twice_that(total: int, cap: int, expected: int) -> None:
    assert experts_per_snapshot(MoetionConfig(staleness_cap=cap), total) == (-(-total // cap), expected)
    assert experts_per_snapshot(MoetionConfig(mode="full", staleness_cap=cap), total) == (total, total)


def test_a_number_that_cannot_keep_the_cap_is_refused() -> None:
    assert experts_per_snapshot(MoetionConfig(experts_per_snapshot=2), 16) == (2, 2)
    assert experts_per_snapshot(MoetionConfig(experts_per_snapshot=99), 16) == (16, 16)
    with pytest.raises(ConfigError, match=r"2 x --moetion-staleness-cap 8 is less than the 17 experts"):
        experts_per_snapshot(MoetionConfig(experts_per_snapshot=2), 17)


def test_slots_for_what_is_stable_awaiting_and_in_flight() -> None:
    units = ToyState(num_experts=6, frozen=True).inventory().units
    full = copies(units, "full", 6)
    assert {name: n for name, n in full.items() if n != 3} == {"frozen": 1}
    some = copies(units, "popularity", 2)
    experts = [n for name, n in some.items() if "experts" in name]
    assert sum(experts) == 6 + 2 * 2
    assert min(experts) == 1
    assert (some["layers.0.dense"], some["host"], some["frozen"]) == (3, 3, 1)
