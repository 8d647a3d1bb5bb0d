# SPDX-License-Identifier: Apache-2.0
"""Parts that train a small MoE GPT, kill it, and compare what comes back with a run that was not killed.

In modes ``full`` and ``exact`` every loss must be the same, bit for bit; in mode ``popularity`` the run must come back
and say what it lost. The verdicts hold for at most two experts a token: the sum of two is the same in either order, and
Megatron-Core adds more by atomics, in any order.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import one_answer
from left_behind import temporary_store

from gpu_check.part import ROOT, CheckFailed, Finding, Setting, execute, need_gpus, need_store, read_lines

ITERATIONS, FAULT_AT = 20, 11
MODEL_FLAGS = f"""
--num-layers 4 --disable-bias-linear --hidden-size 256 --ffn-hidden-size 512 --num-attention-heads 4 --seq-length 128
--max-position-embeddings 128 --num-experts 16 --moe-router-topk 2 --moe-ffn-hidden-size 256
--moe-token-dispatcher-type alltoall --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2
--micro-batch-size 2 --global-batch-size 4 --bf16 --use-distributed-optimizer --attention-dropout 0.1
--hidden-dropout 0.1 --lr 3e-3 --lr-decay-style cosine --lr-warmup-iters 2 --train-iters {ITERATIONS}
--log-interval 1 --eval-interval {ITERATIONS} --eval-iters 2 --seed 1234
""".split()
ARENA_BYTES = 1600 << 20
"""At most, of all runs of a part that train at once, with all ranks and replicas."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How many ranks train, and how the model lies on them."""

    name: str
    ranks: int
    flags: Sequence[str] = ()
    ranks_per_node: int = 1
    mode: str = "full"
    """Of the run that loses a node."""


