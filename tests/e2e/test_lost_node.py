# SPDX-License-Identifier: Apache-2.0
"""The batch script with real torchrun agents: a process dies, then a node with its agent, its ranks and its memory.

SLURM is played by a stand-in for ``srun`` that starts every task on this machine. Each has a store of its own, which
makes it a node.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from official_flags import MODEL

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
ITERATIONS = 60


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """What torchrun starts. ``{folder}`` is that of a job, where ``losses.jsonl`` gets the bits of its losses."""

    program: str
    flags: str
    field: str
    """Of a line of ``losses.jsonl``: every bit of the loss."""


BUNDLED = Trainer(
    program="pretrain_gpt_moe.py",
    flags="--num-layers 1 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --seq-length 32 "
    "--num-experts 4 --expert-model-parallel-size 2 --micro-batch-size 4 --global-batch-size 8 --bf16 "
    f"--use-distributed-optimizer --train-iters {ITERATIONS} --lr 1e-2 --lr-decay-style cosine --log-interval 1 "
    "--eval-iters 0 --distributed-timeout-minutes 1 --metrics-path {folder}/losses.jsonl",
    field="loss_hex",
)
OFFICIAL = Trainer(
    program="tests/dist/megatron_lm_on_cpu.py {folder}/losses.jsonl tests/dist/megatron_lm_gpt.py",
    flags=f"{MODEL} --expert-model-parallel-size 2 --bf16 --global-batch-size 4 --train-iters {ITERATIONS} "
    "--eval-interval 100 --eval-iters 0",
    field="loss",
)
HOSTS = FIRST, SECOND, SPARE, OTHER_SPARE = "127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4"
"""Two train."""
SRUN = """#!{python}
import os, pathlib, subprocess, sys
args = sys.argv[1:]
named = [a.split("=", 1)[1] for a in args if a.startswith("--nodelist=")]
command = args[args.index("rm" if "rm" in args else "bash"):]
tasks = []
for number, host in enumerate(named or {hosts}):
    # The first one hosts the rendezvous; a heartbeat is missed after 6 seconds and not after 15. Addresses give agents
    # their order, and the first one hosts the ranks' store: by one address it would be the one with the lowest pid.
    torchrun = {{"PET_RDZV_CONF": f"is_host={{int(number == 0)}},keep_alive_interval=2", "PET_LOCAL_ADDR": host}}
    tasks.append(
        subprocess.Popen(
            [a.replace("@node", host) for a in command],
            env=os.environ | torchrun | {{"SLURMD_NODENAME": host, "SLURM_PROCID": str(number)}},
            start_new_session=True,
        )
    )
    if not named:
        pathlib.Path({folder!r}, f"{{host}}.pid").write_text(str(tasks[-1].pid))
sys.exit(max(abs(task.wait()) for task in tasks))
"""
SCONTROL = "#!/bin/sh\nprintf '%s\\n' {names}\n"


class Job:
    """A job of two nodes and spares, as the batch script runs it; ``warm``: restarts of warm parents."""

    def __init__(self, trainer: Trainer, folder: Path, memory: Path, *, spares: int = 1, warm: int = 0) -> None:
        hosts = HOSTS[: 2 + spares]
        self.trainer = trainer
        self.folder = folder
        self.memory = memory
        self.log = folder / "log.txt"
        folder.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            path = folder / name
            path.write_text(text.format(python=sys.executable, hosts=hosts, folder=str(folder), names=" ".join(hosts)))
            path.chmod(0o755)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        settings = {
            "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": str(len(hosts)),
            "SLURM_JOB_NODELIST": "these", "SPARES": str(spares), "WARM_RESTARTS": str(warm),
            "RANKS_PER_NODE": "1", "MODE": "full",
            "STORE": f"{memory}/@node", "CHECKPOINT_DIR": str(folder / "saved"), "MASTER_PORT": str(port),
            "PYTHON": sys.executable, "BEAT_S": "0.5", "PROGRAM": trainer.program.format(folder=folder),
        }  # fmt: skip
        flags = f"{trainer.flags.format(folder=folder)} --moetion-report {folder / 'events.jsonl'}"
        with self.log.open("wb") as log:
            self._script = subprocess.Popen(
                ["bash", "scripts/slurm/pretrain_gpt_moe.sbatch", *flags.split()],
                cwd=ROOT, env=environment() | settings, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def events(self, name: str) -> list[dict[str, Any]]:
        return [e for e in read(self.folder / "events.jsonl") if e["event"] == name]

    def curve(self) -> dict[int, set[str]]:
        """Every bit of the losses of each iteration, in all its executions."""
        return curve(self.trainer, self.folder)

    def node(self, host: str) -> list[psutil.Process]:
        """What runs there, from the node's script to the ranks."""
        task = psutil.Process(int((self.folder / f"{host}.pid").read_text()))
        return [task, *task.children(recursive=True)]

    def signal_ranks(self, number: int) -> None:
        for note in self.memory.glob("*/*/*/rank*.pid"):
            os.kill(json.loads(note.read_text())["pid"], number)

    def kill_a_rank(self, host: str) -> None:
        (pid_file,) = (self.memory / host).glob("*/*/rank*.pid")
        psutil.Process(json.loads(pid_file.read_text())["pid"]).kill()

    def lose(self, host: str) -> None:
        """The agent and its ranks die at once, and what the node remembered is gone."""
        for process in self.node(host):
            process.kill()
        shutil.rmtree(self.memory / host)

    def await_it(self, what: str, happened: Callable[[], bool], limit_s: float = 90) -> None:
        deadline = time.monotonic() + limit_s
        while not happened():
            assert time.monotonic() < deadline, f"not {what} within {limit_s} s:\n{self.log.read_text()[-9000:]}"
            assert self._script.poll() is None, f"over and not {what}:\n{self.log.read_text()[-9000:]}"
            time.sleep(0.02)

    def wait(self, limit_s: float = 90) -> int:
        return self._script.wait(limit_s)

    def end(self) -> None:
        """End what a failed test has left."""
        left = [process for host in HOSTS if (self.folder / f"{host}.pid").exists() for process in self._alive(host)]
        for process in [*left, *([psutil.Process(self._script.pid)] if self._script.poll() is None else [])]:
            process.kill()
        self._script.wait()

    def _alive(self, host: str) -> list[psutil.Process]:
        try:
            return self.node(host)
        except psutil.NoSuchProcess:
            return []


