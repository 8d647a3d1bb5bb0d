# SPDX-License-Identifier: Apache-2.0
"""Whose turn it is in mode ``exact``: which slices a snapshot captures anew, and which gradients it logs. Pure.

In the steady state the groups take turns, one an iteration, so that no log is longer than the period. A snapshot that
was not whole on some rank breaks the chains of all slices, on all ranks. They begin anew with one snapshot of all
state, on all ranks the same one, since all learn of the gap in the same iteration. It needs no gradient to be reached;
so there is room for the old chains, which are needed until then, and for new ones. Where the copy of all state takes
too long for one iteration, the next ones take half of it, a quarter and so on.
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
    """There must be no snapshot: a chain has grown so long, because turns were missed, that only a gap can end it."""


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
        """The newest snapshot that was dropped here. Until all ranks know of it, nothing begins anew."""
        self._share = 1.0
        """Of the groups without chains, how many begin anew in one snapshot."""
        self._logged = {u: (logged or {}).get(u, 0) for u in log.log_of}
        """Gradients that are not zero since a slice's capture."""
        self._quiet = dict.fromkeys(log.log_of, False)
        """Whether a slice's gradients have been zero in every iteration since its capture."""
        self._roots: dict[int, int | None] = {iteration: min(bases.values(), default=iteration)}
        """For recent iterations the oldest capture that one of them needs; None: it cannot be reached."""
        self._open: tuple[int, Turn] | None = None
        self._stable = iteration
        self._broken = -1
        self._unreachable: set[int] = set()
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
            groups = self._anew() if self._gap <= self._broken else ()
            begun = (u for g in groups for u in self._groups[g] if self._bases[u] is None)
            return Turn(groups=groups, captures=tuple(begun), logs=logs)
        waits = self._stable < self._broken  # for ranks whose chains are not whole yet: a gap would only set them back
        if not waits and any(logged > self._period + MISSED_TURNS for logged in self._logged.values()):
            return Turn(groups=(), captures=(), logs=(), is_gap=True)
        if not self._groups:  # a rank whose parameters are all frozen, or sharded to others
            return Turn(groups=(), captures=(), logs=())
        longest = min(range(len(self._groups)), key=lambda g: (self._turned[g], g))
        captures = tuple(u for u in self._groups[longest] if not self._is_spared(u, iteration))
        return Turn(groups=(longest,), captures=captures, logs=logs)

    def begin(self, iteration: int, turn: Turn) -> None:
        """The snapshot of ``iteration`` is being made."""
        self._open = (iteration, turn)

    def packed(self, *, is_there: bool, captured: bool, late: bool, zero: frozenset[int]) -> None:
        """The fate of the last snapshot on this rank.

        ``captured``: with its turn's captures, ``late``: why not, ``zero``: ``LOG`` units whose gradient is zero.
        """
        if self._open is None:
            return
        (iteration, turn), self._open = self._open, None
        if not is_there:
            self._gap = iteration
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
        self._roots[iteration] = None
        if self.is_whole:
            self._share = 1.0
            self._roots[iteration] = min((b for b in self._bases.values() if b is not None), default=iteration)

    def reachable(self, rounds: Mapping[int, bool]) -> list[int]:
        """The iterations that can be recovered on this rank; ``rounds``: whether recent snapshots are whole here."""
        found = []
        broken = self._broken
        for iteration, is_whole in sorted(rounds.items()):
            root = self._roots.get(iteration)
            if not is_whole:
                broken = max(broken, iteration)
            elif root is not None and root > broken and iteration - root <= longest_chain(self._period):
                found.append(iteration)
        return found

    def settle(self, stable: int, reachable: Mapping[int, bool], whole: Mapping[int, bool]) -> None:
        """The result of an agreement: whether snapshots can be recovered, and whether they are whole at least."""
        for iteration, is_whole in whole.items():
            if not is_whole:
                self._broken = max(self._broken, iteration)
                self._share = 1.0
                self._break_at(iteration)
        self._unreachable |= {i for i, found in reachable.items() if not found}
        self._stable = stable
        stale = max(stable, self._broken)
        self._unreachable = {i for i in self._unreachable if i > stale}
        self._roots = {i: root for i, root in self._roots.items() if i >= stable}

    @property
    def settled(self) -> Settled:
        """The results of ``settle`` so far, which retention depends on."""
        return Settled(stable=self._stable, broken=self._broken, unreachable=frozenset(self._unreachable))

    def _break_at(self, iteration: int) -> None:
        """No chain leads over this iteration."""
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
