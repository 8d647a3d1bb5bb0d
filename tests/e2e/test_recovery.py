# SPDX-License-Identifier: Apache-2.0
"""The product as a user runs it: Megatron-Core training on four ranks, real SIGKILLs, restarts by torchrun."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_moetion.observe.report import read_traces
from megatron_moetion.run.trial import MEASURED, WARM_UP

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
ITERATIONS = 14
SAVED_AT = 12
MODEL = (
    "--num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --seq-length 32 "
    "--num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 256 --moe-aux-loss-coeff 1e-2 "
    "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2 --micro-batch-size 2 --global-batch-size 8 "
    f"--train-iters {ITERATIONS} --lr 1e-2 --lr-warmup-iters 2 --lr-decay-style cosine --log-interval 1 --bf16 "
    "--use-distributed-optimizer --attention-dropout 0.1 --hidden-dropout 0.1 --eval-interval 5 --eval-iters 1 "
    "--distributed-timeout-minutes 2"
)


@dataclass(frozen=True)
class Run:
    code: int
    output: str
    metrics: list[dict[str, Any]]
    events: list[dict[str, Any]]

    @property
    def curve(self) -> dict[int, tuple[str, float]]:
        """Loss, every bit of it, and gradient norm of the last execution of each iteration."""
        return {m["iteration"]: (m["loss_hex"], m["grad_norm"]) for m in self.metrics if "loss_hex" in m}

    @property
    def validation(self) -> dict[int, str]:
        return {m["iteration"]: m["validation_loss_hex"] for m in self.metrics if "validation_loss" in m}

    @property
    def recoveries(self) -> list[dict[str, Any]]:
        return [e for e in self.events if e["event"] == "recovered"]

    @property
    def summary(self) -> dict[str, Any]:
        return next(e for e in self.events if e["event"] == "summary")


@pytest.fixture
def store() -> Iterator[Path]:
    folder = Path("/dev/shm") / f"moetion-e2e-{os.getpid()}"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def train(folder: Path, flags: str, *, restarts: int = 0, expect: int = 0) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    metrics, events = folder / "metrics.jsonl", folder / "events.jsonl"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    command += ["--max-restarts", str(restarts), str(ROOT / "pretrain_gpt_moe.py"), *MODEL.split(), *flags.split()]
    command += ["--metrics-path", str(metrics)]
    command += ["--moetion-report", str(events)] if "--moetion " in flags else []
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert (done.returncode == 0) == (expect == 0), done.stdout[-6000:]
    return Run(done.returncode, done.stdout, read(metrics), read(events))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The uninterrupted run, without any checkpointing."""
    return train(tmp_path_factory.mktemp("reference"), "")


def moetion(store: Path, mode: str, more: str = "") -> str:
    where = f"--moetion-store {store} --moetion-run-id e2e --moetion-ranks-per-node 2"
    return f"--moetion --moetion-mode {mode} {where} {more}"


def save_at(folder: Path) -> str:
    return f"--save {folder / 'saved'} --save-interval {SAVED_AT} --moetion-save off"


def assert_loads_as_it_went_on(saved: Path, run: Run) -> None:
    """A run that loads what was saved after the recoveries repeats the steps that followed, bit for bit."""
    (saved / "latest_checkpointed_iteration.txt").write_text(str(SAVED_AT))
    resumed = train(saved.parent / "resumed", f"--load {saved}")
    assert resumed.curve == {i: v for i, v in run.curve.items() if i > SAVED_AT}


