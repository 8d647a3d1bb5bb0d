# SPDX-License-Identifier: Apache-2.0
"""What does mode ``exact`` cost beside ``full`` and ``popularity``, and what comes back?

Four ranks (PP 2 x EP 2, two emulated nodes) train one model; blocks of iterations without snapshots and with each mode
alternate within one run, ``exact`` at several periods P. A block of ``exact`` begins with P + 4 iterations that are
not counted: its chains begin anew there, because the blocks in between were not logged. Bytes and memory stand beside
the formula's prediction (12 / P + g bytes a parameter and iteration, g of a gradient), and beside what MoEvement's
published schedule would copy (2 + 10 / W bytes a parameter in its largest slot, 1.5 W iterations replayed on average;
W = P). At the end every mode recovers what it holds, in the same processes, into a state that was overwritten with
noise; every tensor is compared.

Three models: 8 and 64 experts with fp32 gradients, 64 experts with bf16 gradients.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

RANKS = 4
COMMON = (
    "--num-layers 4 --hidden-size 256 --ffn-hidden-size 512 --num-attention-heads 4 --seq-length 128 "
    "--moe-router-topk 2 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2 "
    "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2 --micro-batch-size 1 --global-batch-size 4 "
    "--lr 1e-4 --bf16 --use-distributed-optimizer --train-iters 100000 --eval-iters 0 --seed 1"
)
MODELS = {
    "E 8, fp32 gradients": "--num-experts 8 --moe-ffn-hidden-size 768",
    "E 64, fp32 gradients": "--num-experts 64 --moe-ffn-hidden-size 96",
    "E 64, bf16 gradients": "--num-experts 64 --moe-ffn-hidden-size 96 --grad-reduce-in-bf16",
}
PERIODS = (2, 4, 8, 16)
WARM_UP = 4
TARGETS = {4: 0.48, 2: 0.30}
"""Most bytes an iteration at P = 8, as a share of full's, by bytes of a gradient."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How long a run is."""

    models: tuple[str, ...]
    periods: tuple[int, ...]
    cycles: int
    block_iterations: int

    @property
    def arms(self) -> tuple[str, ...]:
        """What alternates."""
        return ("off", "full", "popularity", *(f"exact P {p}" for p in self.periods))


FULL_SIZE = Size(models=tuple(MODELS), periods=PERIODS, cycles=5, block_iterations=6)
QUICK_SIZE = Size(models=tuple(MODELS)[:1], periods=(4,), cycles=2, block_iterations=4)


