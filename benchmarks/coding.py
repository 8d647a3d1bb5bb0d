# SPDX-License-Identifier: Apache-2.0
"""What do fragments cost and save, beside whole copies that survive as many losses?

Two parts, each within one run.

Arithmetic, in one process on one thread: of a capture, a plain copy, the fragments for all of its holders as a link
makes them (compute, digest, verify what they are made of), and the capture from the fragments that take most work, as a
recovery rebuilds it (compute, digest). They take turns; a ratio is the median over the repetitions of (time / time of
the copy in the same repetition).

A job: five ranks, each a node of its own, train a Megatron-Core MoE GPT with a snapshot of all state every iteration.
Blocks of iterations without snapshots, with one and two whole copies, and with fragments in groups of four and five
nodes that survive two losses alternate in random order. The first iteration of a block is left out: it still carries
the last snapshot of the block before. Bytes are those that this project's sockets have sent, arenas those that lie in
the store. All ranks share the cores of one machine, so CPU seconds are taken from training; on a GPU node these cores
are idle.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._common import Result, median_interval, parser, report
from megatron_moetion.arrays import Bytes, Digests
from megatron_moetion.coding import FRAME_BYTES, Coding, coding_of
from megatron_moetion.recover.fragments import ROUND_BYTES
from megatron_moetion.snapshot.codec import Codec, is_sound, spans_of
from megatron_moetion.snapshot.digest import CALL_BYTES, chunk_spans, digest_of
from megatron_moetion.snapshot.packer import HostPool

ROOT = Path(__file__).resolve().parent.parent
CHUNK_BYTES = 1 << 20
CODES = {nodes: coding_of(2, nodes) for nodes in (4, 5, 8)}
"""By nodes of a group, with two replicas. Three nodes, and one replica, have no fragments that would save anything."""
RANKS = 5
MODEL_FLAGS = (
    "--num-layers 2 --hidden-size 256 --ffn-hidden-size 1024 --num-attention-heads 4 --seq-length 128 "
    "--max-position-embeddings 128 --num-experts 8 --moe-router-topk 1 --moe-router-pre-softmax "
    "--moe-ffn-hidden-size 1024 --disable-bias-linear --moe-router-load-balancing-type aux_loss "
    "--moe-aux-loss-coeff 1e-2 "
    f"--micro-batch-size 1 --global-batch-size {4 * RANKS} --lr 1e-4 --bf16 --use-distributed-optimizer "
    "--train-iters 100000 --eval-iters 0 --seed 1"
)
ARMS = {
    "one copy": {"replicas": 1},
    "two copies": {"replicas": 2},
    "fragments, 4 nodes": {"replicas": 2, "coding_nodes": 4},
    "fragments, 5 nodes": {"replicas": 2, "coding_nodes": 5},
}
OFF = "no snapshots"


@dataclass(frozen=True, kw_only=True)
class Size:
    """How long a run is."""

    capture_bytes: int
    repetitions: int
    cycles: int
    block_iterations: int
    """Counted iterations a block; one more is run and left out."""


FULL_SIZE = Size(capture_bytes=96 << 20, repetitions=9, cycles=6, block_iterations=4)
QUICK_SIZE = Size(capture_bytes=24 << 20, repetitions=5, cycles=3, block_iterations=2)


def main() -> int:
    """Measure both parts and report."""
    options = parser(__doc__ or "")
    options.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = options.parse_args()
    size = QUICK_SIZE if args.quick else FULL_SIZE
    if args.worker is not None:
        return train(args.worker, size)
    results = arithmetic(size)
    with tempfile.TemporaryDirectory() as folder:
        measured = Path(folder) / "measured.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
        command += [__file__, "--worker", str(measured), *(["--quick"] if args.quick else [])]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        subprocess.run(command, check=True, cwd=ROOT, env=environment)
        results += of_job(json.loads(measured.read_text()))
    notes = [
        f"arithmetic: captures of {size.capture_bytes >> 20} MiB, chunks of {CHUNK_BYTES >> 20} MiB, one thread",
        f"job: {RANKS} ranks, {MODEL_FLAGS}",
    ]
    report("coding", results, args.json, notes)
    return 0


# -- arithmetic -------------------------------------------------------------------------------------------------


def arithmetic(size: Size) -> list[Result]:
    """Making and using fragments, against a copy of the capture."""
    pool = HostPool(1, "auto")
    capture = np.random.default_rng(1).integers(0, 256, size.capture_bytes, dtype=np.uint8)
    digests = digests_of(pool, capture)
    whole = digest_of(pool, digests.view(np.uint8))
    target = np.zeros_like(capture)
    jobs: dict[str, Callable[[], None]] = {"copy": lambda: np.copyto(target, capture)}
    for nodes, coding in CODES.items():
        codec = Codec(coding.data, coding.holders - coding.data)
        rows = hardest_rows(codec, coding, capture)
        jobs[f"{nodes} nodes: make"] = lambda codec=codec, coding=coding: make(  # type: ignore[misc]
            pool, codec, coding, capture, digests, whole
        )
        jobs[f"{nodes} nodes: rebuild"] = lambda codec=codec, rows=rows: rebuild(  # type: ignore[misc]
            pool, codec, rows, target, whole
        )
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for repetition in range(size.repetitions + 1):
        for name in [*jobs][repetition % len(jobs) :] + [*jobs][: repetition % len(jobs)]:
            began = time.perf_counter()
            jobs[name]()
            if repetition:  # the first warms caches
                seconds[name].append(time.perf_counter() - began)
    copied = np.array(seconds["copy"])
    results = [Result(name="copy of a capture", value=rate(size, copied), unit="GB/s")]
    for nodes in CODES:
        for job, text in (("make", "fragments for all holders"), ("rebuild", "capture from fragments")):
            taken = np.array(seconds[f"{nodes} nodes: {job}"])
            low, high = median_interval(taken / copied)
            name = f"{nodes} nodes, 2 replicas: {text}"
            results += [
                Result(name=name, value=rate(size, taken), unit="GB/s of the capture"),
                Result(name=f"{name}, time / copy", value=float(np.median(taken / copied)), unit="x"),
                Result(name=f"{name}, lower end of 95%", value=low, unit="x"),
                Result(name=f"{name}, upper end of 95%", value=high, unit="x"),
            ]
    return results


def rate(size: Size, seconds: Any) -> float:
    """GB/s of captures."""
    return size.capture_bytes / float(np.median(seconds)) / 1e9


def digests_of(pool: HostPool, data: Bytes) -> Digests:
    """Of each chunk."""
    spans = chunk_spans(np.array([data.ctypes.data]), np.array([data.nbytes]), CHUNK_BYTES)
    digests = np.empty(len(spans), dtype=np.uint64)
    pool.digest(spans, digests)
    return digests


def make(pool: HostPool, codec: Codec, coding: Coding, capture: Bytes, digests: Digests, whole: int) -> None:
    """What the links of an owner do with a capture, all holders' fragments one after the other."""
    for position in range(coding.holders):
        part = coding.part(position)
        for (span,) in spans_of([part.stored_bytes(capture.nbytes)], CHUNK_BYTES, CALL_BYTES):
            out = np.empty(span.nbytes, dtype=np.uint8)
            codec.fragment(part.number, capture, whole, span.start, out)
            digests_of(pool, out)
        assert is_sound(pool, CHUNK_BYTES, part, capture, digests, whole)


