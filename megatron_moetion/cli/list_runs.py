# SPDX-License-Identifier: Apache-2.0
"""``moetion list``: the runs that lie in the memory of this machine."""

from __future__ import annotations

import argparse
import pwd
from pathlib import Path
from typing import Any

from megatron_moetion.cli.stores import add_flags, ago, console, judge_run, now, print_json, say, size, table
from megatron_moetion.errors import StoreError
from megatron_moetion.inspect.look import closed_in, default_stores, look_at, node_folders, runs_in


def add(commands: Any) -> None:
    """Adds the command to the parser's subparsers."""
    parser = commands.add_parser(
        "list",
        help="the runs in the memory of this machine: iteration, memory, who uses them",
        usage="%(prog)s [--store DIR ...] [--json]",
        description="List the runs whose arenas lie in the stores of this machine. Only files are read; a run that "
        "trains is not disturbed.",
        epilog="example: moetion list --store /mnt/tmpfs/moetion",
    )
    add_flags(parser, "stores (--moetion-store of the runs); default: those of all users in /dev/shm that can be read")
    parser.set_defaults(run=_list)


def _list(args: argparse.Namespace) -> int:
    stores = args.store or default_stores()
    listed: list[dict[str, Any]] = []
    unreadable: list[str] = []
    for store in stores:
        try:
            runs = runs_in(store)
            unreadable.extend(closed_in(store))
        except StoreError as error:
            if args.store:
                raise
            unreadable.append(str(error))
            continue
        listed.extend(row for run_id in runs if (row := _row(store, run_id)) is not None)
    if args.json:
        print_json({"stores": [str(store) for store in stores], "runs": listed, "unreadable": unreadable})
        return 0
    _show(stores, listed)
    for problem in unreadable:
        say(f"not shown: {problem}")
    return 0


def _row(store: Path, run_id: str) -> dict[str, Any] | None:
    try:
        nodes = [look_at(folder, run_id) for folder in node_folders([store / run_id], run_id)]
    except StoreError:  # it has ended meanwhile
        return None
    judged = judge_run(nodes)
    identity = judged.identity
    started = [node.started_s for node in nodes if node.started_s is not None]
    return {
        "run_id": run_id,
        "store": str(store),
        "user": _user(nodes[0].user),
        "nodes": len(nodes),
        "mode": identity.mode if identity else None,
        "period": identity.period if identity else None,
        "world_size": identity.world_size if identity else None,
        "ranks_here": [rank.rank for rank in judged.ranks],
        "epoch": judged.history.epoch if identity else None,
        "stable": judged.history.stable if identity else None,
        "newest": judged.newest if identity else None,
        "memory_bytes": sum(node.memory_bytes for node in nodes),
        "processes": sorted({pid for node in nodes for pid in node.processes}),
        "in_use": any(node.processes for node in nodes),
        "began": judged.history.lineage / 1e9 if identity else None,
        "started": max(started, default=None),
        "problems": [node.problem for node in nodes if node.problem]
        + [arena.problem for node in nodes for arena in node.arenas if arena.problem],
    }


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _show(stores: list[Path], runs: list[dict[str, Any]]) -> None:
    where = ", ".join(map(str, stores)) or "/dev/shm/moetion-*"
    if not runs:
        say(f"no run lies in {where}")
        return
    shown = table(
        ("run", None), ("user", False), ("ranks", True), ("mode", False), ("newest", True), ("memory", True),
        ("in use by", False), ("last start", True),
    )  # fmt: skip
    for run in runs:
        used = f"{len(run['processes'])} proc." if run["in_use"] else "-"
        mode = "?" if run["mode"] is None else f"{run['mode']} P={run['period']}" if run["period"] else run["mode"]
        shown.add_row(
            run["run_id"],
            run["user"],
            f"{len(run['ranks_here'])} of {run['world_size']}" if run["mode"] else "?",
            mode,
            "-" if run["newest"] is None or run["newest"] < 0 else str(run["newest"]),
            size(run["memory_bytes"]),
            used,
            ago(run["started"], now()),
        )
    console().print(shown)
    for run in runs:
        for problem in run["problems"]:
            say(f"{run['run_id']}: {problem}")
