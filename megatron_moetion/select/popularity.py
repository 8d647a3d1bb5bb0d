# SPDX-License-Identifier: Apache-2.0
"""The book of tokens: what each expert has processed, and up to where that is saved.

Fed with counts that all ranks sharing an expert agree on, it gives all of them the same answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class _Expert:
    total: int = 0
    captures: list[tuple[int, int, int]] = field(default_factory=list)
    """(iteration, snapshot number, total then) of the captures not yet known to be dropped, oldest first."""


class Ledger:
    """Unsaved tokens and staleness per expert of one rank, in a fixed order."""

    def __init__(self, num_experts: int) -> None:
        self._experts = [_Expert() for _ in range(num_experts)]
        self._snapshots = 0

    def seed(self, captured: Sequence[int], totals: Sequence[int], saved: Sequence[int]) -> None:
        """Start from a recovery: iteration of each expert's capture, tokens now, tokens at the capture.

        Experts captured longest ago count as stalest, one snapshot for each distinct iteration.
        """
        ages = {iteration: age for age, iteration in enumerate(sorted(set(captured)))}
        self._snapshots = len(ages)
        for expert, iteration, total, then in zip(self._experts, captured, totals, saved, strict=True):
            expert.total = total
            expert.captures = [(iteration, ages[iteration] + 1, then)]

    def update(self, totals: Sequence[int]) -> None:
        """Tokens processed since the run began, per expert."""
        for expert, total in zip(self._experts, totals, strict=True):
            expert.total = total

    @property
    def unsaved(self) -> list[int]:
        """Tokens that would be lost now, per expert."""
        return [e.total - (e.captures[-1][2] if e.captures else 0) for e in self._experts]

    @property
    def staleness(self) -> list[int]:
        """Snapshots since the last capture, the coming one included, per expert."""
        return [self._snapshots + 1 - (e.captures[-1][1] if e.captures else 0) for e in self._experts]

    def captured(self, iteration: int, positions: Sequence[int]) -> None:
        """A snapshot takes these experts; it counts until it is known to be dropped."""
        self._snapshots += 1
        for position in positions:
            expert = self._experts[position]
            expert.captures.append((iteration, self._snapshots, expert.total))

    def settle(self, iteration: int, whole: bool) -> None:
        """The fate of a snapshot: whole on all ranks, or dropped on one and therefore worth nothing."""
        for expert in self._experts:
            if whole:
                older = [c for c in expert.captures if c[0] <= iteration]
                expert.captures = older[-1:] + [c for c in expert.captures if c[0] > iteration]
            else:
                expert.captures = [c for c in expert.captures if c[0] != iteration]


def tokens_lost_share(lost: Sequence[int], processed: Sequence[int]) -> float:
    """PLT of one rank's layers: the mean over layers of lost tokens / tokens processed (MoC-System's measure).

    ``lost`` and ``processed`` count token-expert pairs per layer; a layer that processed none lost none.
    """
    shares = [a / b for a, b in zip(lost, processed, strict=True) if b > 0]
    return sum(shares) / len(shares) if shares else 0.0
