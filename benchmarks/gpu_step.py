# SPDX-License-Identifier: Apache-2.0
"""How much longer is an iteration on one GPU with a snapshot every iteration?

One rank trains a MoE GPT; model ``whole`` has more than 10^9 parameters. The modes come one after the other, each
between blocks of iterations without MoEtion (``none``). While a mode is attached, blocks with snapshots and blocks
without them (``idle``: hooks only) take turns. An iteration counts from the call of the step until ``on_step_end``
has returned. The first iterations of a block are left out: in the first one the last snapshot of the block before is
still on its way, and the chains of mode ``exact`` begin anew.

The time is bounded by ``--seconds``, the start of the process included: each mode gets an equal share of what is left.
A mode whose arena has no room in ``--store``, or in memory, is left out and named.

``--device cpu`` runs the same code on the CPU's path.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._common import (
    Result,
    at_least,
    at_most,
    available_memory_bytes,
    median,
    median_interval,
    parser,
    report,
    start_trainer,
)
from megatron_moetion.config import MoetionConfig
from megatron_moetion.errors import MoetionError
from megatron_moetion.plan.costs import RankState, cost_of_exact, cost_of_full, cost_of_popularity
from megatron_moetion.select.budget import experts_per_snapshot
from megatron_moetion.store.sharedfile import free_bytes

ARMS = ("full", "exact", "popularity")
PERIOD = 2
"""Of mode ``exact``: the arena of a longer one takes longer to make than there is time to measure."""
STALENESS_CAP = 8
TARGET_SHARE = 0.01
DROPPED_SHARE = 0.05
"""Snapshots that may be dropped: those cost nothing, and protect nothing."""
MEMORY_SHARE = 0.85
"""Of the memory that is available, what an arena may take."""
FEWEST_CYCLES = 2
COMMON = (
    "--disable-bias-linear --moe-router-topk 2 --moe-token-dispatcher-type alltoall --attention-dropout 0 "
    "--hidden-dropout 0 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2 --mock-data --bf16 "
    "--grad-reduce-in-bf16 --use-distributed-optimizer --lr 1e-4 --train-iters 100000 --eval-iters 0 --seed 1"
)


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is trained, and how long a block is."""

    flags: str
    counted: int
    """Iterations of a block that count."""


MODELS = {
    "whole": Model(
        flags="--num-layers 4 --hidden-size 2048 --ffn-hidden-size 8192 --num-attention-heads 16 --seq-length 2048 "
        "--num-experts 8 --moe-ffn-hidden-size 8192 --micro-batch-size 4 --global-batch-size 16",
        counted=8,
    ),
    "small": Model(
        flags="--num-layers 4 --hidden-size 1024 --ffn-hidden-size 4096 --num-attention-heads 16 --seq-length 1024 "
        "--num-experts 4 --moe-ffn-hidden-size 4096 --micro-batch-size 8 --global-batch-size 32",
        counted=10,
    ),
    "toy": Model(
        flags="--num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --seq-length 32 "
        "--num-experts 4 --moe-ffn-hidden-size 128 --micro-batch-size 1 --global-batch-size 2",
        counted=4,
    ),
}


@dataclass(kw_only=True)
class Arm:
    """What was measured of one mode. Seconds of each iteration."""

    mode: str
    active: list[float] = field(default_factory=list)
    idle: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    """Median of a block with snapshots over that of the idle block beside it, one a cycle."""
    start_s: float = 0.0
    populated_s: float = 0.0
    """Of the start: until the arena had its memory."""
    arena_bytes: int = 0
    snapshot_bytes: float = 0.0
    dropped: int = 0
    """Of the snapshots of counted iterations."""
    waited_s: float = 0.0
    pinned: bool = False
    problem: str | None = None
    """Why it was not measured."""


def config_of(mode: str, store: Path) -> MoetionConfig:
    """The settings of an arm. Without a replica: nothing leaves the node, so this is the GPU's part of the cost."""
    settings: dict[str, Any] = {"exact": {"period": PERIOD}, "popularity": {"staleness_cap": STALENESS_CAP}}
    return MoetionConfig(
        mode=mode,
        run_id=f"step-{mode}",
        store=str(store),
        replicas=0,
        lost_token_budget=0.0,  # K is what is measured
        **settings.get(mode, {}),
    )


def arena_bytes(mode: str, state: RankState, config: MoetionConfig) -> int:
    """What the arena of a mode takes."""
    if mode == "full":
        return cost_of_full(state).arena.total_bytes
    if mode == "exact":
        return cost_of_exact(state, config.period).arena.total_bytes
    return cost_of_popularity(state, experts_per_snapshot(config, state.num_experts)).arena.total_bytes


