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
import json, os, signal, subprocess, sys
args = sys.argv[1:]
with open(os.environ["FAKE_CALLS"], "a") as calls:
    calls.write(json.dumps(args) + "\\n")
if "rm" in args:
    sys.exit(0)
tasks = [
    subprocess.Popen(
        args[args.index("bash"):],
        env=os.environ | {{"SLURMD_NODENAME": host, "SLURM_PROCID": str(task)}},
        start_new_session=True,
    )
    for task, host in enumerate(os.environ["FAKE_HOSTS"].split())
]
signal.signal(signal.SIGTERM, lambda *_: [os.killpg(task.pid, signal.SIGTERM) for task in tasks if task.poll() is None])
sys.exit(max(task.wait() for task in tasks))
"""
FAKE_SCONTROL = """#!{python}
import json, os, sys
if sys.argv[1] == "requeue":
    with open(os.environ["FAKE_CALLS"], "a") as calls:
        calls.write(json.dumps(sys.argv) + "\\n")
    sys.exit(int(os.environ["FAKE_REQUEUE_CODE"]))
print("\\n".join(os.environ["FAKE_HOSTS"].split()))
"""
FAKE_TORCHRUN = """#!{python}
import json, os, signal, time
end = json.loads(os.environ["FAKE_ENDS"]).get(os.environ["SLURMD_NODENAME"], 0)
if end == "node lost":
    os.kill(os.getppid(), signal.SIGKILL)
if end in ("node lost", "agent killed"):
    os.kill(os.getpid(), signal.SIGKILL)
deadline = time.monotonic() + 30
while not os.path.exists(os.environ["FAKE_UNTIL"]) and time.monotonic() < deadline:
    time.sleep(0.01)
raise SystemExit(end)
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
            "FAKE_REQUEUE_CODE": "0",
            "FAKE_ENDS": "{}",
            "FAKE_UNTIL": str(folder),
            "BEAT_S": "0.02",
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
        (step,) = [call for call in self.calls if "rm" not in call and "requeue" not in call]
        return step

    @property
    def requeued(self) -> bool:
        """Whether the script has queued its job again."""
        return ["requeue", "4711"] in [call[1:] for call in self.calls]

    @property
    def agents(self) -> Path:
        """Where the nodes' scripts leave signs of life."""
        return self.folder / "checkpoints" / "agents" / "4711-0"

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
    assert value(step, "--moetion-mode") == "auto"
    assert value(step, "--data-path") == "a path"
    assert value(step, "--save") == str(tmp_path / "checkpoints")
    assert slurm.cleaned == ["n0"]
    assert slurm.calls[0] == step, "memory is kept until training is over"


def test_gpus_that_slurm_gave_are_demanded(tmp_path):
    """A node whose driver is broken would train on its CPU, for as long as nobody looks."""
    slurm = Slurm(tmp_path, nodes=1)
    slurm.run("--num-layers", "4")
    assert value(slurm.step, "--device") == "gpu"
    slurm.run("--device", "cpu")
    words = json.loads(slurm.calls_path.read_text().splitlines()[-2])
    assert [words[i + 1] for i, word in enumerate(words) if word == "--device"] == ["gpu", "cpu"], "the last one wins"
    del slurm.environment["SLURM_GPUS_ON_NODE"]
    slurm.calls_path.unlink()
    slurm.run()
    assert "--device" not in slurm.step


def test_four_nodes(tmp_path):
    slurm = Slurm(tmp_path, nodes=4)
    code, output = slurm.run()
    assert code == 0, output
    assert value(slurm.step, "--nodes") == value(slurm.step, "--ntasks") == value(slurm.step, "--nnodes") == "4"
    assert sorted(slurm.cleaned) == ["n0", "n1", "n2", "n3"]


def test_the_agents_can_take_a_node_in_that_joins_later(tmp_path):
    """Without the variable a replacement waits for an address that is published only once."""
    slurm = Slurm(tmp_path, nodes=2)
    slurm.run()
    command = slurm.step[slurm.step.index("env") :]
    assert command.index("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1") < command.index("torch.distributed.run")
    (endpoint,) = (word for word in command if word.startswith("--rdzv-endpoint="))
    assert f"MOETION_RENDEZVOUS={endpoint.removeprefix('--rdzv-endpoint=')}" in command


