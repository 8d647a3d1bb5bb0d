# SPDX-License-Identifier: Apache-2.0
"""The ledger of tokens: those that each expert has processed, and those of them that are saved.

Fed with counts that all ranks sharing an expert agree on, it gives all of them the same answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_moetion.arrays import Int64s

OPEN_MAX = 31
"""Snapshots whose fate may be unknown at once; the oldest of more counts as dropped."""
AVERAGED_OVER = 10
"""Snapshots that the moving average of an expert's tokens looks back, about."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Snapshot:
    """The experts of one snapshot, by position. It is not known yet whether it is whole."""

    iteration: int
    number: int
    positions: Int64s
    totals: Int64s
    """Tokens of each of them that all ranks knew of then."""
    local: Int64s
    """Tokens of each of them that this rank had processed by then, exactly."""


class Ledger:
    """Unsaved tokens and staleness per expert of one rank, in a fixed order."""

    def __init__(self, num_experts: int) -> None:
        self._totals = np.zeros(num_experts, dtype=np.int64)
        self._recent = np.zeros(num_experts, dtype=np.int64)
        self._average = np.zeros(num_experts)
        self._snapshots = 0
        # The newest settled capture of each expert, 0 where there is none; then the snapshots that are not settled.
        self._is_captured = np.zeros(num_experts, dtype=bool)
        self._iteration = np.zeros(num_experts, dtype=np.int64)
        self._number = np.zeros(num_experts, dtype=np.int64)
        self._saved = np.zeros(num_experts, dtype=np.int64)
        self._local = np.zeros(num_experts, dtype=np.int64)
        self._open: list[_Snapshot] = []

    def seed(
        self,
        captured: Sequence[int],
        ages: Sequence[int],
        totals: Sequence[int],
        local: Sequence[int],
        recent: Sequence[int],
    ) -> None:
        """Start from a recovery: each expert's capture, by its iteration and its age in snapshots, and tokens now.

        The live state is what was captured, so nothing is unsaved; what was lost is lost. ``recent`` is what
        ``recent`` was then; the moving average begins with it.
        """
        self._snapshots = max(ages, default=0) + 1
        self._totals, self._recent = _array(totals), _array(recent)
        self._average = self._recent.astype(float)
        self._is_captured[:] = True
        self._iteration, self._number = _array(captured), self._snapshots - _array(ages)
        self._saved, self._local = self._totals.copy(), _array(local)
        self._open = []

    @property
    def history(self) -> Int64s:
        """Position, iteration and tokens here of each expert's captures, int64[n, 3]; travels with the host state.

        Sorted by position, the oldest capture of an expert first.
        """
        settled = np.flatnonzero(self._is_captured)
        positions = [settled, *(s.positions for s in self._open)]
        iterations = [self._iteration[settled], *(np.full(len(s.positions), s.iteration) for s in self._open)]
        local = [self._local[settled], *(s.local for s in self._open)]
        rows = np.stack([np.concatenate(column) for column in (positions, iterations, local)], axis=1)
        return rows[np.argsort(rows[:, 0], kind="stable")]

    def update(self, totals: Sequence[int]) -> None:
        """Tokens processed since the run began, per expert."""
        now = _array(totals)
        self._recent = now - self._totals
        self._average += (self._recent - self._average) / AVERAGED_OVER
        self._totals = now

    @property
    def totals(self) -> list[int]:
        """Tokens processed since the run began, per expert."""
        return _listed(self._totals)

    @property
    def recent(self) -> list[int]:
        """Tokens between the last two snapshots, per expert."""
        return _listed(self._recent)

    @property
    def average(self) -> list[float]:
        """Tokens between two snapshots as a moving average, per expert."""
        found: list[float] = self._average.tolist()
        return found

    @property
    def unsaved(self) -> list[int]:
        """Tokens that would be lost now, per expert."""
        saved = self._saved.copy()
        for snapshot in self._open:
            saved[snapshot.positions] = snapshot.totals
        return _listed(self._totals - saved)

    @property
    def staleness(self) -> list[int]:
        """Snapshots since the last capture, the coming one included, per expert."""
        newest = self._number.copy()
        for snapshot in self._open:
            newest[snapshot.positions] = snapshot.number
        return _listed(self._snapshots + 1 - newest)

    def captured(self, iteration: int, positions: Sequence[int], local: Sequence[int]) -> None:
        """A snapshot takes these experts; it counts until it is known to be dropped.

        ``local``: tokens that this rank has processed so far, of all experts.
        """
        self._snapshots += 1
        taken = _array(positions)
        self._open.append(
            _Snapshot(
                iteration=iteration,
                number=self._snapshots,
                positions=taken,
                totals=self._totals[taken],
                local=_array(local)[taken],
            )
        )
        if len(self._open) > OPEN_MAX:
            self.settle(self._open[0].iteration, whole=False)

    def settle(self, iteration: int, whole: bool) -> None:
        """The fate of a snapshot: whole on all ranks, or dropped on one and therefore worth nothing."""
        if not whole:
            self._open = [s for s in self._open if s.iteration != iteration]
            dropped = self._is_captured & (self._iteration == iteration)
            self._is_captured[dropped] = False
            for column in (self._iteration, self._number, self._saved, self._local):
                column[dropped] = 0
            return
        for snapshot in self._open:
            if snapshot.iteration <= iteration:
                taken = snapshot.positions
                self._is_captured[taken] = True
                self._iteration[taken], self._number[taken] = snapshot.iteration, snapshot.number
                self._saved[taken], self._local[taken] = snapshot.totals, snapshot.local
        self._open = [s for s in self._open if s.iteration > iteration]


def _listed(values: Int64s) -> list[int]:
    found: list[int] = values.tolist()
    return found


def _array(values: Sequence[int]) -> Int64s:
    return np.array(values, dtype=np.int64)


def tokens_lost_share(lost: Sequence[int], routed: Sequence[int]) -> float:
    """PLT of one rank's layers: the mean over layers of lost tokens / tokens routed (MoC-System's measure).

    ``lost`` and ``routed`` count token-expert pairs per layer; a layer that routed none lost none.
    """
    shares = [a / b for a, b in zip(lost, routed, strict=True) if b > 0]
    return sum(shares) / len(shares) if shares else 0.0
