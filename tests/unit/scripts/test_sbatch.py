# SPDX-License-Identifier: Apache-2.0
"""The batch script under a fake SLURM: stand-ins for srun and scontrol on PATH, and a made-up environment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "scripts" / "slurm" / "pretrain_gpt_moe.sbatch"

FAKE_SRUN = """#!{python}
import json, os, subprocess, sys
args = sys.argv[1:]
with open(os.environ["FAKE_CALLS"], "a") as calls:
    calls.write(json.dumps(args) + "\\n")
if "rm" in args:
    sys.exit(0)
tasks = [
    subprocess.Popen(args[args.index("bash"):], env=os.environ | {{"SLURMD_NODENAME": host}})
    for host in os.environ["FAKE_HOSTS"].split()
]
sys.exit(max(task.wait() for task in tasks))
"""
FAKE_SCONTROL = """#!{python}
import os
print("\\n".join(os.environ["FAKE_HOSTS"].split()))
"""
FAKE_TORCHRUN = """#!{python}
import json, os, time
codes = json.loads(os.environ["FAKE_CODES"])
time.sleep(float(os.environ["FAKE_SECONDS"]))
raise SystemExit(codes.get(os.environ["SLURMD_NODENAME"], 0))
"""


class Slurm:
    """One job: its environment, and what the script asked of SLURM."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder = folder
        self.calls_path = folder / "calls.jsonl"
        for name, text in (("srun", FAKE_SRUN), ("scontrol", FAKE_SCONTROL), ("torchrun", FAKE_TORCHRUN)):
            path = folder / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text.format(python=sys.executable))
            path.chmod(0o755)
        self.environment = {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_JOB_NODELIST": f"n[0-{nodes - 1}]",
            "SLURM_GPUS_ON_NODE": "8",
            "STORE": "/memory/store",
            "CHECKPOINT_DIR": str(folder / "checkpoints"),
            "PYTHON": str(folder / "bin" / "torchrun"),
            "FAKE_HOSTS": " ".join(f"n{i}" for i in range(nodes)),
            "FAKE_CALLS": str(self.calls_path),
            "FAKE_CODES": "{}",
            "FAKE_SECONDS": "0",
        }

    def start(self, *arguments: str, **settings: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(SCRIPT), *arguments], cwd=ROOT, env=self.environment | settings, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, *arguments: str, **settings: str) -> tuple[int, str]:
        process = self.start(*arguments, **settings)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    @property
    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in self.calls_path.read_text().splitlines()]

    @property
    def step(self) -> list[str]:
        """The one step that trains."""
        (step,) = [call for call in self.calls if "rm" not in call]
        return step

    @property
    def cleaned(self) -> list[str]:
        """Nodes whose memory of this run was removed, in the order of the calls."""
        removals = [call for call in self.calls if "rm" in call]
        assert all(call[-4:] == ["rm", "-rf", "--", "/memory/store/4711"] for call in removals)
        return [argument.split("=")[1] for call in removals for argument in call if argument.startswith("--nodelist=")]


def value(step: list[str], flag: str) -> str:
    """Value of ``--flag value`` or ``--flag=value``."""
    for argument, following in zip(step, [*step[1:], ""], strict=True):
        if argument == flag:
            return following
        if argument.startswith(flag + "="):
            return argument.split("=", 1)[1]
    raise AssertionError(f"{flag} is not in {step}")


def test_one_node(tmp_path):
    slurm = Slurm(tmp_path, nodes=1)
    code, output = slurm.run("--num-layers", "4", "--data-path", "a path")
    assert code == 0, output
    step = slurm.step
    assert "--no-kill" in step
    assert value(step, "--nnodes") == "1"
    assert value(step, "--nproc-per-node") == "8"
    assert value(step, "--rdzv-endpoint") == "n0:24711"
    assert value(step, "--moetion-run-id") == "4711"
    assert value(step, "--moetion-store") == "/memory/store"
    assert value(step, "--moetion-mode") == "popularity"
    assert value(step, "--data-path") == "a path"
    assert value(step, "--save") == str(tmp_path / "checkpoints")
    assert "--load" not in step
    assert slurm.cleaned == ["n0"]
    assert slurm.calls[0] == step, "memory is kept until training is over"


def test_four_nodes(tmp_path):
    slurm = Slurm(tmp_path, nodes=4)
    code, output = slurm.run()
    assert code == 0, output
    assert value(slurm.step, "--nodes") == value(slurm.step, "--ntasks") == value(slurm.step, "--nnodes") == "4"
    assert sorted(slurm.cleaned) == ["n0", "n1", "n2", "n3"]


def test_spares_start_agents_but_do_not_change_the_world_size(tmp_path):
    slurm = Slurm(tmp_path, nodes=5)
    code, output = slurm.run(SPARES="1", FAKE_CODES='{"n3": 1}')
    assert code == 0, f"a spare that was not needed may end with an error: {output}"
    assert value(slurm.step, "--nodes") == "5"
    assert value(slurm.step, "--nnodes") == "4"
    assert "4 nodes x 8 ranks, 1 spares" in output


def test_a_failed_training_fails_the_job_and_cleans(tmp_path):
    slurm = Slurm(tmp_path, nodes=2)
    code, output = slurm.run(FAKE_CODES='{"n0": 3, "n1": 3}')
    assert code == 3
    assert "0 of 2 agents finished" in output
    assert sorted(slurm.cleaned) == ["n0", "n1"]


def test_a_requeued_job_starts_from_its_persistent_checkpoint(tmp_path):
    slurm = Slurm(tmp_path, nodes=2)
    code, output = slurm.run(SLURM_RESTART_COUNT="2", LOAD="/elsewhere")
    assert code == 0, output
    assert value(slurm.step, "--load") == str(tmp_path / "checkpoints")
    assert value(slurm.step, "--rdzv-id") == "4711-2"
    assert value(slurm.step, "--moetion-run-id") == "4711"
    trained_at = slurm.calls.index(slurm.step)
    assert trained_at == 2, "memory of the lost job is removed before training"
    assert sorted(slurm.cleaned) == ["n0", "n0", "n1", "n1"]


def test_settings_can_be_overridden(tmp_path):
    slurm = Slurm(tmp_path, nodes=1)
    code, output = slurm.run(
        "--seed", "7", MODE="full", RANKS_PER_NODE="2", MAX_RESTARTS="5", MASTER_PORT="1234", SAVE_INTERVAL="50",
        LOAD="/earlier", MODEL_ARGS="--num-layers 2 --bf16",
    )  # fmt: skip
    assert code == 0, output
    step = slurm.step
    assert [value(step, flag) for flag in ("--moetion-mode", "--nproc-per-node", "--max-restarts")] == [
        "full",
        "2",
        "5",
    ]
    assert [value(step, flag) for flag in ("--save-interval", "--load")] == ["50", "/earlier"]
    assert value(step, "--rdzv-endpoint") == "n0:1234"
    entry = step.index("pretrain_gpt_moe.py")
    assert step[entry + 1 : entry + 6] == ["--num-layers", "2", "--bf16", "--seed", "7"]


@pytest.mark.parametrize("spares", ["2", "-1"])
def test_impossible_spares_are_refused(tmp_path, spares):
    slurm = Slurm(tmp_path, nodes=2)
    code, output = slurm.run(SPARES=spares)
    assert code == 2
    assert f"SPARES={spares} leaves" in output
    assert not slurm.calls_path.exists()


def test_a_cancelled_job_ends_its_step_and_cleans(tmp_path):
    slurm = Slurm(tmp_path, nodes=2)
    process = slurm.start(FAKE_SECONDS="2")
    deadline = time.monotonic() + 30
    while not slurm.calls_path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert sorted(slurm.cleaned) == ["n0", "n1"]
