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

from megatron_moetion.arrays import Flags, Int64s
from megatron_moetion.select.shares import Shares


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


def choose(
    order: Sequence[int],
    staleness: Sequence[int],
    num_experts: int,
    reserved: int,
    cap: int,
    shares: Shares | None = None,
) -> list[int]:
    """``num_experts`` (K) of an order: the first, without letting any pass the staleness cap, spread over ranks.

    ``reserved`` is the smallest K that a later snapshot may have; K may be larger now.

    The cap is kept by reservation: with d(e) = cap - staleness(e) + 1 snapshots left in which e must be taken
    (this one included), at most R * s experts may have d <= s, for every s, with R the reserved K. If that holds before
    the choice, R * cap >= E, and the choice takes at least ``count(d <= s) - R * (s - 1)`` of those with d <= s, it
    holds again afterwards. So a group that was captured together (the baseline, say) is spread over the cap instead
    of expiring at once. Should drops have broken it, the most overdue go first.

    ``shares``: with more than one rank, no rank sends more than ``shares.busiest_bytes`` of K while others have less to
    send. The bytes of each rank are reserved as the places are, so that what is due later does not lie on one rank, and
    an expert is passed over while a rank of its has no room left, also if fewer than K are taken then. The bound gives
    way where the cap calls for it, or R are not reached; what arenas have room for does not. O(E D) without shares,
    with D different values of staleness; O(E (D + K) N) with N ranks.
    """
    taking = _Taking(order, shares)
    left = cap + 1 - _array(staleness)[_array(order)]
    """By place in the order: snapshots left in which that expert must be taken."""
    limits, widest = taking.limits(num_experts), taking.widest(num_experts)
    soon, group = np.unique(left, return_inverse=True)
    due = np.zeros((len(soon), len(limits)), dtype=np.int64)
    np.add.at(due, group, taking.amounts)
    needed = due.cumsum(axis=0) - taking.limits(reserved) * np.maximum(soon - 1, 0)[:, None]
    """By ``soon`` and column: the least to be taken now of all that is due by then."""
    for row in np.flatnonzero((needed > 0).any(axis=1)).tolist():
        if taking.places >= num_experts:
            break
        for column in np.flatnonzero(needed[row] > taking.load).tolist():
            places = np.flatnonzero((left <= soon[row]) & (taking.amounts[:, column] > 0))
            missing = taking.take(places, limits, column, int(needed[row, column] - taking.load[column]))
            if column == _PLACES:
                taking.take(places, widest, column, missing)
    everyone = np.arange(len(order))
    taking.take(everyone, limits, _PLACES, num_experts - taking.places)
    while taking.places < reserved and (wider := taking.wider(limits, widest)) is not None:
        taking.take(everyone, wider, _PLACES, reserved - taking.places)
    return [order[place] for place in taking.chosen]


def grow(
    chosen: Sequence[int], at_risk: Sequence[int], allowance: int, most: int, shares: Shares | None = None
) -> list[int]:
    """``chosen``, and enough others to bring the tokens at risk of the rest within the allowance; at most ``most``.

    ``at_risk`` counts tokens by position. Those with most tokens come first; ties go to the lower position. Those of
    ranks whose arenas have no room left are passed over. O(E log E).
    """
    risk = _array(at_risk)
    is_other = np.ones(len(risk), dtype=bool)
    is_other[_array(chosen)] = False
    open_risk = int(risk[is_other].sum())
    if open_risk <= allowance or len(chosen) >= most:
        return list(chosen)
    others = [e for e in _sorted(-risk) if is_other[e]]
    taking = _Taking([*chosen, *others], shares)
    taking.take(np.arange(len(chosen)), taking.widest(len(chosen)), _PLACES, len(chosen))
    taking.take(np.arange(len(risk)), taking.widest(most), _PLACES, most - taking.places)
    more = [taking.order[place] for place in taking.chosen[len(chosen) :]]
    left = open_risk - np.cumsum(risk[more])
    """What is at risk with one expert more, with two, and so on."""
    return [*chosen, *more[: 1 + int(np.count_nonzero(left > allowance))]]


_PLACES = 0
"""The column of ``_Taking.amounts`` for the places in a snapshot."""


class _Taking:
    """Takes experts of an order, one after the other, while there is room for them.

    What an expert takes up has columns: one place among K, then its bytes on each rank.
    """

    def __init__(self, order: Sequence[int], shares: Shares | None) -> None:
        self.order = order
        self._shares = shares if shares is not None and shares.ranks > 1 else None
        places = np.ones((len(order), 1), dtype=np.int64)
        self.amounts: Int64s = places if self._shares is None else np.hstack([places, self._shares.nbytes[order]])
        self._is_taken = np.zeros(len(order), dtype=bool)
        self.load = np.zeros(self.amounts.shape[1], dtype=np.int64)
        """By column, what those that are taken take up."""
        self.chosen: list[int] = []
        """Places in the order."""

    @property
    def places(self) -> int:
        """How many experts are taken."""
        return len(self.chosen)

    def limits(self, num_experts: int) -> Int64s:
        """By column, for a snapshot of so many."""
        wide = self.widest(num_experts)
        if self._shares is not None:
            wide[1:] = np.minimum(wide[1:], self._shares.busiest_bytes(num_experts))
        return wide

    def widest(self, num_experts: int) -> Int64s:
        """By column, for a snapshot of so many: what arenas have room for."""
        return np.array([num_experts, *(() if self._shares is None else self._shares.most_bytes)], dtype=np.int64)

    def take(self, places: Int64s, limits: Int64s, column: int, amount: int) -> int:
        """Take those that fit, the first ones first, until they have this much in a column; returns what is missing."""
        places = places[~self._is_taken[places]]
        while amount > 0:
            places = places[self._fits(self.amounts[places], limits)]
            if not len(places):
                break
            so_far = self.amounts[places].cumsum(axis=0)
            is_needed = so_far[:, column] - self.amounts[places, column] < amount
            number = int(np.count_nonzero(self._fits(so_far, limits) & is_needed))
            self._is_taken[places[:number]] = True
            self.chosen.extend(places[:number].tolist())
            self.load = self.load + so_far[number - 1]
            amount -= int(so_far[number - 1, column])
            places = places[number:]
        return amount

    def wider(self, limits: Int64s, widest: Int64s) -> Int64s | None:
        """Limits that let one more in, as narrow as they can be; None where arenas have no room for any."""
        amounts = self.amounts[~self._is_taken]
        amounts = amounts[self._fits(amounts, widest)]
        if not len(amounts):
            return None
        needed = np.where(amounts > 0, self.load + amounts, 0)[:, 1:].max(axis=1, initial=0).min()
        found: Int64s = np.minimum(np.maximum(limits, needed), widest)
        return found

    def _fits(self, amounts: Int64s, limits: Int64s) -> Flags:
        """Of each row, whether there is room for it wherever it takes up any."""
        found: Flags = ((self.load + amounts <= limits) | (amounts == 0)).all(axis=1)
        return found


def _sorted(*keys: npt.NDArray[Any]) -> list[int]:
    """Positions by the first key, ties by the next, then by position."""
    found: list[int] = np.lexsort(keys[::-1]).tolist()
    return found


def _array(values: Sequence[int]) -> Int64s:
    return np.array(values, dtype=np.int64)
