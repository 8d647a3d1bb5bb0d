# SPDX-License-Identifier: Apache-2.0
"""What several nodes' folders hold of one run, and the iteration that can be put together from them.

The same rules choose as in a recovery (``recover/plan.py``), but one process looks at everything and no run exists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_moetion.errors import ConfigError, MoetionError, NothingRecoverable
from megatron_moetion.recover.plan import (
    Choose,
    Reach,
    Units,
    choose_chains,
    choose_newest_experts,
    choose_same_iteration,
    held_of,
    plan_of,
    what_is_missing,
)
from megatron_moetion.recover.report import ArenaReport, History, of_history
from megatron_moetion.recover.survey import intact
from megatron_moetion.snapshot.packer import HostPool
from megatron_moetion.store.arena import Arena
from megatron_moetion.store.manifest import Records, in_history
from megatron_moetion.store.reading import read_only
from megatron_moetion.store.sheet import Sheet, read_sheet
from megatron_moetion.store.spec import ArenaIdentity
from megatron_moetion.store.vetoes import vetoed_in
from megatron_moetion.units import UnitKind

Say = Callable[[str], None]
"""Takes a line for a person: how far an export has come."""
_CHOOSES: Mapping[str, Choose] = {
    "full": choose_same_iteration,
    "exact": choose_chains,
    "popularity": choose_newest_experts,
}
_NAMED_MAX = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class Copy:
    """One arena of an owner, and those of its captures that verify and belong to the run's newest history."""

    arena: Arena
    records: Records


@dataclass(frozen=True, kw_only=True, eq=False)
class Owner:
    """One rank of the dead run. ``chosen``: unit and iteration of each capture that leads to T."""

    rank: int
    sheet: Sheet
    units: Units
    copies: tuple[Copy, ...]
    chosen: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """All that is needed to put iteration ``iteration`` together, of every rank."""

    identity: ArenaIdentity
    """Of all arenas but for ``owner`` and ``layout``."""
    owners: tuple[Owner, ...]
    """By rank."""
    iteration: int
    reachable: tuple[int, ...]
    """Every iteration that could be had, the newest first."""
    stale: Mapping[str, int]
    """Experts that are older than ``iteration``, by unit name: the iteration that they are of (mode ``popularity``)."""
    notes: tuple[str, ...]
    """What was passed over, for a person."""


def arenas_in(folders: Sequence[Path]) -> list[Path]:
    """The arenas in these folders: each a node's, a run's with nodes in it, or one with several runs' copies of nodes.

    ``ConfigError`` where there is none.
    """
    found: list[Path] = []
    for folder in folders:
        here = [p for pattern in ("*.arena", "*/*.arena") for p in folder.glob(pattern) if p.is_file()]
        if not here:
            raise ConfigError(
                f"{folder} holds no arenas: give the folder of a run (STORE/RUN_ID), or of its nodes (.../node0), as "
                f"they are or as copies"
            )
        found.extend(here)
    return sorted({path.resolve(): path for path in found}.values())


def survey(folders: Sequence[Path], pool: HostPool, say: Say, iteration: int | None = None) -> Found:
    """Verify everything and choose. ``iteration``: the one that is wanted, None: the newest.

    ``NothingRecoverable`` where some rank cannot be put together, with the reason; ``ConfigError`` where the folders
    hold several runs, or what cannot be exported.
    """
    paths = arenas_in(folders)
    notes: list[str] = []
    opened = [arena for path in paths if (arena := _opened(path, notes)) is not None]
    if not opened:
        raise NothingRecoverable(f"none of {len(paths)} arenas can be read: {'; '.join(notes[:_NAMED_MAX])}")
    identity = _one_run(opened)
    reports = []
    for number, arena in enumerate(opened, 1):
        page = arena.page
        sound = page.records.where(intact(arena, page.records, pool))
        if damaged := len(page.records) - len(sound):
            notes.append(f"{arena.name}: {damaged} capture(s) do not verify")
        owner = arena.spec.identity.owner
        reports.append(ArenaReport(path=arena.name, owner=owner, history=History.of(page), records=sound))
        say(f"verified {number} of {len(opened)} arenas")
    newest = max((r.history for r in reports), key=lambda h: h.age)
    copies: dict[int, list[Copy]] = {}
    for arena, report in zip(opened, of_history(reports, newest), strict=True):
        if report.problem:
            notes.append(report.problem)
        else:
            alive = report.records.where(in_history(report.records, newest.branches, newest.epoch))
            copies.setdefault(report.owner, []).append(Copy(arena=arena, records=alive))
    owners = _owners(identity, copies, folders)
    vetoed = {i for path in paths for i in vetoed_in(path.parent, newest.lineage, newest.epoch)}
    return _chosen(identity, owners, newest, vetoed, iteration, notes)


def _opened(path: Path, notes: list[str]) -> Arena | None:
    try:
        return read_only(path)
    except MoetionError as error:
        notes.append(str(error))
        return None


