# SPDX-License-Identifier: Apache-2.0
"""What a node's store really holds: every arena opened, every capture verified, reported as plain values.

A rank looks only at files of its own node.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_moetion.errors import CorruptArena, IdentityMismatch
from megatron_moetion.recover.report import ArenaReport
from megatron_moetion.snapshot.packer import HostPool, verify
from megatron_moetion.store.arena import Arena
from megatron_moetion.store.manifest import Record
from megatron_moetion.store.spec import ArenaSpec, check_identity


def survey_store(
    paths: Sequence[Path], node: int, rank: int, specs: Sequence[ArenaSpec], pool: HostPool
) -> list[ArenaReport]:
    """Verify the given arenas of this node. ``specs`` are what each owner's arena must be like; ``rank`` looks.

    Arenas of other settings that never held anything are what a start that failed has left: they are passed over.
    """
    reports = (_report(path, node, rank, specs, pool) for path in paths)
    return [r for r in reports if r is not None]


def _report(path: Path, node: int, rank: int, specs: Sequence[ArenaSpec], pool: HostPool) -> ArenaReport | None:
    try:
        arena = Arena.open(path)
    except IdentityMismatch as error:
        return ArenaReport(path=str(path), node=node, problem=str(error), stranger=True)
    except (CorruptArena, OSError) as error:
        return ArenaReport(path=str(path), node=node, problem=str(error))
    try:
        owner = arena.spec.identity.owner
        check_identity(arena.spec, specs[owner if owner < len(specs) else rank], str(path))
        page = arena.page
        sound = [r for r in page.records if _verifies(arena, r, pool)]
        return ArenaReport(
            path=str(path),
            node=node,
            owner=arena.spec.identity.owner,
            epoch=page.epoch,
            stable=page.stable,
            lineage=page.lineage,
            branches=page.branches,
            captures=tuple(sound),
            damaged=len(page.records) - len(sound),
            verified_bytes=sum(r.nbytes for r in sound),
        )
    except IdentityMismatch as error:
        if arena.page.stable < 0 and not arena.page.records:
            return None
        return ArenaReport(path=str(path), node=node, problem=str(error), stranger=True)
    finally:
        arena.close()


def _verifies(arena: Arena, record: Record, pool: HostPool) -> bool:
    units = arena.spec.units
    if record.is_zero:
        return record.unit < len(units) and not record.nbytes
    if record.unit >= len(units) or record.slot >= arena.spec.num_slots or units[record.unit][2] != record.nbytes:
        return False
    payload = arena.payload(record.slot)
    if payload.nbytes != record.nbytes:
        return False
    return verify(pool, arena.spec.identity.chunk_bytes, payload, arena.digests(record.slot), record.digest)