def hardest_rows(codec: Codec, coding: Coding, capture: Bytes) -> dict[int, Bytes]:
    """As many rows as rebuild a capture, all computed ones among them."""
    found = {}
    for position in range(coding.holders - coding.data, coding.holders):
        part = coding.part(position)
        fragment = np.empty(part.stored_bytes(capture.nbytes), dtype=np.uint8)
        codec.fragment(part.number, capture, 0, 0, fragment)
        found[part.number] = fragment[FRAME_BYTES:]
    return found


def rebuild(pool: HostPool, codec: Codec, rows: dict[int, Bytes], target: Bytes, whole: int) -> None:
    """What the owner does with these rows, round after round, and the proof that all is back."""
    length = len(next(iter(rows.values())))
    for start in range(0, length, ROUND_BYTES):
        codec.restore({n: row[start : start + ROUND_BYTES] for n, row in rows.items()}, start, target)
    assert digest_of(pool, digests_of(pool, target).view(np.uint8)) == whole


# -- a job ------------------------------------------------------------------------------------------------------


def train(path: Path, size: Size) -> int:
    """One rank: train block after block; rank 0 writes what all measured."""
    from benchmarks._common import start_trainer

    sent = count_sent()
    place, trainer = start_trainer(MODEL_FLAGS)

    from torch import distributed as dist

    from megatron_moetion.config import MoetionConfig
    from megatron_moetion.mcore.attach import attach

    store = Path("/dev/shm") / f"moetion-coding-{os.environ['MASTER_PORT']}"
    sessions: dict[str, Any] = {}
    for number, (arm, settings) in enumerate(ARMS.items()):
        sessions[arm] = attach(
            model=trainer.model,
            optimizer=trainer.optimizer,
            opt_param_scheduler=trainer.scheduler,
            user_state=trainer.progress,
            config=MoetionConfig(
                mode="full",
                schedule="eager",
                run_id=f"coding-{number}",
                store=str(store),
                ranks_per_node=1,
                **settings,  # type: ignore[arg-type]
            ),
        )
        sessions[arm].start()
    blocks: list[dict[str, Any]] = []
    order = random.Random(0)
    try:
        for cycle in range(size.cycles + 1):
            for arm in order.sample([OFF, *ARMS], 1 + len(ARMS)):
                block = run_block(trainer, sessions.get(arm), size.block_iterations, sent)
                if cycle:  # the first cycle warms caches and allocators
                    blocks.append({"cycle": cycle, "arm": arm, **block})
            if place.rank == 0:
                print(f"cycle {cycle} of {size.cycles}", flush=True)
        facts = {arm: session.scalars() for arm, session in sessions.items()}
        dist.barrier()
        arenas = {
            arm: sum(p.stat().st_blocks * 512 for p in store.glob(f"coding-{number}/*/*.arena"))
            for number, arm in enumerate(ARMS)
        }
        gathered: list[Any] = [None] * place.world_size
        dist.all_gather_object(gathered, {"blocks": blocks, "facts": facts, "arenas": arenas})
        if place.rank == 0:
            path.write_text(json.dumps(gathered))
        for session in sessions.values():
            session.close()
    finally:
        dist.barrier()
        if place.local_rank == 0:
            shutil.rmtree(store, ignore_errors=True)
    return 0