@pytest.mark.parametrize("mode", ["full", "exact --moetion-period 3"])
def test_bitwise_modes_are_the_uninterrupted_run_after_two_faults(
    reference: Run, tmp_path: Path, store: Path, mode: str
) -> None:
    """Dropout on, a rank lost while replicas travel, then one lost in the middle of a copy; then ``--save``."""
    faults = "--moetion-inject-fault 0:3:5:mid-replication,1:0:9:mid-pack --moetion-state-hash-interval 4"
    run = train(tmp_path, moetion(store, mode, f"{faults} {save_at(tmp_path)}"), restarts=3)
    assert run.curve == reference.curve
    assert run.validation == reference.validation
    assert [r["epoch"] for r in run.recoveries] == [1, 2]
    struck = [int(at) for at in re.findall(r"iteration (\d+): injected SIGKILL", run.output)]
    assert all(0 <= at - r["iteration"] <= 2 for at, r in zip(struck, run.recoveries, strict=True))
    assert run.summary["dropped"] == 0
    assert run.summary["plt"] == 0
    hashes = {e["iteration"]: e["hash"] for e in run.events if e["event"] == "state_hash"}
    assert set(hashes) == {4, 8, 12}
    if mode == "full":  # of both modes the state is that of the reference, and so is what is saved of it
        assert_loads_as_it_went_on(tmp_path / "saved", run)
        return
    traces = tmp_path / "traces"
    more = f"--moetion-state-hash-interval 4 --moetion-schedule eager --moetion-trace-dir {traces}"
    undisturbed = train(tmp_path / "undisturbed", moetion(store / "undisturbed", mode, more))
    assert hashes == {e["iteration"]: e["hash"] for e in undisturbed.events if e["event"] == "state_hash"}
    assert undisturbed.curve == reference.curve
    assert_all_traffic_is_drawn(traces)


def test_popularity_loses_little_and_counts_it(reference: Run, tmp_path: Path, store: Path) -> None:
    faults = "--moetion-inject-fault 0:2:6:before-commit,1:1:-1:restored,2:1:9:before-select"
    more = f"--moetion-staleness-cap 4 --moetion-lost-token-budget 0 {faults} {save_at(tmp_path)}"
    run = train(tmp_path, moetion(store, "popularity", more), restarts=3)
    assert run.output.count("injected SIGKILL at ") == 3, run.output[-6000:]
    first, second = run.recoveries
    before = {i: v for i, v in reference.curve.items() if i <= first["iteration"]}
    assert {i: run.curve[i] for i in before} == before, "until the fault nothing may differ"
    assert max(run.curve) == ITERATIONS
    assert second["epoch"] > first["epoch"]
    assert first["lost_tokens"] > 0
    assert 0 < run.summary["plt"] < 0.25
    assert run.summary["snapshot_bytes_mean"] < 0.7 * run.summary["snapshot_bytes_full"]
    assert_loads_as_it_went_on(tmp_path / "saved", run)


@pytest.mark.parametrize("schedule", ["bubble", "steady"])
def test_training_is_bitwise_the_same_whenever_snapshots_travel(
    reference: Run, tmp_path: Path, store: Path, schedule: str
) -> None:
    """The third schedule, ``eager``, is that of an undisturbed run above."""
    traces = tmp_path / "traces"
    run = train(tmp_path, moetion(store, "popularity", f"--moetion-schedule {schedule} --moetion-trace-dir {traces}"))
    assert run.curve == reference.curve
    assert run.validation == reference.validation
    assert_all_traffic_is_drawn(traces)


def assert_all_traffic_is_drawn(traces: Path) -> None:
    """Every kind of training's own traffic beside what snapshots do."""
    bars = read_traces(traces)
    assert {b.rank for b in bars} == {0, 1, 2, 3}
    for rank in range(4):
        lanes = {b.lane for b in bars if b.rank == rank}
        assert lanes >= {"iteration", "compute", "pipeline", "all-to-all", "wait", "device to host", "replication"}, (
            rank
        )
    # PP 2 x EP 2 on four ranks: the dense parameters are shared by two ranks, and so are their gradients.
    assert {"gradient sync", "parameter gather"} <= {b.lane for b in bars}
    sent = {lane: sum(b.value for b in bars if b.lane == lane) for lane in ("pipeline", "all-to-all")}
    assert sent["pipeline"] > 0  # between the two nodes
    assert sent["all-to-all"] == 0  # inside a node


FRAGMENTS = "--moetion-ranks-per-node 1 --moetion-replicas 2 --moetion-coding-nodes 4"


