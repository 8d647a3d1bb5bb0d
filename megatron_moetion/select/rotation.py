# SPDX-License-Identifier: Apache-2.0
"""Whose turn it is in mode ``exact``: which slices a snapshot captures anew, and which gradients it logs. Pure.

In the steady state the groups take turns, one an iteration, so that no log is longer than the period. A snapshot that
was not whole on some rank breaks the chains of all slices, on all ranks. They begin anew at the usual number of bytes
an iteration: gradients that no chain needs are not logged, and their bytes go into captures. Groups whose broken log is
short begin first: their new log grows longest, so that old and new log of any slice together stay within one period.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from megatron_moetion.snapshot.gradlog import GradientLog
from megatron_moetion.store.chains import ChainLayout, retain_chains
from megatron_moetion.store.manifest import Record

STATE_SLOTS = 2
"""Captures of one slice that there is room for: the base of the stable iteration, and the next one."""
SPARE_LOGS = 3
"""Gradients of one slice that there is room for beyond the period: until the new capture is stable, for replication
that takes longer than an iteration, and for a turn that was missed."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What one snapshot holds beside the units that every snapshot has, as unit numbers."""

    groups: tuple[int, ...]
    """Whose turn it is."""
    captures: tuple[int, ...]
    """Slices of these groups; all of them, or none where there is no room or no time."""
    logs: tuple[int, ...]


class Rotation:
    """The chains of one rank's slices, as far as they are known to be unbroken.

    ``bases``: the iteration that each slice was captured at, all chains leading to ``iteration``.
    """

    def __init__(self, log: GradientLog, iteration: int, bases: Mapping[int, int]) -> None:
        self._log = log
        self._bytes = {u: log.inventory.units[u].nbytes for pair in log.log_of.items() for u in pair}
        self._groups = [g for g in log.groups if g]
        self._period = len(log.groups)
        self._turned = [max(bases[u] for u in group) for group in self._groups]
        """When each group had its last turn."""
        self._bases: dict[int, int | None] = {u: bases[u] for u in log.log_of}
        self._broken_log = [0] * len(self._groups)
        self._quiet = dict.fromkeys(log.log_of, False)
        """Whether a slice's gradients have been zero in every iteration since its capture."""
        self._roots: dict[int, int | None] = {iteration: min(bases.values(), default=iteration)}
        """For recent iterations the oldest capture that one of them needs; None: it cannot be reached."""
        self._open: tuple[int, Turn, frozenset[int]] | None = None
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
            groups = self._anew(logs)
            return Turn(groups=groups, captures=tuple(u for g in groups for u in self._groups[g]), logs=logs)
        if not self._groups:  # a rank whose parameters are all frozen, or sharded to others
            return Turn(groups=(), captures=(), logs=())
        longest = min(range(len(self._groups)), key=lambda g: (self._turned[g], g))
        captures = tuple(u for u in self._groups[longest] if not self._is_spared(u, iteration))
        return Turn(groups=(longest,), captures=captures, logs=logs)

    def begin(self, iteration: int, turn: Turn, zero: frozenset[int]) -> None:
        """The snapshot of ``iteration`` is being made; ``zero``: ``LOG`` units whose gradient is zero."""
        self._open = (iteration, turn, zero)

    def packed(self, *, is_there: bool, captured: bool) -> None:
        """What became of the last snapshot on this rank; ``captured``: with its turn's captures."""
        if self._open is None:
            return
        (iteration, turn, zero), self._open = self._open, None
        if not is_there:
            self._break_at(iteration)
            return
        for unit in self._bases:
            self._quiet[unit] &= self._log.log_of[unit] in zero
        if captured:
            for number in turn.groups:
                self._turned[number] = iteration
                spared = set(self._groups[number]) - set(turn.captures)
                self.spared_bytes += sum(self._bytes[u] for u in spared)
            for unit in turn.captures:
                self._bases[unit] = iteration
                self._quiet[unit] = True
        self._roots[iteration] = min((b for b in self._bases.values() if b is not None), default=iteration)
        if not self.is_whole:
            self._roots[iteration] = None

    def reachable(self, rounds: Mapping[int, bool]) -> list[int]:
        """The iterations that can be recovered on this rank; ``rounds``: whether recent snapshots are whole here."""
        found = []
        broken = self._broken
        for iteration, is_whole in sorted(rounds.items()):
            root = self._roots.get(iteration)
            if not is_whole:
                broken = max(broken, iteration)
            elif root is not None and root > broken:
                found.append(iteration)
        return found

    def settle(self, stable: int, reachable: Mapping[int, bool], whole: Mapping[int, bool]) -> None:
        """What all ranks agreed on: which snapshots could be recovered, and which are whole at least."""
        for iteration, is_whole in whole.items():
            if not is_whole:
                self._broken = max(self._broken, iteration)
                self._break_at(iteration)
        self._unreachable |= {i for i, found in reachable.items() if not found}
        stale = max(stable, self._broken)
        self._unreachable = {i for i in self._unreachable if i > stale}
        self._roots = {i: root for i, root in self._roots.items() if i >= stable}

    def retain(self, records: Iterable[Record], stable: int, layout: ChainLayout) -> tuple[Record, ...]:
        """The records of an arena that are still needed; see ``retain_chains``."""
        return retain_chains(records, stable, layout, broken=self._broken, unreachable=self._unreachable)

    def _break_at(self, iteration: int) -> None:
        """No chain leads over this iteration."""
        if self.is_whole:
            self._broken_log = [iteration - turned for turned in self._turned]
        for unit, base in self._bases.items():
            if base is not None and base <= iteration:
                self._bases[unit] = None

    def _is_spared(self, unit: int, iteration: int) -> bool:
        """A slice that had no gradient since its capture is left out, once in a row: its log takes no room."""
        base = self._bases[unit]
        return self._quiet[unit] and base is not None and iteration - base <= self._period

    def _anew(self, logs: Collection[int]) -> tuple[int, ...]:
        """Groups without chains, as many as the bytes of a usual snapshot allow, one at least."""
        waiting = [g for g, group in enumerate(self._groups) if any(self._bases[u] is None for u in group)]
        room = max(self._log.group_bytes) + self._log.log_bytes - sum(self._bytes[u] for u in logs)
        found: list[int] = []
        for number in sorted(waiting, key=lambda g: (self._broken_log[g], g)):
            cost = sum(self._bytes[u] for u in self._groups[number])
            if found and cost > room:
                break
            found.append(number)
            room -= cost
        return tuple(found)
