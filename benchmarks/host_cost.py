# SPDX-License-Identifier: Apache-2.0
"""How much CPU time does a snapshot cost the host, by the number of units?

Two real sessions, of ranks on a node each, take a snapshot of every iteration and hold each other's, over the loopback.
Both run in this process, and nothing else does; a figure is half of what they take together: of one rank's work, for
its own arena and for the one that it holds. Every snapshot is whole, and agreed on, before the next step.

A layer has a dense unit of 12 parameters and 64 experts of 2 parameters. A region has 512 bytes, so that what is
counted is what a unit costs whatever its size; ``host_pack.py`` counts what bytes cost. Each mode has the same units;
mode ``exact`` cuts and logs them, and a figure a unit is still one of a unit of the model.

CPU time is taken thread by thread, in blocks of iterations; a figure is the median of its blocks. Python threads share
one lock: what the other threads take may delay the training thread.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._common import Result, median, parser, report
from megatron_moetion.clock import SystemClock
from megatron_moetion.config import MoetionConfig
from megatron_moetion.framework import StepNote, TokenCounter
from megatron_moetion.modes.exact import ExactBlueprint
from megatron_moetion.modes.full import FullBlueprint
from megatron_moetion.modes.mode import Blueprint
from megatron_moetion.modes.popularity import PopularityBlueprint
from megatron_moetion.replicate.fabric import SocketFabric
from megatron_moetion.replicate.worker import SystemThreads
from megatron_moetion.run.host import Host
from megatron_moetion.run.prepare import prepare
from megatron_moetion.run.starter import Starter
from megatron_moetion.schedule.recorder import HostStopwatch
from megatron_moetion.schedule.scheduler import Scheduler, no_drawing
from megatron_moetion.session import Session
from megatron_moetion.units import HOST_UNIT, Inventory, Region, Role, Unit, UnitKind

MODES = ("full", "popularity", "exact")
PERIOD = 8
"""Of mode ``exact``; in a block of so many iterations every slice is captured once."""
EXPERTS_PER_LAYER = 64
DENSE_PARAMETERS, EXPERT_PARAMETERS = 12, 2
REGION_ELEMENTS = 128
STATE_ROLES = (Role.MASTER, Role.EXP_AVG, Role.EXP_AVG_SQ)
WARM_UP_ITERATIONS = 3 * PERIOD
"""Until as many captures are kept as there ever are."""
RANKS = 2
THREADS = {"training": "rank", "packing": "moetion-pack", "sending": "moetion-link"}
"""How the names of threads begin. All others hold the other rank's captures, and agree: ``holding``."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured: numbers of layers, and blocks of ``PERIOD`` iterations for each."""

    layers: tuple[int, ...]
    blocks: int


FULL_SIZE = Size(layers=(1, 4, 24, 96), blocks=7)
QUICK_SIZE = Size(layers=(1, 4, 8), blocks=3)


# -- one of two ranks ---------------------------------------------------------------------------------------


