# SPDX-License-Identifier: Apache-2.0
"""From the folders of a dead run to a checkpoint on disk: survey, put ranks together one by one, name what was written.

``RankPart`` writes one rank and may be used by several processes for one checkpoint; ``export`` is one process.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_moetion.arrays import Bytes
from megatron_moetion.errors import ConfigError, StoreError
from megatron_moetion.export.assemble import Stretch, memory_bytes, refuse, write_rank
from megatron_moetion.export.survey import Found, Owner, Say, survey
from megatron_moetion.framework import StepReplayer
from megatron_moetion.mcore import offline
from megatron_moetion.mcore.torch_dist import CHUNK_BYTES, PartWriter, finish
from megatron_moetion.persist.tracker import TRACKER, Draft, checkpoint_folder, latest_iteration
from megatron_moetion.snapshot.packer import HostPool
from megatron_moetion.store.sharedfile import available_bytes
from megatron_moetion.units import Role


@dataclass(frozen=True, kw_only=True)
class Exported:
    """The result of an export."""

    checkpoint: str
    iteration: int
    mode: str
    ranks: int
    nbytes: int
    """Of tensors."""
    replayed_steps: int
    stale: Mapping[str, int]
    """Experts that are older than the iteration, and the iteration that they are of."""
    left_out: Sequence[str]
    """Keys that the run's own checkpoints would have and this one lacks."""
    notes: Sequence[str]


def export(
    folders: Sequence[Path],
    run_id: str,
    output: Path,
    say: Say,
    *,
    iteration: int | None = None,
    force: bool = False,
    expert_parallel_size: int | None = None,
) -> Exported:
    """Write the newest iteration that the folders of a run's nodes hold below ``output``.

    Named and tracked as Megatron-LM names and tracks checkpoints. Errors as ``survey``; ``ConfigError`` where something
    would be overwritten and ``force`` is not given. ``expert_parallel_size``: see ``write_checkpoint``.
    """
    pool = HostPool(max(1, len(os.sched_getaffinity(0))))
    found = survey(folders, run_id, pool, say, iteration)
    say(f"iteration {found.iteration}: mode {found.identity.mode}, {found.identity.world_size} ranks")
    target = checkpoint_folder(str(output), found.iteration)
    _require_free(output, target, force=force)
    for owner in found.owners:
        refuse(owner)
    _require_memory(found)
    replayed = 0
    try:
        with Draft(output, found.iteration) as draft, PartWriter(draft.folder, 0) as writer:
            part = RankPart(writer)
            for number, owner in enumerate(found.owners, 1):
                replayed = max(replayed, write_rank(owner, found.iteration, part, pool, replayer))
                say(f"wrote rank {owner.rank} ({number} of {len(found.owners)})")
            finish(draft.folder, [writer.close()], found.iteration, expert_parallel_size)
            draft.publish()
    except OSError as error:
        raise StoreError(f"{target} cannot be written: {error.strerror or error}") from error
    return Exported(
        checkpoint=str(target),
        iteration=found.iteration,
        mode=found.identity.mode,
        ranks=found.identity.world_size,
        nbytes=writer.nbytes,
        replayed_steps=replayed,
        stale=found.stale,
        left_out=sorted({key for owner in found.owners for key in owner.sheet.guide["left_out"]}),
        notes=found.notes,
    )


class RankPart:
    """Writes what ``write_rank`` gives of any number of ranks into one part of a checkpoint."""

    def __init__(self, writer: PartWriter) -> None:
        self._writer = writer

    def add(self, stretch: Stretch) -> None:
        """Write it."""
        tensors = {role: _tensor(data, stretch.dtypes[role]) for role, data in stretch.arrays.items()}
        scales = {name: _tensor(data, "float32") for name, data in stretch.scales.items()}
        self._writer.add(stretch.entry, stretch.start, tensors, scales)

    def add_rank(self, owner: Owner, state: Mapping[str, Any]) -> None:
        """Write what is no tensor."""
        self._writer.add_rank(owner.rank, owner.sheet.guide, state)


def _require_free(output: Path, target: Path, *, force: bool) -> None:
    if force:
        return
    if target.exists():
        raise ConfigError(f"{target} exists: choose another --output, or replace it with --force")
    if (latest := latest_iteration(str(output))) is not None:
        raise ConfigError(
            f"{output / TRACKER} names iteration {latest} of checkpoints that are there: choose another --output, or "
            f"let it name this one with --force"
        )


def _require_memory(found: Found) -> None:
    """``StoreError`` where this machine cannot hold the state of one rank beside the arenas."""
    need = max(memory_bytes(owner) for owner in found.owners) + 3 * CHUNK_BYTES
    if need > (have := available_bytes()):
        raise StoreError(
            f"the state of a rank takes {need / 2**30:,.1f} GiB of memory beside the arenas, and this machine has "
            f"{have / 2**30:,.1f} GiB available: copy the arenas to a larger one, or to a disk of this one, from where "
            f"they are read as well"
        )


def _tensor(data: Bytes, dtype: str) -> torch.Tensor:
    return torch.from_numpy(data).view(getattr(torch, dtype))


def replayer(
    owner: Owner, stretches: Sequence[Stretch], state: Mapping[str, Any]
) -> AbstractContextManager[StepReplayer]:
    """What repeats the steps of one rank's optimizers on these stretches, in place. Left, it lets go of them."""
    held = [
        offline.Stretch(
            link=each.entry["link"],
            group=each.entry["group"],
            main=_tensor(each.arrays[Role.MASTER], each.dtypes[Role.MASTER]),
            exp_avg=_tensor(each.arrays[Role.EXP_AVG], each.dtypes[Role.EXP_AVG]),
            exp_avg_sq=_tensor(each.arrays[Role.EXP_AVG_SQ], each.dtypes[Role.EXP_AVG_SQ]),
            gradient=_tensor(each.arrays[Role.GRAD], each.dtypes[Role.GRAD]),
        )
        for each in stretches
    ]
    return closing(offline.offline_steps(held, owner.sheet.guide["optimizers"], state))