def main() -> int:
    """Start the ranks of each model, read what they measured, report."""
    from benchmarks._common import parser, report

    options = parser(__doc__ or "")
    options.add_argument("--plot", type=Path, metavar="PATH", help="draw bytes, memory and recoveries")
    options.add_argument("--periods", type=int, nargs="+", help=f"default: {' '.join(map(str, PERIODS))}")
    options.add_argument("--cycles", type=int, help="how often the blocks alternate")
    options.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--model", help=argparse.SUPPRESS)
    args = options.parse_args()
    size = QUICK_SIZE if args.quick else FULL_SIZE
    size = replace(size, periods=tuple(args.periods or size.periods), cycles=args.cycles or size.cycles)
    if args.worker is not None:
        return measure(args.worker, size, args.model)
    results: list[Any] = []
    for model in size.models:
        with tempfile.TemporaryDirectory() as folder:
            measured = Path(folder) / "measured.json"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
            command += [__file__, "--worker", str(measured), "--model", model, *(["--quick"] if args.quick else [])]
            command += ["--cycles", str(size.cycles), "--periods", *map(str, size.periods)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            subprocess.run(command, check=True, cwd=ROOT, env=environment)
            results += summarise(json.loads(measured.read_text()), size, model)
    if args.plot is not None:
        plot({r.name: r.value for r in results}, size, args.plot)
    report("exact_mode", results, args.json, [f"model: {COMMON}", *(f"{k}: {v}" for k, v in MODELS.items())])
    return 0


def measure(path: Path, size: Size, model: str) -> int:
    """One rank: train block after block, then recover; rank 0 writes what all measured."""
    from benchmarks._common import start_trainer

    place, trainer = start_trainer(f"{COMMON} {MODELS[model]}")

    from torch import distributed as dist

    store = Path("/dev/shm") / f"moetion-exact-{os.environ['MASTER_PORT']}"
    order = random.Random(0)
    blocks: list[dict[str, Any]] = []
    try:
        sessions = {arm: start(trainer, store, arm)[0] for arm in size.arms if arm != "off"}
        for cycle in range(size.cycles + 1):
            for arm in order.sample(size.arms, len(size.arms)):
                block = run_block(trainer, sessions.get(arm), warm_up(arm), size.block_iterations)
                if cycle:  # the first cycle warms caches and allocators
                    blocks.append({"cycle": cycle, "arm": arm, **block})
            if place.rank == 0:
                print(f"{model}: cycle {cycle} of {size.cycles}", flush=True)
        facts = {arm: facts_of(session) for arm, session in sessions.items()}
        os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"
        for arm, session in sessions.items():
            facts[arm] |= recover(trainer, store, arm, session)
        gathered: list[Any] = [None] * place.world_size
        dist.all_gather_object(gathered, {"blocks": blocks, "facts": facts})
        if place.rank == 0:
            path.write_text(json.dumps(gathered))
    finally:
        dist.barrier()
        if place.local_rank == 0:
            shutil.rmtree(store, ignore_errors=True)
    return 0


def warm_up(arm: str) -> int:
    """Iterations at the beginning of a block that are not counted."""
    return 1 if arm in ("off", "full", "popularity") else int(arm.split()[-1]) + WARM_UP


def start(trainer: Any, store: Path, arm: str) -> tuple[Any, Any]:
    """A session of one arm, and what it recovered."""
    from megatron_moetion.config import MoetionConfig
    from megatron_moetion.mcore.attach import attach

    mode, *period = arm.split(" P ")
    attached = attach(
        model=trainer.model,
        optimizer=trainer.optimizer,
        opt_param_scheduler=trainer.scheduler,
        user_state=trainer.progress,
        config=MoetionConfig(
            mode=mode,
            period=int(period[0]) if period else 0,
            run_id=arm.replace(" ", "-"),
            store=str(store),
            ranks_per_node=2,
            lost_token_budget=0.0,  # K is what is measured
        ),
    )
    return attached, attached.start()


def run_block(trainer: Any, attached: Any, skipped: int, iterations: int) -> dict[str, Any]:
    """Counted iterations: seconds of each, CPU seconds and bytes of one, and when each was over and whole."""
    from benchmarks._common import whole_since

    seconds, steps = [], []
    cpu = 0.0
    before: dict[str, float] = {}
    began = time.monotonic()
    for number in range(iterations + skipped):
        if number == skipped:
            cpu, before = time.process_time(), counts_of(attached)
        started = time.perf_counter()
        trainer.train_step()
        ended = time.monotonic()
        if attached is not None:
            attached.on_step_end(trainer.progress.iteration)
        if number >= skipped:
            seconds.append(time.perf_counter() - started)
            steps.append([trainer.progress.iteration, ended])
    cpu = (time.process_time() - cpu) / iterations
    if attached is not None:
        attached.drain()
    after = counts_of(attached)
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "steps": steps,
        "whole": whole_since(attached, began) if attached is not None else {},
        **{name: (after[name] - before[name]) / iterations for name in after},
    }


def counts_of(attached: Any) -> dict[str, float]:
    """What a session has counted so far."""
    if attached is None:
        return {}
    counts = attached.session.running.pipeline.counts
    return {
        "bytes": counts.bytes_committed,
        "zero_bytes": counts.zero_bytes,
        "snapshots": counts.committed,
        "dropped": sum(counts.dropped.values()),
        "left_out": sum(counts.left_out.values()),
        "waited_s": counts.waited_s,
        "spared_bytes": attached.scalars().get("moetion/spared-bytes", 0.0),
    }


