# SPDX-License-Identifier: Apache-2.0
"""How much CPU time does a snapshot cost the host, by the number of units?

One real ``Session`` takes a snapshot of every iteration and replicates it. It is rank 0 of a job of two ranks, one a
node; rank 1 is its mirror image: it says what rank 0 says and sends what rank 0 sends. So rank 0 does all of its work,
for its own arena and for the one that it holds, and nothing else runs in the process. Every snapshot is whole before
the next step.

A layer has a dense unit of 12 parameters and 64 experts of 2 parameters. A region has 512 bytes, so that what is
counted is what a unit costs whatever its size; ``host_pack.py`` counts what bytes cost. Each mode has the same units;
mode ``exact`` cuts and logs them, and a figure a unit is still one of a unit of the model.

CPU time is taken thread by thread, in blocks of iterations; a figure is the median of its blocks. Python threads share
one lock: what the packing and the sending thread take may delay the training thread.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._common import Result, median, parser, report
from megatron_moetion.clock import SystemClock
from megatron_moetion.config import MoetionConfig
from megatron_moetion.framework import StepNote, TokenCounter
from megatron_moetion.modes.exact import ExactBlueprint
from megatron_moetion.modes.full import FullBlueprint
from megatron_moetion.modes.mode import Blueprint
from megatron_moetion.modes.popularity import PopularityBlueprint
from megatron_moetion.replicate.channel import Channel, Message
from megatron_moetion.run.host import Host
from megatron_moetion.run.prepare import prepare
from megatron_moetion.run.starter import Starter
from megatron_moetion.schedule.recorder import HostStopwatch
from megatron_moetion.schedule.scheduler import Scheduler, no_drawing
from megatron_moetion.session import Session
from megatron_moetion.store.spec import ArenaSpec
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
THREADS = {"training": "MainThread", "packing": "moetion-pack", "sending": "moetion-send"}


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured: numbers of layers, and blocks of ``PERIOD`` iterations for each."""

    layers: tuple[int, ...]
    blocks: int


FULL_SIZE = Size(layers=(1, 4, 24, 96), blocks=7)
QUICK_SIZE = Size(layers=(1, 4, 8), blocks=3)


# -- one rank of two -----------------------------------------------------------------------------------------


class SmallState:
    """Training state of many small units; an adapter of all three modes."""

    bytes_a_step = 300

    def __init__(self, mode: str, layers: int, experts: int) -> None:
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
        return (0,)

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

    def note_step(self, iteration: int) -> StepNote:
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


class MirrorChannel:
    """What rank 0 sends to rank 1 is what rank 1 sends to rank 0."""

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        for sent, received in zip(sends, receives, strict=True):
            received.data[:] = sent.data


class MirrorFabric:
    """Rank 0 of two ranks, of which the other says the same of an arena and a node of its own."""

    rank = 0
    world_size = 2

    def __init__(self) -> None:
        self.channel: Channel = MirrorChannel()
        self._masks: tuple[int, ...] | None = None
        self._counts: list[int] | None = None

    def gather(self, document: Any) -> list[Any]:
        mine, mirrored = json.loads(json.dumps(document)), json.loads(json.dumps(document))
        if isinstance(mirrored, dict) and "spec" in mirrored:
            spec = ArenaSpec.from_json(mirrored["spec"].encode())
            spec = replace(spec, identity=replace(spec.identity, owner=1))
            mirrored |= {"spec": spec.to_json().decode(), "node": f"{mirrored['node']}, mirrored"}
        return [mine, mirrored]

    def start_agreement(self, *masks: int) -> None:
        self._masks = masks

    def finish_agreement(self) -> tuple[int, ...] | None:
        masks, self._masks = self._masks, None
        return masks

    def start_sum(self, counts: Sequence[int]) -> None:
        self._counts = list(counts)

    def finish_sum(self) -> list[int] | None:
        counts, self._counts = self._counts, None
        return counts

    def abandon(self) -> None:
        pass

    def close(self) -> None:
        pass


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
    """Train block after block; in a store of its own, which is removed."""
    store = Path(tempfile.mkdtemp(prefix="moetion-host-cost-", dir="/dev/shm"))
    try:
        state = SmallState(mode, layers, experts)
        session = start(mode, state, store)
        try:
            train(session, state, range(1, WARM_UP_ITERATIONS + 1))
            found: dict[str, list[float]] = {name: [] for name in THREADS}
            for block in range(blocks):
                first = WARM_UP_ITERATIONS + block * PERIOD + 1
                for name, seconds in train(session, state, range(first, first + PERIOD)).items():
                    found[name].append(seconds)
            dropped = sum(session.running.pipeline.counts.dropped.values())
        finally:
            session.close()
    finally:
        shutil.rmtree(store)
    return Measured(mode=mode, units=len(state.inventory().units), cpu_s=found, dropped=dropped)


def start(mode: str, state: SmallState, store: Path) -> Session:
    """A session whose baseline is whole."""
    blueprints: dict[str, Blueprint] = {
        "full": FullBlueprint(),
        "popularity": PopularityBlueprint(state),
        "exact": ExactBlueprint(state),
    }
    clock = SystemClock()
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
        fabric=MirrorFabric(),
        topology="one rank and its mirror",
        scheduler=Scheduler(
            "eager",  # with a plan to keep, snapshots would be rarer
            HostStopwatch(clock),
            clock=clock,
            condition=threading.Condition(),
            eager_slice_bytes=1 << 20,
            draw=no_drawing,
        ),
        host=Host(environment={"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}),
    )
    running, _ = Starter(prepared).start()
    return Session(running)


def train(session: Session, state: SmallState, iterations: range) -> dict[str, float]:
    """CPU seconds of each thread in these iterations, of which the model's own steps are no part."""
    noise = np.random.default_rng(iterations.start)
    training_s = 0.0
    before = cpu_by_thread()
    for iteration in iterations:
        state.tokens += noise.integers(0, 100, state.tokens.shape)
        began_s = time.thread_time()
        session.before_optimizer_step()
        session.on_step_end(iteration)
        session.drain()
        training_s += time.thread_time() - began_s
    after = cpu_by_thread()
    return {
        name: training_s if name == "training" else after[thread] - before[thread] for name, thread in THREADS.items()
    }


def cpu_by_thread() -> dict[str, float]:
    """CPU seconds so far of each Python thread of this process, by its name."""
    return {
        thread.name: time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
        for thread in threading.enumerate()
        if thread.ident is not None
    }


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
