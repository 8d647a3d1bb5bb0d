# SPDX-License-Identifier: Apache-2.0
"""The steps of ``gpu_check.sh``: each a command with a log, a time limit and a verdict; a table at the end.

The training steps run one rank of a small MoE GPT. In modes ``full`` and ``exact`` it is killed in the middle of a copy
and must end bit for bit as the run that was not; in mode ``popularity`` it must come back and say what it lost.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
STEPS = ("tests", "sanitizer", "train", "device_pack", "host_pack")
ITERATIONS, FAULT_AT = 20, 11
SANITIZED_CASES = "each_source_alignment or pieces_that_share or scatter_brings"
"""A subset of ``tests/gpu/test_kernels.py``, since the sanitizer makes kernels some hundred times slower."""
MODEL_FLAGS = f"""
--num-layers 4 --disable-bias-linear --hidden-size 256 --ffn-hidden-size 512 --num-attention-heads 4 --seq-length 128
--max-position-embeddings 128 --num-experts 16 --moe-router-topk 2 --moe-ffn-hidden-size 256
--moe-token-dispatcher-type alltoall --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2
--micro-batch-size 2 --global-batch-size 4 --bf16 --use-distributed-optimizer --attention-dropout 0.1
--hidden-dropout 0.1 --lr 3e-3 --lr-decay-style cosine --lr-warmup-iters 2 --train-iters {ITERATIONS}
--log-interval 1 --eval-interval {ITERATIONS} --eval-iters 2 --seed 1234
""".split()


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of one step. ``passed`` is None where it was not run."""

    step: str
    passed: bool | None
    seconds: float
    finding: str


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line."""

    results: Path
    quick: bool
    on_gpu: bool


class CheckFailed(Exception):
    """A step found something; the message is for the table."""


class NotRun(Exception):
    """A step cannot run here; the message says why."""


def execute(command: Sequence[str], log: Path, limit_s: float, environment: Mapping[str, str] | None = None) -> str:
    """Run a command with its output in ``log``; returns the output. ``CheckFailed`` for an exit code or the limit."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=os.environ | dict(environment or {}), stdout=out, stderr=subprocess.STDOUT,
                timeout=limit_s,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired as late:
            raise CheckFailed(f"not done after {limit_s:.0f} s; see {log.name}") from late
    text = log.read_text(errors="replace")
    if code:
        said = [line for line in text.splitlines() if line.strip(" =-")] or ["no output"]
        error = next((line for line in said if line.lower().startswith(("error", "[setup] error"))), said[-1])
        raise CheckFailed(f"exit code {code}, see {log.relative_to(log.parents[1])}: {error[:160]}")
    return text


def run_tests(options: Options) -> str:
    """All tests that need a GPU."""
    if not options.on_gpu:
        raise NotRun("needs a GPU")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu"]
    text = execute(command, options.results / "tests.log", 1200, {"MOETION_REQUIRE_GPU": "1"})
    return text.strip().splitlines()[-1]


def run_sanitizer(options: Options) -> str:
    """memcheck over part of the kernel tests: every access inside what was allocated, and aligned."""
    if not options.on_gpu:
        raise NotRun("needs a GPU")
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        raise NotRun("compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin; it comes with the CUDA toolkit")
    # torch's caching allocator would hide a write beyond a tensor inside its own large blocks
    environment = {"MOETION_REQUIRE_GPU": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [
        tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", "-p",
        "no:cacheprovider", "--timeout", "1200", "tests/gpu/test_kernels.py", "-k",
        f"test_case and ({SANITIZED_CASES}) and not floats",
    ]  # fmt: skip
    text = execute(command, options.results / "sanitizer.log", 1800, environment)
    summary = next((line for line in reversed(text.splitlines()) if "ERROR SUMMARY" in line), None)
    if summary is None:
        raise CheckFailed("the sanitizer gave no summary, so it checked nothing; see sanitizer.log")
    return summary.strip("= ")


def run_training(options: Options) -> str:
    """Reference, then each mode with a SIGKILL in mid-copy; see the module."""
    reference = train(options, "reference", [])
    bitwise = {mode: train(options, mode, ["--moetion", "--moetion-mode", mode]) for mode in ("full", "exact")}
    for mode, found in bitwise.items():
        if found.curve != reference.curve:
            wrong = [i for i in reference.curve if found.curve.get(i) != reference.curve[i]]
            raise CheckFailed(
                f"{mode}: {len(wrong)} of {ITERATIONS} iterations differ from the reference, first {wrong[:1]}"
            )
    popularity = train(options, "popularity", ["--moetion", "--moetion-lost-token-budget", "0"])
    resumed = [run.resumed_from for run in (*bitwise.values(), popularity)]
    if popularity.lost_tokens == 0 or max(popularity.curve) != ITERATIONS:
        raise CheckFailed(f"popularity lost {popularity.lost_tokens} tokens and reached {max(popularity.curve)}")
    return (
        f"killed at {FAULT_AT}; full resumed from {resumed[0]}, exact from {resumed[1]}, all {ITERATIONS} losses "
        f"bitwise; popularity from {resumed[2]}, {popularity.lost_tokens} tokens lost, PLT {popularity.plt:.2%}"
    )


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a training run left behind."""

    curve: dict[int, tuple[str, float]]
    """Loss, every bit of it, and gradient norm of the last execution of each iteration."""
    resumed_from: int | None
    lost_tokens: int
    plt: float


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
        lost_tokens=sum(e["lost_tokens"] for e in recovered),
        plt=next((e["plt"] for e in events if e["event"] == "summary"), 0.0),
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A file of JSON lines; empty if it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def train(options: Options, name: str, flags: Sequence[str]) -> Run:
    """One rank to the end, on this check's device; with ``--moetion`` it is killed once and must have recovered."""
    folder = options.results / f"train-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    store = Path(tempfile.mkdtemp(prefix="moetion-check-", dir="/dev/shm"))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "--max-restarts", "1",
        str(ROOT / "pretrain_gpt_moe.py"), *MODEL_FLAGS, "--metrics-path", str(folder / "metrics.jsonl"), *flags,
    ]  # fmt: skip
    if flags:
        command += ["--moetion-replicas", "0", "--moetion-store", str(store), "--moetion-run-id", f"check-{name}"]
        command += ["--moetion-report", str(folder / "events.jsonl")]
        command += ["--moetion-inject-fault", f"0:0:{FAULT_AT}:mid-pack"]
    if options.on_gpu:
        command += ["--device", "gpu"]
    environment = {"OMP_NUM_THREADS": "1"} | ({} if options.on_gpu else {"CUDA_VISIBLE_DEVICES": ""})
    try:
        said = execute(command, folder / "log.txt", 600, environment)
    finally:
        shutil.rmtree(store, ignore_errors=True)
    if options.on_gpu:
        require_gpu(name, said, attempts=2 if flags else 1)
    run = read_run(folder)
    if flags and run.resumed_from is None:
        raise CheckFailed(f"{name}: the run ended without a recovery, see {folder.name}/log.txt")
    return run


