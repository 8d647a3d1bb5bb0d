# SPDX-License-Identifier: Apache-2.0
"""What a node's store really holds: every arena opened, every capture verified, reported as plain values.

A rank looks only at arenas of its own node. What it will use later it looks at itself, and leaves it open.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_moetion.arrays import Flags
from megatron_moetion.errors import CorruptArena, IdentityMismatch
from megatron_moetion.recover.opened import Opened
from megatron_moetion.recover.plan import custodian
from megatron_moetion.recover.report import ArenaReport, History
from megatron_moetion.replicate.placement import Placement
from megatron_moetion.snapshot.digest import gather_digests, num_chunks_of, verify
from megatron_moetion.snapshot.packer import HostPool
from megatron_moetion.store.arena import Arena
from megatron_moetion.store.manifest import Records
from megatron_moetion.store.spec import ArenaIdentity, ArenaShape, check_identity, owner_of


def share_of(rank: int, names: Sequence[str], node: int, placement: Placement) -> list[str]:
    """Of the arenas on node number ``node``, those that this rank surveys, its own first.

    They are those that it opens afterwards if they are sound. Arenas of no rank of this run go round.
    """
    found = {name: owner_of(name) for name in names}
    owners = {name: owner for name, owner in found.items() if owner is not None and owner < len(placement.node_of)}
    ranks = placement.ranks_on(node)
    foreign = [name for name in names if name not in owners]
    ours = [name for name in names if name in owners and custodian(owners[name], node, placement) == rank]
    return sorted(ours, key=lambda name: owners[name] != rank) + foreign[ranks.index(rank) :: len(ranks)]


def survey_store(
    opened: Opened, names: Sequence[str], ours: ArenaIdentity, shapes: Sequence[ArenaShape], pool: HostPool
) -> list[ArenaReport]:
    """Verify the arenas of these names; those without a problem stay open.

    ``ours`` is the surveying rank's identity, ``shapes[r]`` what rank r's arena must match. Arenas of other settings
    that never held anything are left over from a start that failed: they are passed over, and so is an arena under
    another rank's name, which nobody would find again.
    """
    reports = []
    for name in names:
        report = _report(opened, name, ours, shapes, pool)
        if report is None or report.problem:
            opened.close(name)
        if report is not None:
            reports.append(report)
    return reports


def _report(
    opened: Opened, name: str, ours: ArenaIdentity, shapes: Sequence[ArenaShape], pool: HostPool
) -> ArenaReport | None:
    path = opened.node.describe(name)
    try:
        arena = opened.open(name)
    except IdentityMismatch as error:
        return ArenaReport(path=path, problem=str(error), foreign=True)
    except (CorruptArena, OSError) as error:
        return ArenaReport(path=path, problem=str(error))
    try:
        owner = arena.spec.identity.owner
        check_identity(arena.spec, ours, shapes[owner] if owner < len(shapes) else None, path)
        if name != arena.spec.name:
            return None
        page = arena.page
        sound = page.records.where(intact(arena, page.records, pool))
        return ArenaReport(
            path=path,
            owner=owner,
            part=arena.spec.part,
            history=History.of(page),
            records=arena.whole_records(sound),
            damaged=len(page.records) - len(sound),
        )
    except IdentityMismatch as error:
        if arena.page.stable < 0 and not arena.page.records:
            return None
        return ArenaReport(path=path, problem=str(error), foreign=True)


def intact(arena: Arena, records: Records, pool: HostPool) -> Flags:
    """Whether each capture is of a unit of the arena, in a slot of its size, and as it was captured; bool[n]."""
    units, slots, nbytes = (records.table[field].astype(np.int64) for field in ("unit", "slot", "nbytes"))
    is_known, is_zero = units < len(arena.spec.units), records.is_zero
    stored = np.flatnonzero(is_known & ~is_zero & (slots < arena.spec.num_slots) & (nbytes > 0))
    fits = (nbytes[stored] == arena.unit_bytes[units[stored]]) & (nbytes[stored] == arena.slot_bytes(slots[stored]))
    stored = stored[fits]
    addresses, sizes = arena.payload_addresses(slots[stored]), nbytes[stored]
    chunk_bytes = arena.spec.identity.chunk_bytes
    digests = gather_digests(pool, addresses + sizes, num_chunks_of(sizes, chunk_bytes))
    found: Flags = is_known & is_zero & (nbytes == 0)
    found[stored] = verify(pool, chunk_bytes, addresses, sizes, digests, records.table["digest"][stored])
    return found