def count_sent() -> list[int]:
    """Bytes that this process's Python sockets have sent: training's own have none, it sends from C++."""
    sent = [0]
    sendmsg, send = socket.socket.sendmsg, socket.socket.send

    def counted(of: Callable[..., int]) -> Callable[..., int]:
        def call(*args: Any) -> int:
            nbytes = of(*args)
            sent[0] += nbytes
            return nbytes

        return call

    socket.socket.sendmsg, socket.socket.send = counted(sendmsg), counted(send)  # type: ignore[method-assign]
    return sent


def run_block(trainer: Any, session: Any, iterations: int, sent: list[int]) -> dict[str, Any]:
    """Seconds of each counted iteration; CPU seconds and bytes sent by this process, an iteration."""
    seconds, cpu, before = [], 0.0, 0
    for number in range(iterations + 1):
        if number == 1:
            cpu, before = time.process_time(), sent[0]
        began = time.perf_counter()
        trainer.train_step()
        if session is not None:
            session.on_step_end(trainer.progress.iteration)
        if number:
            seconds.append(time.perf_counter() - began)
    return {
        "seconds": seconds,
        "cpu_seconds": (time.process_time() - cpu) / iterations,
        "sent": (sent[0] - before) / iterations,
    }


def of_job(ranks: list[dict[str, Any]]) -> list[Result]:
    """Bytes, memory and time of each arm."""
    times = {(b["cycle"], b["arm"]): statistics.median(b["seconds"]) for b in ranks[0]["blocks"]}
    cycles = sorted({cycle for cycle, _ in times})
    first = ranks[0]["facts"]
    snapshot = sum(r["facts"]["two copies"]["moetion/snapshot-bytes"] for r in ranks)
    own = ranks[0]["arenas"]["two copies"] / 3  # each rank's own and two copies of it, all of one size
    copies = {arm: ranks[0]["arenas"][arm] - own for arm in ARMS}
    sent = {arm: sum(statistics.mean(b["sent"] for b in r["blocks"] if b["arm"] == arm) for r in ranks) for arm in ARMS}
    cpu = {arm: of_all(ranks, arm, "cpu_seconds") for arm in (OFF, *ARMS)}
    results = [
        Result(
            name="job: iteration without snapshots", value=statistics.median(times[c, OFF] for c in cycles), unit="s"
        ),
        Result(name="job: snapshot, all ranks", value=snapshot / 1e6, unit="MB"),
    ]
    for arm in ARMS:
        slower = np.array([times[c, arm] / times[c, OFF] for c in cycles])
        against = np.array([times[c, arm] / times[c, "two copies"] for c in cycles])
        results += [
            Result(name=f"{arm}: sent, of a snapshot", value=sent[arm] / snapshot, unit="x"),
            Result(name=f"{arm}: sent, of two copies'", value=sent[arm] / sent["two copies"], unit="x"),
            Result(
                name=f"{arm}: memory on other nodes, of two copies'", value=copies[arm] / copies["two copies"], unit="x"
            ),
            Result(name=f"{arm}: CPU seconds added, all ranks", value=cpu[arm] - cpu[OFF], unit="s/iteration"),
            Result(name=f"{arm}: iteration time, ratio to none", value=float(np.median(slower)), unit="x"),
            *interval(f"{arm}: iteration time, ratio to none", slower),
            Result(name=f"{arm}: iteration time, ratio to two copies", value=float(np.median(against)), unit="x"),
            *interval(f"{arm}: iteration time, ratio to two copies", against),
            Result(name=f"{arm}: snapshots dropped", value=first[arm]["moetion/snapshots-dropped"], unit=""),
        ]
    return results


def of_all(ranks: list[dict[str, Any]], arm: str, name: str) -> float:
    """A median an iteration in one arm, summed over ranks."""
    return sum(statistics.median(b[name] for b in r["blocks"] if b["arm"] == arm) for r in ranks)


def interval(name: str, ratios: Any) -> list[Result]:
    """Both ends of 95%."""
    low, high = median_interval(ratios)
    return [
        Result(name=f"{name}, lower end of 95%", value=low, unit="x"),
        Result(name=f"{name}, upper end of 95%", value=high, unit="x"),
    ]


if __name__ == "__main__":
    sys.exit(main())
