# SPDX-License-Identifier: Apache-2.0
"""``moetion status``: one run, living or dead, as far as it lies in some folders."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from megatron_moetion.cli.stores import (
    add_flags,
    ago,
    console,
    judge_run,
    look_at_run,
    now,
    numbers,
    positive,
    print_json,
    recovery,
    recovery_words,
    say,
    size,
    table,
)
from megatron_moetion.errors import StoreError
from megatron_moetion.inspect.judge import JudgedCopy, Judgement
from megatron_moetion.inspect.look import ArenaFile, NodeFiles, users_in_words, words_of
from megatron_moetion.store.sharedfile import free_bytes

NOT_KNOWN = (
    "dropped snapshots (TensorBoard's moetion/snapshots-dropped and --moetion-report have them)",
    "whether the captures' bytes are sound (moetion verify reads them)",
)
"""What arenas do not say, or what is not read."""


def add(commands: Any) -> None:
    """Adds the command to the parser's subparsers."""
    parser = commands.add_parser(
        "status",
        help="one run: iteration, copies of each rank, staleness, memory; living or dead",
        usage="%(prog)s RUN_ID [--store DIR ...] [--watch S] [--json]",
        description="Show a run as far as it lies here: what is captured, what is stable, how many copies of which "
        "rank there are, and what a restart would go on from. Only headers and manifest pages are read; a run that "
        "trains is not disturbed.",
        epilog="Of a job that has died, give the stores of all its nodes, or copies of them: moetion status my-run "
        "--store /rescue/node-a /rescue/node-b. Exit code 3: nothing can be recovered from the folders that were "
        "given, although no rank is missing.",
    )
    parser.add_argument("run_id", metavar="RUN_ID", help="the run's name, as moetion list shows it")
    add_flags(parser, "stores, or folders of the run or of its nodes; default: the stores in /dev/shm")
    parser.add_argument("--watch", type=float, metavar="S", help="repeat every S seconds until Ctrl-C")
    parser.set_defaults(run=_status)


def _status(args: argparse.Namespace) -> int:
    if args.watch is None:
        return _once(args)
    positive("--watch", args.watch)
    with suppress(KeyboardInterrupt):
        while True:
            if not args.json:
                say(time.strftime("%Y-%m-%d %H:%M:%S"))
            _once(args)
            time.sleep(args.watch)
    return 0


def _once(args: argparse.Namespace) -> int:
    nodes = look_at_run(args.store, args.run_id)
    judged = judge_run(nodes)
    if args.json:
        print_json(_document(args.run_id, nodes, judged))
    else:
        _show(args.run_id, nodes, judged)
    began = judged.newest >= 0 or any(arena.problem for node in nodes for arena in node.arenas)
    return 3 if began and judged.iteration < 0 and not judged.missing else 0


# -- the document --------------------------------------------------------------------------------------------------


def _document(run_id: str, nodes: Sequence[NodeFiles], judged: Judgement) -> dict[str, Any]:
    identity, history = judged.identity, judged.history
    by_path = _by_path(nodes, judged)
    return {
        "run_id": run_id,
        "time": now(),
        "mode": identity.mode if identity else None,
        "period": identity.period if identity else None,
        "topology": identity.topology if identity else None,
        "world_size": identity.world_size if identity else None,
        "began": history.lineage / 1e9 if identity else None,
        "epoch": history.epoch,
        "recoveries": [branch.iteration for branch in history.branches],
        "stable": history.stable,
        "newest": judged.newest,
        "vetoed": list(judged.vetoed),
        "in_use": any(node.processes for node in nodes),
        "memory_bytes": sum(node.memory_bytes for node in nodes),
        "recovery": recovery(judged),
        "experts": None if judged.staleness is None else _experts(judged),
        "ranks": [
            {"rank": rank.rank, "reaches": list(rank.reaches), "complete_copies": rank.complete}
            for rank in judged.ranks
        ],
        "nodes": [
            {
                "path": str(node.path),
                "problem": node.problem,
                "processes": [{"pid": pid, "command": words_of(pid)} for pid in node.processes],
                "ranks": list(node.ranks),
                "started": node.started_s,
                "memory_bytes": node.memory_bytes,
                "free_bytes": _free(node),
                "arenas": [_arena(node, arena, by_path.get(str(arena.path))) for arena in node.arenas],
            }
            for node in nodes
        ],
        "not_known": list(NOT_KNOWN),
    }


def _arena(node: NodeFiles, arena: ArenaFile, judged: JudgedCopy | None) -> dict[str, Any]:
    page = arena.page
    return {
        "path": str(arena.path),
        "rank": arena.spec.identity.owner if arena.spec else None,
        "copy": _kind(node, arena),
        "problem": arena.problem or (judged.problem if judged else None),
        "size_bytes": arena.nbytes,
        "epoch": page.epoch if page else None,
        "stable": page.stable if page else None,
        "newest": judged.newest if judged else -1,
        "reaches": list(judged.reaches) if judged else [],
        "captures": judged.captured if judged else 0,
        "captured_bytes": _captured_bytes(judged),
    }


