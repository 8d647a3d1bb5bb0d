# SPDX-License-Identifier: Apache-2.0
"""Which experts go into a snapshot. Pure: numbers in, positions out, the same on every rank.

A *policy* orders all experts of a rank, over all its layers at once, so that a hot layer may take more places than a
cold one. ``choose`` takes the first K, after those that the staleness cap calls for; ``grow`` takes more where
the budget of lost tokens calls for it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Popularity:
    """What is known of a rank's experts, by position; equal on all ranks that share them."""

    unsaved: Sequence[int]
    """Tokens since the last capture."""
    staleness: Sequence[int]
    """Snapshots since the last capture, the coming one included (1: captured by the previous snapshot)."""
    average: Sequence[float]
    """Tokens between two snapshots, as a moving average."""
    turn: Sequence[int]
    """Place of each expert in a round over all of them that goes across layers."""


Policy = Callable[[Popularity], list[int]]
"""All positions, the one whose capture is wanted most first."""


def unsaved_tokens(seen: Popularity) -> list[int]:
    """Most tokens since the last capture first: what makes a fault after this snapshot cost least.

    Ties go to the staler, then to the lower position.
    """
    return sorted(range(len(seen.unsaved)), key=lambda e: (-seen.unsaved[e], -seen.staleness[e], e))


def popularity_average(seen: Popularity) -> list[int]:
    """Most tokens of late first, whether saved or not."""
    return sorted(range(len(seen.average)), key=lambda e: (-seen.average[e], -seen.staleness[e], e))


def in_turn(seen: Popularity) -> list[int]:
    """One after the other, across layers, whatever they process. Idea: MoC-System's sequential selection."""
    return sorted(range(len(seen.turn)), key=lambda e: (-seen.staleness[e], seen.turn[e]))


POLICIES: Mapping[str, Policy] = {
    "unsaved-tokens": unsaved_tokens,
    "popularity-ema": popularity_average,
    "sequential": in_turn,
    "full": in_turn,  # K is all of them
}


def choose(order: Sequence[int], staleness: Sequence[int], num_experts: int, reserved: int, cap: int) -> list[int]:
    """The first ``num_experts`` (K) of an order, without letting any expert pass the staleness cap.

    ``reserved`` is the smallest K that a later snapshot may have; K may be larger now.

    The cap is kept by reservation: with d(e) = cap - staleness(e) + 1 snapshots left in which e must be taken
    (this one included), at most R * s experts may have d <= s, for every s, with R the reserved K. If that holds before
    the choice, R * cap >= E, and the choice takes at least ``count(d <= s) - R * (s - 1)`` of those with d <= s, it
    holds again afterwards. So a group that was captured together (the baseline, say) is spread over the cap instead
    of expiring at once. Should drops have broken it, the most overdue go first. O(E log E).
    """
    place = {e: i for i, e in enumerate(order)}
    by_deadline = sorted(order, key=lambda e: (-staleness[e], place[e]))
    due: list[int] = []
    """Places of experts that are due and not chosen, the first in the order on top."""
    chosen: list[int] = []
    count = 0
    while count < len(by_deadline):
        left = cap + 1 - staleness[by_deadline[count]]
        while count < len(by_deadline) and cap + 1 - staleness[by_deadline[count]] == left:
            heapq.heappush(due, place[by_deadline[count]])
            count += 1
        must = min(count - reserved * max(left - 1, 0), num_experts)
        while len(chosen) < must:
            chosen.append(order[heapq.heappop(due)])
    taken = set(chosen)
    rest = (e for e in order if e not in taken)
    while len(chosen) < min(num_experts, len(order)):
        chosen.append(next(rest))
    return chosen


def grow(chosen: Sequence[int], at_risk: Sequence[int], allowance: int, most: int) -> list[int]:
    """``chosen``, and as many more as bring what all others have at risk within the allowance; at most ``most``.

    ``at_risk`` counts tokens by position. Those with most tokens come first; ties go to the lower position. O(E log E).
    """
    taken = set(chosen)
    others = sorted((e for e in range(len(at_risk)) if e not in taken), key=lambda e: (-at_risk[e], e))
    open_tokens = sum(at_risk[e] for e in others)
    found = list(chosen)
    for e in others:
        if open_tokens <= allowance or len(found) >= most:
            break
        found.append(e)
        open_tokens -= at_risk[e]
    return found
