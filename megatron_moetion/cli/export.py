# SPDX-License-Identifier: Apache-2.0
"""``moetion export``: what a dead run's memory holds as a checkpoint on disk."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_moetion.cli.stores import add_flags, note, print_json, say, size
from megatron_moetion.inspect.look import default_stores, node_folders

_SHOWN_MAX = 10


def add(commands: Any) -> None:
    """Adds the command to the parser's subparsers."""
    parser = commands.add_parser(
        "export",
        help="write what a dead run left in memory as a Megatron checkpoint on disk",
        usage="%(prog)s RUN_ID --output DIR [--store DIR ...] [--iteration N] "
        "[--expert-model-parallel-size N] [--force] [--json]",
        description="Write the newest iteration that a run's arenas hold as a Megatron-Core checkpoint (torch_dist), "
        "which any other pipeline, expert or data parallel size can load. One process on the CPU does it, without the "
        "model. Arenas are only read. Exit code 0: it is written; 2: wrong usage or input; 3: some rank's state is in "
        "none of the folders.",
        epilog="The arenas of all nodes must be at hand: copy the folders of other nodes to this machine and name each "
        "with --store. With replicas, the nodes that are left are enough.",
    )
    parser.add_argument("run_id", metavar="RUN_ID", help="the run's name, as moetion list shows it")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR", help="where it goes: what --load will name"
    )
    add_flags(parser, "stores, or folders of the run or of its nodes; default: the stores in /dev/shm")
    parser.add_argument(
        "--iteration", type=int, metavar="N", help="this one; default: the newest that can be put together"
    )
    parser.add_argument(
        "--expert-model-parallel-size", type=int, metavar="N",
        help="the size that will load it; needed only where it is 1 and the run's was not, or the other way round: "
        "Megatron keeps one optimizer then, and two otherwise",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace a checkpoint that is there")
    parser.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> int:
    folders = node_folders(args.store or default_stores(), args.run_id)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported
    from megatron_moetion.mcore import cpu_device

    cpu_device.install()
    from megatron_moetion.export.export import export

    done = export(
        folders,
        args.run_id,
        args.output,
        note,
        iteration=args.iteration,
        force=args.force,
        expert_parallel_size=args.expert_model_parallel_size,
    )
    if args.json:
        print_json(asdict(done))
        return 0
    for passed in done.notes:
        say(f"passed over: {passed}")
    if done.stale:
        listed = ", ".join(f"{name} (iteration {i})" for name, i in list(done.stale.items())[:_SHOWN_MAX])
        more = f", and {len(done.stale) - _SHOWN_MAX} more (--json lists them)" if len(done.stale) > _SHOWN_MAX else ""
        say(f"{len(done.stale)} experts are older than iteration {done.iteration}: {listed}{more}")
    if done.left_out:
        say(f"not in the checkpoint: {', '.join(done.left_out[:_SHOWN_MAX])}")
    replayed = f", {done.replayed_steps} optimizer steps replayed" if done.replayed_steps else ""
    say(f"{done.checkpoint}: iteration {done.iteration} of {done.ranks} ranks, {size(done.nbytes)}{replayed}")
    return 0
