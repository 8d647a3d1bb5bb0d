# SPDX-License-Identifier: Apache-2.0
"""The experts of each snapshot: the same choice on all ranks that share them, however late each of them hears. Pure.

The round of a snapshot is its number. A choice depends on results of the group's rounds alone, which are the same on
all its ranks: of the rounds before its own, and of none since. What all ranks of the job have agreed on reaches the
ranks of a group at different moments, so it counts from the group's round on in which the last of them had heard it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from megatron_moetion.replicate.agreement import Agreed
from megatron_moetion.replicate.channel import Reduced
from megatron_moetion.schedule.sizes import Sizes
from megatron_moetion.select.book import ExpertBook

_ROUNDS = 128
"""Rounds whose results may be on their way, at most: the last ones, and those that follow the last result. Reducers
give up far fewer than these; in between a rank that was away for long has given rounds up, and so have all others."""


def combine_counts(mine: Sequence[int], theirs: Sequence[int]) -> Sequence[int]:
    """Two ranks' words to one: the older of the rounds that they have heard of, and the sums of their counts."""
    return [min(mine[0], theirs[0]), *(a + b for a, b in zip(mine[1:], theirs[1:], strict=True))]


class Choices:
    """A rank's part in the choices of its group, and the choices. ``interval``: iterations between snapshots.

    A snapshot whose choice is not known in time is left out by the ranks that do not know it. The choice is made later,
    in its turn, because the others' later choices depend on it.
    """

    def __init__(self, book: ExpertBook, sizes: Sizes, interval: int) -> None:
        self._book = book
        self._sizes = sizes
        self._interval = interval
        self._agreed: deque[Agreed] = deque()
        """Results of the job's rounds that do not count in the group yet."""
        self._heard = -1
        self._results: deque[Reduced] = deque()
        self._last = -1
        """The group's last round whose result has come."""
        self._snapshots: dict[int, tuple[int, Sequence[int]]] = {}
        """By round: the iteration, and this rank's counts then."""
        self._chosen: dict[int, tuple[int, ...] | None] = {}
        """Of the last round that a choice was made for."""

    def hear(self, agreed: Agreed) -> None:
        """The result of a round of all ranks."""
        self._heard = agreed.number
        self._agreed.append(agreed)

    def words(self, counts: Sequence[int]) -> list[int]:
        """What this rank has to say in its group's round of a snapshot; ``counts`` are its experts' tokens."""
        return [self._heard, *counts]

    def choose(self, number: int, iteration: int, counts: Sequence[int], results: Iterable[Reduced]) -> None:
        """Make the choices up to the one of this snapshot, as far as ``results`` allow: those of the group's rounds.

        Call it once for each snapshot. Each result is given once, in order; some may be of this round already.
        """
        self._snapshots[number] = (iteration, counts)
        self._snapshots = {
            n: s for n, s in self._snapshots.items() if n > number - _ROUNDS or self._last < n <= self._last + _ROUNDS
        }
        self._results.extend(results)
        if number == 0:
            self._choose(0)
        while self._results and self._results[0].number < number:
            result = self._results.popleft()
            self._last = result.number
            heard, *totals = result.words
            while self._agreed and self._agreed[0].number <= heard:
                self._apply(self._agreed.popleft())
            self._book.ledger.update(totals)
            self._choose(result.number + 1)

    def is_known(self, number: int) -> bool:
        """Whether the choice of this round has been made."""
        return number in self._chosen

    def chosen(self, number: int) -> tuple[int, ...] | None:
        """The experts of the snapshot of this round, by position; None where it is left out, to fit the links."""
        return self._chosen[number]

    def _apply(self, agreed: Agreed) -> None:
        self._sizes.agree(agreed.votes)
        for iteration, is_whole in sorted(agreed.recoverable.items()):
            self._book.ledger.settle(iteration, is_whole)

    def _choose(self, number: int) -> None:
        snapshot = self._snapshots.get(number)
        if snapshot is None:
            return
        iteration, counts = snapshot
        skips = self._sizes.skips(iteration // self._interval)
        chosen = None if skips else self._book.choose(iteration, counts, self._sizes.now.experts)
        self._chosen = {number: chosen}
