# SPDX-License-Identifier: Apache-2.0
"""One rank: ``train`` with a system, and say what happens; or ``measure`` what the system costs.

What it says goes line by line into ``rank<r>.jsonl`` of a folder: JSON objects with an ``event`` and a ``moment_s`` of
the monotonic clock, which all processes of the machine share.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_moetion.mcore import cpu_device

cpu_device.install()  # before anything of Megatron is imported

import torch  # noqa: E402

from benchmarks.peers import meters  # noqa: E402
from benchmarks.peers.systems import System, system_class  # noqa: E402
from benchmarks.peers.training import Place, Training, connect  # noqa: E402

RARE = 10
"""The longer interval."""
COUNTED = 4
"""Iterations of a block without copies, or with one after each; one before them settles."""
WARM_UP = 2 * RARE


def main() -> int:
    """Run as the options say."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("work", choices=("train", "measure"))
    options.add_argument("--system", default="", metavar="MODULE:CLASS")
    options.add_argument("--layout", required=True, metavar="PPxEP")
    options.add_argument("--events", type=Path, required=True, metavar="DIR")
    options.add_argument("--memory", type=Path, required=True, metavar="DIR", help="of this host's memory")
    options.add_argument("--shared", type=Path, required=True, metavar="DIR", help="on a disk that all hosts see")
    options.add_argument("--until", type=int, default=0, help="train: the last iteration")
    options.add_argument("--digests", action="store_true", help="train: say a hash of all state after each iteration")
    options.add_argument("--hold-at", type=int, default=0, help="train: wait for copies there, and then to be killed")
    options.add_argument("--cycles", type=int, default=4, help="measure: how often blocks alternate")
    args = options.parse_args()
    place = connect()
    args.events.mkdir(parents=True, exist_ok=True)
    with (args.events / f"rank{place.rank}.jsonl").open("a", buffering=1) as stream:

        def tell(event: str, **facts: Any) -> None:
            moment = time.monotonic()
            stream.write(json.dumps({"event": event, "moment_s": moment, **facts}) + "\n")

        tell("up", pid=os.getpid())
        training = Training(*map(int, args.layout.split("x")))
        intervals = (1, RARE) if args.work == "measure" else (1,)
        system = system_class(args.system)(training, place, args.memory, args.shared, intervals)
        if args.work == "train":
            train(training, system, tell, args)
        else:
            measure(training, system, place, tell, args.cycles)
    os._exit(0)  # what a system has left behind in threads or processes is not waited for


def train(training: Training, system: System, tell: Callable[..., None], args: argparse.Namespace) -> None:
    """From the newest copy that there is, with a copy of each iteration."""

    def state() -> dict[str, str]:
        return {"digest": training.digest(), "needle": training.needle().hex()} if args.digests else {}

    began = time.monotonic()
    resumed = system.start()
    tell(
        "started",
        iteration=resumed,
        seconds=time.monotonic() - began,
        at=training.iteration,
        **state(),
    )
    while training.iteration < args.until:
        training.pipeline_arguments = system.pipeline_arguments(1)
        loss = training.step()
        moment = time.monotonic()
        system.after_step(training.iteration, 1)
        tell(
            "step",
            iteration=training.iteration,
            over_s=moment,
            loss=None if loss is None else float(loss).hex(),
            **state(),
        )
        if training.iteration == args.hold_at:
            system.drain()
            tell("held")
            while True:
                time.sleep(0.2)  # signal handlers of systems run in between
    system.drain()
    system.close()
    tell("ended")


@dataclass(frozen=True, kw_only=True)
class Block:
    """Iterations in a row: a copy each ``interval`` of them, 0: none; the first ``settling`` are not counted."""

    arm: str
    interval: int
    settling: int
    counted: int


OFF = Block(arm="off", interval=0, settling=1, counted=COUNTED)
EACH = Block(arm="each", interval=1, settling=1, counted=COUNTED)
RARELY = Block(arm="rarely", interval=RARE, settling=0, counted=RARE)


def measure(training: Training, system: System, place: Place, tell: Callable[..., None], cycles: int) -> None:
    """Blocks in turn. A cycle is 2 x ``RARE`` iterations, so that the one rare copy falls on the first of a block."""
    system.start()
    order = random.Random(0)
    while training.iteration < WARM_UP - 1:  # every kind of block once; nothing is kept
        arm = EACH if training.iteration < RARE else RARELY
        _one(training, system, arm.interval)
    system.drain()
    for cycle in range(cycles):
        blocks = [OFF, EACH]
        order.shuffle(blocks)
        for block in (RARELY, *blocks):
            tell("block", cycle=cycle, **_run_block(training, system, block, place))
    system.leave(RARE)
    torch.distributed.barrier()
    with meters.Peak() as peak:
        for _ in range(COUNTED + 1):
            _one(training, system, 1)
        system.drain()
    tell("memory", private=peak.private, shared=peak.shared if place.local_rank == 0 else 0)
    state = sum(tensor.numel() * tensor.element_size() for tensor in training.tensors().values())
    tell("ended", state_bytes=state)
    system.close()


def _run_block(training: Training, system: System, block: Block, place: Place) -> dict[str, Any]:
    """Seconds are of the counted iterations; processor, bytes and whole copies of all of them, and of what is late."""
    has_link = place.local_rank == 0
    for _ in range(system.warming if block.interval == 1 else 0):
        _one(training, system, block.interval)
    whole, cpu, sent = system.drain(), meters.cpu_seconds(), meters.sent_bytes() if has_link else 0
    seconds, stalls = [], []
    for number in range(block.settling + block.counted):
        took, stalled = _one(training, system, block.interval)
        if number >= block.settling:
            seconds.append(took)
            stalls.append(stalled)
    ended = time.monotonic()
    whole = system.drain() - whole
    return {
        "arm": block.arm,
        "iterations": block.settling + block.counted,
        "seconds": seconds,
        "stalls": stalls,
        "drain_s": time.monotonic() - ended,
        "whole": whole,
        "cpu_s": meters.cpu_seconds() - cpu,
        "sent": meters.sent_bytes() - sent if has_link else 0,
    }


def _one(training: Training, system: System, interval: int) -> tuple[float, float]:
    """An iteration with its copy, if one is due: seconds, and those that the training thread spent for the system."""
    training.pipeline_arguments = system.pipeline_arguments(interval)
    began, waited = time.monotonic(), system.waited_s()
    training.step()
    stepped = time.monotonic()
    if interval:
        system.after_step(training.iteration, interval)
    ended = time.monotonic()
    return ended - began, ended - stepped + system.waited_s() - waited


if __name__ == "__main__":
    sys.exit(main())
