# SPDX-License-Identifier: Apache-2.0
"""From the folders of a dead run to a checkpoint on disk: survey, put together, write, rename."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_moetion.arrays import Bytes
from megatron_moetion.errors import ConfigError, StoreError
from megatron_moetion.export.assemble import Assembled, Assembly, Held, Whole
from megatron_moetion.export.survey import Found, Owner, Say, survey
from megatron_moetion.framework import StepReplayer
from megatron_moetion.mcore.offline import Stretch, offline_steps
from megatron_moetion.mcore.torch_dist import Tensors, write_checkpoint
from megatron_moetion.persist.tracker import TRACKER, checkpoint_folder, latest_iteration, write_tracker
from megatron_moetion.snapshot.packer import HostPool
from megatron_moetion.store.sharedfile import available_bytes
from megatron_moetion.units import Role

_STATE_BYTES = 12
"""Of an element that is trained: main value and two moments."""


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
    _require_memory(found)
    assembly = Assembly(found, pool, _replayer)
    for number, owner in enumerate(found.owners, 1):
        assembly.add(owner)
        say(f"read rank {owner.rank} ({number} of {len(found.owners)})")
    assembled = assembly.finish()
    say(f"writing {assembled.nbytes / 2**20:,.1f} MiB to {target}")
    guides = [owner.sheet.guide for owner in found.owners]
    _write(output, target, assembled, guides, found.iteration, expert_parallel_size)
    return Exported(
        checkpoint=str(target),
        iteration=found.iteration,
        mode=found.identity.mode,
        ranks=found.identity.world_size,
        nbytes=assembled.nbytes,
        replayed_steps=assembled.replayed_steps,
        stale=found.stale,
        left_out=sorted({key for guide in guides for key in guide["left_out"]}),
        notes=found.notes,
    )


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
    """``StoreError`` where this machine cannot hold the state beside the arenas."""
    needs: dict[tuple[str, tuple[int, ...]], int] = {}
    for entry in (entry for owner in found.owners for entry in owner.sheet.guide["parameters"]):
        for view in entry["views"]:
            dtype = getattr(torch, entry["dtype"])
            is_stepped, is_own = entry["link"] is not None, dtype is not torch.float32
            each = _STATE_BYTES + is_own * dtype.itemsize if is_stepped else dtype.itemsize
            copies = 1 if len(entry["views"]) == 1 else 2  # Megatron's writer clones what is a part of a tensor
            needs[view["key"], tuple(view["global_offset"])] = each * copies * torch.Size(view["shape"]).numel()
    need, have = sum(needs.values()), available_bytes()
    if need > have:
        raise StoreError(
            f"the state takes {need / 2**30:,.1f} GiB of memory beside the arenas, and this machine has "
            f"{have / 2**30:,.1f} GiB available: copy the arenas to a larger one, or to a disk of this one, from where "
            f"they are read as well"
        )


def _write(
    output: Path,
    target: Path,
    assembled: Assembled,
    guides: Sequence[Mapping[str, Any]],
    iteration: int,
    expert_parallel_size: int | None,
) -> None:
    """All of it under another name, then the name, then the tracker."""
    scratch = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        scratch.mkdir(parents=True)
        states = [host["adapter"] for host in assembled.hosts]
        write_checkpoint(
            scratch, [_tensors(w) for w in assembled.wholes.values()], guides, states, iteration, expert_parallel_size
        )
        old = target.with_name(f".{target.name}.{os.getpid()}.old")
        with suppress(FileNotFoundError):
            target.rename(old)
        scratch.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        write_tracker(output, iteration)
    except OSError as error:
        raise StoreError(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _tensors(whole: Whole) -> Tensors:
    def of(role: Role) -> torch.Tensor:
        return _tensor(whole.arrays[role], whole.dtypes[role])

    dtype = getattr(torch, whole.guide["dtype"])
    if Role.MASTER in whole.arrays:
        main = of(Role.MASTER)
        moments = {name: of(role) for name, role in _MOMENTS.items() if role in whole.arrays}
        return Tensors(guide=whole.guide, weight=main.to(dtype), main=main, **moments)
    return Tensors(guide=whole.guide, weight=of(Role.WEIGHT if Role.WEIGHT in whole.arrays else Role.BUFFER))


_MOMENTS = {"exp_avg": Role.EXP_AVG, "exp_avg_sq": Role.EXP_AVG_SQ}


def _tensor(data: Bytes, dtype: str) -> torch.Tensor:
    return torch.from_numpy(data).view(getattr(torch, dtype))


def _replayer(owner: Owner, held: Sequence[Held], state: Mapping[str, Any]) -> StepReplayer:
    stretches = [
        Stretch(
            link=each.link,
            group=each.group,
            main=_tensor(each.arrays[Role.MASTER], each.dtypes[Role.MASTER]),
            exp_avg=_tensor(each.arrays[Role.EXP_AVG], each.dtypes[Role.EXP_AVG]),
            exp_avg_sq=_tensor(each.arrays[Role.EXP_AVG_SQ], each.dtypes[Role.EXP_AVG_SQ]),
            gradient=_tensor(each.arrays[Role.GRAD], each.dtypes[Role.GRAD]),
        )
        for each in held
    ]
    return offline_steps(stretches, owner.sheet.guide["optimizers"], state)
