# SPDX-License-Identifier: Apache-2.0
"""Whose turn it is in mode ``exact``: which slices a snapshot captures anew, and which gradients it logs. Pure.

In the steady state the groups take turns, one an iteration, so that no log is longer than the period. A snapshot that
is not there breaks the chains of all slices of this rank, and of no other rank. What the old chains lead to stays until
it is stable, or given up by some rank; then there is room, and the chains begin anew with one snapshot of all state,
which needs no gradient to be reached. Where the copy of all state takes too long for one iteration, the next ones take
half of it, a quarter and so on.

Where the stable iteration stands still, because of another rank, logs grow until there is no room for the next one.
That is a gap like any other: what was logged until then waits for the stable iteration, or is given up with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_moetion.snapshot.gradlog import GradientLog
from megatron_moetion.store.retention import Settled

STATE_SLOTS = 2
"""Captures of one slice that there is room for: the base of the stable iteration, and the next one."""
MISSED_TURNS = 2
"""Iterations that a turn may be late, as it is after a gap, before only a gap can end the chain."""
SPARE_LOGS = MISSED_TURNS + 4
"""Gradients of one slice that there is room for beyond the period: those of turns that were missed, one until the
capture is there, and three for the time after a gap, when the old chain is needed and the new one must last until it is
stable."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """The contents of one snapshot without the units that every snapshot has, as unit numbers."""

    groups: tuple[int, ...]
    """Whose turn it is."""
    captures: tuple[int, ...]
    """Slices of these groups; all of them, or none where there is no room or no time."""
    logs: tuple[int, ...]
    is_gap: bool = False
    """There must be no snapshot: no chain leads to it, or one has grown so long, because turns were missed, that only a
    gap can end it."""


_GAP = Turn(groups=(), captures=(), logs=(), is_gap=True)


class Rotation:
    """The chains of one rank's slices, as far as they are known to be unbroken.

    ``bases``: the iteration that each slice was captured at, all chains leading to ``iteration``; ``logged``: how many
    gradients that are not zero a slice's chain has, none where it is not named.
    """

    def __init__(
        self, log: GradientLog, iteration: int, bases: Mapping[int, int], logged: Mapping[int, int] | None = None
    ) -> None:
        self._log = log
        self._bytes = {u: log.inventory.units[u].nbytes for pair in log.log_of.items() for u in pair}
        self._groups = [g for g in log.groups if g]
        self._period = len(log.groups)
        self._turned = [max(bases[u] for u in group) for group in self._groups]
        """When each group had its last turn."""
        self._bases: dict[int, int | None] = {u: bases[u] for u in log.log_of}
        self._gap = -1
        """No chain leads over this iteration."""
        self._is_late = False
        """Whether the last snapshot has no captures because they took too long."""
        self._share = 1.0
        """Of the groups without chains, how many begin anew in one snapshot."""
        self._logged = {u: (logged or {}).get(u, 0) for u in log.log_of}
        """Gradients that are not zero since a slice's capture."""
        self._quiet = dict.fromkeys(log.log_of, False)
        """Whether a slice's gradients have been zero in every iteration since its capture."""
        self._reachable = {iteration}
        """The iterations, from the stable one on, that can be recovered here: their captures and gradients stay."""
        self._unreachable: set[int] = set()
        """Those after it that cannot be, here or on another rank."""
        self._open: tuple[int, Turn] | None = None
        self._stable = iteration
        self._broken = -1
        self.spared_bytes = 0
        """Of captures that were left out because the slice had no gradient since the last one."""

    @property
    def is_whole(self) -> bool:
        """Whether every slice has an unbroken chain."""
        return None not in self._bases.values()

    def turn(self, iteration: int) -> Turn:
        """What the snapshot of ``iteration`` should hold."""
        logs = tuple(self._log.log_of[u] for u, base in self._bases.items() if base is not None)
        if not self.is_whole:
            if self._gap > self._broken:  # the captures that lead to earlier iterations take the room of new ones
                return _GAP
            groups = self._anew()
            begun = (u for g in groups for u in self._groups[g] if self._bases[u] is None)
            return Turn(groups=groups, captures=tuple(begun), logs=logs)
        if self._is_late and max(self._logged.values(), default=0) > self._period + MISSED_TURNS:
            return _GAP
        if not self._groups:  # a rank whose parameters are all frozen, or sharded to others
            return Turn(groups=(), captures=(), logs=())
        longest = min(range(len(self._groups)), key=lambda g: (self._turned[g], g))
        if self._turned[longest] > self._stable:  # it has two captures, and both are needed
            return Turn(groups=(), captures=(), logs=logs)
        captures = tuple(u for u in self._groups[longest] if not self._is_spared(u, iteration))
        return Turn(groups=(longest,), captures=captures, logs=logs)

    def begin(self, iteration: int, turn: Turn) -> None:
        """The snapshot of ``iteration`` is being made."""
        self._open = (iteration, turn)

    def interrupt(self, iteration: int) -> None:
        """No log tells what led to this iteration: chains begin anew with its snapshot, if there is room, or later."""
        self._break_at(iteration - 1)

    def packed(self, *, is_there: bool, captured: bool, late: bool, zero: frozenset[int]) -> None:
        """The fate of the last snapshot on this rank.

        ``captured``: with its turn's captures, ``late``: why not, ``zero``: ``LOG`` units whose gradient is zero.
        """
        if self._open is None:
            return
        (iteration, turn), self._open = self._open, None
        self._is_late = late
        if not is_there:
            self._share = min(2 * self._share, 1.0)
            self._break_at(iteration)
            return
        if late and not self.is_whole:
            self._share = max(self._share / 2, 1 / len(self._groups))
        for unit in self._bases:
            is_zero = self._log.log_of[unit] in zero
            self._quiet[unit] &= is_zero
            self._logged[unit] += not is_zero
        was_whole = self.is_whole
        if captured:
            for number in turn.groups:
                self._turned[number] = iteration
                spared = set(self._groups[number]) - set(turn.captures) if was_whole else ()
                self.spared_bytes += sum(self._bytes[u] for u in spared)
            for unit in turn.captures:
                self._bases[unit] = iteration
                self._quiet[unit] = True
                self._logged[unit] = 0
        if self.is_whole:
            self._share = 1.0
        root = min((iteration if b is None else b for b in self._bases.values()), default=iteration)
        is_reachable = self.is_whole and iteration - root <= longest_chain(self._period)
        (self._reachable if is_reachable else self._unreachable).add(iteration)

    def reachable(self, rounds: Mapping[int, bool]) -> list[int]:
        """The iterations that can be recovered on this rank; ``rounds``: whether recent snapshots are whole."""
        return sorted(i for i in self._reachable if rounds.get(i, False))

    @property
    def unreachable(self) -> frozenset[int]:
        """Iterations after the stable one that cannot be recovered, here or on another rank."""
        return frozenset(self._unreachable)

    def settle(self, stable: int, recoverable: Mapping[int, bool]) -> None:
        """The result of an agreement: the stable iteration, and whether all ranks can recover the others."""
        given_up = {i for i, is_recoverable in recoverable.items() if not is_recoverable}
        self._stable = stable
        self._reachable = {i for i in self._reachable - given_up if i >= stable}
        self._unreachable = {i for i in self._unreachable | given_up if i > stable}
        if not self.is_whole and self._reachable <= {stable}:
            self._broken = self._gap

    @property
    def settled(self) -> Settled:
        """The results of ``settle`` so far, which retention depends on."""
        stale = max(self._stable, self._broken)
        unreachable = frozenset(i for i in self._unreachable if i > stale)
        return Settled(stable=self._stable, broken=self._broken, unreachable=unreachable)

    def _break_at(self, iteration: int) -> None:
        """No chain leads over this iteration."""
        self._gap = max(self._gap, iteration)
        self._bases |= {u: None for u, base in self._bases.items() if base is not None and base <= iteration}

    def _is_spared(self, unit: int, iteration: int) -> bool:
        """A slice that had no gradient since its capture is left out, once in a row: its log takes no room."""
        base = self._bases[unit]
        return self._quiet[unit] and base is not None and iteration - base <= self._period

    def _anew(self) -> tuple[int, ...]:
        """Groups without chains: as many as one snapshot takes, those first that have waited longest."""
        waiting = [g for g, group in enumerate(self._groups) if any(self._bases[u] is None for u in group)]
        waiting.sort(key=lambda g: (self._turned[g], g))
        return tuple(sorted(waiting[: math.ceil(self._share * len(self._groups))]))


def longest_chain(period: int) -> int:
    """Most steps that are ever replayed: slices without gradients wait for two periods, and a turn may be missed."""
    return 2 * period + SPARE_LOGS


def remembered_steps(period: int) -> int:
    """Optimizer steps in a host state: as many as a recovery may replay, and those on their way."""
    return longest_chain(period) + SPARE_LOGS