def _experts(judged: Judgement) -> dict[str, Any]:
    found = judged.staleness
    assert found is not None
    return {
        **{name: value for name, value in asdict(found).items() if name != "stalest"},
        "stalest": [{**asdict(expert), "at_risk": expert.at_risk} for expert in found.stalest],
    }


# -- for a person --------------------------------------------------------------------------------------------------


def _show(run_id: str, nodes: Sequence[NodeFiles], judged: Judgement) -> None:
    identity, history = judged.identity, judged.history
    if identity is not None:
        mode = f"{identity.mode} (period {identity.period})" if identity.period else identity.mode
        say(f"run {run_id}: mode {mode}, {identity.world_size} rank(s), {identity.topology}")
        started = max((node.started_s for node in nodes if node.started_s is not None), default=None)
        back = f", {history.epoch} recovery(s)" if history.epoch else ""
        say(f"began {ago(history.lineage / 1e9, now())} ago; last start {ago(started, now())} ago{back}")
    else:
        say(f"run {run_id}")
    used = sorted({pid for node in nodes for pid in node.processes})
    say(f"in use by {users_in_words(used)}" if used else "no process of this machine uses it")
    if identity is not None:
        elsewhere = "; ranks that are not here may know of a later one" if judged.missing else ""
        say(f"captured up to iteration {judged.newest}; stable: {_iteration(history.stable)}{elsewhere}")
        if judged.vetoed:
            say(f"called unhealthy: {numbers(judged.vetoed)}")
    say(recovery_words(judged))
    _show_experts(judged)
    folders = {node.path.parent.parent: _free(node) for node in nodes}
    free = ", ".join(f"{size(room)} free in {folder}" for folder, room in folders.items() if room is not None)
    say(f"memory: {size(sum(node.memory_bytes for node in nodes))}" + (f"; {free}" if free else ""))
    _show_copies(nodes, judged)
    say(f"not known from here: {'; '.join(NOT_KNOWN)}")


def _show_experts(judged: Judgement) -> None:
    found = judged.staleness
    if found is None:
        return
    say(
        f"experts: {found.experts} here, the stalest {found.longest} iteration(s) old, {found.mean:.1f} on average; a "
        f"fault at {judged.iteration} would cost about {found.tokens_at_risk:,} tokens of them, those of "
        f"{found.iterations_at_risk:.1f} iteration(s)"
    )
    for expert in found.stalest:
        say(f"  {expert.name}: captured at {expert.iteration}, about {expert.at_risk:,.0f} tokens at risk")


def _show_copies(nodes: Sequence[NodeFiles], judged: Judgement) -> None:
    by_path = _by_path(nodes, judged)
    say("")
    for number, node in enumerate(nodes, 1):
        say(f"node {number}: {node.path}" + (f": {node.problem}" if node.problem else ""))
    shown = table(
        ("rank", True), ("node", True), ("copy", False), ("epoch", True), ("stable", True), ("newest", True),
        ("reaches", True), ("captures", True), ("arena", True),
    )  # fmt: skip
    rows = [
        (arena.spec.identity.owner, number, _kind(node, arena), arena, by_path[str(arena.path)])
        for number, node in enumerate(nodes, 1)
        for arena in node.arenas
        if arena.spec is not None and arena.page is not None
    ]
    for owner, number, kind, arena, found in sorted(rows, key=lambda row: row[:3]):
        assert arena.page is not None
        shown.add_row(
            str(owner),
            str(number),
            kind,
            str(arena.page.epoch),
            _iteration(arena.page.stable),
            _iteration(found.newest),
            _iteration(max(found.reaches, default=-1)),
            str(found.captured),
            size(arena.nbytes),
        )
    if rows:
        console().print(shown)
    for _, _, _, arena, found in rows:
        if found.problem:
            say(f"{arena.path} {found.problem}")
    for arena in (arena for node in nodes for arena in node.arenas if arena.problem):
        say(str(arena.problem))


def _iteration(found: int) -> str:
    return str(found) if found >= 0 else "none"


def _kind(node: NodeFiles, arena: ArenaFile) -> str:
    """Whose arena it is to this node: one of its own ranks, or another's. The notes of its ranks tell."""
    if arena.spec is None or (not node.ranks and arena.spec.part.is_whole):
        return "?"
    if not arena.spec.part.is_whole:
        return str(arena.spec.part)
    return "own" if arena.spec.identity.owner in node.ranks else "replica"


def _captured_bytes(judged: JudgedCopy | None) -> int:
    return int(judged.copy.records.table["nbytes"].sum()) if judged else 0


def _by_path(nodes: Sequence[NodeFiles], judged: Judgement) -> dict[str, JudgedCopy]:
    """Copies stand in the order in which ``judge_run`` took them."""
    paths = [str(a.path) for node in nodes for a in node.arenas if a.spec is not None and a.page is not None]
    return dict(zip(paths, judged.copies, strict=True))


def _free(node: NodeFiles) -> int | None:
    try:
        return free_bytes(node.path)
    except (OSError, StoreError):
        return None