ONE_RANK = Layout(name="one rank", ranks=1)
LAYOUTS = (
    Layout(name="ep2", ranks=2, flags=("--expert-model-parallel-size", "2")),
    Layout(name="pp2", ranks=2, flags=("--pipeline-model-parallel-size", "2"), mode="exact"),
    Layout(
        name="pp2-ep2",
        ranks=4,
        flags=("--pipeline-model-parallel-size", "2", "--expert-model-parallel-size", "2"),
        ranks_per_node=2,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a training run left behind."""

    curve: Mapping[int, tuple[str, float]]
    """Loss, every bit of it, and gradient norm of the last execution of each iteration."""
    resumed_from: int | None
    fetched_units: int
    lost_tokens: int
    plt: float


def run_training(setting: Setting) -> Finding:
    """One rank: a reference, then each mode with a SIGKILL in mid-copy. The runs share the GPU: nothing is timed."""
    need_store(setting, ARENA_BYTES)
    runs = {
        "reference": [],
        "full": ["--moetion", "--moetion-mode", "full"],
        "exact": ["--moetion", "--moetion-mode", "exact"],
        "popularity": ["--moetion", "--moetion-mode", "popularity", "--moetion-lost-token-budget", "0"],
    }
    at_once = max(1, min(len(runs), len(os.sched_getaffinity(0)) // 2))
    with ThreadPoolExecutor(at_once) as threads:
        found = dict(zip(runs, threads.map(lambda item: train(setting, *item), runs.items()), strict=True))
    reference, popularity = found["reference"], found["popularity"]
    for mode in ("full", "exact"):
        compare(mode, found[mode], reference)
    resumed = [found[mode].resumed_from for mode in ("full", "exact", "popularity")]
    if popularity.lost_tokens == 0 or max(popularity.curve) != ITERATIONS:
        raise CheckFailed(f"popularity lost {popularity.lost_tokens} tokens and reached {max(popularity.curve)}")
    return Finding(
        text=f"killed at {FAULT_AT}; full resumed from {resumed[0]}, exact from {resumed[1]}, all {ITERATIONS} losses "
        f"bitwise; popularity from {resumed[2]}, {popularity.lost_tokens} tokens lost, PLT {popularity.plt:.2%}"
    )


def run_several(setting: Setting) -> Finding:
    """Two or more GPUs: NCCL, each layout with a reference and a run that loses a node with its memory."""
    if setting.on_gpu:
        need_gpus(setting, 2)
    need_store(setting, ARENA_BYTES)
    ranks = len(setting.machine.gpus) if setting.on_gpu else 2
    chosen = [layout for layout in LAYOUTS if layout.ranks <= ranks][: 1 if setting.quick else None]
    said = []
    for layout in chosen:
        reference = train(setting, f"{layout.name}-reference", [], layout)
        found = lose_node(setting, layout)
        compare(f"{layout.name}, {layout.mode}", found, reference)
        if not found.fetched_units:
            raise CheckFailed(f"{layout.name}: nothing came from the other node's memory")
        said.append(f"{layout.name} ({layout.mode}) resumed from {found.resumed_from}")
    backend = "NCCL" if setting.on_gpu else "gloo"
    return Finding(text=f"{backend}; a node lost with its memory: {', '.join(said)}, all losses bitwise")


def compare(name: str, found: Run, reference: Run) -> None:
    """Raise ``CheckFailed`` unless both have the same losses and gradient norms, bit for bit."""
    if found.curve != reference.curve:
        wrong = [i for i in reference.curve if found.curve.get(i) != reference.curve[i]]
        raise CheckFailed(
            f"{name}: {len(wrong)} of {ITERATIONS} iterations differ from the reference, first {wrong[:1]}"
        )


def train(setting: Setting, name: str, flags: Sequence[str], layout: Layout = ONE_RANK) -> Run:
    """A run to the end, on this check's device; with ``--moetion`` it is killed once and must have recovered."""
    folder = fresh_folder(setting, name)
    with temporary_store(setting.store, "check") as store:
        ours = [] if not flags else [*flags, *moetion_flags(store, name, folder), "--moetion-replicas", "0"]
        if flags:
            ours += ["--moetion-inject-fault", f"0:0:{FAULT_AT}:mid-pack"]
        command = torchrun(setting, layout, folder, ours, max_restarts=1)
        said = execute(command, folder / "log.txt", setting.left_s, environment_of(setting))
    if setting.on_gpu:
        require_gpu(name, said, attempts=2 if flags else 1)
    run = read_run(folder)
    if flags and run.resumed_from is None:
        raise CheckFailed(f"{name}: the run ended without a recovery, see {folder.name}/log.txt")
    return run


def lose_node(setting: Setting, layout: Layout) -> Run:
    """A run that is killed, loses the memory of node 1, is launched again, and ends."""
    name = f"{layout.name}-{layout.mode}"
    folder, lost_rank = fresh_folder(setting, name), layout.ranks_per_node
    with temporary_store(setting.store, "check") as store:
        ours = ["--moetion", "--moetion-mode", layout.mode, *moetion_flags(store, name, folder)]
        ours += ["--moetion-ranks-per-node", str(layout.ranks_per_node)]
        fault = ["--moetion-inject-fault", f"0:{lost_rank}:{FAULT_AT}:mid-pack"]
        environment = environment_of(setting)
        first = torchrun(setting, layout, folder, [*ours, *fault], max_restarts=0)
        said = execute(first, folder / "first.txt", setting.left_s, environment, may_fail=True)
        node = store / f"check-{name}" / "node1"
        if not node.is_dir():
            raise CheckFailed(f"{name}: no memory of node 1 to lose, see train-{name}/first.txt")
        shutil.rmtree(node)
        second = torchrun(setting, layout, folder, ours, max_restarts=0)
        said += "\n" + execute(second, folder / "log.txt", setting.left_s, environment)
    if setting.on_gpu:
        require_gpu(name, said, attempts=2)
    return read_run(folder)


def fresh_folder(setting: Setting, name: str) -> Path:
    """An empty folder for a run's files."""
    folder = setting.results / f"train-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def moetion_flags(store: Path, name: str, folder: Path) -> list[str]:
    """Where a run's memory and events go."""
    return [
        "--moetion-store", str(store), "--moetion-run-id", f"check-{name}", "--moetion-report",
        str(folder / "events.jsonl"),
    ]  # fmt: skip


def torchrun(setting: Setting, layout: Layout, folder: Path, flags: Sequence[str], *, max_restarts: int) -> list[str]:
    """The command line of a run."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node",
        str(layout.ranks), "--max-restarts", str(max_restarts), str(ROOT / "pretrain_gpt_moe.py"), *MODEL_FLAGS,
        *layout.flags, "--metrics-path", str(folder / "metrics.jsonl"), *flags,
        "--device", "gpu" if setting.on_gpu else "cpu",
    ]  # fmt: skip


def environment_of(setting: Setting) -> dict[str, str]:
    """Of a run: the same bits each time, on this check's device."""
    hidden = {} if setting.on_gpu else {"CUDA_VISIBLE_DEVICES": ""}
    # The name of a bare machine need not resolve.
    return one_answer.ENVIRONMENT | {"GLOO_SOCKET_IFNAME": "lo"} | hidden


def read_run(folder: Path) -> Run:
    """From the run's files. ``CheckFailed`` where they do not hold what a whole run writes."""
    metrics, events = read_lines(folder / "metrics.jsonl"), read_lines(folder / "events.jsonl")
    curve = {m["iteration"]: (m["loss_hex"], m["grad_norm"]) for m in metrics if "loss_hex" in m}
    if not curve:
        raise CheckFailed(f"{folder.name}: no losses in metrics.jsonl")
    recovered = [e for e in events if e["event"] == "recovered"]
    return Run(
        curve=curve,
        resumed_from=recovered[-1]["iteration"] if recovered else None,
        fetched_units=sum(e["fetched_units"] for e in recovered),
        lost_tokens=sum(e["lost_tokens"] for e in recovered),
        plt=next((e["plt"] for e in events if e["event"] == "summary"), 0.0),
    )


def require_gpu(name: str, said: str, attempts: int) -> None:
    """Raise ``CheckFailed`` unless all attempts were on a GPU, with arenas pinned for it.

    Rank 0 says that its arena is pinned; each rank says it where its arena is not.
    """
    lines = said.splitlines()
    on_gpu = sum(line.startswith("> GPU path on ") for line in lines)
    if on_gpu < attempts or any("CPU path" in line for line in lines):
        raise CheckFailed(
            f"{name}: {on_gpu} of {attempts} attempts say that they were on a GPU, see train-{name}/log.txt"
        )
    pinned = sum("arena pinned" in line for line in lines)
    unpinned = next((line for line in lines if "could not be pinned" in line), None)
    if attempts > 1 and (pinned < attempts or unpinned is not None):
        raise CheckFailed(
            f"{name}: the arena was pinned in {pinned} of {attempts} attempts: {(unpinned or 'no line says so')[:160]}"
        )
