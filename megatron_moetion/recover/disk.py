# SPDX-License-Identifier: Apache-2.0
"""The newer of memory and the newest checkpoint on disk is loaded. All functions are collective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_moetion.errors import StoreError, shared
from megatron_moetion.observe.journal import Journal
from megatron_moetion.recover.plan import NoPlan, RecoveryPlan
from megatron_moetion.replicate.channel import Fabric
from megatron_moetion.replicate.collective import on_all_ranks


@dataclass(frozen=True, kw_only=True)
class Disk:
    """Persistent checkpoints, as the training loop reads them. Both functions are called on all ranks."""

    load: Callable[[], int | None] | None = None
    """Load the newest one and return its iteration; None if there is none."""
    newest: Callable[[], int | None] | None = None
    """The iteration that ``load`` would return, without loading. Without it, disk is asked only if memory is empty."""


def newest_on_disk(fabric: Fabric, disk: Disk, plan: RecoveryPlan | NoPlan) -> int:
    """The iteration of the newest checkpoint on disk, -1 without one.

    ``StoreError`` where some ranks see one that is newer than memory and others do not: taking memory's older state
    would undo work, and loading from disk would fail.
    """
    found = on_all_ranks(fabric, disk.newest) if disk.newest is not None else None
    seen = [-1 if n is None else n for n in fabric.gather(found)]
    newest = max(seen)
    if isinstance(plan, RecoveryPlan) and newest > plan.iteration and len(set(seen)) > 1:
        others = [rank for rank, n in enumerate(seen) if n != newest]
        raise shared(
            StoreError(
                f"disk has a checkpoint of iteration {newest}, memory one of {plan.iteration}, and "
                f"{len(others)} ranks ({others[:8]}) see none or an older one: mount the folder of "
                f"--load there, or leave --load out to go on from memory"
            )
        )
    return newest


def load_from_disk(
    fabric: Fabric, disk: Disk, plan: RecoveryPlan | NoPlan, newest: int, journal: Journal
) -> int | None:
    """Load from disk where it is newer than memory or memory has nothing; the iteration, None if nothing was loaded.

    ``newest`` is the result of ``newest_on_disk``. The loaded checkpoint may still turn out to be older than memory.
    ``StoreError`` where ranks loaded different checkpoints.
    """
    in_memory = plan.iteration if isinstance(plan, RecoveryPlan) else None
    if disk.load is None or (in_memory is not None and newest <= in_memory):
        return None
    if in_memory is not None and fabric.rank == 0:
        journal.info(
            in_memory, f"memory holds iteration {in_memory}, disk {newest}: the newer one is loaded, from disk"
        )
    loaded = on_all_ranks(fabric, disk.load)
    everyone = set(fabric.gather(loaded))
    if len(everyone) > 1:
        iterations = sorted(everyone, key=str)
        raise shared(StoreError(f"ranks loaded different persistent checkpoints: iterations {iterations}"))
    if in_memory is not None and fabric.rank == 0 and (loaded is None or loaded < newest):
        journal.warn_once(
            "disk",
            newest,
            f"disk should have held iteration {newest} and gave {loaded}; the newer of it and memory is taken",
        )
    return loaded