def test_warm_restarts_are_asked_for_once_and_by_name(tmp_path):
    """Without the setting a flag among the arguments counts."""
    slurm = Slurm(tmp_path, nodes=1)
    assert slurm.run("--moetion-warm-restarts", "3")[0] == 0
    assert value(slurm.step, "--moetion-warm-restarts") == "3"
    assert slurm.step.count("--moetion-warm-restarts") == 1
    other = Slurm(tmp_path, nodes=1)
    other.calls_path.unlink()
    assert other.run(WARM_RESTARTS="7")[0] == 0
    assert value(other.step, "--moetion-warm-restarts") == "7"


def test_a_spare_that_is_not_needed_starts_no_agent(tmp_path):
    slurm = Slurm(tmp_path, nodes=5)
    code, output = slurm.run(SPARES="1")
    assert code == 0, output
    assert value(slurm.step, "--nodes") == "5"
    assert value(slurm.step, "--nnodes") == "4"
    assert "4 nodes x 8 ranks, 1 spares" in output
    assert "n4: standing by" in output
    assert "n4: not needed" in output
    assert not (slurm.agents / "beat-n4").exists()


@pytest.mark.parametrize("end", ["node lost", "agent killed"])
def test_one_spare_takes_a_lost_nodes_place(tmp_path, end):
    slurm = Slurm(tmp_path, nodes=4)
    started = slurm.agents / "taken-n1"
    code, output = slurm.run(SPARES="2", FAKE_ENDS=json.dumps({"n1": end}), FAKE_UNTIL=str(started))
    assert code == 0, output
    assert output.count("taking the place of n1") == 1
    assert output.count("not needed") == 1
    assert not slurm.requeued
    assert sorted(slurm.cleaned) == ["n0", "n1", "n2", "n3"]


def test_a_node_whose_place_was_taken_ends_its_agent(tmp_path):
    node = subprocess.Popen(
        ["bash", str(SCRIPT.parent / "node.sh"), str(tmp_path), "1", "0", "1", "1", "sleep", "60"],
        env=os.environ | {"SLURM_PROCID": "0", "SLURMD_NODENAME": "n0", "BEAT_S": "0.02"},
    )
    await_file(tmp_path / "beat-n0")
    (tmp_path / "taken-n0").mkdir()
    assert node.wait(30) == 128 + signal.SIGTERM
    assert not (tmp_path / "code-n0").exists(), "what counts is the spare's"


FAKE_STANDBY = """#!/usr/bin/env bash
if [[ -n ${MOETION_STANDBY:-} ]]; then
  case $FAKE_END in
    alarmed) exec "$FAKE_PYTHON" -ISc "$FAKE_ALARMED" "$MOETION_STANDBY" ;;
    dies) exit 7 ;;
    deaf) exec sleep 60 ;;
    *) printf n0 >"$MOETION_STANDBY"; sleep 0.2; exit "$FAKE_END" ;;
  esac
fi
echo "agent: $*"
"""
FAKE_ALARMED = """
import pathlib, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: None)
signal.pause()
pathlib.Path(sys.argv[1]).write_text("n0")
"""
"""A shell that was started with a signal ignored cannot hear it."""


