# SPDX-License-Identifier: Apache-2.0
"""The newer of memory and the newest checkpoint on disk is loaded. All functions are collective."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_moetion.errors import StoreError, shared, understood
from megatron_moetion.observe.journal import Journal
from megatron_moetion.recover.plan import NoPlan, RecoveryPlan
from megatron_moetion.replicate.channel import Fabric
from megatron_moetion.replicate.collective import on_all_ranks

_RANKS_NAMED = 8


@dataclass(frozen=True, kw_only=True)
class Disk:
    """Persistent checkpoints, as the training loop reads them. Both functions are called on all ranks."""

    load: Callable[[], int | None] | None = None
    """Load the newest one and return its iteration; None if there is none."""
    newest: Callable[[], int | None] | None = None
    """The iteration that ``load`` would return, without loading. Without it, disk is asked only if memory has
    nothing, or nothing that training gets further from."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """The newest checkpoint that some ranks see on disk; -1: none."""

    newest: int
    ranks: int
    behind: int = 0
    """Of these ranks, those that see none or an older one."""
    named: tuple[int, ...] = ()
    """The first of them."""
    first: int = 0
    """The lowest of these ranks, which are neighbours."""

    def followed_by(self, later: Seen) -> Seen:
        """This, of lower ranks, and what later ranks see, as one."""
        newest = max(self.newest, later.newest)
        mine, theirs = self._against(newest), later._against(newest)
        return Seen(
            newest=newest,
            ranks=self.ranks + later.ranks,
            behind=mine.behind + theirs.behind,
            named=(*mine.named, *theirs.named)[:_RANKS_NAMED],
            first=self.first,
        )

    def _against(self, newest: int) -> Seen:
        if self.newest == newest:
            return self
        named = range(self.first, self.first + min(self.ranks, _RANKS_NAMED))
        return Seen(newest=newest, ranks=self.ranks, behind=self.ranks, named=tuple(named), first=self.first)


def newest_on_disk(fabric: Fabric, disk: Disk, plan: RecoveryPlan | NoPlan) -> int:
    """The iteration of the newest checkpoint on disk, -1 without one.

    ``StoreError`` where some ranks see one that is newer than memory and others do not: taking memory's older state
    would undo work, and loading from disk would fail.
    """
    found = on_all_ranks(fabric, disk.newest) if disk.newest is not None else None
    mine = Seen(newest=-1 if found is None else found, ranks=1, first=fabric.rank)
    seen = _seen(fabric.reduce(asdict(mine), _both_seen))
    if isinstance(plan, RecoveryPlan) and seen.newest > plan.iteration and seen.behind:
        raise shared(
            StoreError(
                f"disk has a checkpoint of iteration {seen.newest}, memory one of {plan.iteration}, and "
                f"{seen.behind} ranks ({list(seen.named)}) see none or an older one: mount the folder of "
                f"--load there, or leave --load out to go on from memory"
            )
        )
    return seen.newest


def load_from_disk(fabric: Fabric, disk: Disk, in_memory: int | None, newest: int, journal: Journal) -> int | None:
    """Load from disk where it is newer than memory or memory has nothing; the iteration, None if nothing was loaded.

    ``in_memory`` is the iteration that memory has, None without one; ``newest`` the result of ``newest_on_disk``. The
    loaded checkpoint may still turn out to be older than memory. ``StoreError`` where ranks loaded different
    checkpoints.
    """
    if disk.load is None or (in_memory is not None and newest <= in_memory):
        return None
    if in_memory is not None and fabric.rank == 0:
        journal.info(
            in_memory, f"memory holds iteration {in_memory}, disk {newest}: the newer one is loaded, from disk"
        )
    loaded = on_all_ranks(fabric, disk.load)
    everyone = fabric.reduce([loaded], _different)
    if len(everyone) > 1:
        raise shared(StoreError(f"ranks loaded different persistent checkpoints: iterations {everyone}"))
    if in_memory is not None and fabric.rank == 0 and (loaded is None or loaded < newest):
        journal.warn_once(
            "disk",
            newest,
            f"disk should have held iteration {newest} and gave {loaded}; the newer of it and memory is taken",
        )
    return loaded


def _seen(raw: Mapping[str, Any]) -> Seen:
    with understood("what it has found on disk"):
        return Seen(**{**raw, "named": tuple(raw["named"])})


def _both_seen(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    return asdict(_seen(mine).followed_by(_seen(theirs)))


def _different(mine: Sequence[int | None], theirs: Sequence[int | None]) -> list[int | None]:
    return sorted({*mine, *theirs}, key=str)[:_RANKS_NAMED]