@pytest.mark.parametrize(("mode", "copies"), [("full", FRAGMENTS), ("exact --moetion-period 3", "")])
def test_ranks_that_warm_parents_fork_again_are_the_uninterrupted_run(
    reference: Run, tmp_path: Path, store: Path, mode: str, copies: str
) -> None:
    """A rank dies in a step, another one in the recovery from that, one after it; ``torchrun`` restarts nothing."""
    faults = "0:3:6:mid-pack,1:0:-1:restore,2:2:8:mid-replication"
    saved = tmp_path / "saved"
    more = f"{copies} --moetion-warm-restarts 3 --moetion-inject-fault {faults} --save {saved} --save-interval 100"
    run = train(tmp_path, moetion(store, mode, more))
    assert run.output.count("injected SIGKILL at ") == 3, run.output[-6000:]
    assert [e["epoch"] for e in run.recoveries] == [1, 2]
    assert [folder.name for folder in saved.glob("iter_*")] == [f"iter_{ITERATIONS:07d}"], "none for a restart"
    assert "as the job ends" not in run.output.replace("no checkpoint is written as the job ends", "")
    assert run.curve == reference.curve
    assert run.validation == reference.validation
    assert run.output.count("the ranks start again from warm parents") == 3


def test_a_run_that_dies_before_its_first_snapshot_is_restarted_from_the_beginning(
    reference: Run, tmp_path: Path, store: Path
) -> None:
    """torchrun's store knows that there was nothing to lose yet; without that a restart would ask for consent."""
    run = train(tmp_path, moetion(store, "full", "--moetion-inject-fault 0:2:-1:survey"), restarts=2)
    assert run.recoveries == []
    assert run.curve == reference.curve


ANY_TRAINING = {
    "coding", "config", "ending", "errors", "mcore", "mcore.argument_checks", "mcore.arguments", "mcore.chain",
    "mcore.cpu_adam", "mcore.cpu_device", "mcore.disk_format", "mcore.engine_names", "mcore.optimizer_state",
    "mcore.rng", "mcore.topology", "output", "persist", "persist.tracker", "rendezvous", "units",
}  # fmt: skip
"""Beside ``pretrain``, what the bundled trainer needs for flags, device, model and its checkpoints on disk."""


def test_without_the_flag_nothing_of_the_runtime_is_imported(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from megatron_moetion.pretrain.launch import run\n"
        "code = run(sys.argv[1:])\n"
        "found = [m[17:] for m in sys.modules if m.startswith('megatron_moetion.')]\n"
        "print('LOADED', *found)\n"
        "sys.exit(code)\n"
    )
    flags = MODEL.replace("--pipeline-model-parallel-size 2 --expert-model-parallel-size 2", "--disable-bias-linear")
    flags = flags.replace(f"--train-iters {ITERATIONS}", "--train-iters 4")
    done = subprocess.run(
        [sys.executable, "-c", script, *flags.split()],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (loaded,) = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("LOADED ")]
    assert "pretrain.loop" in loaded
    assert {name for name in loaded if name.split(".")[0] != "pretrain"} <= ANY_TRAINING


def test_mode_auto_chooses_the_strongest_mode_that_fits_and_a_restart_keeps_it(
    tmp_path: Path, store: Path, reference: Run
) -> None:
    chosen_at = WARM_UP + MEASURED
    fault = f"--moetion-inject-fault 0:2:{chosen_at + 1}:mid-pack"  # what there is to go back to is the baseline
    run = train(tmp_path / "run", moetion(store, "auto", fault), restarts=1)
    assert run.curve == reference.curve
    (chosen,) = [line for line in run.output.splitlines() if "mode auto: mode 'full', the strongest that fits" in line]
    assert f"iteration {chosen_at}:" in chosen
    assert "exact P=" in chosen
    assert "popularity K=" in chosen
    measured = re.search(r"Measured on rank \d, the tightest: the network has (\S+) of (\S+) s for them at", chosen)
    assert measured is not None, chosen
    idle_s, iteration_s = map(float, measured.groups())
    assert 0 <= idle_s < iteration_s
    assert run.output.count("replicas go over ") == 2  # once a start
    (recovery,) = run.recoveries
    assert recovery["iteration"] == chosen_at
