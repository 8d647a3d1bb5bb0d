# SPDX-License-Identifier: Apache-2.0
"""``moetion export``: what a dead run's memory holds as a checkpoint on disk."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

_SHOWN_MAX = 10


def add(commands: Any) -> None:
    """Adds the command to the parser's subparsers."""
    export = commands.add_parser(
        "export",
        help="write what a dead run's nodes hold in memory as a Megatron torch_dist checkpoint",
        description=(
            "Write the newest iteration that the given stores hold as a Megatron-Core checkpoint (torch_dist), which "
            "any other pipeline, expert or data parallel size can load. One process on the CPU does it; the model is "
            "not needed. Copy the folders of other nodes to this machine first. The stores are only read."
        ),
        epilog="Exit codes: 0 written; 2 wrong usage or input; 3 some rank's state is in none of the folders.",
    )
    export.add_argument(
        "folders", type=Path, nargs="+", metavar="FOLDER", help="a run's folder (STORE/RUN_ID), or folders of its nodes"
    )
    export.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR",
        help="where the checkpoint goes: what --load will name",
    )  # fmt: skip
    export.add_argument(
        "--iteration", type=int, metavar="N", help="this iteration; default: the newest that can be put together"
    )
    export.add_argument("--force", action="store_true", help="replace a checkpoint that is there")
    export.add_argument("--json", action="store_true", help="print the result as JSON")
    export.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> int:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported
    from megatron_moetion.mcore import cpu_device

    cpu_device.install()
    from megatron_moetion.export.export import export

    def say(line: str) -> None:
        print(f"[moetion] {line}", file=sys.stderr, flush=True)

    done = export(args.folders, args.output, say, iteration=args.iteration, force=args.force)
    if args.json:
        print(json.dumps(asdict(done)))
        return 0
    for note in done.notes:
        print(f"passed over: {note}")
    if done.stale:
        listed = ", ".join(f"{name} (iteration {i})" for name, i in list(done.stale.items())[:_SHOWN_MAX])
        more = f", and {len(done.stale) - _SHOWN_MAX} more (--json lists them)" if len(done.stale) > _SHOWN_MAX else ""
        print(f"{len(done.stale)} experts are older than iteration {done.iteration}: {listed}{more}")
    if done.left_out:
        print(f"not in the checkpoint: {', '.join(done.left_out[:_SHOWN_MAX])}")
    replayed = f", {done.replayed_steps} optimizer steps replayed" if done.replayed_steps else ""
    print(
        f"{done.checkpoint}: iteration {done.iteration} of {done.ranks} ranks, {done.nbytes / 2**20:,.1f} MiB{replayed}"
    )
    return 0
