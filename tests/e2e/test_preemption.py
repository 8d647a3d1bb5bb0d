# SPDX-License-Identifier: Apache-2.0
"""A job is told to leave: the stable iteration is on disk within the grace, and another job goes on from it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_moetion.persist.tracker import checkpoint_folder, latest_iteration

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(500)]

ROOT = Path(__file__).parents[2]
MODEL = (
    "--num-layers 1 --hidden-size 32 --num-attention-heads 2 --seq-length 16 --num-experts 4 --moe-router-topk 2 "
    "--moe-ffn-hidden-size 48 --micro-batch-size 1 --global-batch-size 4 --mock-data --eval-iters 0 --log-interval 1 "
    "--expert-model-parallel-size 2 --bf16 --use-distributed-optimizer --lr 1e-2 --lr-decay-iters 100000"
)


@pytest.fixture
def store() -> Iterator[Path]:
    folder = Path("/dev/shm") / f"moetion-preemption-{os.getpid()}"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def start(folder: Path, flags: str) -> subprocess.Popen[bytes]:
    """Two ranks under torchrun; what they say is in ``log``."""
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "pretrain_gpt_moe.py"), *MODEL.split(), *flags.split()]
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            [*command, "--metrics-path", str(folder / "metrics.jsonl")],
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def wait_until(condition: Callable[[], object], seconds: float, log: Path) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, log.read_text()[-6000:]
        time.sleep(0.2)


def losses(folder: Path) -> dict[int, str]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {m["iteration"]: m["loss_hex"] for m in map(json.loads, lines) if "loss_hex" in m}


def writers(store: Path) -> list[int]:
    """Processes that write for ranks of this store and can be told to end."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            if b"megatron_moetion.export" in (status.parent / "cmdline").read_bytes():
                caught = int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16)  # type: ignore[index]
                if caught >> (signal.SIGTERM - 1) & 1:
                    found.append(int(status.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("parents", ["", " --moetion-warm-restarts 2"], ids=["torchrun", "warm parents"])
def test_what_is_stable_when_a_job_is_told_to_leave_is_what_another_job_goes_on_from(
    tmp_path: Path, store: Path, parents: str
) -> None:
    """A warm parent hands the signal on, to its rank and to what writes for it."""
    saved, log = tmp_path / "saved", tmp_path / "first" / "log"
    before = set(writers(store))
    flags = f"--moetion --moetion-mode full --moetion-store {store} --moetion-run-id leaving --moetion-ranks-per-node 1"
    flags += " --moetion-schedule eager" + parents
    job = start(tmp_path / "first", f"--train-iters 100000 --save {saved} --moetion-grace-s 60 {flags}")
    try:
        wait_until(lambda: "one when SIGTERM ends the job" in log.read_text(), 120, log)
        wait_until(lambda: len(set(writers(store)) - before) == 2, 60, log)
        wait_until(lambda: max(losses(tmp_path / "first")) >= 20, 120, log)
        assert latest_iteration(str(saved)) is None
        told = time.monotonic()
        job.send_signal(signal.SIGTERM)  # torchrun hands it on to its workers' groups
        job.wait(90)
        grace = time.monotonic() - told
    finally:
        job.kill()
    iteration = latest_iteration(str(saved))
    assert iteration is not None, log.read_text()[-6000:]
    assert checkpoint_folder(str(saved), iteration).is_dir(), "it was there when the job had gone"
    assert [p.name for p in saved.iterdir() if p.name.startswith(".")] == []
    trained = losses(tmp_path / "first")
    assert 0 < iteration <= max(trained)
    assert grace < 60, "it left when that was done"
    if parents:  # what is on disk is written by the same code
        return

    until = iteration + 3
    for name, load in (("other", f"--load {saved}"), ("undisturbed", "")):
        process = start(tmp_path / name, f"--train-iters {until} {load}")
        assert process.wait(200) == 0, (tmp_path / name / "log").read_text()[-6000:]
    undisturbed, other = losses(tmp_path / "undisturbed"), losses(tmp_path / "other")
    assert other == {i: loss for i, loss in undisturbed.items() if i > iteration}
    assert {i: loss for i, loss in trained.items() if i <= iteration}.items() <= undisturbed.items()


def test_one_rank_that_is_told_to_leave_leaves_nothing_on_disk_and_the_job_goes_on(tmp_path: Path, store: Path) -> None:
    """As torchrun does to the ranks that are left when one has failed: a restart goes on from memory, at once."""
    saved, log = tmp_path / "saved", tmp_path / "first" / "log"
    before = set(writers(store))
    flags = f"--moetion --moetion-mode full --moetion-store {store} --moetion-run-id failing --moetion-ranks-per-node 1"
    job = start(tmp_path / "first", f"--train-iters 100000 --save {saved} {flags}")
    try:
        wait_until(lambda: len(set(writers(store)) - before) == 2, 120, log)
        wait_until(lambda: (tmp_path / "first" / "metrics.jsonl").exists(), 60, log)
        writer = (set(writers(store)) - before).pop()
        rank = int(re.search(r"PPid:\s*(\d+)", Path(f"/proc/{writer}/status").read_text())[1])  # type: ignore[index]
        os.kill(rank, signal.SIGKILL)  # torchrun tells the other one to end
        assert job.wait(90) != 0
        wait_until(lambda: not set(writers(store)) - before, 60, log)
    finally:
        job.kill()
    assert latest_iteration(str(saved)) is None
    left = [p for p in saved.rglob("*") if p.is_file()] if saved.exists() else []
    assert [p.name for p in left if not p.name.startswith("moetion-")] == [], "a few words, which the next start clears"
