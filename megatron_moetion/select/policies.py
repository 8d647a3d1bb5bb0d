# SPDX-License-Identifier: Apache-2.0
"""Which experts go into a snapshot. Pure: numbers in, positions out, the same on every rank.

A *policy* orders all experts of a rank, over all its layers at once, so that a hot layer may take more places than a
cold one. ``choose`` takes the first K, after those that the staleness cap calls for; ``grow`` takes more where
the budget of lost tokens calls for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_moetion.arrays import Int64s


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
    """Most tokens since the last capture first, which makes a fault after this snapshot cost least.

    Ties go to the staler, then to the lower position.
    """
    return _sorted(-_array(seen.unsaved), -_array(seen.staleness))


def popularity_average(seen: Popularity) -> list[int]:
    """Most recent tokens first, whether saved or not."""
    return _sorted(-np.array(seen.average, dtype=np.float64), -_array(seen.staleness))


def in_turn(seen: Popularity) -> list[int]:
    """One after the other, across layers, independent of their tokens. Idea: MoC-System's sequential selection."""
    return _sorted(-_array(seen.staleness), _array(seen.turn))


POLICIES: Mapping[str, Policy] = {
    "unsaved-tokens": unsaved_tokens,
    "popularity-ema": popularity_average,
    "sequential": in_turn,
}


def choose(order: Sequence[int], staleness: Sequence[int], num_experts: int, reserved: int, cap: int) -> list[int]:
    """The first ``num_experts`` (K) of an order, without letting any expert pass the staleness cap.

    ``reserved`` is the smallest K that a later snapshot may have; K may be larger now.

    The cap is kept by reservation: with d(e) = cap - staleness(e) + 1 snapshots left in which e must be taken
    (this one included), at most R * s experts may have d <= s, for every s, with R the reserved K. If that holds before
    the choice, R * cap >= E, and the choice takes at least ``count(d <= s) - R * (s - 1)`` of those with d <= s, it
    holds again afterwards. So a group that was captured together (the baseline, say) is spread over the cap instead
    of expiring at once. Should drops have broken it, the most overdue go first. O(E D) with D different
    values of staleness.
    """
    left = cap + 1 - _array(staleness)[_array(order)]
    """By place in the order: snapshots left in which that expert must be taken."""
    is_chosen = np.zeros(len(order), dtype=bool)
    places: list[int] = []
    for soon in np.unique(left).tolist():
        is_due = left <= soon
        must = min(int(np.count_nonzero(is_due)) - reserved * max(soon - 1, 0), num_experts)
        if must > len(places):
            due = np.flatnonzero(is_due & ~is_chosen)[: must - len(places)]
            is_chosen[due] = True
            places.extend(due.tolist())
    places.extend(np.flatnonzero(~is_chosen)[: max(0, num_experts - len(places))].tolist())
    return [order[place] for place in places]


def grow(chosen: Sequence[int], at_risk: Sequence[int], allowance: int, most: int) -> list[int]:
    """``chosen``, and enough others to bring the tokens at risk of the rest within the allowance; at most ``most``.

    ``at_risk`` counts tokens by position. Those with most tokens come first; ties go to the lower position. O(E log E).
    """
    risk = _array(at_risk)
    is_other = np.ones(len(risk), dtype=bool)
    is_other[_array(chosen)] = False
    others = [e for e in _sorted(-risk) if is_other[e]]
    left = risk[is_other].sum() - np.cumsum(risk[others])
    """What is at risk with one expert more, with two, and so on."""
    needed = 0 if risk[is_other].sum() <= allowance else 1 + int(np.count_nonzero(left > allowance))
    return [*chosen, *others[: min(needed, max(0, most - len(chosen)))]]


def _sorted(*keys: npt.NDArray[Any]) -> list[int]:
    """Positions by the first key, ties by the next, then by position."""
    found: list[int] = np.lexsort(keys[::-1]).tolist()
    return found


def _array(values: Sequence[int]) -> Int64s:
    return np.array(values, dtype=np.int64)
