# SPDX-License-Identifier: Apache-2.0
"""The command line: which parts run, the table at the end, and ``summary.json``."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gpu_check import measuring, training
from gpu_check.machine import Machine, NoGpu, commit_of, machine_here
from gpu_check.part import ROOT, Outcome, Part, Setting, Verdict, judge

PARTS = (
    Part(name="tests", about="tests/gpu", limit_s=60, action=measuring.run_tests),
    Part(name="sanitizer", about="memcheck on some kernels", limit_s=50, action=measuring.run_sanitizer),
    Part(name="engines", about="the choice of an engine, 5 times", limit_s=18, action=measuring.run_link("engines")),
    Part(name="speed", about="snapshots against the link", limit_s=18, action=measuring.run_link("speed")),
    Part(name="sms", about="census of multiprocessors", limit_s=14, action=measuring.run_link("sms")),
    Part(name="arena", about="32 GiB, pinned", limit_s=35, action=measuring.run_arena),
    Part(name="step", about="iteration with and without snapshots", limit_s=140, action=measuring.run_step),
    Part(name="connections", about="the same in other environments", limit_s=80, action=measuring.run_connections),
    Part(name="train", about="kill and bitwise resume", limit_s=65, action=training.run_training),
    Part(name="multi", about="NCCL, EP, PP, replicas", limit_s=150, action=training.run_several),
    Part(
        name="device_pack", about="the pack kernel in detail", limit_s=600, by_default=False,
        action=measuring.run_benchmark("device_pack"),
    ),
    Part(
        name="host_pack", about="the host's pack kernels", limit_s=600, by_default=False,
        action=measuring.run_benchmark("host_pack"),
    ),
)  # fmt: skip
COLORS = {Outcome.PASSED: "green", Outcome.MISSED: "yellow", Outcome.FAILED: "red", Outcome.LATE: "red"}
PACKAGES = ("torch", "megatron-core", "transformer-engine", "apex", "numpy", "nvidia-nccl-cu13", "nvidia-nccl-cu12")
WITHOUT_GPU_FACTOR = 5.0
"""Two cores take longer to train than a GPU does."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chosen parts. 0: all passed or could not run; 1: one failed, was late or missed a target."""
    parser = argument_parser()
    args = parser.parse_args(argv)
    # SIGTERM ends what runs, and removes its arenas, as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        machine = machine_here(on_gpu=not args.without_gpu)
    except NoGpu as error:
        parser.error(str(error))
    if not args.store.is_dir() or not os.access(args.store, os.W_OK):
        parser.error(f"--store {args.store}: no folder that can be written")
    setting = Setting(results=args.results.resolve(), machine=machine, store=args.store.resolve(), quick=args.quick)
    setting.results.mkdir(parents=True, exist_ok=True)
    parts = chosen(args.only)
    factor = args.slower or (WITHOUT_GPU_FACTOR if args.without_gpu else 1.0)
    console, verdicts = Console(), []
    console.print(escape(f"{machine}\n{plan_of(parts, machine, factor)}"), highlight=False, soft_wrap=True)
    for part in parts:
        console.print(f"{part.name}: {part.about} ...", highlight=False)
        try:
            verdict = judge(part, setting, part.limit_s * factor)
        except KeyboardInterrupt:
            print("interrupted: what ran is ended, its memory is removed", file=sys.stderr)
            return 130
        verdicts.append(verdict)
        write_summary(setting, verdict)
        console.print(escape(f"{part.name}: {verdict.outcome.value}, {verdict.seconds:.0f} s"), highlight=False)
    console.print(table_of(machine, verdicts))
    return int(not all(verdict.outcome.is_good for verdict in verdicts))


def argument_parser() -> argparse.ArgumentParser:
    """Of ``gpu_check``; ``gpu_check.sh`` takes ``--offline`` and ``--python`` for itself."""
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description="Check MoEtion on this machine's GPU.")
    parser.add_argument("results", type=Path, metavar="RESULTS", help="folder for logs, figures and summary.json")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, layouts and environments")
    parser.add_argument(
        "--only",
        action="append",
        choices=[part.name for part in PARTS],
        help="run this part; may be given several times. summary.json keeps the other parts of earlier calls",
    )
    parser.add_argument("--without-gpu", action="store_true", help="try the script: a CPU and a model of the device")
    parser.add_argument("--store", type=Path, default=Path("/dev/shm"), metavar="DIR", help="in memory, for arenas")
    parser.add_argument("--slower", type=float, metavar="FACTOR", help="of the time limits, for a slower machine")
    return parser


def chosen(only: Sequence[str] | None) -> list[Part]:
    """The named parts in their order here; without names those that run by default."""
    return [part for part in PARTS if (part.name in only if only else part.by_default)]


def plan_of(parts: Sequence[Part], machine: Machine, factor: float) -> str:
    """How long the parts may take, for a person. What needs more GPUs than there are takes no time."""
    counted = [part for part in parts if part.name != "multi" or len(machine.gpus) != 1]
    limits = ", ".join(f"{part.name} {part.limit_s * factor:.0f}" for part in counted)
    return f"seconds at most: {limits}; together {sum(part.limit_s for part in counted) * factor:.0f}"


def table_of(machine: Machine, verdicts: Sequence[Verdict]) -> Table:
    """One row a part."""
    table = Table(title=escape(f"gpu_check on {machine}"))
    for column in ("part", "verdict", "seconds", "finding"):
        table.add_column(column, justify="right" if column == "seconds" else "left")
    for v in verdicts:
        color = COLORS.get(v.outcome)
        word = f"[{color}]{v.outcome.value}[/{color}]" if color else v.outcome.value
        table.add_row(v.part, word, f"{v.seconds:.0f}", escape(v.finding))
    return table


def write_summary(setting: Setting, verdict: Verdict) -> None:
    """Put one part's verdict into ``summary.json``; those of other parts stay. Each says how it was made."""
    path = setting.results / "summary.json"
    parts: dict[str, Any] = json.loads(path.read_text())["parts"] if path.exists() else {}
    parts[verdict.part] = {
        **asdict(verdict),
        "outcome": verdict.outcome.value,
        "figures": list(verdict.figures),
        "quick": setting.quick,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit_of(ROOT),
        "command": shlex.join(sys.argv[1:]),
        "hardware": hardware(setting),
        "versions": versions(),
    }
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps({"benchmark": "gpu_check", "parts": parts}, indent=1) + "\n")
    scratch.replace(path)


def hardware(setting: Setting) -> Mapping[str, Any]:
    """The machine, as far as it is known."""
    from benchmarks._common import hardware as facts

    return {**facts(), "gpus": list(setting.machine.gpus), "driver": setting.machine.driver}


def versions() -> Mapping[str, str | None]:
    """Of the interpreter, the kernel, and what computes; null where it is not installed."""
    import torch

    found: dict[str, str | None] = {"python": platform.python_version(), "kernel": platform.release()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return {**found, "cuda": torch.version.cuda}
