# SPDX-License-Identifier: Apache-2.0
"""A rank's captures as its part of a checkpoint on disk, beside the checkpoint that Megatron itself saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing
from torch import distributed as dist

from megatron_moetion.export.assemble import write_rank
from megatron_moetion.export.export import RankPart, replayer
from megatron_moetion.export.survey import Owner, Source
from megatron_moetion.mcore.state import MegatronState
from megatron_moetion.mcore.topology import topology
from megatron_moetion.mcore.torch_dist import PartWriter, finish
from megatron_moetion.pretrain.checkpoint import save_checkpoint
from megatron_moetion.pretrain.loop import Trainer
from megatron_moetion.snapshot.host_state import decode, encode
from megatron_moetion.snapshot.packer import HostPool, Packer
from megatron_moetion.snapshot.plan import Targets
from megatron_moetion.store.manifest import Page, Records
from megatron_moetion.store.sharedfile import create_arena
from megatron_moetion.store.sheet import read_sheet
from megatron_moetion.store.spec import ArenaIdentity, ArenaSpec
from megatron_moetion.units import UnitKind

CHUNK_BYTES = 1 << 16
ITERATION = 1


def differs_from_megatrons(trainer: Trainer, state: MegatronState, folder: Path) -> list[str]:
    """Keys of one of the two checkpoints alone, or with another bit. Every rank writes a part, rank 0 the rest.

    All ranks call it. What is left out of the comparison is the record of flags.
    """
    ours, rank = folder / "ours", dist.get_rank()
    if rank == 0:
        ours.mkdir(parents=True)
    dist.barrier()
    owner = _captured(state, folder)
    with PartWriter(ours, rank, chunk_bytes=1 << 12) as writer:
        write_rank(owner, ITERATION, RankPart(writer), HostPool(1), replayer)
        part = encode(writer.close())
    parts: list[bytes] = [b""] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    if rank == 0:
        finish(ours, [decode(each) for each in parts], trainer.progress.iteration)
    with trainer.params_gathered():
        theirs = save_checkpoint(str(folder), trainer.model, trainer.optimizer, trainer.scheduler, trainer.state)
    found = [dist_checkpointing.load_plain_tensors(str(each)) for each in (ours, theirs)]
    common = [{k: v for k, v in each.items() if k not in ("progress", "args")} for each in found]
    return [k for k in sorted({*common[0], *common[1]}) if not _same(*(c.get(k) for c in common))]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype is b.dtype and a.shape == b.shape and _bits(a) == _bits(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _captured(state: MegatronState, folder: Path) -> Owner:
    """This rank's state in an arena of its own."""
    inventory, rank = state.inventory(), dist.get_rank()
    identity = ArenaIdentity(
        run_id="disk", owner=rank, world_size=dist.get_world_size(), topology=topology(),
        layout=inventory.fingerprint, mode="full", chunk_bytes=CHUNK_BYTES,
    )  # fmt: skip
    spec = ArenaSpec.of(identity, inventory, {unit.name: 1 for unit in inventory.units})
    arena = create_arena(folder / f"rank{rank:05d}.arena", spec, Page())
    packer = Packer(inventory, CHUNK_BYTES, HostPool(1), None)
    units = np.arange(len(inventory.units))
    slots = arena.acquire_all(arena.unit_bytes[units])
    assert slots is not None
    targets = Targets.in_slots(units, arena.payload_addresses(slots), arena.unit_bytes[units])
    packer.freeze(encode({"adapter": state.host_state()}))
    digests = packer.pack(targets, lambda: None)
    assert digests is not None
    nbytes = arena.unit_bytes[units]
    records = Records.make(len(units), unit=units, iteration=ITERATION, slot=slots, nbytes=nbytes, digest=digests)
    arena.add(records)
    return Owner(
        rank=rank,
        sheet=read_sheet(spec.sheet),
        units=[(name, UnitKind(kind)) for name, kind, _ in spec.units],
        sources=(Source(arena=arena, records=records),),
        chosen=tuple((int(unit), ITERATION) for unit in units),
    )
