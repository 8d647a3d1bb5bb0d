# SPDX-License-Identifier: Apache-2.0
"""``moetion``: one module a command. ``--json`` prints one document and nothing else."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from megatron_moetion.cli import clean, export, list_runs, plan, report, simulate, status, verify
from megatron_moetion.cli.parser import Parser
from megatron_moetion.errors import MoetionError

COMMANDS = (
    plan,
    list_runs,
    status,
    verify,
    export,
    clean,
    report,
    simulate,
)
"""In the order of ``moetion --help``. Each has ``add(commands)``, which sets ``run``: arguments to an exit code."""

_INTERRUPTED, _PIPE_CLOSED = 130, 141
"""As a shell reports them."""


def main(argv: Sequence[str] | None = None) -> int:
    """The program. 0: done; 1: a check found something; 2: wrong usage or input; 3: nothing can be recovered."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except MoetionError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:  # whoever read the output has enough, as head has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="moetion",
        description="Plan a run with MoEtion, look after its memory, draw its traces, or simulate faults.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser
