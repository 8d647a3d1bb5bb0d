# SPDX-License-Identifier: Apache-2.0
"""The demonstration: train a small MoE GPT on two (emulated) nodes, lose one of them half-way, compare.

One fault-free run without checkpoints is the reference. Then, for each mode, a run whose node 1 is lost: both of
its ranks are killed with SIGKILL and its memory is deleted, which is what the loss of a host means. ``torchrun``
restarts the processes; node 1's state comes back from node 0's memory. Results are in ``out/quickstart/``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import one_answer
from left_behind import end, temporary_store
from quickstart_summary import Fault, Run, RunError, check, read_json_lines, read_run, summarise
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from megatron_moetion._C import built_with_cuda
from megatron_moetion.pretrain.launch import visible_gpus

ROOT = Path(__file__).resolve().parent.parent
MODES = ("full", "exact", "popularity")
ITERATIONS, ITERATIONS_QUICK = 60, 24
RANKS, RANKS_PER_NODE, LOST_NODE = 4, 2, 1
POLL_INTERVAL_S = 0.05
PLAIN_LINE_INTERVAL_S = 5.0
NO_PROGRESS_LIMIT_S = 300.0
"""A run that logs no iteration for so long has failed. Covers the imports of a slow machine."""

MODEL_FLAGS = """
--num-layers 4 --hidden-size 128 --ffn-hidden-size 256 --num-attention-heads 4 --seq-length 128
--max-position-embeddings 128 --num-experts 16 --moe-router-topk 2 --moe-ffn-hidden-size 256
--moe-token-dispatcher-type alltoall --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2
--pipeline-model-parallel-size 2 --expert-model-parallel-size 2
--micro-batch-size 2 --global-batch-size 8 --bf16 --use-distributed-optimizer
--attention-dropout 0.1 --hidden-dropout 0.1
--lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-iters 5 --weight-decay 0.1 --clip-grad 1.0
--seed 1234 --log-interval 1 --eval-iters 4
""".split()


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training run to launch."""

    name: str
    iterations: int
    folder: Path
    store: Path | None
    """Where the arenas lie; None: train without checkpoints."""

    @property
    def run_id(self) -> str:
        """Name of the run in its arenas."""
        return f"quickstart-{self.name}"

    @property
    def log(self) -> Path:
        """Everything that the run printed."""
        return self.folder / "log.txt"

    def command(self) -> list[str]:
        """The command line: ``torchrun``, the entry point, the model's flags and ours."""
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
            "--nproc-per-node", str(RANKS), "--max-restarts", "3", str(ROOT / "pretrain_gpt_moe.py"),
            *MODEL_FLAGS, "--device", device_for(visible_gpus(os.environ), built_with_cuda()),
            "--train-iters", str(self.iterations), "--eval-interval", str(self.iterations),
            "--metrics-path", str(self.folder / "metrics.jsonl"),
        ]  # fmt: skip
        if self.store is not None:
            command += [
                "--moetion", "--moetion-mode", self.name, "--moetion-ranks-per-node", str(RANKS_PER_NODE),
                "--moetion-store", str(self.store), "--moetion-run-id", self.run_id,
                "--moetion-report", str(self.folder / "report.jsonl"),
            ]  # fmt: skip
        return command

    def environment(self) -> dict[str, str]:
        """The same bits each time, and gloo on the loopback: the name of this machine need not resolve."""
        return one_answer.ENVIRONMENT | {"GLOO_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1"} | dict(os.environ)


def device_for(gpus: int, with_kernels: bool) -> str:
    """``--device`` of the runs: GPUs are left alone where there is not one for each rank, or no kernels were built."""
    return "cpu" if gpus and (gpus < RANKS or not with_kernels) else "auto"


class Display:
    """Progress of all runs: live bars in a terminal, else a plain line every few seconds."""

    def __init__(self, console: Console, jobs: Sequence[Job]) -> None:
        self._console = console
        self._said = 0.0
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks = {
            job.name: self._bars.add_task(f"{job.name:<10}", total=job.iterations, note="", start=False) for job in jobs
        }

    def __enter__(self) -> Display:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def begin(self, job: Job) -> None:
        """The run's processes are being started."""
        self._bars.start_task(self._tasks[job.name])
        self.say(f"{job.name}: starting {RANKS} ranks")

    def update(self, job: Job, iteration: int, note: str) -> None:
        """The run has finished ``iteration``, or shows another ``note``."""
        self._bars.update(self._tasks[job.name], completed=iteration, note=note)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._said >= PLAIN_LINE_INTERVAL_S:
            self._said = now
            self.say(f"{job.name}: iteration {iteration}/{job.iterations}  {note}")

    def say(self, text: str) -> None:
        """One line that stays."""
        self._console.print(text, highlight=False, soft_wrap=True)


class Training:
    """A running job: ``torchrun`` and the ranks below it."""

    def __init__(self, job: Job) -> None:
        job.folder.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "report.jsonl", "log.txt"):
            (job.folder / name).unlink(missing_ok=True)
        self.job = job
        self._log = job.log.open("wb")
        self._process = subprocess.Popen(
            job.command(),
            cwd=ROOT,
            env=job.environment(),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def newest_step(self) -> Mapping[str, Any] | None:
        """The last training step that was logged."""
        steps = [m for m in read_json_lines(self.job.folder / "metrics.jsonl") if "loss" in m]
        return steps[-1] if steps else None

    def device(self) -> str:
        """What the trainer says about GPUs, for instance "no GPU for 4 ranks: CPU path"; empty if nothing."""
        lines = self.job.log.read_text(errors="replace").splitlines()
        return next((line[2:] for line in lines if line.startswith("> ") and "GPU" in line), "")

    def close(self) -> None:
        """Ends every process of the job."""
        end(self._process)
        self._log.close()


def lose_node(store: Path, run_id: str, node: int) -> list[int]:
    """Kills the processes of a node and deletes its memory. Returns the killed ranks."""
    folder = store / run_id / f"node{node}"
    owners = [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.pid"))]
    if len(owners) != RANKS_PER_NODE:
        raise RunError(f"{folder} names {len(owners)} processes instead of {RANKS_PER_NODE}: cannot lose node {node}")
    for owner in owners:
        os.kill(owner["pid"], signal.SIGKILL)
    # Renamed first: no process of the next attempt can meet a half-deleted folder.
    grave = store / f"lost-{run_id}-node{node}"
    folder.rename(grave)
    shutil.rmtree(grave)
    return [owner["rank"] for owner in owners]


def train(job: Job, display: Display, clock: Callable[[], float] = time.time) -> Run:
    """Runs one job to its end; with a store, loses a node when half of the iterations are done."""
    fault: Fault | None = None
    recovered = False
    iteration, moved = 0, time.monotonic()
    display.begin(job)
    training = Training(job)
    try:
        while True:
            code = training.exit_code()
            step = training.newest_step()
            if step is not None and iteration == 0 and job.store is None and training.device():
                display.say(f"{job.name}: {training.device()}")
            if step is not None and int(step["iteration"]) != iteration:
                iteration, moved = int(step["iteration"]), time.monotonic()
            if job.store is not None and fault is None and iteration >= job.iterations // 2:
                fault = Fault(iteration=iteration, time=clock())
                ranks = lose_node(job.store, job.run_id, LOST_NODE)
                display.say(
                    f"{job.name}: node {LOST_NODE} lost after iteration {iteration}: ranks "
                    f"{', '.join(map(str, ranks))} killed, their memory deleted"
                )
            if fault is not None and not recovered and step is not None and step.get("attempt", 0) > 0:
                recovered = True
                display.say(f"{job.name}: training again after {clock() - fault.time:.0f} s, at iteration {iteration}")
            waiting = fault is not None and not recovered
            note = "waiting for the restart" if waiting else f"loss {step['loss']:.3f}" if step else "importing"
            display.update(job, iteration, note)
            if code is not None:
                break
            if time.monotonic() - moved > NO_PROGRESS_LIMIT_S:
                raise RunError(f"run '{job.name}' has made no progress for {NO_PROGRESS_LIMIT_S:.0f} s")
            time.sleep(POLL_INTERVAL_S)
    finally:
        training.close()
    if code != 0:
        raise RunError(f"run '{job.name}' ended with exit code {code}")
    if iteration != job.iterations:
        raise RunError(f"run '{job.name}' ended at iteration {iteration} of {job.iterations}")
    if job.store is not None and fault is None:
        raise RunError(f"run '{job.name}' was over before its node could be lost")
    display.update(job, iteration, "done")
    return read_run(job.name, job.folder, fault)


def print_table(console: Console, entries: Sequence[Mapping[str, Any]], out: Path) -> None:
    """The result in a few rows, one column a mode."""

    def loss(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    def size(entry: Mapping[str, Any]) -> str:
        mean, full = entry["snapshot_bytes_mean"], entry["snapshot_bytes_full"]
        return f"{mean / 1e6:.1f} of {full / 1e6:.1f} MB" if mean and full else "-"

    def curve(entry: Mapping[str, Any]) -> str:
        distance = entry["loss_curve_max_abs_diff"]
        return "0.0 (bitwise equal)" if distance == 0 else f"{distance:.2g}"

    rows: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [
        ("node lost after iteration", lambda e: str(e["killed_at_iteration"])),
        ("resumed from iteration", lambda e: str(e["resumed_from_iteration"])),
        ("iterations of work lost", lambda e: str(e["lost_iterations"])),
        ("training again after", lambda e: f"{sum(e['recovery_seconds'].values()):.1f} s"),
        ("snapshot, every iteration", size),
        ("distance to the fault-free losses", curve),
        ("lost tokens (PLT)", lambda e: "-" if e["plt"] is None else f"{100 * e['plt']:.2g}%"),
        ("final loss / fault-free", lambda e: f"{loss(e['final_loss'])} / {loss(e['fault_free_final_loss'])}"),
        ("validation loss / fault-free",
         lambda e: f"{loss(e['validation_loss'])} / {loss(e['fault_free_validation_loss'])}"),
    ]  # fmt: skip
    table = Table(title="A lost node, half-way; each mode with its default settings", title_justify="left")
    table.add_column("")
    for entry in entries:
        table.add_column(f"mode {entry['mode']}", justify="right")
    for title, render in rows:
        table.add_row(title, *(render(entry) for entry in entries))
    console.print(table)
    for name in ("loss.png", "summary.json"):
        console.print(os.path.relpath(out / name), highlight=False, soft_wrap=True)


def run_all(iterations: int, out: Path, console: Console) -> list[dict[str, Any]]:
    """All runs, ``summary.json`` and the picture. Returns the entries of ``summary.json``."""
    for name in ("summary.json", "loss.png"):  # never the results of an earlier call beside a failure
        (out / name).unlink(missing_ok=True)
    memory = Path("/dev/shm")
    with temporary_store(memory if os.access(memory, os.W_OK) else out, "quickstart") as store:
        reference_job = Job(name="fault-free", iterations=iterations, folder=out / "fault-free", store=None)
        jobs = [Job(name=mode, iterations=iterations, folder=out / mode, store=store) for mode in MODES]
        with Display(console, [reference_job, *jobs]) as display:
            reference = train(reference_job, display)
            runs = []
            for job in jobs:
                runs.append(train(job, display))
                shutil.rmtree(store / job.run_id, ignore_errors=True)
    entries = [summarise(run, reference) for run in runs]
    (out / "summary.json").write_text(json.dumps({"runs": entries}, indent=2) + "\n")
    from quickstart_plot import draw  # matplotlib takes seconds to import: after the runs

    draw(out / "loss.png", reference, runs, entries)
    for run in runs:
        check(run, reference)
    return entries


def main() -> int:
    """Exit code: 0 if every run kept its mode's promise, 1 if one did not, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help=f"{ITERATIONS_QUICK} iterations instead of {ITERATIONS}")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "quickstart", help="folder for the results")
    args = parser.parse_args()
    # SIGTERM ends the runs and removes the store as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = Console()
    out: Path = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    try:
        entries = run_all(ITERATIONS_QUICK if args.quick else ITERATIONS, out, console)
    except RunError as error:
        print_tail(error, out)
        return 1
    except KeyboardInterrupt:
        print("interrupted: all runs are ended, their memory is removed", file=sys.stderr)
        return 130
    print_table(console, entries, out)
    return 0


def print_tail(error: RunError, out: Path) -> None:
    """The end of the log that was written last, the ranks' own last words, then the error."""
    logs = sorted(out.glob("*/log.txt"), key=lambda path: path.stat().st_mtime)
    if logs:
        lines = logs[-1].read_text(errors="replace").splitlines()
        said = [line for line in dict.fromkeys(lines) if line.startswith("error:")]
        # Each rank tells its error before torchrun's long report of who failed.
        print("\n".join([*lines[-30:], "...", *said[-RANKS:]]), f"\n(from {logs[-1]})", file=sys.stderr)
    print(f"error: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