def require_gpu(name: str, said: str, attempts: int) -> None:
    """Raise ``CheckFailed`` unless all attempts say that they were on a GPU, and that the arena was pinned for it."""
    lines = said.splitlines()
    on_gpu = sum(line.startswith("> GPU path on ") for line in lines)
    if on_gpu < attempts or any("CPU path" in line for line in lines):
        raise CheckFailed(
            f"{name}: {on_gpu} of {attempts} attempts say that they were on a GPU, see train-{name}/log.txt"
        )
    pinned = sum("arena pinned" in line for line in lines)
    if attempts > 1 and pinned < attempts:
        why = next((line for line in lines if "could not be pinned" in line), "no line says so")
        raise CheckFailed(f"{name}: the arena was pinned in {pinned} of {attempts} attempts: {why[:160]}")


def run_benchmark(name: str) -> Callable[[Options], str]:
    """A step that runs one benchmark and counts its targets."""

    def step(options: Options) -> str:
        path = options.results / f"{name}.json"
        command = [
            sys.executable,
            f"benchmarks/{name}.py",
            "--json",
            str(path),
            *(["--quick"] if options.quick else []),
        ]
        execute(command, options.results / f"{name}.log", 1800)
        figures = json.loads(path.read_text())["results"]
        if all(f["value"] is None for f in figures):
            if options.on_gpu:
                raise CheckFailed(f"nothing was measured: it found no GPU that it can use; see {name}.log")
            raise NotRun("needs a GPU")
        judged = [f for f in figures if f["met"] is not None]
        missed = [f["name"] for f in judged if not f["met"]]
        return f"{len(judged) - len(missed)} of {len(judged)} targets met" + "".join(
            f"; missed: {m}" for m in missed[:6]
        )

    return step


def judge(step: str, action: Callable[[Options], str], options: Options) -> Verdict:
    """Run one step."""
    started = time.monotonic()
    try:
        passed, finding = True, action(options)
    except NotRun as reason:
        passed, finding = None, str(reason)
    except CheckFailed as failure:
        passed, finding = False, str(failure)
    return Verdict(step=step, passed=passed, seconds=time.monotonic() - started, finding=finding)


def describe_machine(on_gpu: bool) -> str:
    """The GPU and its driver, as nvidia-smi names them."""
    if not on_gpu:
        return "no GPU"
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().replace("\n", "; ")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chosen steps; 0 if none failed, 1 if one did."""
    parser = argparse.ArgumentParser(description="Check MoEtion on this machine's GPU.")
    parser.add_argument("results", type=Path, metavar="RESULTS", help="folder for logs, figures and summary.json")
    parser.add_argument("--quick", action="store_true", help="benchmarks of about a minute each")
    parser.add_argument("--only", action="append", choices=STEPS, help="run this step; may be given several times")
    parser.add_argument("--without-gpu", action="store_true", help="try the script: train on the CPU, skip the rest")
    args = parser.parse_args(argv)
    options = Options(results=args.results.resolve(), quick=args.quick, on_gpu=not args.without_gpu)
    try:
        machine = describe_machine(options.on_gpu)
    except (OSError, subprocess.CalledProcessError) as error:
        parser.error(f"no GPU to check: {error}; --without-gpu tries the script itself")
    options.results.mkdir(parents=True, exist_ok=True)
    actions = dict(zip(STEPS, (run_tests, run_sanitizer, run_training, *map(run_benchmark, STEPS[3:])), strict=True))
    console, verdicts = Console(), []
    for step in args.only or STEPS:
        console.print(f"{step} ...", highlight=False)
        verdicts.append(judge(step, actions[step], options))
    table = Table(title=f"gpu_check on {machine}")
    for column in ("step", "verdict", "seconds", "finding"):
        table.add_column(column, justify="right" if column == "seconds" else "left")
    words = {True: "[green]passed[/green]", False: "[red]FAILED[/red]", None: "not run"}
    for v in verdicts:
        table.add_row(v.step, words[v.passed], f"{v.seconds:.0f}", v.finding)
    console.print(table)
    summary = {"machine": machine, "steps": [asdict(v) for v in verdicts]}
    (options.results / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return int(any(v.passed is False for v in verdicts))


if __name__ == "__main__":
    sys.exit(main())
