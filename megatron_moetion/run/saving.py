# SPDX-License-Identifier: Apache-2.0
"""Whether checkpoints on disk are written from memory, as all ranks have it, and what has them written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_moetion.errors import CorruptArena
from megatron_moetion.persist.saver import NoWriter, Releases, Saver, Writer
from megatron_moetion.persist.tracker import latest_iteration
from megatron_moetion.run.running import Prepared
from megatron_moetion.store.arena import Arena
from megatron_moetion.store.sharedfile import available_bytes
from megatron_moetion.store.sheet import export_problem, read_sheet, replay_problem
from megatron_moetion.units import UnitKind

OFF = "off"


@dataclass(frozen=True, kw_only=True)
class Saving:
    """Equal on all ranks."""

    written: int
    """The iteration of the newest checkpoint that is there, -1 without one."""
    problem: str = ""
    """Why some rank's state cannot be written from memory; empty where it can."""


def agree_on_saving(run: Prepared) -> Saving | None:
    """None where no checkpoints were asked for, or training is to write them. Collective otherwise."""
    if run.config.save in ("", OFF):
        return None
    mine = Saving(written=_written(run.config.save) if run.fabric.rank == 0 else -1, problem=_problem(run))
    return Saving(**run.fabric.reduce(asdict(mine), _joined))


def make_releases(run: Prepared, saving: Saving | None, arena: Arena, iteration: int, epoch: int) -> Releases:
    """What a session asks before arenas release anything: plain, or with checkpoints written on the way.

    The run goes on from ``iteration``: what is on disk beyond it is of another run, or was gone back from.
    """
    if saving is None:
        return Releases()
    if saving.problem:
        if run.fabric.rank == 0:
            run.journal.info(
                iteration, f"training writes the checkpoints in {run.config.save} itself: {saving.problem}"
            )
        return Releases()
    settings = {
        "arena": arena.name,
        "root": str(Path(run.config.save).absolute()),
        "rank": run.fabric.rank,
        "world_size": run.fabric.world_size,
        "local_ranks": max(run.node.num_ranks, int(run.host.environment.get("LOCAL_WORLD_SIZE", "1"))),
        "history": f"{arena.page.lineage:x}-{epoch}",
        "limit_s": run.config.save_limit_s,
        "pid": os.getpid(),
        "is_waited_for": run.config.grace_s > 0,
    }

    def start() -> Writer:
        try:
            return run.host.start_writer(settings)
        except OSError as error:
            return NoWriter(f"it cannot be started: {error}")

    return Saver(
        interval=run.config.save_interval,
        written=min(saving.written, iteration),
        state_bytes=run.state_bytes,
        limit_s=run.config.save_limit_s,
        free_bytes=available_bytes,
        start_writer=start,
        journal=run.journal,
        clock=run.host.clock,
        speaks=run.fabric.rank == 0,
        grace_s=run.config.grace_s,
        end=run.host.end,
    )


def _problem(run: Prepared) -> str:
    if run.mode.loses_tokens:
        return f"in mode {run.mode.name!r} some experts in memory are older than the iteration"
    try:
        sheet = read_sheet(run.mode.spec.sheet)
    except CorruptArena as error:
        return str(error)
    if (problem := export_problem(sheet.guide)) is None and run.mode.inventory.of_kind(UnitKind.LOG):
        problem = replay_problem(sheet)
    return problem or ""


def _written(root: str) -> int:
    try:
        found = latest_iteration(root)
    except (OSError, ValueError):
        found = None  # whatever it is, the next checkpoint replaces it
    return -1 if found is None else found


def _joined(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    return {"written": max(mine["written"], theirs["written"]), "problem": mine["problem"] or theirs["problem"]}
