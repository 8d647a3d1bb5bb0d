# SPDX-License-Identifier: Apache-2.0
"""How long does an agreement take, by the number of ranks, and what does the control plane cost a rank?

Ranks are threads of ``PROCESSES`` processes on the loopback of this machine, each with the real fabric: a control
thread, real connections, ``RANKS_PER_HOST`` ranks a node. A round begins when the last rank has contributed its words
and ends when the last rank has the result. A figure is the median of its rounds.

All ranks share the processors of this machine, so rounds of many ranks take as long as their messages take it to work
off. What a cluster would show is the sum of the steps of one path: so a chain of ranks, one below the other, tells what
one step up and down costs, and a star of ranks what each further child of one parent costs. From these two comes the
law: ``depth`` steps, at each of which a parent has so many children. Figures marked "by the law" are not measured, and
a network's own latency comes on top of each step.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from torch import distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._common import Result, at_most, median, parser, report
from megatron_moetion.clock import SystemClock
from megatron_moetion.replicate.agreement import combine_words
from megatron_moetion.replicate.fabric import SocketFabric
from megatron_moetion.replicate.tree import ARITY, depth_of, place_of
from megatron_moetion.replicate.worker import SystemThreads

PROCESSES = 2
RANKS_PER_HOST = 8
WORDS = (-1, -1, 1, 1)
"""Of ``Agreement``: two masks, votes, redundancy."""
WARM_UP = 10
LATENCY_MAX_S = 0.1
"""At 256 ranks on one machine. The rounds of an iteration of a second never pile up."""
LARGE = (1024, 4096, 16384)


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured."""

    worlds: tuple[int, ...]
    chain: int
    star: int
    rounds: int


FULL_SIZE = Size(worlds=(16, 32, 64, 128, 256), chain=9, star=17, rounds=200)
QUICK_SIZE = Size(worlds=(16, 32, 64), chain=5, star=9, rounds=60)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Ranks that agree. ``arity``: see ``place_of``."""

    world: int
    ranks_per_host: int
    arity: int = ARITY


class CountedStore:
    """A store that counts requests and their bytes: keys and values."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store
        self.requests = self.nbytes = 0

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._store, name)

        def counted(*args: Any) -> Any:
            found = call(*args)
            self.requests += 1
            sent = [a for arg in args for a in (arg if isinstance(arg, list) else [arg])]
            self.nbytes += sum(len(str(a)) for a in sent) + (len(found) if isinstance(found, bytes) else 0)
            return found

        return counted


# -- one process of ranks ------------------------------------------------------------------------------------


def serve_ranks(job: Job, port: int, ranks: Sequence[int]) -> None:
    """Hold these ranks. Each line of standard input begins a round; each is answered with what was measured."""
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60), wait_for_workers=False)
    counted: Any = [CountedStore(store) for _ in ranks]
    fabrics = [
        SocketFabric.connect(
            store=each,
            rank=rank,
            world_size=job.world,
            ranks_per_host=job.ranks_per_host,
            timeout_s=60.0,
            in_flight_bytes=1 << 20,
            clock=SystemClock(),
            threads=SystemThreads(),
            interface="lo",
            arity=job.arity,
        )
        for rank, each in zip(ranks, counted, strict=True)
    ]
    reducers = [fabric.reducer("agreement", range(job.world), combine_words) for fabric in fabrics]
    print(json.dumps({}), flush=True)
    for number, _ in enumerate(sys.stdin):
        cpu_s = time.process_time()
        for reducer in reducers:
            reducer.contribute(number, WORDS)
        began_s = time.monotonic()
        if not all([reducer.wait(number, 60.0) for reducer in reducers]):
            raise SystemExit("no result")
        ended_s = time.monotonic()
        assert all(reducer.results()[-1].words == WORDS for reducer in reducers)
        found = {
            "began_s": began_s,
            "ended_s": ended_s,
            "cpu_s": time.process_time() - cpu_s,
            "fds": len(os.listdir("/proc/self/fd")),
            "requests": sum(each.requests for each in counted),
            "bytes": sum(each.nbytes for each in counted),
        }
        print(json.dumps(found), flush=True)
    for fabric in reversed(fabrics):
        fabric.abandon()
    os._exit(0)


# -- all of them ---------------------------------------------------------------------------------------------


