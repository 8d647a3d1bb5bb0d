# SPDX-License-Identifier: Apache-2.0
"""``moetion``: looks at what a run left behind. ``--json`` prints one document and nothing else."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_moetion.errors import ConfigError, MoetionError
from megatron_moetion.observe.report import beside_traffic, between_iterations, draw, middle_iterations, read_traces


def main(argv: Sequence[str] | None = None) -> int:
    """The program. 0: done; 2: wrong usage or input."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except MoetionError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moetion", description="Look at what a MoEtion run left behind.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    report = commands.add_parser(
        "report",
        help="draw the traces of --moetion-trace-dir as a Gantt chart",
        description="Draw traces as a Gantt chart and say how much replication met training's own traffic.",
    )
    report.add_argument("folder", type=Path, metavar="TRACE_DIR", help="the run's --moetion-trace-dir")
    report.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="default: TRACE_DIR/gantt.png; also .svg, .pdf"
    )
    report.add_argument("--iterations", metavar="FIRST:LAST", help="default: two from the middle of the run")
    report.add_argument("--json", action="store_true", help="print the figures as JSON")
    report.set_defaults(run=_report)
    return parser


def _report(args: argparse.Namespace) -> int:
    bars = read_traces(args.folder)
    first, last = middle_iterations(bars) if args.iterations is None else _range(args.iterations)
    chosen = between_iterations(bars, first, last)
    output = args.output or args.folder / "gantt.png"
    draw(chosen, output)
    figures = beside_traffic(chosen)
    if args.json:
        print(json.dumps({"iterations": [first, last], "chart": str(output), "ranks": [asdict(f) for f in figures]}))
        return 0
    table = Table(title=f"iterations {first} to {last}: replication beside training's own sends")
    for column in ("rank", "replicated MB", "replicating s", "of these beside traffic"):
        table.add_column(column, justify="right")
    for f in figures:
        share = f.beside_traffic_s / f.replicating_s if f.replicating_s else 0.0
        table.add_row(str(f.rank), f"{f.replicated_bytes / 1e6:.1f}", f"{f.replicating_s:.3f}", f"{share:.1%}")
    console = Console()
    console.print(table)
    console.print(f"chart: {output}", highlight=False)
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


if __name__ == "__main__":
    sys.exit(main())