def environment() -> dict[str, str]:
    ours = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    return os.environ | ours


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def curve(trainer: Trainer, folder: Path) -> dict[int, set[str]]:
    found: dict[int, set[str]] = {}
    for step in read(folder / "losses.jsonl"):
        if trainer.field in step:
            found.setdefault(step["iteration"], set()).add(step[trainer.field])
    return found


def undisturbed(trainer: Trainer, folder: Path) -> dict[int, set[str]]:
    """The losses of the same training under one agent, without checkpoints."""
    launcher = "-m torch.distributed.run --standalone --nproc-per-node=2"
    line = f"{launcher} {trainer.program} {trainer.flags}".format(folder=folder)
    command = [sys.executable, *line.split()]
    subprocess.run(command, cwd=ROOT, env=environment(), check=True, stdout=subprocess.DEVNULL, timeout=120)
    return curve(trainer, folder)


@pytest.fixture
def memory() -> Iterator[Path]:
    folder = Path("/dev/shm") / f"moetion-nodes-{os.getpid()}"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_a_spare_changes_nothing_until_it_takes_a_lost_nodes_place(tmp_path: Path, memory: Path) -> None:
    """After a process died the same nodes go on; after a node died the spare does; every loss is as without a fault."""
    expected = undisturbed(BUNDLED, tmp_path)
    job = Job(BUNDLED, tmp_path / "job", memory)
    try:
        job.await_it("training", lambda: len(job.curve()) >= 4)
        job.kill_a_rank(SECOND)
        job.await_it("recovered", lambda: len(job.events("recovered")) == 1)
        again = job.events("recovered")[0]["iteration"]
        job.await_it("going on", lambda: max(job.curve()) >= again + 6)
        job.lose(SECOND)
        assert job.wait() == 0, job.log.read_text()[-9000:]
    finally:
        job.end()
    of_a_process, of_a_node = job.events("recovered")
    assert of_a_process["fetched_units"] == 0, "the spare must not have taken a living node's place"
    assert of_a_node["fetched_units"] > 0
    assert of_a_node["iteration"] > of_a_process["iteration"]
    assert job.curve() == expected
    assert f"{SPARE}: taking the place of {SECOND}" in job.log.read_text()
    assert not list(memory.glob("*/4711")), "memory of a finished run is removed"


@pytest.mark.timeout(600)
def test_warm_spares_take_the_places_of_two_nodes_that_are_lost_one_after_the_other(
    tmp_path: Path, memory: Path
) -> None:
    """The second one is the first spare, as soon as its ranks have recovered; every loss is as without a fault."""
    expected = undisturbed(BUNDLED, tmp_path)
    job = Job(BUNDLED, tmp_path / "job", memory, spares=2, warm=5)
    try:
        job.await_it("training", lambda: len(job.curve()) >= 4)
        job.signal_ranks(signal.SIGSTOP)  # the job is a short one, and spares begin to import when it has begun
        job.await_it("ready", lambda: job.log.read_text().count("stands by for a lost machine of 2") == 2)
        job.signal_ranks(signal.SIGCONT)
        job.lose(SECOND)
        job.await_it("recovered", lambda: len(job.events("recovered")) == 1)
        job.await_it("said", lambda: f": taking the place of {SECOND}" in job.log.read_text())
        taker = SPARE if f"{SPARE}: taking the place of {SECOND}" in job.log.read_text() else OTHER_SPARE
        job.lose(taker)
        assert job.wait(180) == 0, job.log.read_text()[-9000:]
    finally:
        job.end()
    recovered = job.events("recovered")
    assert len(recovered) == 2
    assert all(event["fetched_units"] > 0 for event in recovered)
    assert job.curve() == expected
    log = job.log.read_text()
    assert log.count("the ranks start again from warm parents") == 2
    assert f"{OTHER_SPARE if taker == SPARE else SPARE}: taking the place of {taker}" in log
    assert not list(memory.glob("*/4711")), "memory of a finished run is removed"


@pytest.mark.proves("Megatron's own pretrain() under megatron_lm", "recovery")
@pytest.mark.skipif(
    importlib.util.find_spec("megatron.training") is None, reason="this Megatron comes without its training loop"
)
def test_a_spare_takes_a_lost_nodes_place_in_megatrons_own_training(tmp_path: Path, memory: Path) -> None:
    """Two agents and a spare, each with a rank of Megatron's own ``pretrain()`` under the launcher."""
    expected = undisturbed(OFFICIAL, tmp_path)
    job = Job(OFFICIAL, tmp_path / "job", memory)
    try:
        job.await_it("training", lambda: len(job.curve()) >= 6)
        job.lose(SECOND)
        assert job.wait() == 0, job.log.read_text()[-9000:]
    finally:
        job.end()
    (recovered,) = job.events("recovered")
    assert recovered["fetched_units"] > 0
    assert 4 <= recovered["iteration"] < ITERATIONS
    assert set(expected) == set(range(1, ITERATIONS + 1))
    assert job.curve() == expected
    assert f"{SPARE}: taking the place of {SECOND}" in job.log.read_text()
