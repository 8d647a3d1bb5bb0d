# SPDX-License-Identifier: Apache-2.0
"""How ranks agree on the stable iteration: bitmasks of recoverable iterations, AND-ed over all ranks.

A minimum over ranks would be wrong once snapshots can be dropped: one rank may hold {8, 10} and another
{8, 9}. Bits stand for snapshots in the order in which they were begun, which is the same on all ranks, and not for
iterations: however far apart those are, the last ``WINDOW`` snapshots can be agreed on. Bit k of a round's masks is the
k-th snapshot before the round's own.

There are two masks: the snapshots that a rank can recover, and those that it has not given up. One rank that gives a
snapshot up settles it for all of them, so that they free it, also while no newer one becomes stable.

Nothing here waits. A round's result comes when it comes, the same and in the same order on all ranks, at different
moments. So a rank that has said that it can recover an iteration must be able to, until a later round, in which it no
longer said so, has its result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_moetion.replicate.channel import Note, Reduced, Reducer

WINDOW = 31
"""Snapshots that one mask covers."""
_ROUNDS = 64
"""Rounds whose results may be on their way: the last ones, and those that follow the last result. In between a rank
that was away for long has given rounds up, and so have all others."""


@dataclass(frozen=True, kw_only=True)
class Agreed:
    """The result of one round. Equal on all ranks."""

    number: int
    """Of the round."""
    stable: int
    recoverable: Mapping[int, bool]
    """Of each iteration whose fate this round has settled: whether all ranks can recover it."""
    votes: int
    """The AND of all ranks' votes."""
    redundancy: int
    """Of the rank that has the least: node losses that its state survives."""
    notes: Mapping[str, Note]
    """Trouble that ranks have had, by kind."""
    is_news: bool
    """Whether anything has been settled, or ``stable`` has moved."""


class Agreement:
    """One rank's knowledge of the stable iteration, and its words to the others. Used by the training thread.

    ``reducer`` combines with ``combine_words`` over all ranks. ``iteration``: all ranks begin with it, as stable.
    """

    def __init__(self, reducer: Reducer, iteration: int) -> None:
        self._reducer = reducer
        self._iterations = {-1: iteration}
        """The iteration of each snapshot, by number, as far back as a result may reach."""
        self.heard = -1
        """The last round whose result has come."""
        self._open: set[int] = set()
        self._vetoed: set[int] = set()
        self.stable = iteration
        """The newest iteration that every rank can recover from its nodes, as far as is known here."""
        self.redundancy = 0
        """As of the last result; see ``Agreed``."""

    @property
    def newest(self) -> int:
        """The iteration of the last snapshot."""
        return self._iterations[self._number]

    @property
    def _number(self) -> int:
        return max(self._iterations)

    def poll(self) -> list[Agreed]:
        """All results that have arrived since the last call, in order. Does not wait."""
        return [self._learn(result) for result in self._reducer.results()]

    def wait(self, timeout_s: float) -> bool:
        """Return once the results of all rounds so far have come, or after the timeout; whether they have."""
        return self._number < 0 or self._reducer.wait(self._number, timeout_s)

    def start(
        self,
        iteration: int,
        *,
        rounds: Mapping[int, bool],
        recoverable: Iterable[int],
        vote: int,
        redundancy: int,
        notes: Mapping[str, Note] | None = None,
    ) -> int:
        """Begin to agree, at the snapshot of ``iteration``; returns the number of the round.

        ``rounds``: the iterations of recent snapshots whose fate is known here; ``recoverable``: of these, the ones
        that this rank can recover. The others are given up.
        """
        number = self._number + 1
        self._iterations[number] = iteration
        heard = self.heard
        self._iterations = {
            n: i
            for n, i in self._iterations.items()
            if n > number - _ROUNDS - WINDOW or heard - WINDOW < n <= heard + _ROUNDS
        }
        recent = self._recent(number)
        self._vetoed &= set(recent)
        able = set(recoverable) - self._vetoed
        dead = (rounds.keys() | self._vetoed) - able
        alive = set(recent) - dead
        self._open.add(iteration)
        self._reducer.contribute(number, (bits_of(able, recent), bits_of(alive, recent), vote, redundancy), notes)
        return number

    def veto(self, iterations: Iterable[int]) -> None:
        """Keep these from ever becoming stable, unless they are; no round may have begun after the newest of them."""
        self._vetoed |= {i for i in iterations if i > self.stable}

    def _recent(self, number: int) -> list[int]:
        """The iterations that the masks of a round stand for, the newest first."""
        wanted = range(number, number - WINDOW, -1)
        return [self._iterations[n] for n in wanted if n in self._iterations]

    def _learn(self, result: Reduced) -> Agreed:
        able, alive, votes, redundancy = result.words
        self.heard = result.number
        recent = self._recent(result.number)
        able &= bits_of(self._open, recent)  # what was given up stays so: its captures may be gone
        newest = newest_common(able, recent)
        stable = self.stable if newest is None else max(self.stable, newest)
        settled = fates(able, alive, recent, self._open)
        is_news = stable != self.stable or bool(settled)
        self.stable, self.redundancy = stable, redundancy
        self._open -= settled.keys()
        return Agreed(
            number=result.number,
            stable=stable,
            recoverable=settled,
            votes=votes,
            redundancy=redundancy,
            notes=result.notes,
            is_news=is_news,
        )


def combine_words(mine: Sequence[int], theirs: Sequence[int]) -> Sequence[int]:
    """Of two ranks' words: what both say, and the smaller redundancy."""
    *masks, redundancy = zip(mine, theirs, strict=True)
    return [*(a & b for a, b in masks), min(redundancy)]


def bits_of(iterations: Iterable[int], recent: Sequence[int]) -> int:
    """A mask: bit k is set if the k-th of ``recent`` is among the iterations."""
    among = set(iterations)
    return sum(1 << k for k, iteration in enumerate(recent[:WINDOW]) if iteration in among)


def newest_common(mask: int, recent: Sequence[int]) -> int | None:
    """The newest iteration that every rank can recover, or None."""
    return next((iteration for k, iteration in enumerate(recent[:WINDOW]) if mask >> k & 1), None)


def fates(able: int, alive: int, recent: Sequence[int], known: Iterable[int]) -> dict[int, bool]:
    """Whether each of the ``known`` iterations can be recovered by all ranks, as far as that is settled.

    It is settled once some rank has given the iteration up; and up to the newest common one, because replication keeps
    the order of iterations. What is no longer among the last ``WINDOW`` cannot be agreed on any more: it counts as
    given up.
    """
    newest = newest_common(able, recent)
    places = {iteration: k for k, iteration in enumerate(recent[:WINDOW])}
    found = {}
    for iteration in known:
        place = places.get(iteration)
        if place is None:
            if recent and iteration < recent[0]:
                found[iteration] = False
        elif not alive >> place & 1 or (newest is not None and iteration <= newest):
            found[iteration] = bool(able >> place & 1)
    return found