def measure(job: Job, rounds: int) -> dict[str, float]:
    """Medians over rounds: seconds of a round and of processors for it; a rank's descriptors and use of the store."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    command = [sys.executable, __file__, "--ranks"]
    shares = [list(range(job.world))[k::PROCESSES] for k in range(PROCESSES)]
    processes = [
        subprocess.Popen(
            [*command, json.dumps([job.world, job.ranks_per_host, job.arity, server.port, share])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for share in shares
        if share
    ]
    try:
        for process in processes:
            _answer(process)
        found = [_round(processes) for _ in range(WARM_UP + rounds)][WARM_UP:]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    latencies = [max(f["ended_s"] for f in each) - max(f["began_s"] for f in each) for each in found]
    last = found[-1]
    return {
        "latency_s": median(latencies),
        "slow_s": float(np.quantile(latencies, 0.95)),
        "cpu_s": median([sum(f["cpu_s"] for f in each) for each in found]),
        "fds": sum(f["fds"] for f in last) / job.world,
        "requests": sum(f["requests"] for f in last) / job.world,
        "bytes": sum(f["bytes"] for f in last) / job.world,
    }


def _round(processes: Sequence[subprocess.Popen[str]]) -> list[dict[str, float]]:
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    return [_answer(process) for process in processes]


def _answer(process: subprocess.Popen[str]) -> dict[str, float]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit("a process of ranks has ended")
    return dict(json.loads(line))


# -- the law -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Law:
    """Seconds of one round: those that it takes anyhow, and those of each step and of each further child at a step."""

    fixed_s: float
    step_s: float
    child_s: float

    def latency_s(self, world: int, ranks_per_host: int) -> float:
        """Of the longest path of a tree, from a rank that is no leader to the root and back."""
        nodes = -(-world // ranks_per_host)
        steps = depth_of(nodes) + (ranks_per_host > 1)
        children = min(ARITY, nodes - 1) * depth_of(nodes) + (ranks_per_host - 1) * (depth_of(nodes) + 1)
        return self.fixed_s + self.step_s * steps + self.child_s * max(0, children - steps)


def fit(chain: dict[int, float], star: dict[int, float]) -> Law:
    """From seconds by the depth of a chain, and by the children of one parent."""
    step_s, fixed_s = np.polyfit(list(chain), list(chain.values()), 1)
    child_s, _ = np.polyfit(list(star), list(star.values()), 1)
    return Law(fixed_s=max(0.0, float(fixed_s)), step_s=float(step_s), child_s=float(child_s))


def most_sockets(world: int, ranks_per_host: int) -> int:
    """Connections of the rank that has most of them, in the tree of all ranks."""
    places = (place_of(r, range(world), ranks_per_host) for r in range(0, world, ranks_per_host))
    return max(len(p.children) + (p.parent is not None) for p in places)


def main() -> int:
    options = parser(__doc__.split("\n")[0])
    options.add_argument("--ranks", metavar="JSON", help="used by the benchmark itself: one process of ranks")
    args = options.parse_args()
    if args.ranks:
        world, ranks_per_host, arity, port, ranks = json.loads(args.ranks)
        serve_ranks(Job(world=world, ranks_per_host=ranks_per_host, arity=arity), port, ranks)
    size = QUICK_SIZE if args.quick else FULL_SIZE
    results: list[Result] = []
    for world in size.worlds:
        found = measure(Job(world=world, ranks_per_host=RANKS_PER_HOST), size.rounds)
        name = f"{world} ranks"
        latency = found["latency_s"] * 1e3
        is_last = world == FULL_SIZE.worlds[-1]
        results += [
            at_most(f"{name}: latency", latency, "ms", LATENCY_MAX_S * 1e3)
            if is_last
            else Result(name=f"{name}: latency", value=latency, unit="ms"),
            Result(name=f"{name}: latency, 95th percentile", value=found["slow_s"] * 1e3, unit="ms"),
            Result(name=f"{name}: processor time a rank and round", value=found["cpu_s"] / world * 1e6, unit="us"),
            Result(name=f"{name}: file descriptors a rank", value=found["fds"], unit=""),
            Result(name=f"{name}: connections of the busiest rank", value=most_sockets(world, RANKS_PER_HOST), unit=""),
            Result(name=f"{name}: requests to the store a rank", value=found["requests"], unit=""),
            Result(name=f"{name}: bytes to and from the store a rank", value=found["bytes"], unit="B"),
        ]
    chain = {
        depth: measure(Job(world=depth + 1, ranks_per_host=1, arity=1), size.rounds)["latency_s"]
        for depth in range(1, size.chain, 1 if args.quick else 2)
    }
    star = {
        children: measure(Job(world=children + 1, ranks_per_host=1, arity=children), size.rounds)["latency_s"]
        for children in range(2, size.star, 2)
    }
    law = fit(chain, star)
    results += [
        Result(name="law: of a round anyhow", value=law.fixed_s * 1e6, unit="us"),
        Result(name="law: of a step up and down", value=law.step_s * 1e6, unit="us"),
        Result(name="law: of each further child at a step", value=law.child_s * 1e6, unit="us"),
    ]
    results += [
        Result(name=f"{world} ranks, by the law: latency", value=law.latency_s(world, RANKS_PER_HOST) * 1e3, unit="ms")
        for world in (*size.worlds, *LARGE)
    ]
    results += [
        Result(
            name=f"{world} ranks, by the tree: connections of the busiest rank", value=most_sockets(world, 8), unit=""
        )
        for world in LARGE
    ]
    report("agreement", results, args.json, [f"{PROCESSES} processes of ranks, {RANKS_PER_HOST} ranks a node"])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