class SmallState:
    """Training state of many small units; an adapter of all three modes."""

    bytes_a_step = 300

    def __init__(self, rank: int, mode: str, layers: int, experts: int) -> None:
        self.rank = rank
        roles = (*STATE_ROLES, Role.GRAD) if mode == "exact" else STATE_ROLES
        regions = layers * (DENSE_PARAMETERS + experts * EXPERT_PARAMETERS) * len(roles)
        self._memory = np.ones((regions, REGION_ELEMENTS), dtype=np.float32)
        memory = iter(self._memory)
        self.tokens = np.zeros((layers, experts), dtype=np.int64)
        self._counters: list[TokenCounter] = []
        self._steps: list[int] = []
        self._remembered = 0
        units: list[Unit] = []
        for layer in range(layers):
            dense = f"layers.{layer}.dense"
            own = [_region(dense, p, role, next(memory)) for p in range(DENSE_PARAMETERS) for role in roles]
            if mode == "popularity":
                own.append(_region(dense, "tokens", Role.BUFFER, self.tokens[layer]))
            units.append(Unit(name=dense, kind=UnitKind.DENSE, layer=layer, regions=tuple(own)))
            for expert in range(experts):
                name = f"layers.{layer}.experts.{expert}"
                own = [_region(name, p, role, next(memory)) for p in range(EXPERT_PARAMETERS) for role in roles]
                unit = Unit(name=name, kind=UnitKind.EXPERT, layer=layer, expert=expert, regions=tuple(own))
                units.append(unit)
                counter = TokenCounter(expert=name, unit=dense, tensor=f"{dense}.tokens", position=expert)
                self._counters.append(counter)
        units.append(Unit(name=HOST_UNIT, kind=UnitKind.HOST, regions=(), reserved_bytes=8192))
        self._inventory = Inventory(units=tuple(units))

    # StateAdapter

    def inventory(self) -> Inventory:
        return self._inventory

    def moved(self) -> str | None:
        return None

    def expert_peers(self) -> tuple[int, ...]:
        return (self.rank,)

    def host_state(self) -> dict[str, Any]:
        return {"rng": bytes(5056), "steps": self._steps[-self._remembered :] if self._remembered else []}

    def load_host_state(self, state: Mapping[str, Any]) -> None:
        raise AssertionError("nothing is recovered here")

    def after_step(self) -> None:
        pass

    def state_hash(self) -> str:
        return ""

    def copy_to_model(self) -> None: ...

    def resync(self) -> None:
        pass

    # TokenSource

    def token_counters(self) -> tuple[TokenCounter, ...]:
        return tuple(self._counters)

    def counts_tokens(self) -> bool:
        return True

    def routed_tokens(self) -> dict[str, int]:
        return {}

    def layer_tokens(self) -> dict[str, dict[str, float]]:
        return {}

    def capacity_problem(self) -> str | None:
        return None

    def recalibrate(self, lost: Mapping[str, int]) -> None:
        pass

    # StepReplayer

    def remember(self, steps: int) -> None:
        self._remembered = steps

    def note_step(self, iteration: int, *, stepped: bool = True) -> StepNote:
        self._steps.append(iteration)
        return StepNote()

    def begin_replay(self, state: Mapping[str, Any]) -> None:
        raise AssertionError("nothing is recovered here")

    def replay(self, iteration: int) -> bool:
        raise AssertionError("nothing is recovered here")


def _region(unit: str, tensor: str | int, role: Role, array: npt.NDArray[Any]) -> Region:
    return Region(
        unit=unit,
        tensor=f"{unit}.{tensor}",
        role=role,
        dtype=str(array.dtype),
        start=0,
        nbytes=array.nbytes,
        address=array.ctypes.data,
        at_once=role in (Role.GRAD, Role.BUFFER),
    )


# -- a mode at a size ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One mode with one number of units."""

    mode: str
    units: int
    """Of the model; of them one is the host state."""
    cpu_s: Mapping[str, Sequence[float]]
    """By thread: CPU seconds of each block."""
    dropped: int
    """Snapshots, the warm-up's included."""


def measure(mode: str, layers: int, blocks: int, experts: int = EXPERTS_PER_LAYER) -> Measured:
    """Train block after block; in stores of their own, which are removed."""
    store = Path(tempfile.mkdtemp(prefix="moetion-host-cost-", dir="/dev/shm"))
    states = [SmallState(rank, mode, layers, experts) for rank in range(RANKS)]
    try:
        with ThreadPoolExecutor(RANKS, thread_name_prefix=THREADS["training"]) as ranks:
            meeting = dist.HashStore()
            sessions = list(ranks.map(lambda state: start(mode, state, store, meeting), states))
            try:
                found: dict[str, list[float]] = {}
                train(ranks, sessions, states, range(1, WARM_UP_ITERATIONS + 1))
                for block in range(blocks):
                    first = WARM_UP_ITERATIONS + block * PERIOD + 1
                    for name, cpu_s in train(ranks, sessions, states, range(first, first + PERIOD)).items():
                        found.setdefault(name, []).append(cpu_s / RANKS)
                dropped = sum(sum(s.running.pipeline.counts.dropped.values()) for s in sessions)
            finally:
                list(ranks.map(Session.close, sessions))
    finally:
        shutil.rmtree(store)
    return Measured(mode=mode, units=len(states[0].inventory().units), cpu_s=found, dropped=dropped)


def start(mode: str, state: SmallState, store: Path, meeting: dist.Store) -> Session:
    """A rank's session, whose baseline is whole. Both ranks start at once."""
    blueprints: dict[str, Blueprint] = {
        "full": FullBlueprint(),
        "popularity": PopularityBlueprint(state),
        "exact": ExactBlueprint(state),
    }
    clock = SystemClock()
    fabric = SocketFabric.connect(
        store=meeting,
        rank=state.rank,
        world_size=RANKS,
        ranks_per_host=1,
        timeout_s=60.0,
        in_flight_bytes=64 << 20,
        clock=clock,
        threads=SystemThreads(),
        interface="lo",
    )
    prepared = prepare(
        config=MoetionConfig(
            mode=mode,
            run_id=f"host-cost-{mode}",
            store=str(store),
            ranks_per_node=1,
            period=PERIOD if mode == "exact" else 0,
            pack_threads=1,  # which is the packing thread itself
            lost_token_budget=0.0,  # else K grows
        ),
        adapter=state,
        blueprint=blueprints[mode],
        fabric=fabric,
        topology="two ranks",
        scheduler=Scheduler(
            "eager",  # with a plan to keep, snapshots would be rarer
            HostStopwatch(clock),
            clock=clock,
            condition=threading.Condition(),
            eager_slice_bytes=1 << 20,
            draw=no_drawing,
        ),
        host=Host(environment={"LOCAL_RANK": str(state.rank), "LOCAL_WORLD_SIZE": str(RANKS)}),
    )
    running, _ = Starter(prepared).start()
    return Session(running)


def train(
    ranks: ThreadPoolExecutor, sessions: Sequence[Session], states: Sequence[SmallState], iterations: range
) -> dict[str, float]:
    """CPU seconds of both ranks' threads in these iterations, of which the model's own steps are no part."""

    def step(rank: int, iteration: int) -> float:
        began_s = time.thread_time()
        sessions[rank].before_optimizer_step()
        sessions[rank].on_step_end(iteration)
        sessions[rank].drain()
        return time.thread_time() - began_s

    noise = np.random.default_rng(iterations.start)
    found = dict.fromkeys((*THREADS, "holding"), 0.0)
    for iteration in iterations:
        for state in states:
            state.tokens += noise.integers(0, 100, state.tokens.shape)
        before, began_s = cpu_by_thread(), time.process_time()
        training_s = sum(ranks.map(lambda rank, i=iteration: step(rank, i), range(RANKS)))
        total_s, after = time.process_time() - began_s, cpu_by_thread()
        named = {n: sum(s - before.get(t, 0.0) for t, s in after.items() if t[0] == n) for n in THREADS}
        named["training"] = training_s
        for name, seconds in {**named, "holding": max(0.0, total_s - sum(named.values()))}.items():
            found[name] += seconds
    return found


def cpu_by_thread() -> dict[tuple[str, int], float]:
    """CPU seconds so far of each Python thread of this process that ``THREADS`` names, by that name and identity."""
    found = {}
    for thread in threading.enumerate():
        name = next((n for n, begins in THREADS.items() if thread.name.startswith(begins)), None)
        if name is not None and thread.ident is not None:
            found[name, thread.ident] = time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
    return found


# -- figures -------------------------------------------------------------------------------------------------


def results_of(measured: Measured) -> list[Result]:
    """CPU time of an iteration, and of a unit in it: by thread and in all."""
    at = f"{measured.mode}, {measured.units} units"
    total = [sum(seconds) for seconds in zip(*measured.cpu_s.values(), strict=True)]
    results = [Result(name=f"{at}: CPU", value=1e3 * median(total) / PERIOD, unit="ms/iteration")]
    for name, blocks in {"all threads": total, **{f"{n} thread": s for n, s in measured.cpu_s.items()}}.items():
        value = 1e6 * median(blocks) / (PERIOD * measured.units)
        results.append(Result(name=f"{at}: {name}", value=value, unit="us/unit/iteration"))
    results.append(Result(name=f"{at}: snapshots dropped", value=float(measured.dropped), unit=""))
    return results


def main() -> None:
    """Measure all modes at all sizes and report."""
    args = parser(__doc__ or "").parse_args()
    size = QUICK_SIZE if args.quick else FULL_SIZE
    results: list[Result] = []
    for mode in MODES:
        for layers in size.layers:
            results += results_of(measure(mode, layers, size.blocks))
    notes = [
        f"{EXPERTS_PER_LAYER} experts a layer, regions of {4 * REGION_ELEMENTS} bytes, one replica; period {PERIOD} in "
        f"mode exact; {size.blocks} blocks of {PERIOD} iterations after {WARM_UP_ITERATIONS} of warm-up",
    ]
    report("host_cost", results, args.json, notes)


if __name__ == "__main__":
    main()