def state_of(trainer: Any) -> RankState:
    """The trainer's state, counted."""
    named = [pair for chunk in trainer.model for pair in chunk.named_parameters()]
    experts = sum(p.numel() for name, p in named if ".experts." in name)
    return RankState(
        dense_parameters=trainer.num_parameters - experts,
        expert_parameters=experts,
        num_experts=trainer.args.num_experts * trainer.args.num_layers,
        gradient_bytes=2,
        replicas=0,
        ranks_per_node=1,
    )


def shortage(need: int, store: Path, available: int) -> str | None:
    """Why an arena of ``need`` bytes has no room; None if it has. ``available``: memory that the kernel could give."""
    free = free_bytes(store)
    if need > free:
        return f"its arena takes {need / 2**30:.1f} GiB and {store} has {free / 2**30:.1f} GiB free (--store DIR)"
    if need > MEMORY_SHARE * available:
        return f"its arena takes {need / 2**30:.1f} GiB of {available / 2**30:.1f} GiB of memory"
    return None


def no_time(need_bytes: int, before: Sequence[Arm], iteration_s: float, counted: int, left_s: float) -> str | None:
    """Why there is no time for a mode, by what arenas have taken ``before``; None if there is, or nobody knows."""
    known = [arm.start_s / arm.arena_bytes for arm in before if arm.start_s]
    if not known:
        return None
    cycles_s = FEWEST_CYCLES * 2 * (counted + PERIOD + 4) * iteration_s
    need_s = need_bytes * max(known) + cycles_s
    return f"it takes some {need_s:.0f} s, and {max(left_s, 0):.0f} s are left" if need_s > left_s else None


def run_block(trainer: Any, attached: Any, skipped: int, counted: int) -> list[float]:
    """Seconds of each counted iteration of a block; with ``attached`` there is a snapshot of each."""
    seconds = []
    for number in range(skipped + counted):
        started = time.perf_counter()
        trainer.train_step()
        if attached is not None:
            attached.on_step_end(trainer.progress.iteration)
        if number >= skipped:
            seconds.append(time.perf_counter() - started)
    return seconds


def measure_arm(trainer: Any, arm: Arm, store: Path, model: Model, until: float) -> None:
    """Attach, let blocks with and without snapshots take turns, detach. ``until``: of the monotonic clock."""
    from megatron_moetion.mcore.attach import attach

    config = config_of(arm.mode, store)
    began = time.monotonic()
    try:
        attached = attach(
            model=trainer.model,
            optimizer=trainer.optimizer,
            opt_param_scheduler=trainer.scheduler,
            user_state=trainer.progress,
            config=config,
        )
        with attached:
            attached.start()
            arm.start_s = time.monotonic() - began
            measure_cycles(trainer, arm, attached, model, until)
            attached.drain()
            note_counts(arm, attached)
    except MoetionError as error:
        arm.problem = f"{type(error).__name__}: {error}"
    finally:
        shutil.rmtree(store / config.run_id, ignore_errors=True)


def measure_cycles(trainer: Any, arm: Arm, attached: Any, model: Model, until: float) -> None:
    """Cycles of an idle block and one with snapshots, until the time is over."""
    skipped = 1 if arm.mode != "exact" else PERIOD + 4
    cycle_s = 0.0
    while len(arm.ratios) < FEWEST_CYCLES or time.monotonic() + cycle_s < until:
        began = time.monotonic()
        idle = run_block(trainer, None, 1, model.counted)
        run_block(trainer, attached, skipped, 0)
        before = dropped(attached)
        active = run_block(trainer, attached, 0, model.counted)
        arm.dropped += dropped(attached) - before
        arm.idle += idle
        arm.active += active
        arm.ratios.append(median(active) / median(idle))
        cycle_s = time.monotonic() - began


def dropped(attached: Any) -> int:
    """Snapshots dropped so far."""
    return int(sum(attached.session.running.pipeline.counts.dropped.values()))


def note_counts(arm: Arm, attached: Any) -> None:
    """What the session has counted."""
    running = attached.session.running
    counts = running.pipeline.counts
    arm.snapshot_bytes = counts.bytes_committed / max(counts.committed, 1)
    arm.waited_s = counts.waited_s
    arm.populated_s = running.arenas.own.population.seconds
    arm.pinned = "arena pinned" in running.packer.note


