# SPDX-License-Identifier: Apache-2.0
"""``moetion``: one module a command. ``--json`` prints one document and nothing else."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_moetion.cli import export, plan, report
from megatron_moetion.errors import MoetionError

COMMANDS = (
    plan,
    report,
    export,
)
"""In the order of ``moetion --help``. Each has ``add(commands)``, which sets ``run``: arguments to an exit code."""


def main(argv: Sequence[str] | None = None) -> int:
    """The program. 0: done; 1: a check found something; 2: wrong usage or input; 3: nothing can be recovered."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except MoetionError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moetion", description="Plan a run with MoEtion, or draw the traces of one.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser
