# SPDX-License-Identifier: Apache-2.0
"""What do snapshots cost on links that training itself uses?

Two emulated hosts (``benchmarks/testbed``) with a limited link train one Megatron-Core MoE GPT with 64 experts on two
ranks each. By default (PP 2 x EP 2) the pipeline crosses the link; with ``--pp 1 --ep 4`` tokens do, in the all-to-alls
of every layer, and gradients and parameters. For each rate of the sweep one run alternates blocks of iterations of five
arms:

    off                  no snapshots
    full-eager           all state, every iteration, at once (GEMINI without its scheduler)
    full-bubble          all state, in the gaps (GEMINI's idea)
    popularity-eager     dense state and K experts, at once
    popularity-bubble    the same, in the gaps: what this project does

The first iterations of a block are left out: there the arm settles. Snapshots count that became whole in the others:
one that is still on its way at the end of a block leaves then, while nothing is measured. A cycle has a block without
snapshots, one of ours, and one of the other three in turn, in random order, so that what is compared lies close
together. It gives one ratio for each of its arms, the median iteration over that of ``off``; reported are the median
over all cycles and its 95% interval (of the other three, with a third of the blocks, it is hardly more than their
range). The unlimited link is the control: what snapshots cost there is CPU time, because two cores train, pack and
send.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import statistics
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

MODEL_FLAGS = (
    "--num-layers 2 --hidden-size 256 --ffn-hidden-size 512 --num-attention-heads 4 --group-query-attention "
    "--num-query-groups 1 --seq-length 512 --max-position-embeddings 512 --position-embedding-type rope "
    "--num-experts 64 --moe-router-topk 1 --moe-router-pre-softmax --moe-ffn-hidden-size 160 "
    "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-3 "
    "--micro-batch-size 1 "
    "--lr 1e-3 --use-distributed-optimizer --train-iters 1000000 --eval-iters 0 --seed 1"
)
EXPERTS = 64
LAYERS = 2
STALENESS_CAP = 32
OURS = "popularity-bubble"
OTHERS = ("full-eager", "full-bubble", "popularity-eager")
ARMS = ("off", *OTHERS, OURS)
IN_PICTURES = {
    "full-eager": ("mode full, sent at once", "#999999", -0.12),
    "full-bubble": ("mode full, sent in the gaps of training", "#444444", -0.04),
    "popularity-eager": ("mode popularity, sent at once", "#E69F00", 0.04),
    "popularity-bubble": ("mode popularity, sent in the gaps of training", "#D55E00", 0.12),
}
"""By arm: words, colour and place beside the link's mark."""
ITERATION = ": iteration without snapshots"
"""How the first figure of each link ends."""
BATCH = 48
"""Sequences an iteration. The fewer, the more bytes of state there are for each byte that training sends and each
second that it computes; large runs have thousands."""
TOKENS_PER_SEQUENCE = 512 * LAYERS
"""Routed ones, of all layers: length, layers."""
FAULT_EVERY = 1000
"""Iterations between faults, for the PLT that is printed beside K."""
RATES_MBIT = (100.0, 200.0, None)
QUICK_RATES_MBIT = (400.0,)
HOSTS, RANKS_PER_HOST = 2, 2
LAYOUTS = ((2, 2), (1, 4))
"""Pipeline stages and expert ranks."""
TARGET_SLOWDOWN = 0.01


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the model lies on the ranks: pipeline stages, and ranks that share a layer's experts."""

    pp: int
    ep: int

    @property
    def flags(self) -> str:
        """Of the trainer."""
        return f"{MODEL_FLAGS} --pipeline-model-parallel-size {self.pp} --expert-model-parallel-size {self.ep}"

    @property
    def experts_per_rank(self) -> int:
        """Of all layers of the rank."""
        return LAYERS // self.pp * EXPERTS // self.ep


@dataclass(frozen=True, kw_only=True)
class Size:
    """How long one rate is measured: cycles of blocks, iterations counted in a block, and left out before them."""

    batch: int
    cycles: int
    block_iterations: int
    settling_iterations: int
    limit_s: float


FULL_SIZE = Size(batch=BATCH, cycles=12, block_iterations=3, settling_iterations=2, limit_s=4000)
QUICK_SIZE = Size(batch=8, cycles=3, block_iterations=2, settling_iterations=1, limit_s=600)


def main() -> int:
    """Run the sweep and report."""
    from benchmarks._common import Result, parser, report
    from benchmarks.testbed import Testbed, TestbedUnavailable, run_torchrun

    options = parser(__doc__ or "")
    options.add_argument("--rates", type=_rate, nargs="+", metavar="MBIT", help="links to try; 0: unlimited")
    options.add_argument("--trace-dir", type=Path, metavar="DIR", help="keep traces of the bubble and eager arms there")
    options.add_argument("--plot", type=Path, metavar="PATH", help="draw the sweep")
    options.add_argument("--cycles", type=int, nargs="+", help="how often blocks alternate: for all links, or for each")
    options.add_argument("--batch", type=int, metavar="SEQUENCES", help=f"sequences an iteration; default: {BATCH}")
    options.add_argument("--pp", type=int, default=LAYOUTS[0][0], help="pipeline stages, 1 or 2")
    options.add_argument(
        "--ep", type=int, default=LAYOUTS[0][1], help="ranks that share experts: 4 of one stage, else 2"
    )
    options.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = options.parse_args()
    size = QUICK_SIZE if args.quick else FULL_SIZE
    size = replace(size, batch=args.batch or size.batch)
    rates = args.rates or (QUICK_RATES_MBIT if args.quick else RATES_MBIT)
    cycles = args.cycles or [size.cycles]
    if len(cycles) not in (1, len(rates)):
        options.error(f"--cycles has {len(cycles)} numbers for {len(rates)} links; give one, or one for each")
    if min(cycles) < len(OTHERS):
        options.error(f"--cycles {min(cycles)} is too few: an arm has one block in {len(OTHERS)} of them")
    if (args.pp, args.ep) not in LAYOUTS:
        options.error(f"--pp {args.pp} --ep {args.ep}: choose one of {', '.join(map(str, LAYOUTS))}")
    layout = Layout(pp=args.pp, ep=args.ep)
    if args.worker is not None:
        return measure(args.worker, replace(size, cycles=cycles[0]), layout, args.trace_dir)
    found: dict[float, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for rate, count in zip(rates, cycles * len(rates), strict=False):
            folder = Path(scratch) / f"{rate or 0:g}"
            command = [__file__, "--worker", str(folder / "measured.json"), *(["--quick"] if args.quick else [])]
            command += ["--cycles", str(count), "--batch", str(size.batch)]
            command += ["--pp", str(layout.pp), "--ep", str(layout.ep)]
            if args.trace_dir is not None:
                command += ["--trace-dir", str(args.trace_dir.resolve() / f"{rate or 0:g}mbit")]
            print(f"link: {_name(rate)} ...", flush=True)
            started = time.monotonic()
            try:
                with Testbed(HOSTS, rate) as testbed:
                    run_torchrun(testbed, command, RANKS_PER_HOST, size.limit_s, folder)
            except TestbedUnavailable as missing:
                print(f"error: {missing}", file=sys.stderr)
                return 2
            found[rate or math.inf] = json.loads((folder / "measured.json").read_text())
            print(f"link: {_name(rate)}: {time.monotonic() - started:.0f} s", flush=True)
    summaries = {rate: summarise(measured) for rate, measured in found.items()}
    results: list[Result] = []
    for rate, arms in summaries.items():
        results += results_of(rate, arms, size.batch * TOKENS_PER_SEQUENCE, layout)
    results += headline(summaries, layout)
    report(
        "replication_overhead",
        results,
        args.json,
        [f"model: {layout.flags}", f"{size.batch} sequences an iteration", f"staleness cap {STALENESS_CAP}"],
    )
    if args.plot is not None:
        plot({result.name: result.value for result in results}, args.plot)
    return 0


def _rate(text: str) -> float | None:
    return float(text) or None


def _name(rate: float | None) -> str:
    return "unlimited" if rate is None or math.isinf(rate) else f"{rate:g} Mbit/s"


# -- one rank ------------------------------------------------------------------------------------------------


def measure(path: Path, size: Size, layout: Layout, trace_dir: Path | None) -> int:
    """Train block after block; rank 0 writes what all ranks measured."""
    from benchmarks._common import start_trainer

    place, trainer = start_trainer(f"{layout.flags} --global-batch-size {size.batch}")

    from torch import distributed as dist

    store = Path("/dev/shm/moetion-replication")
    sessions = {arm: open_session(trainer, arm, store, trace_dir) for arm in ARMS[1:]}
    order, blocks = random.Random(0), []
    for cycle in range(size.cycles + 1):
        arms = ("off", OURS, OTHERS[cycle % len(OTHERS)]) if cycle else ARMS
        for arm in order.sample(arms, len(arms)):
            block = run_block(trainer, sessions.get(arm), size)
            if cycle:  # the first cycle warms caches, allocators and timelines
                blocks.append({"cycle": cycle, "arm": arm, **block})
        if place.rank == 0:
            print(f"cycle {cycle} of {size.cycles}", flush=True)
    spans = len(sessions[OURS].scheduler.newest_timeline.spans)
    for session in reversed(sessions.values()):
        session.close()
    gathered: list[Any] = [None] * place.world_size
    dist.all_gather_object(gathered, {"blocks": blocks})
    if place.rank == 0:
        hooks = {"span_s": seconds_per_span(layout), "spans": spans}
        path.write_text(json.dumps({"ranks": gathered, "shares": state_shares(trainer), "hooks": hooks}))
    dist.barrier()
    shutil.rmtree(store, ignore_errors=True)
    return 0


def open_session(trainer: Any, arm: str, store: Path, trace_dir: Path | None) -> Any:
    """A session of one arm, started: its baseline is whole."""
    from megatron_moetion.config import MoetionConfig
    from megatron_moetion.mcore.attach import attach

    mode, schedule = arm.split("-")
    session = attach(
        model=trainer.model,
        optimizer=trainer.optimizer,
        opt_param_scheduler=trainer.scheduler,
        user_state=trainer.progress,
        config=MoetionConfig(
            mode=mode,
            schedule=schedule,
            run_id=arm,
            store=str(store),
            staleness_cap=STALENESS_CAP,
            lost_token_budget=0.0,  # K is what is measured
            trace_dir=str(trace_dir / arm) if trace_dir is not None else "",
        ),
    )
    session.start()
    return session


def state_shares(trainer: Any) -> dict[str, float]:
    """Experts' share of the parameters of the whole model, from this rank's part of it."""
    named = [(n, p.numel()) for chunk in trainer.model for n, p in chunk.named_parameters()]
    experts = sum(n for name, n in named if ".experts." in name)
    return {"experts": experts / sum(n for _, n in named)}


def seconds_per_span(layout: Layout) -> float:
    """What one span of training's sends costs the training thread: of the pipeline, else of the token dispatcher."""
    from benchmarks.hook_cost import QUICK_ITERATIONS, dispatcher_us, iteration_us

    costs_us = iteration_us("bubble", QUICK_ITERATIONS) if layout.pp > 1 else (dispatcher_us("bubble", True),)
    return costs_us[0] * 1e-6


def run_block(trainer: Any, session: Any, size: Size) -> dict[str, Any]:
    """Seconds of each counted iteration, CPU seconds, and what became of the snapshots."""
    from benchmarks._common import whole_since

    trainer.pipeline_arguments = {} if session is None else session.pipeline_arguments
    seconds, steps, unsaved, experts = [], [], [], []
    before: dict[str, float] = {}
    cpu = 0.0
    began = time.monotonic()
    if session is not None:
        session.scheduler.recorder.cut(trainer.progress.iteration)  # what other arms did is no timeline of this one
    for number in range(size.settling_iterations + size.block_iterations):
        is_counted = number >= size.settling_iterations
        if number == size.settling_iterations:
            cpu = time.process_time()
            before = session.scalars() if session is not None else {}
        started = time.perf_counter()
        trainer.train_step()
        ended = time.monotonic()
        if session is not None:
            session.on_step_end(trainer.progress.iteration)
        if is_counted:
            steps.append([trainer.progress.iteration, ended])
            seconds.append(time.perf_counter() - started)
        if is_counted and session is not None:
            now = session.scalars()
            unsaved.append(now.get("moetion/unsaved-tokens", 0.0))  # of mode popularity
            experts.append(now.get("moetion/experts-per-snapshot", 0.0))
    cpu = (time.process_time() - cpu) / size.block_iterations
    found: dict[str, Any] = {"seconds": seconds, "cpu_seconds": cpu}
    if session is not None:
        now = session.scalars()
        session.drain()
        dropped = now["moetion/snapshots-dropped"] - before["moetion/snapshots-dropped"]
        found |= {
            "steps": steps,
            "whole": whole_since(session, began),
            "unsaved": statistics.mean(unsaved),
            "experts": statistics.mean(experts),
            "bytes": now["moetion/snapshot-bytes"],
            "dropped": dropped,
            "mb_per_s": now["moetion/network-mb-per-s"],
        }
    return found


# -- figures -------------------------------------------------------------------------------------------------


def summarise(measured: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """For each arm its figures at one rate."""
    from benchmarks._common import lost_iterations, median_interval

    ranks = measured["ranks"]
    times = {(b["cycle"], b["arm"]): statistics.median(b["seconds"]) for b in ranks[0]["blocks"]}
    cycles = sorted({cycle for cycle, _ in times})
    found: dict[str, dict[str, float]] = {}
    for arm in ARMS:
        ratios = np.array([times[c, arm] / times[c, "off"] for c in cycles if (c, arm) in times])
        low, high = median_interval(ratios)
        mine = [b for r in ranks for b in r["blocks"] if b["arm"] == arm]
        found[arm] = {
            "seconds": statistics.median(s for (_, a), s in times.items() if a == arm),
            "slowdown": float(np.median(ratios)) - 1,
            "low": low - 1,
            "high": high - 1,
            "cpu": len(ranks) * statistics.median(b["cpu_seconds"] for b in mine),
            "experts_share": measured["shares"]["experts"],
            "hooks": measured["hooks"]["span_s"] * measured["hooks"]["spans"],
        }
        if arm != "off":
            iterations = sum(len(b["seconds"]) for b in mine)
            # Blocks count cumulative means, so the last one has the mean over the run.
            found[arm] |= {
                "bytes": sum([b for b in r["blocks"] if b["arm"] == arm][-1]["bytes"] for r in ranks),
                "lost": lost_work(lost_iterations([r["blocks"] for r in ranks], arm)),
                "unsaved": sum(statistics.mean(b["unsaved"] for b in r["blocks"] if b["arm"] == arm) for r in ranks),
                "experts": statistics.mean(b["experts"] for b in mine),
                "whole": min(1.0, sum(map(whole_in_time, mine)) / iterations),
                "mb_per_s": statistics.median(b["mb_per_s"] for b in mine),
            }
    return found


def whole_in_time(block: Mapping[str, Any]) -> int:
    """How many snapshots became whole on a rank and its buddies while the block's iterations were counted.

    What leaves after the block, when training waits for it, has cost nothing in it and does not count either.
    """
    began, ended = block["steps"][0][1] - block["seconds"][0], block["steps"][-1][1]
    return sum(began < moment_s <= ended for moment_s in block["whole"].values())


def lost_work(lost: Mapping[int, int]) -> float:
    """The mean, with half of the iteration that the fault interrupts. Not known where no snapshot was whole."""
    moments = sum(lost.values())
    return 0.5 + sum(iterations * count for iterations, count in lost.items()) / moments if moments else math.inf


def smallest_interval(arm: Mapping[str, float]) -> float:
    """Iterations between snapshots at which slowdown is 1%: a snapshot costs the same, spread over more iterations.

    From the upper end of the interval, for each snapshot that became whole; at least 1. Infinite if none did.
    """
    if arm["whole"] <= 0:
        return math.inf
    return max(1.0, math.ceil(max(arm["high"], 0.0) / arm["whole"] / TARGET_SLOWDOWN))


def results_of(
    rate: float, arms: Mapping[str, Mapping[str, float]], tokens_per_iteration: int, layout: Layout
) -> list[Any]:
    """All figures of one rate."""
    from benchmarks._common import Result, at_most

    link = _name(rate)
    off = arms["off"]
    results = [
        Result(name=f"{link}{ITERATION}", value=off["seconds"], unit="s"),
        at_most(f"{link}: cost of the hooks", off["hooks"] / off["seconds"], "share", 0.002),
    ]
    for name in ARMS[1:]:
        arm = arms[name]
        interval = smallest_interval(arm)
        for what, value, unit in (
            ("slowdown", arm["slowdown"], "share"),
            ("slowdown, lower end of 95%", arm["low"], "share"),
            ("slowdown, upper end of 95%", arm["high"], "share"),
            ("bytes a snapshot, all ranks", arm["bytes"] / 1e6, "MB"),
            ("snapshots that became whole", arm["whole"], "share"),
            ("smallest interval at 1% slowdown", None if math.isinf(interval) else interval, "iterations"),
            ("lost work at a random fault", None if math.isinf(arm["lost"]) else arm["lost"], "iterations"),
            ("CPU seconds added, all ranks", arm["cpu"] - arms["off"]["cpu"], "s/iteration"),
            ("bandwidth seen by a rank", arm["mb_per_s"], "MB/s"),
        ):
            results.append(Result(name=f"{link}: {name}: {what}", value=value, unit=unit))
    ours = arms[OURS]
    results += [
        Result(name=f"{link}: K of a rank's {layout.experts_per_rank} experts", value=ours["experts"], unit="experts"),
        Result(name=f"{link}: tokens at risk, all ranks", value=ours["unsaved"], unit="tokens"),
        Result(
            name=f"{link}: PLT at that K with a fault every {FAULT_EVERY} iterations",
            value=ours["unsaved"] / (tokens_per_iteration * FAULT_EVERY),
            unit="share",
        ),
    ]
    return results


def headline(summaries: Mapping[float, Mapping[str, Mapping[str, float]]], layout: Layout) -> list[Any]:
    """The targets, at the fastest link on which ``full-eager`` slows training by at least 50%."""
    from benchmarks._common import Result, at_least, at_most

    slow = [rate for rate, arms in summaries.items() if arms["full-eager"]["slowdown"] >= 0.5]
    if not slow:
        return [Result(name="a link on which full-eager slows training by 50%", value=None, unit="Mbit/s")]
    rate = max(slow)
    arms = summaries[rate]
    ours, eager, bubble = arms[OURS], arms["full-eager"], arms["full-bubble"]
    cost = max(ours["high"], 1e-3)  # never a value near zero
    at = _name(rate)

    def frequency(other: Mapping[str, float], name: str, target: float) -> Result:
        """How much more often ours can be taken at one cost, by snapshots that became whole; not known without one."""
        what = f"{at}: frequency of ours / {name}"
        if not (other["whole"] and ours["whole"]):
            return Result(name=what, value=None, unit="x")
        return at_least(what, other["slowdown"] / other["whole"] / (cost / ours["whole"]), "x", target)

    return [
        Result(name="fastest link on which full-eager slows training by 50%", value=rate, unit="Mbit/s"),
        at_most(f"{at}: popularity-bubble: slowdown, upper end", ours["high"], "share", 0.02),
        at_least(f"{at}: overhead of full-eager / ours", eager["slowdown"] / cost, "x", 12),
        at_least(f"{at}: overhead of full-bubble / ours", bubble["slowdown"] / cost, "x", 3),
        frequency(eager, "full-eager", 15),
        frequency(bubble, "full-bubble", bubble["bytes"] / ours["bytes"]),
        at_least(f"{at}: bytes of full / ours", eager["bytes"] / ours["bytes"], "x", 9),
        at_least(
            f"{at}: K x staleness cap / experts", ours["experts"] * STALENESS_CAP / layout.experts_per_rank, "x", 1
        ),
        Result(name=f"{at}: experts' share of the state", value=ours["experts_share"], unit="share"),
        Result(name=f"{at}: snapshots of ours that became whole", value=ours["whole"], unit="share"),
    ]


def plot(figures: Mapping[str, float | None], path: Path) -> None:
    """Slowdown over the rate of the link, one line an arm, with intervals; ``figures`` are results by name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = {name.removesuffix(ITERATION) for name in figures if name.endswith(ITERATION)}
    links = sorted(found, key=lambda link: float(link.split()[0]) if link[0].isdigit() else math.inf)
    figure, axis = pyplot.subplots(figsize=(8, 5.2), layout="constrained")
    for arm, (words, color, offset) in IN_PICTURES.items():
        slowdown, low, high = (
            np.array([figures[f"{link}: {arm}: slowdown{end}"] or 0.0 for link in links]) * 100
            for end in ("", ", lower end of 95%", ", upper end of 95%")
        )
        places = np.arange(len(links)) + offset
        axis.errorbar(places, slowdown, yerr=[slowdown - low, high - slowdown], label=words, color=color, marker="o",
                      capsize=3, linewidth=0, elinewidth=1.8)  # fmt: skip
    axis.axhline(0, color="#444444", linewidth=0.8)
    axis.set_xticks(range(len(links)), links)
    axis.set_xlim(-0.5, len(links) - 0.5)
    axis.set_xlabel("link of each host")
    axis.set_ylabel("slowdown of training (%), with its 95% interval")
    axis.set_title("What a snapshot every iteration costs", loc="left", fontweight="bold")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
