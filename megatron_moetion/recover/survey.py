# SPDX-License-Identifier: Apache-2.0
"""What a node's store really holds: every arena opened, every capture verified, reported as plain values.

A rank looks only at files of its own node. Reports travel as JSON; nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_moetion.errors import CorruptArena, IdentityMismatch
from megatron_moetion.snapshot.packer import HostPool, verify
from megatron_moetion.store.arena import Arena, ArenaSpec, check_identity
from megatron_moetion.store.manifest import Branch, Record


@dataclass(frozen=True, kw_only=True)
class ArenaReport:
    """One arena as found. ``problem`` is set where it cannot be used at all, or is not ours to use."""

    path: str
    node: int
    owner: int = -1
    epoch: int = 0
    stable: int = -1
    lineage: int = 0
    branches: tuple[Branch, ...] = ()
    captures: tuple[Record, ...] = ()
    """Captures whose bytes verify."""
    damaged: int = 0
    """Captures that are listed and do not verify."""
    verified_bytes: int = 0
    problem: str = ""
    stranger: bool = False
    """The arena is sound and belongs to another run, topology or model."""

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> ArenaReport:
        """Inverse of ``to_json``."""
        values = dict(raw)
        values["branches"] = tuple(Branch(**b) for b in raw["branches"])
        values["captures"] = tuple(Record(**c) for c in raw["captures"])
        return cls(**values)


def survey_store(
    paths: Sequence[Path], node: int, rank: int, specs: Sequence[ArenaSpec], pool: HostPool
) -> list[ArenaReport]:
    """Verify the given arenas of this node. ``specs`` are what each owner's arena must be like; ``rank`` looks.

    Arenas of other settings that never held anything are what a start that failed has left: they are passed over.
    """
    reports = (_report(path, node, rank, specs, pool) for path in paths)
    return [r for r in reports if r is not None]


def living(reports: Sequence[ArenaReport]) -> tuple[ArenaReport, ...]:
    """The reports, those of other histories marked as of no use.

    A node may come back with memory from before the run began anew, or from a recovery that was cut short on it and
    then took place without it, to another iteration perhaps. The history that went on is the one of the newest
    lineage, the latest epoch, the newest stable iteration.
    """
    sound = [r for r in reports if not r.problem]
    if not sound:
        return tuple(reports)
    newest = max(sound, key=lambda r: (r.lineage, r.epoch, r.stable))
    nonces = {b.epoch: b.nonce for b in newest.branches}

    def is_dead(report: ArenaReport) -> bool:
        forked = any(nonces.get(b.epoch, b.nonce) != b.nonce for b in report.branches)
        return not report.problem and (report.lineage < newest.lineage or forked)

    why = "belongs to a history of this run that did not go on"
    return tuple(replace(r, problem=f"{r.path} {why}", captures=()) if is_dead(r) else r for r in reports)


def _report(path: Path, node: int, rank: int, specs: Sequence[ArenaSpec], pool: HostPool) -> ArenaReport | None:
    try:
        arena = Arena.open(path)
    except IdentityMismatch as error:
        return ArenaReport(path=str(path), node=node, problem=str(error), stranger=True)
    except (CorruptArena, OSError) as error:
        return ArenaReport(path=str(path), node=node, problem=str(error))
    try:
        owner = arena.spec.identity.owner
        check_identity(arena.spec, specs[owner if owner < len(specs) else rank], path)
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
