# SPDX-License-Identifier: Apache-2.0
"""The book of tokens: what each expert has processed, and up to where that is saved.

Fed with counts that all ranks sharing an expert agree on, it gives all of them the same answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class _Capture:
    iteration: int
    snapshot: int
    total: int
    """Tokens that all ranks knew of then."""
    local: int
    """Tokens that this rank had processed by then, exactly."""


AVERAGED_OVER = 10
"""Snapshots that the moving average of an expert's tokens looks back, about."""


@dataclass
class _Expert:
    total: int = 0
    recent: int = 0
    """Tokens between the last two snapshots."""
    average: float = 0.0
    captures: list[_Capture] = field(default_factory=list)
    """Captures not yet known to be dropped, oldest first; at most one settled one."""


class Ledger:
    """Unsaved tokens and staleness per expert of one rank, in a fixed order."""

    def __init__(self, num_experts: int) -> None:
        self._experts = [_Expert() for _ in range(num_experts)]
        self._snapshots = 0

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
        rows = zip(self._experts, captured, ages, totals, local, recent, strict=True)
        for expert, iteration, age, total, here, tokens in rows:
            expert.total = total
            expert.recent, expert.average = tokens, float(tokens)
            expert.captures = [_Capture(iteration=iteration, snapshot=self._snapshots - age, total=total, local=here)]

    @property
    def history(self) -> list[tuple[int, int, int]]:
        """Position, iteration and tokens here of each expert's captures, oldest first; travels with the host state."""
        return [(position, c.iteration, c.local) for position, e in enumerate(self._experts) for c in e.captures]

    def update(self, totals: Sequence[int]) -> None:
        """Tokens processed since the run began, per expert."""
        for expert, total in zip(self._experts, totals, strict=True):
            expert.recent = total - expert.total
            expert.average += (expert.recent - expert.average) / AVERAGED_OVER
            expert.total = total

    @property
    def totals(self) -> list[int]:
        """Tokens processed since the run began, per expert."""
        return [e.total for e in self._experts]

    @property
    def recent(self) -> list[int]:
        """Tokens between the last two snapshots, per expert."""
        return [e.recent for e in self._experts]

    @property
    def average(self) -> list[float]:
        """Tokens between two snapshots as a moving average, per expert."""
        return [e.average for e in self._experts]

    @property
    def unsaved(self) -> list[int]:
        """Tokens that would be lost now, per expert."""
        return [e.total - (e.captures[-1].total if e.captures else 0) for e in self._experts]

    @property
    def staleness(self) -> list[int]:
        """Snapshots since the last capture, the coming one included, per expert."""
        return [self._snapshots + 1 - (e.captures[-1].snapshot if e.captures else 0) for e in self._experts]

    def captured(self, iteration: int, positions: Sequence[int], local: Sequence[int]) -> None:
        """A snapshot takes these experts; it counts until it is known to be dropped.

        ``local`` is what this rank has processed so far, for all experts.
        """
        self._snapshots += 1
        for position in positions:
            expert = self._experts[position]
            expert.captures.append(
                _Capture(iteration=iteration, snapshot=self._snapshots, total=expert.total, local=local[position])
            )

    def settle(self, iteration: int, whole: bool) -> None:
        """The fate of a snapshot: whole on all ranks, or dropped on one and therefore worth nothing."""
        for expert in self._experts:
            if whole:
                older = [c for c in expert.captures if c.iteration <= iteration]
                expert.captures = older[-1:] + [c for c in expert.captures if c.iteration > iteration]
            else:
                expert.captures = [c for c in expert.captures if c.iteration != iteration]


def tokens_lost_share(lost: Sequence[int], routed: Sequence[int]) -> float:
    """PLT of one rank's layers: the mean over layers of lost tokens / tokens routed (MoC-System's measure).

    ``lost`` and ``routed`` count token-expert pairs per layer; a layer that routed none lost none.
    """
    shares = [a / b for a, b in zip(lost, routed, strict=True) if b > 0]
    return sum(shares) / len(shares) if shares else 0.0
