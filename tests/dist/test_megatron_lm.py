# SPDX-License-Identifier: Apache-2.0
"""Megatron's own ``pretrain()`` loses a node and goes on, bit for bit: PP 2 x EP 2 under torchrun, its data loaders.

What the other node's memory held when the node was lost is exported, too, and an unmodified ``pretrain()`` loads it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from official_flags import MODEL, STAGES
from test_export import content_of, differing, export

from megatron_moetion.persist.tracker import checkpoint_folder, latest_iteration

pytestmark = [
    pytest.mark.dist,
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(
        importlib.util.find_spec("megatron.training") is None, reason="this Megatron comes without its training loop"
    ),
]
HERE = Path(__file__).parent
ITERATIONS, SKIPPED = 16, 6
FLAGS = (
    f"{MODEL} {STAGES} --bf16 --global-batch-size 8 --train-iters {ITERATIONS} --eval-interval 3 --eval-iters 1 "
    f"--iterations-to-skip {SKIPPED}"
)


class Job:
    """One run of the script under ``torchrun``."""

    def __init__(self, folder: Path, *flags: str, ranks: int = 4, aside: bool = False) -> None:
        folder.mkdir()
        self.losses, self.log = folder / "losses.jsonl", folder / "log.txt"
        environment = {
            "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore",
            "PYTHONPATH": str(HERE.parents[1]),
        }  # fmt: skip
        if aside:
            environment["LOADERS_DRAW_ASIDE"] = "1"
        launcher = f"-m torch.distributed.run --standalone --nproc-per-node {ranks} --max-restarts 1"
        script = [str(HERE / "megatron_lm_on_cpu.py"), str(self.losses), str(HERE / "megatron_lm_gpt.py")]
        with self.log.open("wb") as log:
            self._agent = subprocess.Popen(
                [sys.executable, *launcher.split(), *script, *FLAGS.split(), *flags],
                env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def curve(self) -> dict[int, set[str]]:
        """Every bit of the losses of each iteration, by all ranks and attempts that were through it."""
        found: dict[int, set[str]] = {}
        for step in read(self.losses):
            found.setdefault(step["iteration"], set()).add(step["loss"])
        return found

    def await_iteration(self, iteration: int) -> None:
        while max(self.curve(), default=0) < iteration:
            assert self._agent.poll() is None, self.said()
            time.sleep(0.01)

    def finish(self) -> None:
        assert self._agent.wait(100) == 0, self.said()

    def run(self) -> dict[int, set[str]]:
        """To its end; the curve."""
        try:
            self.finish()
        finally:
            self.end()
        return self.curve()

    def said(self) -> str:
        return self.log.read_text()[-9000:]

    def end(self) -> None:
        """End what a failed test has left."""
        if self._agent.poll() is None:
            for process in [*psutil.Process(self._agent.pid).children(recursive=True), self._agent]:
                process.kill()
            self._agent.wait()


def read(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


@pytest.fixture
def store() -> Iterator[Path]:
    folder = Path("/dev/shm") / f"moetion-megatron-lm-{os.getpid()}"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, set[str]]:
    """The losses of the same training without checkpoints and without a fault."""
    job = Job(tmp_path_factory.mktemp("reference") / "job")
    curve = job.run()
    assert set(curve) == set(range(1, ITERATIONS + 1)) - {SKIPPED}
    assert "moetion" not in job.log.read_text()
    return curve


@pytest.mark.proves("Megatron's own pretrain() under megatron_lm", "recovery")
def test_a_lost_node_changes_no_bit_of_megatrons_own_training(
    undisturbed: dict[int, set[str]], tmp_path: Path, store: Path
) -> None:
    """With dropout, evaluations and a skipped iteration; a node's two ranks die at once and its memory is gone.

    ``test_megatron_lm_flags.py`` and ``test_lost_node.py`` have mode ``full``.
    """
    report = tmp_path / "events.jsonl"
    moetion = "--moetion --moetion-mode exact --moetion-ranks-per-node 2 --moetion-run-id job"
    job = Job(tmp_path / "job", *moetion.split(), "--moetion-store", str(store), "--moetion-report", str(report))
    try:
        job.await_iteration(7)
        for pid_file in (store / "job" / "node1").glob("rank*.pid"):
            psutil.Process(json.loads(pid_file.read_text())["pid"]).kill()
        shutil.rmtree(store / "job" / "node1")
        shutil.copytree(store / "job" / "node0", tmp_path / "rescued" / "node0")
        job.finish()
    finally:
        job.end()
    (recovered,) = [event for event in read(report) if event["event"] == "recovered"]
    assert 3 <= recovered["iteration"] < ITERATIONS
    assert recovered["fetched_units"] > 0, "node 1 has nothing of its own"
    assert job.curve() == undisturbed
    assert "summary is missing" not in job.log.read_text(), "noise of ranks that end after a fault"
    checkpoints = exported(tmp_path)
    goes_on_bitwise(checkpoints, tmp_path, undisturbed)
    goes_on_in_another_layout(checkpoints, tmp_path)


@pytest.mark.proves("Megatron's own pretrain() under megatron_lm, ranks forked again by warm parents", "recovery")
def test_a_rank_that_a_warm_parent_forks_again_changes_no_bit(
    undisturbed: dict[int, set[str]], tmp_path: Path, store: Path
) -> None:
    """``torchrun`` has its restart left in the end."""
    report = tmp_path / "events.jsonl"
    moetion = "--moetion --moetion-mode full --moetion-ranks-per-node 2 --moetion-run-id job --moetion-warm-restarts 2"
    job = Job(tmp_path / "job", *moetion.split(), "--moetion-store", str(store), "--moetion-report", str(report))
    try:
        for iteration, rank in ((5, 3), (9, 0)):
            job.await_iteration(iteration)
            (pid_file,) = store.glob(f"job/node?/rank{rank:05d}.pid")
            psutil.Process(json.loads(pid_file.read_text())["pid"]).kill()
        job.finish()
    finally:
        job.end()
    assert [event["epoch"] for event in read(report) if event["event"] == "recovered"] == [1, 2]
    assert job.curve() == undisturbed
    assert job.log.read_text().count("the ranks start again from warm parents") == 2
    assert "local_rank: " not in job.log.read_text(), "torchrun saw no process end"


def exported(folder: Path) -> Path:
    """A checkpoint of what was copied."""
    code, found, said = export(folder / "exported", folder / "rescued", run_id="job")
    assert code == 0, said
    assert found["left_out"] == []
    return folder / "exported"


def goes_on_bitwise(checkpoints: Path, folder: Path, undisturbed: dict[int, set[str]]) -> None:
    """Megatron's own ``--load``, without MoEtion."""
    iteration = latest_iteration(str(checkpoints))
    assert iteration is not None
    resumed = Job(folder / "resumed", "--load", str(checkpoints), aside=True)
    assert resumed.run() == {i: losses for i, losses in undisturbed.items() if i > iteration}
    assert "moetion" not in resumed.log.read_text().replace(str(HERE.parents[1]), "")


def goes_on_in_another_layout(checkpoints: Path, folder: Path) -> None:
    """One stage and two ranks: what Megatron has loaded is what it saves at once."""
    iteration = latest_iteration(str(checkpoints))
    assert iteration is not None
    again = folder / "again"
    flags = f"--pipeline-model-parallel-size 1 --load {checkpoints} --save {again} --save-interval 1000"
    flags += f" --dist-ckpt-optim-fully-reshardable --train-iters {iteration} --use-checkpoint-opt_param-scheduler"
    Job(folder / "other", *flags.split(), ranks=2).run()
    contents = [content_of(checkpoint_folder(str(root), iteration)) for root in (checkpoints, again)]
    assert differing(*({k: v for k, v in c.items() if isinstance(v, torch.Tensor)} for c in contents)) == []
    samples = [{k: v for k, v in vars(c["args"]).items() if k.endswith("_samples")} for c in contents]
    assert samples[0] == samples[1]
    assert samples[0]["consumed_train_samples"] > 0