@pytest.mark.parametrize(
    ("end", "said", "agent"),
    [
        ("0", "taking the place of n0", False),
        ("3", "taking the place of n0", True),
        ("alarmed", "taking the place of n0", False),
        ("dies", "the process that stands by has ended with exit code 7", True),
        ("deaf", "taking the place of n0", True),
    ],
)
def test_warm_ranks_of_a_spare_come_first_and_its_agent_where_they_fail(
    tmp_path: Path, end: str, said: str, agent: bool
) -> None:
    """They take the place of a lost node before or after this script has noticed, and leave it to the agent, or not."""
    program = tmp_path / "program"
    program.write_text(FAKE_STANDBY)
    program.chmod(0o755)
    if not end.isdigit():
        (tmp_path / "beat-n0").touch()  # and never again
    if end == "deaf":
        (tmp_path / "beat-n9").touch()  # there is no spare for this one
    fake = {"FAKE_PYTHON": sys.executable, "FAKE_ALARMED": FAKE_ALARMED, "FAKE_END": end}
    fake["BEAT_S"] = "0.1" if end == "alarmed" else "0.02"  # it has to hear of it
    arguments = [str(tmp_path), "1", "5", "1", "2", str(program), "-m", "launcher", "train.py", "--flag"]
    done = subprocess.run(
        ["bash", str(SCRIPT.parent / "node.sh"), *arguments],
        env=os.environ | fake | {"SLURM_PROCID": "1", "SLURMD_NODENAME": "n1"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert said in done.stdout
    assert ("agent: -m launcher train.py --flag" in done.stdout) == agent
    assert (tmp_path / "taken-n0").is_dir()
    assert (tmp_path / "code-n1").read_text() == "0\n"
    assert (tmp_path / "finished").exists() == (not agent)


def test_an_agent_does_not_wait_for_a_lost_nodes_at_the_end(tmp_path: Path) -> None:
    node = subprocess.Popen(
        ["bash", str(SCRIPT.parent / "node.sh"), str(tmp_path), "1", "5", "1", "1", "sleep", "60"],
        env=os.environ | {"SLURM_PROCID": "0", "SLURMD_NODENAME": "n0", "BEAT_S": "0.02"},
    )
    await_file(tmp_path / "beat-n0")
    (tmp_path / "finished").touch()
    assert node.wait(30) == 0
    assert (tmp_path / "code-n0").read_text() == "0\n"


def test_memory_is_kept_when_training_gave_up(tmp_path):
    """Whoever requeues the job, with the fault mended, goes on from it."""
    slurm = Slurm(tmp_path, nodes=2)
    code, output = slurm.run(FAKE_ENDS='{"n0": 3, "n1": 3}')
    assert code == 3
    assert "0 of 2 agents finished" in output
    assert "memory of the run is kept. To go on from it: scontrol requeue 4711" in output
    assert "on each of n0 n1: rm -rf /memory/store/4711" in output
    assert not slurm.cleaned
    assert not slurm.requeued


@pytest.mark.parametrize("end", ["node lost", "agent killed"])
def test_a_job_that_lost_a_node_for_good_is_queued_again_with_its_memory(tmp_path, end):
    slurm = Slurm(tmp_path, nodes=2)
    lost = json.dumps({"n0": 1, "n1": end})
    code, output = slurm.run(FAKE_ENDS=lost)
    assert code == 1
    assert "1 agents were lost: queueing job 4711 again" in output
    assert slurm.requeued
    assert not slurm.cleaned


@pytest.mark.parametrize(
    "settings", [{"SLURM_RESTART_COUNT": "10"}, {"FAKE_REQUEUE_CODE": "1"}], ids=["too often", "refused by SLURM"]
)
def test_a_job_that_cannot_be_queued_again_says_how_to_go_on(tmp_path, settings):
    slurm = Slurm(tmp_path, nodes=2)
    code, output = slurm.run(FAKE_ENDS='{"n0": 1, "n1": "node lost"}', **settings)
    assert code != 0
    assert "To go on from it: scontrol requeue 4711" in output
    assert not slurm.cleaned


def test_a_requeued_job_begins_with_what_its_nodes_remember(tmp_path):
    slurm = Slurm(tmp_path, nodes=2)
    code, output = slurm.run(SLURM_RESTART_COUNT="2")
    assert code == 0, output
    assert value(slurm.step, "--rdzv-id") == "4711-2"
    assert value(slurm.step, "--moetion-run-id") == "4711"
    assert slurm.calls[0] == slurm.step, "memory is kept until training is over"
    assert sorted(slurm.cleaned) == ["n0", "n1"]


def test_every_start_falls_back_to_the_jobs_own_checkpoints(tmp_path):
    slurm = Slurm(tmp_path, nodes=1)
    slurm.run()
    assert value(slurm.step, "--load") == value(slurm.step, "--save") == str(tmp_path / "checkpoints")


def test_a_checkpoint_to_begin_with_is_the_first_of_the_jobs_own(tmp_path):
    earlier, own = tmp_path / "earlier", tmp_path / "checkpoints"
    (earlier / "iter_0000250").mkdir(parents=True)
    (earlier / "iter_0000250" / "common.pt").write_bytes(b"state")
    (earlier / "latest_checkpointed_iteration.txt").write_text("250")
    code, output = Slurm(tmp_path, nodes=1).run(LOAD=str(earlier))
    assert code == 0, output
    assert (own / "latest_checkpointed_iteration.txt").read_text() == "250"
    assert (own / "iter_0000250" / "common.pt").read_bytes() == b"state"
    (own / "latest_checkpointed_iteration.txt").write_text("300")
    (earlier / "latest_checkpointed_iteration.txt").unlink()
    assert Slurm(tmp_path, nodes=1).run(LOAD=str(earlier), SLURM_RESTART_COUNT="1")[0] == 0
    assert (own / "latest_checkpointed_iteration.txt").read_text() == "300", "newer than where the run began"


def test_a_folder_without_checkpoints_to_begin_with_is_refused(tmp_path):
    code, output = Slurm(tmp_path, nodes=1).run(LOAD=str(tmp_path))
    assert code == 2
    assert f"LOAD={tmp_path} has no latest_checkpointed_iteration.txt" in output
    assert not (tmp_path / "calls.jsonl").exists()


def test_settings_can_be_overridden(tmp_path):
    slurm = Slurm(tmp_path, nodes=1)
    code, output = slurm.run(
        "--seed", "7", MODE="full", RANKS_PER_NODE="2", MAX_RESTARTS="5", MASTER_PORT="1234", SAVE_INTERVAL="50",
        MODEL_ARGS="--num-layers 2 --bf16",
    )  # fmt: skip
    assert code == 0, output
    step = slurm.step
    assert [value(step, flag) for flag in ("--moetion-mode", "--nproc-per-node", "--max-restarts")] == [
        "full",
        "2",
        "5",
    ]
    assert value(step, "--save-interval") == "50"
    assert value(step, "--rdzv-endpoint") == "n0:1234"
    entry = step.index("pretrain_gpt_moe.py")
    assert step[entry + 1 : entry + 8] == ["--device", "gpu", "--num-layers", "2", "--bf16", "--seed", "7"]


def test_another_program_gets_the_same_flags_and_none_of_the_bundled_trainer(tmp_path):
    slurm = Slurm(tmp_path, nodes=2)
    code, output = slurm.run("--bf16", PROGRAM="-m megatron_moetion.megatron_lm /opt/megatron-lm/pretrain_gpt.py")
    assert code == 0, output
    entry = slurm.step.index("/opt/megatron-lm/pretrain_gpt.py")
    assert slurm.step[entry - 2 : entry + 3] == [
        "-m", "megatron_moetion.megatron_lm", "/opt/megatron-lm/pretrain_gpt.py", "--bf16", "--save",
    ]  # fmt: skip
    assert "--moetion" in slurm.step
    assert "--device" not in slurm.step


@pytest.mark.parametrize("spares", ["2", "-1"])
def test_impossible_spares_are_refused(tmp_path, spares):
    slurm = Slurm(tmp_path, nodes=2)
    code, output = slurm.run(SPARES=spares)
    assert code == 2
    assert f"SPARES={spares} leaves" in output
    assert not slurm.calls_path.exists()


@pytest.mark.parametrize(("keep", "cleaned"), [("0", ["n0", "n1"]), ("1", [])])
def test_a_job_whose_nodes_are_taken_away_ends_its_step_and_leaves_no_memory(tmp_path, keep, cleaned):
    slurm = Slurm(tmp_path, nodes=2)
    process = slurm.start(FAKE_UNTIL=str(tmp_path / "never"), KEEP_MEMORY=keep)
    for host in ("n0", "n1"):
        await_file(slurm.agents / f"beat-{host}")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert sorted(slurm.cleaned) == cleaned
    assert not slurm.requeued


def await_file(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.02)
