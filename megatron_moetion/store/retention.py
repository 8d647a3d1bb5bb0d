# SPDX-License-Identifier: Apache-2.0
"""Which captures recovery may still need. Pure.

An owner's arenas, its own and its replicas, follow one rule, so that the same captures are kept everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from megatron_moetion.store.chains import ChainLayout, retain_chains
from megatron_moetion.store.manifest import Record, retain


@dataclass(frozen=True, kw_only=True)
class Settled:
    """What all ranks have agreed on so far."""

    stable: int
    """The stable iteration."""
    whole: Mapping[int, bool] = field(default_factory=dict)
    """For iterations settled just now: whether the snapshot is whole on every rank. Others were settled before."""
    broken: int = -1
    """The newest iteration whose snapshot is not whole on some rank: no chain of gradients leads over it."""
    unreachable: frozenset[int] = frozenset()
    """Later iterations that are whole and cannot be recovered, because some chain has not begun anew yet."""


class Retention(Protocol):
    """Decides what an owner's arenas keep."""

    def keep(self, records: Sequence[Record], settled: Settled) -> tuple[Record, ...]:
        """Those of ``records`` that recovery may still need, sorted by unit and iteration."""
        ...


class Newest:
    """Of each unit all captures newer than the stable iteration, and the newest one at or before it.

    A capture of a snapshot that is not whole on every rank is dropped: other ranks lack their part of it.
    """

    def keep(self, records: Sequence[Record], settled: Settled) -> tuple[Record, ...]:
        """See ``Retention``."""
        whole = (r for r in records if settled.whole.get(r.iteration, True))
        return retain(whole, settled.stable, settled.whole)


@dataclass(frozen=True)
class Chains:
    """Of each slice what leads to the stable iteration and beyond it: captures, and the gradients since then."""

    layout: ChainLayout

    def keep(self, records: Sequence[Record], settled: Settled) -> tuple[Record, ...]:
        """See ``Retention``."""
        return retain_chains(
            records, settled.stable, self.layout, broken=settled.broken, unreachable=settled.unreachable
        )