def facts_of(attached: Any) -> dict[str, Any]:
    """Sizes that do not change."""
    from megatron_moetion.units import Role

    running = attached.session.running
    units = running.adapter.inventory().units
    regions = [r for u in units for r in u.regions]
    parameters = sum(r.nbytes // 4 for r in regions if r.role is Role.MASTER)
    return {
        "parameters": parameters,
        "always": sum(u.nbytes for u in always_in(running.mode.inventory)),
        "gradient_bytes": sum(r.nbytes for r in regions if r.role is Role.GRAD) / parameters,
        "arenas": sum(a.nbytes for a in running.arenas.all()),
    }


def always_in(inventory: Any) -> list[Any]:
    """What every snapshot of mode ``exact`` holds beside gradients; nothing in other modes."""
    from megatron_moetion.store.chains import always_of, log_units

    log_of = log_units([(u.name, u.kind) for u in inventory.units])
    always = always_of([u.kind for u in inventory.units], log_of)
    return [inventory.units[u] for u in always] if log_of else []


def live_state(inventory: Any) -> list[Any]:
    """Tensors over every byte of state that is captured from host memory, gradients aside."""
    import torch

    from megatron_moetion.units import Role

    return [
        torch.frombuffer((ctypes.c_uint8 * r.nbytes).from_address(r.address), dtype=getattr(torch, r.dtype))
        for u in inventory.units
        for r in u.regions
        if r.role is not Role.GRAD
    ]


def recover(trainer: Any, store: Path, arm: str, attached: Any) -> dict[str, Any]:
    """Train a block, stop in mid-rotation, overwrite all state with noise, come back; compare every tensor."""
    import torch
    from torch import distributed as dist

    for _ in range(warm_up(arm) + 2):
        trainer.train_step()
        attached.on_step_end(trainer.progress.iteration)
    attached.drain()
    state = live_state(attached.session.running.adapter.inventory())
    before = [tensor.clone() for tensor in state]
    progress = trainer.progress.iteration
    attached.close()
    for tensor in state:
        tensor.copy_(torch.rand(tensor.shape).to(tensor.dtype) if tensor.is_floating_point() else tensor)
    dist.barrier()
    again, resumed = start(trainer, store, arm)
    wrong = sum(
        not torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(before, live_state(again.session.running.adapter.inventory()), strict=True)
    )
    found = {
        "recovery_s": dict(resumed.seconds),
        "replayed": resumed.replayed_steps,
        "lost": progress - resumed.iteration,
        "wrong": wrong,
        "tensors": len(before),
    }
    again.close()
    return found


def summarise(ranks: list[dict[str, Any]], size: Size, model: str) -> list[Any]:
    """The figures of one model."""
    from benchmarks._common import Result, at_most, lost_iterations, median_interval
    from megatron_moetion.select.rotation import SPARE_LOGS

    times = {(b["cycle"], b["arm"]): statistics.median(b["seconds"]) for b in ranks[0]["blocks"]}
    cycles = sorted({cycle for cycle, _ in times})
    facts = [r["facts"] for r in ranks]

    def mean(arm: str, name: str) -> float:
        """An iteration, all ranks. What is counted by snapshot: a block may end with the last of the one before."""
        return sum(
            statistics.mean(
                b[name] / (b["snapshots"] if name.endswith("bytes") else 1) for b in r["blocks"] if b["arm"] == arm
            )
            for r in ranks
        )

    def total(arm: str, name: str) -> float:
        return float(sum(f[arm][name] for f in facts))

    exact = f"exact P {size.periods[0]}"
    parameters, gradient = total(exact, "parameters"), total(exact, "gradient_bytes") / len(facts)
    full = mean("full", "bytes")
    results = [
        Result(
            name=f"{model}: iteration without snapshots",
            value=statistics.median(times[c, "off"] for c in cycles),
            unit="s",
        ),
        Result(name=f"{model}: parameters, all ranks", value=parameters / 1e6, unit="M"),
        Result(name=f"{model}: full: bytes", value=full / 1e6, unit="MB/iteration"),
    ]
    for arm in size.arms[1:]:
        at = f"{model}: {arm}"
        ratios = np.array([times[c, arm] / times[c, "off"] for c in cycles])
        low, high = median_interval(ratios)
        cpu = mean(arm, "cpu_seconds") - mean("off", "cpu_seconds")
        lost = lost_iterations([r["blocks"] for r in ranks], arm)
        moments = sum(lost.values())
        seconds = {k: max(f[arm]["recovery_s"].get(k, 0.0) for f in facts) for k in facts[0][arm]["recovery_s"]}
        wrong, of = total(arm, "wrong"), total(arm, "tensors")
        if arm.startswith("exact"):
            period = int(arm.split()[-1])
            always = total(arm, "always")
            before_saving = mean(arm, "bytes") + mean(arm, "zero_bytes") + mean(arm, "spared_bytes")
            predicted = (12 / period + gradient) * parameters + always
            share = before_saving / full
            target = TARGETS[round(gradient)] if period == 8 else None
            name = f"{at}: bytes, share of full's, before the saving on zeros"
            results += [
                at_most(name, share, "", target) if target else Result(name=name, value=share, unit=""),
                Result(name=f"{at}: the same by the formula", value=predicted / full, unit=""),
                Result(name=f"{at}: bytes, share of full's", value=mean(arm, "bytes") / full, unit=""),
                Result(name=f"{at}: gradients of zeros", value=mean(arm, "zero_bytes") / 1e6, unit="MB/iteration"),
                Result(
                    name=f"{at}: captures spared without gradients",
                    value=mean(arm, "spared_bytes") / 1e6,
                    unit="MB/iteration",
                ),
                Result(
                    name=f"{at}: MoEvement's largest slot by its formula, W = P", value=(2 + 10 / period) / 12, unit=""
                ),
                Result(name=f"{at}: device staging on a GPU, all ranks", value=gradient * parameters / 1e6, unit="MB"),
                Result(
                    name=f"{at}: steps replayed in the recovery", value=max(f[arm]["replayed"] for f in facts), unit=""
                ),
                Result(name=f"{at}: iterations that MoEvement replays on average, 1.5 W", value=1.5 * period, unit=""),
                Result(name=f"{at}: captures left out", value=mean(arm, "left_out"), unit="/iteration"),
                Result(name=f"{at}: training waited", value=mean(arm, "waited_s") / len(ranks), unit="s/iteration"),
                Result(
                    name=f"{at}: host memory by the formula",
                    value=2 * ((24 + gradient * (period + SPARE_LOGS)) * parameters + (2 + SPARE_LOGS) * always) / 1e6,
                    unit="MB",
                ),
            ]
        else:
            results.append(Result(name=f"{at}: bytes, share of full's", value=mean(arm, "bytes") / full, unit=""))
        results += [
            Result(name=f"{at}: host memory, all ranks, one replica", value=total(arm, "arenas") / 1e6, unit="MB"),
            Result(name=f"{at}: iteration time, ratio to none", value=float(np.median(ratios)), unit="x"),
            Result(name=f"{at}: the same, lower end of 95%", value=low, unit="x"),
            Result(name=f"{at}: the same, upper end of 95%", value=high, unit="x"),
            Result(name=f"{at}: CPU seconds added, all ranks", value=cpu, unit="s/iteration"),
            Result(name=f"{at}: snapshots dropped", value=mean(arm, "dropped"), unit="/iteration"),
            Result(name=f"{at}: recovery", value=sum(seconds.values()), unit="s"),
            Result(name=f"{at}: of it, restoring state", value=seconds.get("restore", 0.0), unit="s"),
        ]
        for iterations in range(3):
            results.append(
                Result(
                    name=f"{at}: moments at which a fault costs {iterations} iteration(s)",
                    value=lost[iterations] / moments if moments else None,
                    unit="",
                )
            )
        if arm != "popularity":
            results.append(at_most(f"{at}: most iterations that a fault costs", float(max(lost, default=0)), "", 2))
            results.append(at_most(f"{at}: tensors that came back otherwise, of {of:.0f}", wrong, "", 0))
    return results


def plot(figures: Mapping[str, float | None], size: Size, path: Path) -> None:
    """Bytes, host memory, recovery and iteration time over the period, beside the formulas and the other modes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colors = dict(zip(MODELS, ("#0072B2", "#009E73", "#D55E00"), strict=True))
    fine = np.geomspace(size.periods[0], size.periods[-1], 100)
    figure, axes = pyplot.subplots(2, 2, figsize=(12, 10), layout="constrained")
    bytes_, memory, recovery, overhead = axes.flat
    bytes_.axhline(12, color="#222222", label="mode full")
    memory.axhline(36, color="#222222", label="mode full, by the formula 36")
    for gradient, style, kind in ((4, "-", "fp32"), (2, ":", "bf16")):
        how = {"color": "#222222", "linestyle": style, "linewidth": 1}
        bytes_.plot(fine, 12 / fine + gradient, **how, label=f"formula 12/P + {gradient}, {kind} gradients")
        memory.plot(fine, 24 + gradient * (fine + 6), **how, label=f"formula 24 + {gradient} (P + 6), {kind} gradients")
    bytes_.plot(fine, 2 + 10 / fine, color="#8c8c8c", linestyle="--", label="MoEvement's largest, by its formula")
    for number, model in enumerate(size.models):
        words = in_words(model)
        parameters = figures[f"{model}: parameters, all ranks"] or 1.0
        full = (figures[f"{model}: full: bytes"] or 0.0) / parameters
        exact = {p: f"{model}: exact P {p}" for p in size.periods}
        shares = [figures[f"{at}: bytes, share of full's"] or 0.0 for at in exact.values()]
        arenas = [
            (figures[f"{at}: host memory, all ranks, one replica"] or 0.0) / parameters / 2 for at in exact.values()
        ]
        seconds = [figures[f"{at}: of it, restoring state"] or 0.0 for at in exact.values()]
        marks = {"color": colors[model], "markersize": 7}
        bytes_.plot(list(exact), [s * full for s in shares], "o", **marks, label=words)
        memory.plot(list(exact), arenas, "o", **marks, label=words)
        recovery.plot(list(exact), seconds, "o-", **marks, label=f"mode exact, {words}")
        ratios, low, high = (
            np.array([figures[f"{model}: {arm}: {what}"] or math.nan for arm in size.arms[1:]])
            for what in ("iteration time, ratio to none", "the same, lower end of 95%", "the same, upper end of 95%")
        )
        places = np.arange(len(ratios)) + (number - 1) * 0.15
        spread = [ratios - low, high - ratios]
        overhead.errorbar(places, ratios, yerr=spread, fmt="o", capsize=3, color=colors[model], label=words)
        other = figures[f"{model}: full: of it, restoring state"] or 0.0
        recovery.axhline(other, color=colors[model], linestyle="--", linewidth=1, label=f"mode full, {words}")
    bytes_.set(title="Bytes of a snapshot", ylabel="bytes per parameter and iteration", ylim=(0, 22))
    memory.set(title="Host memory", ylabel="bytes per parameter and copy", ylim=(0, 160))
    recovery.set(title="Loading state and replaying steps in a recovery", ylabel="seconds", ylim=(0, None))
    for axis in (bytes_, memory, recovery):
        axis.set_xscale("log", base=2)
        axis.set_xticks(size.periods, [str(p) for p in size.periods])
        axis.set_xlabel("period P of mode exact (iterations)")
    overhead.set(title="Time of an iteration with a snapshot", ylabel="ratio to none, with its 95% interval")
    overhead.axhline(1, color="#222222", linewidth=1)
    overhead.set_ylim(None, 1.75)
    overhead.set_xticks(range(len(size.arms) - 1), [arm.replace(" P ", "\nP = ") for arm in size.arms[1:]])
    overhead.set_xlabel("mode")
    for axis in axes.flat:
        axis.legend(fontsize=8, frameon=False, loc="upper left")
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def in_words(model: str) -> str:
    """``E 8, fp32 gradients``, a model's key in the results, as pictures have it."""
    experts, _, gradients = model.removeprefix("E ").partition(", ")
    return f"{experts} experts, {gradients}"


if __name__ == "__main__":
    sys.exit(main())
