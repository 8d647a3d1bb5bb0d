# SPDX-License-Identifier: Apache-2.0
"""What several nodes' folders hold of one run, every byte of it verified, and how its newest iteration is put together.

The same rules choose as in a recovery and in ``moetion status`` (``inspect/judge.py``); nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_moetion.errors import ConfigError, CorruptArena, NothingRecoverable, StoreError
from megatron_moetion.inspect.judge import CHOOSE, Copy, Judgement, held_by_owner, judge, newest_history
from megatron_moetion.mcore.guide import GUIDE_VERSION
from megatron_moetion.recover.plan import Units, what_is_missing
from megatron_moetion.recover.survey import intact
from megatron_moetion.snapshot.packer import HostPool
from megatron_moetion.store.arena import Arena
from megatron_moetion.store.manifest import Records
from megatron_moetion.store.reading import read_only
from megatron_moetion.store.sheet import Sheet, export_problem, read_sheet
from megatron_moetion.store.spec import ArenaIdentity
from megatron_moetion.store.vetoes import vetoed_in
from megatron_moetion.units import UnitKind

Say = Callable[[str], None]
"""Takes a line for a person: how far an export has come."""
_NAMED_MAX = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """One arena of an owner, and those of its captures that verify and belong to the run's newest history.

    ``records`` are of whole captures, also where the arena has fragments of them.
    """

    arena: Arena
    records: Records


@dataclass(frozen=True, kw_only=True, eq=False)
class Owner:
    """One rank of the run. ``chosen``: unit and iteration of each capture that leads to the iteration."""

    rank: int
    sheet: Sheet
    units: Units
    sources: tuple[Source, ...]
    chosen: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """All that is needed to put ``iteration`` together, of every rank."""

    identity: ArenaIdentity
    """Of any rank."""
    owners: tuple[Owner, ...]
    """By rank."""
    iteration: int
    reachable: tuple[int, ...]
    """Every iteration that could be had, the newest first."""
    stale: Mapping[str, int]
    """Experts that are older than ``iteration``, by unit name: the iteration that they are of (mode ``popularity``)."""
    notes: tuple[str, ...]
    """What was passed over, for a person."""


def survey(folders: Sequence[Path], run_id: str, pool: HostPool, say: Say, iteration: int | None = None) -> Found:
    """Verify the arenas in the folders of a run's nodes, and choose. ``iteration``: the wanted one, None: the newest.

    ``NothingRecoverable`` where some rank cannot be put together, with the reason; ``ConfigError`` for state that
    cannot be exported.
    """
    notes: list[str] = []
    arenas = _open_all(folders, run_id, notes)
    copies = []
    for number, (node, arena) in enumerate(arenas, 1):
        sound = arena.page.records.where(intact(arena, arena.page.records, pool))
        if damaged := len(arena.page.records) - len(sound):
            notes.append(f"{arena.name}: {damaged} capture(s) do not verify")
        copies.append(Copy(node=node, spec=arena.spec, page=arena.page, records=arena.whole_records(sound)))
        say(f"verified {number} of {len(arenas)} arenas")
    history = newest_history(copies)
    vetoed: set[int] = set()
    if history is not None:
        vetoed = {i for folder in folders for i in vetoed_in(folder, history.lineage, history.epoch)}
    judged = judge(copies, vetoed)
    notes.extend(
        f"{arena.name} {copy.problem}"
        for (_, arena), copy in zip(arenas, judged.copies, strict=True)
        if copy.problem is not None
    )
    return _choose(judged, [arena for _, arena in arenas], folders, iteration, notes)


def owner_alone(arena: Arena, iteration: int) -> Owner:
    """One rank, from its own arena: just the captures that lead to ``iteration``, not verified.

    ``NothingRecoverable`` where some are not there; ``ConfigError`` for state that cannot be exported.
    """
    copy = Copy.of(0, arena.spec, arena.page)
    choose = CHOOSE[arena.spec.identity.mode]
    chosen = choose(copy.units, held_by_owner([copy], arena.spec.identity.mode)[copy.owner], iteration)
    if isinstance(chosen, str):
        raise NothingRecoverable(f"iteration {iteration} is not in {arena.name} (any more): {chosen}")
    wanted = set(chosen)
    records = Records.of([r for r in copy.records if r.key in wanted])
    return Owner(
        rank=copy.owner,
        sheet=_sheet(arena, copy.owner),
        units=copy.units,
        sources=(Source(arena=arena, records=records),),
        chosen=tuple(chosen),
    )


def _open_all(folders: Sequence[Path], run_id: str, notes: list[str]) -> list[tuple[int, Arena]]:
    """The arenas of this run that can be opened, each with the number of its folder."""
    found: list[tuple[int, Arena]] = []
    others: set[str] = set()
    for node, folder in enumerate(folders):
        for path in sorted(folder.glob("*.arena")):
            try:
                arena = read_only(path)
            except StoreError as error:
                notes.append(str(error))
                continue
            if arena.spec.identity.run_id == run_id:
                found.append((node, arena))
            else:
                others.add(arena.spec.identity.run_id)
                arena.close()
    if not found:
        here = f"; there are arenas of {', '.join(sorted(others))}" if others else ""
        why = f": {'; '.join(notes[:_NAMED_MAX])}" if notes else ""
        raise NothingRecoverable(f"no arena of {run_id} in {_listed(folders)} can be read{here}{why}")
    return found


def _choose(
    judged: Judgement, arenas: Sequence[Arena], folders: Sequence[Path], wanted: int | None, notes: list[str]
) -> Found:
    if judged.identity is None:
        raise NothingRecoverable(f"there is nothing to export: {judged.reason}")
    if judged.missing:
        ranks = ", ".join(map(str, judged.missing[:_NAMED_MAX])) + (", ..." if len(judged.missing) > _NAMED_MAX else "")
        raise NothingRecoverable(
            f"no copy of rank(s) {ranks} of {judged.identity.world_size} is in {_listed(folders)}: give the folders of "
            f"more nodes. A rank's arena is on its own node and on those of its replicas"
        )
    if judged.iteration < 0:
        raise NothingRecoverable(f"there is nothing to export: {judged.reason}")
    choose = CHOOSE[judged.identity.mode]
    usable = [(j.copy, arena) for j, arena in zip(judged.copies, arenas, strict=True) if j.problem is None]
    held = held_by_owner([copy for copy, _ in usable], judged.identity.mode)
    reachable = set.intersection(*(set(rank.reaches) for rank in judged.ranks))
    iteration = judged.iteration if wanted is None else wanted
    owners = []
    stale: dict[str, int] = {}
    for rank in range(judged.identity.world_size):
        sources = [Source(arena=arena, records=copy.records) for copy, arena in usable if copy.owner == rank]
        units = [(name, UnitKind(kind)) for name, kind, _ in sources[0].arena.spec.units]
        if iteration not in reachable:
            missing = what_is_missing(rank, units, held[rank], choose, [iteration]).get(str(iteration))
            could = ", ".join(map(str, sorted(reachable, reverse=True)))
            if missing is not None:
                raise NothingRecoverable(f"iteration {iteration}: {missing}. What can be had: {could}")
            continue
        chosen = choose(units, held[rank], iteration)
        assert not isinstance(chosen, str), f"rank {rank} said that it reaches iteration {iteration}: {chosen}"
        owners.append(
            Owner(
                rank=rank,
                sheet=_sheet(sources[0].arena, rank),
                units=units,
                sources=tuple(sources),
                chosen=tuple(chosen),
            )
        )
        if judged.identity.mode == "popularity":
            stale |= {units[u][0]: i for u, i in chosen if units[u][1] is UnitKind.EXPERT and i < iteration}
    if iteration in judged.vetoed:
        notes.append(f"training has called iteration {iteration} unhealthy, and no other one can be had")
    return Found(
        identity=judged.identity,
        owners=tuple(owners),
        iteration=iteration,
        reachable=tuple(sorted(reachable, reverse=True)),
        stale=dict(sorted(stale.items())),
        notes=tuple(notes),
    )


def _sheet(arena: Arena, rank: int) -> Sheet:
    """``ConfigError`` where a rank's state has no places in a checkpoint."""
    try:
        sheet = read_sheet(arena.spec.sheet)
    except CorruptArena as error:
        raise CorruptArena(f"{arena.name}: {error}") from error
    if sheet.guide.get("version") != GUIDE_VERSION:
        raise ConfigError(
            f"the state of rank {rank} cannot be exported: {arena.name} was written by another version of MoEtion (its "
            f"guide is of version {sheet.guide.get('version')}, this program reads {GUIDE_VERSION}); export with that"
        )
    if problem := export_problem(sheet.guide):
        raise ConfigError(f"the state of rank {rank} cannot be exported: {problem}")
    return sheet


def _listed(folders: Sequence[Path]) -> str:
    return ", ".join(map(str, folders))
