# SPDX-License-Identifier: Apache-2.0
"""Which captures and logged gradients lead to which iteration (mode ``exact``). Pure.

A slice's state at iteration T follows from a capture at c <= T, its *base*, and the gradients of c + 1 ... T, all of
them: a *chain*. An iteration whose gradient is missing breaks every chain that would pass over it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_moetion.units import LOG_SUFFIX, UnitKind


@dataclass(frozen=True, kw_only=True)
class ChainLayout:
    """Which units of a rank form chains, by number."""

    log_of: Mapping[int, int]
    """The unit of the gradients of each slice."""
    always: frozenset[int]
    """Units that every snapshot holds and that only the iteration itself needs (host state, buffers)."""


def chain_layout(units: Sequence[tuple[str, int, int]]) -> ChainLayout:
    """From an arena's units (name, kind, bytes)."""
    kinds = [UnitKind(kind) for _, kind, _ in units]
    logs = log_units([(name, kind) for (name, _, _), kind in zip(units, kinds, strict=True)])
    return ChainLayout(log_of=logs, always=frozenset(always_of(kinds, logs)))


def log_units(units: Sequence[tuple[str, UnitKind]]) -> dict[int, int]:
    """From names and kinds by unit number: for each unit whose gradient is logged, the unit of that log.

    The log of a unit that is not there, which no run has, is none.
    """
    numbers = {name: number for number, (name, kind) in enumerate(units) if kind is not UnitKind.LOG}
    logs = [(name.removesuffix(LOG_SUFFIX), n) for n, (name, kind) in enumerate(units) if kind is UnitKind.LOG]
    return {numbers[name]: number for name, number in logs if name in numbers}


def always_of(kinds: Sequence[UnitKind], log_of: Mapping[int, int]) -> tuple[int, ...]:
    """Units of every snapshot of mode ``exact``, gradients aside: neither part of a chain nor fixed for good."""
    members = {*log_of, *log_of.values()}
    return tuple(u for u, kind in enumerate(kinds) if u not in members and kind is not UnitKind.FROZEN)


def base_of(captures: Iterable[int], logged: Collection[int], at: int) -> int | None:
    """The newest capture from which iteration ``at`` can be reached, None if there is none."""
    newest = max((c for c in captures if c <= at), default=None)
    if newest is None:
        return None
    # A gap below the newest capture is of no interest, and one above it breaks the chains of all older ones too.
    return newest if all(i in logged for i in range(newest + 1, at + 1)) else None
