# SPDX-License-Identifier: Apache-2.0
"""``moetion report``: the traces of a run."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_moetion.errors import ConfigError
from megatron_moetion.observe.report import (
    between_iterations,
    draw,
    middle_iterations,
    overlap_with_traffic,
    read_traces,
    traced_ranks,
)


def add(commands: Any) -> None:
    """Adds the command to the parser's subparsers."""
    report = commands.add_parser(
        "report",
        help="draw the traces of --moetion-trace-dir as a Gantt chart",
        description="Draw traces as a Gantt chart and print how much replication overlapped training's own traffic.",
    )
    report.add_argument("folder", type=Path, metavar="TRACE_DIR", help="the run's --moetion-trace-dir")
    report.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="default: TRACE_DIR/gantt.png; also .svg, .pdf"
    )
    report.add_argument("--iterations", metavar="FIRST:LAST", help="default: two from the middle of the run")
    report.add_argument("--json", action="store_true", help="print the figures as JSON")
    report.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> int:
    bars = read_traces(args.folder)
    first, last = middle_iterations(bars) if args.iterations is None else _range(args.iterations)
    chosen = between_iterations(bars, first, last)
    output = args.output or args.folder / "gantt.png"
    draw(chosen, output)
    figures = overlap_with_traffic(chosen)
    untraced = sorted(traced_ranks(args.folder) - {f.rank for f in figures})
    if args.json:
        document = {
            "iterations": [first, last],
            "chart": str(output),
            "ranks": [asdict(f) for f in figures],
            "ranks_without": untraced,
        }
        print(json.dumps(document))
        return 0
    table = Table(title=f"iterations {first} to {last}: overlap of replication with training's own sends")
    for column in ("rank", "replicated MB", "replicating s", "overlapping"):
        table.add_column(column, justify="right")
    for f in figures:
        share = f.beside_traffic_s / f.replicating_s if f.replicating_s else 0.0
        table.add_row(str(f.rank), f"{f.replicated_bytes / 1e6:.1f}", f"{f.replicating_s:.3f}", f"{share:.1%}")
    console = Console()
    console.print(table)
    if untraced:
        ranks = ", ".join(map(str, untraced))
        console.print(f"not traced in these iterations: rank {ranks}", highlight=False, soft_wrap=True)
    console.print(f"chart: {output}", highlight=False, soft_wrap=True)
    return 0


def _range(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    try:
        found = int(first), int(last or first)
    except ValueError as error:
        raise ConfigError(f"--iterations is {text!r}; it must be FIRST:LAST, for instance 20:21") from error
    if found[0] > found[1]:
        raise ConfigError(f"--iterations is {text!r}; the first must not be after the last")
    return found
