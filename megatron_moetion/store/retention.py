# SPDX-License-Identifier: Apache-2.0
"""Which captures of a rank's own arena recovery may still need. Pure. Replicas follow the owner's arena."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from megatron_moetion.arrays import Flags, Int64s
from megatron_moetion.store.chains import ChainLayout
from megatron_moetion.store.manifest import Records

_NEVER = -(1 << 62)
"""Before every iteration."""


@dataclass(frozen=True, kw_only=True)
class Settled:
    """What all ranks have agreed on so far."""

    stable: int
    """The stable iteration."""
    whole: Mapping[int, bool] = field(default_factory=dict)
    """For iterations settled just now: whether the snapshot is whole on every rank. Others were settled before."""
    broken: int = -1
    """No chain of gradients of this rank leads over this iteration, and after the stable one nothing until then is of
    use."""
    unreachable: frozenset[int] = frozenset()
    """Later iterations that cannot be recovered, here or on another rank; chains may lead over them."""

    def followed_by(self, later: Settled) -> Settled:
        """This and what was agreed on afterwards, as one."""
        return replace(later, whole={**self.whole, **later.whole})


class Retention(Protocol):
    """Decides what an owner's arenas keep."""

    def keep(self, records: Records, settled: Settled) -> Records:
        """Those of ``records`` that recovery may still need, sorted by unit and iteration."""
        ...


class Newest:
    """Of each unit all captures newer than the stable iteration, and the newest one at or before it.

    A capture of a snapshot that is not whole on every rank is dropped: other ranks lack their part of it.
    """

    def keep(self, records: Records, settled: Settled) -> Records:
        """See ``Retention``."""
        lost = [i for i, is_whole in settled.whole.items() if not is_whole]
        whole = records.where(~np.isin(records.table["iteration"], lost)).sorted()
        unit, iteration = whole.table["unit"], whole.table["iteration"]
        is_new = iteration > settled.stable
        is_last = np.ones(len(whole), dtype=bool)  # of its unit, or the next one is new
        is_last[:-1] = is_new[1:] | (unit[1:] != unit[:-1])
        return whole.where(is_new | is_last)


class Chains:
    """Of each slice what leads to the stable iteration and beyond it: captures, and the gradients since then.

    What lies between the stable iteration and the one that broke all chains is of no use. What every snapshot holds
    stays for the iterations that can be recovered, and what never changes stays for good.
    """

    def __init__(self, layout: ChainLayout) -> None:
        num_units = max([*layout.log_of, *layout.log_of.values(), *layout.always], default=-1) + 1
        self._num_chains = len(layout.log_of)
        self._chain = np.full(num_units + 1, -1, dtype=np.int64)
        """By unit: the number of the chain that it is part of. The last element stands for all higher units."""
        self._is_log = np.zeros(num_units + 1, dtype=bool)
        self._is_always = np.zeros(num_units + 1, dtype=bool)
        self._is_always[list(layout.always)] = True
        for number, (unit, log) in enumerate(layout.log_of.items()):
            self._chain[[unit, log]] = number
            self._is_log[log] = True

    def keep(self, records: Records, settled: Settled) -> Records:
        """See ``Retention``."""
        stable, stale = settled.stable, max(settled.stable, settled.broken)
        iteration = records.table["iteration"]
        records = records.where((iteration <= stable) | (iteration > stale)).sorted()
        iteration = records.table["iteration"]
        unit = np.minimum(records.table["unit"], len(self._chain) - 1)
        chain = self._chain[unit]
        is_log = self._is_log[unit]
        is_capture = (chain >= 0) & ~is_log
        is_later = iteration > stale
        bases = self._bases(chain, is_capture, is_log, iteration, stable)
        base = bases[chain]  # of records outside chains any value
        begin = np.full(self._num_chains + 1, stable if stale == stable else -_NEVER, dtype=np.int64)
        if stale != stable:  # what begins anew begins with the first later capture
            later = is_capture & is_later
            np.minimum.at(begin, chain[later], iteration[later])
        leads_to_stable = is_log & (base != _NEVER) & (base < iteration) & (iteration <= stable)
        leads_on = is_log & is_later & (iteration > begin[chain])
        is_recoverable = (iteration == stable) | (is_later & ~np.isin(iteration, list(settled.unreachable)))
        is_fixed = (chain < 0) & ~self._is_always[unit]
        return records.where(
            is_fixed
            | (self._is_always[unit] & is_recoverable)
            | (is_capture & (is_later | (iteration == base)))
            | leads_to_stable
            | leads_on
        )

    def _bases(self, chain: Int64s, is_capture: Flags, is_log: Flags, iteration: Int64s, stable: int) -> Int64s:
        """By chain: the newest capture from which all gradients lead to ``stable``; ``_NEVER`` without one.

        The last element is for records that are in no chain.
        """
        newest = np.full(self._num_chains + 1, _NEVER, dtype=np.int64)
        known = is_capture & (iteration <= stable)
        np.maximum.at(newest, chain[known], iteration[known])
        between = is_log & (newest[chain] < iteration) & (iteration <= stable)
        found = np.bincount(chain[between], minlength=len(newest))
        return np.where(found == stable - newest, newest, _NEVER)