def _one_run(arenas: Sequence[Arena]) -> ArenaIdentity:
    """The identity that all share; ``ConfigError`` where they do not."""

    def shared(identity: ArenaIdentity) -> dict[str, object]:
        return {k: v for k, v in asdict(identity).items() if k not in ("owner", "layout")}

    first = arenas[0].spec.identity
    for arena in arenas[1:]:
        theirs, ours = shared(arena.spec.identity), shared(first)
        differ = [f"{k} {ours[k]!r} and {theirs[k]!r}" for k in ours if ours[k] != theirs[k]]
        if differ:
            raise ConfigError(
                f"{arenas[0].name} and {arena.name} are of different runs ({', '.join(differ)}): give the folders of "
                f"one run"
            )
    return first


def _owners(identity: ArenaIdentity, copies: Mapping[int, Sequence[Copy]], folders: Sequence[Path]) -> list[Owner]:
    missing = [rank for rank in range(identity.world_size) if rank not in copies]
    if missing:
        listed = ", ".join(map(str, missing[:_NAMED_MAX])) + (", ..." if len(missing) > _NAMED_MAX else "")
        raise NothingRecoverable(
            f"no copy of rank(s) {listed} of {identity.world_size} is in {', '.join(map(str, folders))}: add the "
            f"folders of more nodes; each rank's own node has its arena, and so do the nodes of its replicas"
        )
    owners = []
    for rank in range(identity.world_size):
        spec = copies[rank][0].arena.spec
        sheet = read_sheet(spec.sheet)
        if problem := sheet.guide.get("problem", "the framework gave no guide to its tensors"):
            raise ConfigError(f"the state of rank {rank} cannot be exported: {problem}")
        units = [(name, UnitKind(kind)) for name, kind, _ in spec.units]
        owners.append(Owner(rank=rank, sheet=sheet, units=units, copies=tuple(copies[rank])))
    return owners


def _chosen(
    identity: ArenaIdentity,
    owners: Sequence[Owner],
    newest: History,
    vetoed: set[int],
    wanted: int | None,
    notes: Sequence[str],
) -> Found:
    choose = _CHOOSES[identity.mode]
    held = _held(owners, identity.mode)
    reach = None
    for owner in owners:
        mine = Reach.of(owner.rank, owner.units, held[owner.rank], choose, vetoed)
        reach = mine if reach is None else reach.followed_by(mine)
    assert reach is not None
    plan = plan_of(reach, newest, nonce=0)
    if plan is None or (wanted is not None and wanted not in reach.iterations):
        iterations = [wanted] if wanted is not None else reach.hosts[:3]
        why = [
            f"iteration {i}: {text}"
            for owner in owners
            for i, text in what_is_missing(owner.rank, owner.units, held[owner.rank], choose, iterations).items()
        ]
        could = f"; what there is: {', '.join(map(str, reach.iterations))}" if reach.iterations else ""
        nothing = "there is no iteration of which every rank has its host state"
        raise NothingRecoverable(f"{'; '.join(why[:_NAMED_MAX]) or nothing}{could}")
    iteration = plan.iteration if wanted is None else wanted
    stale: dict[str, int] = {}
    ready = []
    for owner in owners:
        chosen = choose(owner.units, held[owner.rank], iteration)
        assert not isinstance(chosen, str), f"rank {owner.rank} said that it reaches iteration {iteration}: {chosen}"
        for unit, captured in chosen:
            name, kind = owner.units[unit]
            if identity.mode == "popularity" and kind is UnitKind.EXPERT and captured < iteration:
                stale[name] = captured
        ready.append(
            Owner(rank=owner.rank, sheet=owner.sheet, units=owner.units, copies=owner.copies, chosen=tuple(chosen))
        )
    if iteration in vetoed:
        notes = [*notes, f"iteration {iteration} is one that training has called unhealthy"]
    return Found(
        identity=identity,
        owners=tuple(ready),
        iteration=iteration,
        reachable=reach.iterations,
        stale=dict(sorted(stale.items())),
        notes=tuple(notes),
    )


def _held(owners: Sequence[Owner], mode: str) -> dict[int, dict[int, set[int]]]:
    """By rank and unit: the iterations that are left. Of experts that several ranks hold shards of: those of all."""
    held = {owner.rank: held_of(dict(enumerate(copy.records for copy in owner.copies))) for owner in owners}
    if mode != "popularity":
        return held
    common: dict[tuple[str, str], set[int]] = {}
    for owner in owners:
        for key, unit in _experts(owner):
            mine = held[owner.rank].get(unit, set())
            common[key] = common[key] & mine if key in common else set(mine)
    for owner in owners:
        for key, unit in _experts(owner):
            held[owner.rank][unit] = common[key]
    return held


def _experts(owner: Owner) -> list[tuple[tuple[str, str], int]]:
    """The experts of which a rank has a shard: name and place in expert tensor parallelism, and the unit's number."""
    place = owner.sheet.place.rpartition(" ")[2]
    return [((name, place), u) for u, (name, kind) in enumerate(owner.units) if kind is UnitKind.EXPERT]