def arm_results(arm: Arm, none: Sequence[float], on_gpu: bool) -> list[Result]:
    """The figures of one mode, against the iterations without it."""
    name = f"{arm.mode}: iteration over none, median"
    if arm.problem is not None:
        return [Result(name=name, value=None, unit="share", target=f"<= {TARGET_SHARE:g}")]
    low, high = median_interval(arm.ratios)
    over = median(arm.active) / median(none) - 1
    results = [
        at_most(name, over, "share", TARGET_SHARE) if on_gpu else Result(name=name, value=over, unit="share"),
        Result(name=f"{arm.mode}: the same, 99th percentile", value=p99(arm.active) / p99(none) - 1, unit="share"),
        Result(name=f"{arm.mode}: hooks alone", value=median(arm.idle) / median(none) - 1, unit="share"),
        Result(name=f"{arm.mode}: over idle, lower end of 95%", value=low - 1, unit="share"),
        Result(name=f"{arm.mode}: over idle, upper end of 95%", value=high - 1, unit="share"),
        Result(name=f"{arm.mode}: iteration, median", value=median(arm.active), unit="s"),
        Result(name=f"{arm.mode}: iteration, 99th percentile", value=p99(arm.active), unit="s"),
        Result(name=f"{arm.mode}: iterations counted", value=float(len(arm.active)), unit=""),
        Result(name=f"{arm.mode}: bytes of a snapshot", value=arm.snapshot_bytes / 1e9, unit="GB"),
        at_most(f"{arm.mode}: snapshots dropped", arm.dropped / len(arm.active), "share", DROPPED_SHARE),
        Result(name=f"{arm.mode}: training waited for snapshots", value=arm.waited_s, unit="s"),
        Result(name=f"{arm.mode}: arena", value=arm.arena_bytes / 2**30, unit="GiB"),
        Result(name=f"{arm.mode}: attach and start", value=arm.start_s, unit="s"),
        Result(name=f"{arm.mode}: of it, the arena got its memory", value=arm.populated_s, unit="s"),
    ]
    if on_gpu:
        results.append(at_least(f"{arm.mode}: arena pinned", float(arm.pinned), "", 1))
    return results


def p99(seconds: Sequence[float]) -> float:
    """The 99th percentile; of fewer than a hundred it is close to the largest."""
    return float(np.quantile(np.asarray(seconds), 0.99))


def main() -> int:
    """Train, measure, report."""
    began = time.monotonic()
    options = parser(__doc__ or "")
    options.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    options.add_argument("--model", choices=MODELS, default="whole")
    options.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    options.add_argument("--seconds", type=float, default=130.0, help="for the whole process")
    options.add_argument("--store", type=Path, default=Path("/dev/shm"), help="folder in memory for the arenas")
    args = options.parse_args()
    on_gpu, model = args.device == "gpu", MODELS[args.model]
    if not on_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    if on_gpu and not torch.cuda.is_available():
        report("gpu_step", [Result(name="iteration over none", value=None, unit="share")], args.json, ["no GPU"])
        return 0
    end = began + args.seconds * (0.6 if args.quick else 1.0)
    store = args.store / f"moetion-step-{os.getpid()}"
    store.mkdir(parents=True)
    arms = [Arm(mode=mode) for mode in args.arms]
    try:
        _, trainer = start_trainer(f"{COMMON} {model.flags}", on_gpu=on_gpu)
        run_block(trainer, None, 3, 0)  # warms caches, allocators and clocks
        none = run_block(trainer, None, 1, model.counted)
        for number, arm in enumerate(arms):
            now = time.monotonic()
            arm.arena_bytes = arena_bytes(arm.mode, state_of(trainer), config_of(arm.mode, store))
            arm.problem = shortage(arm.arena_bytes, store, available_memory_bytes()) or no_time(
                arm.arena_bytes, arms[:number], median(none), model.counted, end - now
            )
            if arm.problem is None:
                measure_arm(trainer, arm, store, model, now + (end - now) / (len(arms) - number))
                none += run_block(trainer, None, 1, model.counted)
            print(f"{arm.mode}: {arm.problem or f'{len(arm.active)} iterations'}", flush=True)
    finally:
        shutil.rmtree(store, ignore_errors=True)
    results = [
        Result(name="parameters", value=trainer.num_parameters / 1e9, unit="10^9"),
        Result(name="none: iteration, median", value=median(none), unit="s"),
        Result(name="none: iteration, 99th percentile", value=p99(none), unit="s"),
        Result(name="none: iterations counted", value=float(len(none)), unit=""),
        *(result for arm in arms for result in arm_results(arm, none, on_gpu)),
    ]
    notes = [f"model: {model.flags} {COMMON}", f"--transformer-impl {trainer.args.transformer_impl}"]
    notes += [f"{arm.mode}: not measured: {arm.problem}" for arm in arms if arm.problem is not None]
    report("gpu_step", results, args.json, notes)
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
