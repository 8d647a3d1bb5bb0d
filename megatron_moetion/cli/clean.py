# SPDX-License-Identifier: Apache-2.0
"""``moetion clean``: memory of runs that nobody uses any more."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_moetion.cli.stores import add_flags, ago, judge_run, note, now, numbers, print_json, say, size
from megatron_moetion.clock import SystemClock
from megatron_moetion.config import MoetionConfig
from megatron_moetion.errors import ConfigError, StoreError
from megatron_moetion.inspect.look import NodeFiles, look_at, node_folders, runs_in
from megatron_moetion.inspect.remove import remove, remove_leftovers, why_not
from megatron_moetion.store.node import store_folder


@dataclass(frozen=True, kw_only=True)
class _Run:
    """A run in a store."""

    run_id: str
    folder: Path
    memory_bytes: int
    holds: str
    """What would be lost, for a person."""
    started_s: float | None
    kept: str | None
    """Why it stays."""

    def to_json(self, *, removed: bool) -> dict[str, Any]:
        return {
            "run_id": self.run_id,
            "path": str(self.folder),
            "memory_bytes": self.memory_bytes,
            "holds": self.holds,
            "kept_because": self.kept,
            "removed": removed,
        }


def add(commands: Any) -> None:
    """Adds the command to the parser's subparsers."""
    parser = commands.add_parser(
        "clean",
        help="remove runs from memory that no process uses",
        usage="%(prog)s (RUN_ID | --all) [--store DIR ...] [--yes] [--json]",
        description="Remove a run's arenas from the stores of this machine, after saying what they hold. A run that a "
        "process uses, or whose launcher still runs, stays. Without --yes the command asks; where there is no "
        "terminal to ask on, it removes nothing and ends with exit code 2.",
        epilog="It removes from this machine only: run it on every node. examples: moetion clean my-run; "
        "moetion clean --all --yes",
    )
    parser.add_argument("run_id", metavar="RUN_ID", nargs="?", help="the run's name, as moetion list shows it")
    parser.add_argument("--all", action="store_true", help="all runs that nobody uses")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    add_flags(parser, "stores (--moetion-store of the runs); default: this user's in /dev/shm")
    parser.set_defaults(run=_clean)


def _clean(args: argparse.Namespace) -> int:
    if (args.run_id is None) != args.all:
        raise ConfigError("give the name of a run, or --all, and not both")
    stores = args.store or [store for store in [store_folder(MoetionConfig())] if store.is_dir()]
    names = [(store, run_id) for store in stores for run_id in runs_in(store) if args.run_id in (None, run_id)]
    runs = [run for store, run_id in names if (run := _look(store, run_id)) is not None]
    if args.run_id is not None and not runs:
        where = ", ".join(map(str, stores)) or "this user's store in /dev/shm"
        raise StoreError(f"there is no run {args.run_id!r} in {where}; moetion list shows all")
    idle = [run for run in runs if run.kept is None]
    if not args.json:
        _show(runs, stores)
    refused = next((run for run in runs if run.kept is not None), None) if args.run_id is not None else None
    if refused is not None:
        _print(args, runs, removed=[])
        raise StoreError(f"run {refused.run_id} stays: {refused.kept}. Nothing was removed")
    if idle and not args.yes and not _asked(args, idle):
        _print(args, runs, removed=[])
        return 2
    removed, failed = _remove(args, idle, stores)
    _print(args, runs, removed)
    if failed:
        raise StoreError("; ".join(failed))
    return 0


def _remove(args: argparse.Namespace, idle: list[_Run], stores: list[Path]) -> tuple[list[_Run], list[str]]:
    """The runs that have gone, and why others have not: one that stays does not keep the others."""
    removed: list[_Run] = []
    failed: list[str] = []
    for run in idle:
        try:
            remove(run.folder, SystemClock())
        except StoreError as error:
            failed.append(str(error))
            continue
        removed.append(run)
        if not args.json:
            say(f"removed {run.run_id}, {size(run.memory_bytes)}")
    for store in stores:
        try:
            remove_leftovers(store)
        except StoreError as error:
            failed.append(str(error))
    return removed, failed


def _look(store: Path, run_id: str) -> _Run | None:
    """None where the run has gone meanwhile."""
    folder = store / run_id
    try:
        nodes = [look_at(path, run_id) for path in node_folders([folder], run_id)]
        kept = why_not(folder, nodes)
    except (StoreError, OSError):
        return None
    return _Run(
        run_id=run_id,
        folder=folder,
        memory_bytes=sum(node.memory_bytes for node in nodes),
        holds=_holds(nodes),
        started_s=max((node.started_s for node in nodes if node.started_s is not None), default=None),
        kept=kept,
    )


def _holds(nodes: list[NodeFiles]) -> str:
    judged = judge_run(nodes)
    if judged.identity is None:
        return "no arena that can be read"
    if judged.newest < 0:
        return "no capture"
    ranks = numbers(rank.rank for rank in judged.ranks)
    if judged.iteration < 0:
        return f"captures of rank(s) {ranks}, of which nothing can be recovered"
    of = f"of all {judged.identity.world_size} rank(s)"
    elsewhere = ""
    if judged.missing:
        of = f"of rank(s) {ranks} of {judged.identity.world_size}"
        elsewhere = "; other nodes may hold more"
    return f"the state {of} at iteration {judged.iteration}, the only copy that is known here{elsewhere}"


def _show(runs: list[_Run], stores: list[Path]) -> None:
    if not runs:
        say(f"nothing to remove in {', '.join(map(str, stores)) or '/dev/shm'}")
    for run in runs:
        say(f"{run.run_id}: {size(run.memory_bytes)} in {run.folder}, last start {ago(run.started_s, now())} ago")
        say(f"  holds {run.holds}")
        if run.kept is not None:
            say(f"  stays: {run.kept}")


def _asked(args: argparse.Namespace, idle: list[_Run]) -> bool:
    """Whether the user agrees; ``False`` is said where nobody can be asked."""
    if args.json or not (sys.stdin.isatty() and sys.stdout.isatty()):
        note("nothing was removed: give --yes to remove it without being asked")
        return False
    total = size(sum(run.memory_bytes for run in idle))
    try:
        answer = input(f"remove {len(idle)} run(s), {total}? [y/N] ")
    except (EOFError, KeyboardInterrupt):
        answer = ""
    if answer.strip().lower() in ("y", "yes"):
        return True
    note("nothing was removed")
    return False


def _print(args: argparse.Namespace, runs: list[_Run], removed: list[_Run]) -> None:
    if args.json:
        print_json({"runs": [run.to_json(removed=run in removed) for run in runs]})
