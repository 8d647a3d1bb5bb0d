# SPDX-License-Identifier: Apache-2.0
"""``moetion verify``: every capture of a run's arenas, byte for byte."""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from typing import Any

from megatron_moetion.cli.stores import (
    add_flags,
    look_at_run,
    note,
    print_json,
    recovery,
    recovery_words,
    say,
    size,
    vetoed_on,
)
from megatron_moetion.errors import ConfigError, StoreError
from megatron_moetion.inspect.judge import Copy, Judgement, as_listed, judge
from megatron_moetion.inspect.look import NodeFiles
from megatron_moetion.inspect.verify import Verified, Verifier, whole_copies

THREADS = 4
_NOTE_EVERY_S = 10.0
_LISTED = 20
"""Damaged captures that are named for a person."""


def add(commands: Any) -> None:
    """Adds the command to the parser's subparsers."""
    parser = commands.add_parser(
        "verify",
        help="read every capture of a run and compare its digests",
        usage="%(prog)s RUN_ID [--store DIR ...] [--threads N] [--json]",
        description="Read every capture that the arenas of a run list, and compare its digests. Exit code 0: all is "
        "whole; 1: something is damaged, and it is named, with the arenas that have another whole copy. A run that "
        "trains may go on meanwhile; what it gives up while it is read does not count.",
        epilog="Of a job that has died, give the stores of all its nodes, or copies of them.",
    )
    parser.add_argument("run_id", metavar="RUN_ID", help="the run's name, as moetion list shows it")
    add_flags(parser, "stores, or folders of the run or of its nodes; default: the stores in /dev/shm")
    parser.add_argument(
        "--threads", type=int, default=THREADS, metavar="N", help=f"threads that read, 8 MiB each (default: {THREADS})"
    )
    parser.set_defaults(run=_verify)


def _verify(args: argparse.Namespace) -> int:
    if args.threads < 1:
        raise ConfigError(f"--threads is {args.threads}; it must be at least 1")
    began = time.monotonic()
    nodes = look_at_run(args.store, args.run_id)
    if not any(node.arenas or node.problem for node in nodes):
        raise StoreError(f"run {args.run_id} has no arena in {', '.join(str(node.path) for node in nodes)}")
    total = sum(int(a.page.records.table["nbytes"].sum()) for n in nodes for a in n.arenas if a.page is not None)
    progress = _Progress(total)
    found: list[tuple[int, Verified]] = []
    gone: list[str] = []
    with closing(Verifier(min(args.threads, os.cpu_count() or 1), progress)) as verifier:
        for number, node in enumerate(nodes):
            for arena in node.arenas:
                verified = verifier.verify(arena)
                if verified is None:
                    gone.append(str(arena.path))
                else:
                    found.append((number, verified))
    judged = _judge(nodes, found)
    document = _document(args.run_id, nodes, [v for _, v in found], gone, judged, time.monotonic() - began)
    if args.json:
        print_json(document)
    else:
        _show(document, judged)
    return 0 if document["whole"] else 1


def _judge(nodes: Sequence[NodeFiles], found: Sequence[tuple[int, Verified]]) -> Judgement:
    """With the captures that are sound alone."""
    copies = [
        Copy(node=number, spec=v.file.spec, page=v.file.page, records=as_listed(v.file.spec, v.sound))
        for number, v in found
        if v.file.spec is not None and v.file.page is not None
    ]
    return judge(copies, vetoed_on(nodes, copies))


def _document(
    run_id: str,
    nodes: Sequence[NodeFiles],
    found: Sequence[Verified],
    gone: list[str],
    judged: Judgement,
    seconds: float,
) -> dict[str, Any]:
    damaged = [
        {
            "path": str(verified.file.path),
            "rank": spec.identity.owner,
            "unit": spec.units[record.unit][0] if record.unit < len(spec.units) else f"number {record.unit}",
            "iteration": record.iteration,
            "whole_copies": [str(path) for path in whole_copies(record, spec, found)],
        }
        for verified in found
        if (spec := verified.file.spec) is not None
        for record in verified.damaged
    ]
    problems = [{"path": str(n.path), "problem": n.problem} for n in nodes if n.problem]
    problems += [{"path": str(v.file.path), "problem": v.file.problem} for v in found if v.file.problem]
    return {
        "run_id": run_id,
        "whole": not damaged and not problems,
        "captures": sum(len(v.sound) + len(v.damaged) for v in found),
        "captured_bytes": sum(v.nbytes for v in found),
        "seconds": seconds,
        "damaged": damaged,
        "problems": problems,
        "gone": gone,
        "arenas": [
            {
                "path": str(v.file.path),
                "rank": v.file.spec.identity.owner if v.file.spec else None,
                "captures": len(v.sound) + len(v.damaged),
                "damaged": len(v.damaged),
                "released": v.released,
                "pages": 0 if v.file.page is None else 1 + v.file.other_page,
            }
            for v in found
        ],
        "recovery": recovery(judged),
    }


def _show(document: dict[str, Any], judged: Judgement) -> None:
    for problem in document["problems"]:
        say(f"cannot be used: {problem['problem']}")
    damaged = document["damaged"]
    for one in damaged[:_LISTED]:
        copies = one["whole_copies"]
        where = f"a whole copy is in {', '.join(copies)}" if copies else "no whole copy lies here"
        say(f"damaged: {one['unit']} of rank {one['rank']} at iteration {one['iteration']} in {one['path']}; {where}")
    if len(damaged) > _LISTED:
        say(f"... and {len(damaged) - _LISTED} more: --json lists all")
    rate = document["captured_bytes"] / max(document["seconds"], 1e-9)
    wrong = f"{len(damaged)} damaged, {len(document['problems'])} arena(s) cannot be used"
    say(
        f"{document['captures']} captures, {size(document['captured_bytes'])} in {document['seconds']:.1f} s "
        f"({size(int(rate))}/s) in {len(document['arenas'])} arena(s): "
        + ("all are whole" if document["whole"] else wrong)
    )
    released = sum(arena["released"] for arena in document["arenas"])
    if released or document["gone"]:
        say(f"given up by the run meanwhile: {released} capture(s), {len(document['gone'])} arena(s)")
    say(recovery_words(judged))


class _Progress:
    """A line now and then, beside the result. Called from several threads."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._lock = threading.Lock()
        self._began = self._said = time.monotonic()

    def __call__(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            now = time.monotonic()
            if now - self._said < _NOTE_EVERY_S:
                return
            self._said = now
            rate = self._done / (now - self._began)
            note(f"verified {size(self._done)} of {size(self._total)}, {size(int(rate))}/s")
