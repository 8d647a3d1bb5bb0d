# SPDX-License-Identifier: Apache-2.0
"""Which device the ranks of a node take, and what the end of a process says: its error and its exit code."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_moetion.config import MoetionConfig
from megatron_moetion.errors import ConfigError, StoreError
from megatron_moetion.pretrain import launch
from megatron_moetion.pretrain.launch import check_nodes, complain, settings, takes_gpu, visible_gpus
from megatron_moetion.pretrain.process import Process

ROOT = Path(__file__).parents[3]
HOST = socket.gethostname()
FLAGS = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --micro-batch-size 1 --train-iters 1 "
    "--lr 1e-3 --mock-data --eval-iters 0"
)


def process(rank: int = 8, local_rank: int = 0, ranks: int = 8) -> Process:
    """On the second of two nodes."""
    return Process(rank=rank, world_size=2 * ranks, local_rank=local_rank, local_world_size=ranks)


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (None, 4),
        ("0,2", 2),
        ("", 0),
        ("-1", 0),
        ("NoDevFiles", 0),
        ("0,-1,2", 1),
        ("GPU-8a,MIG-1", 2),
        ("0,1,2,3,4", 4),
    ],
)
def test_gpus_are_counted_as_cuda_does(tmp_path: Path, chosen: str | None, expected: int) -> None:
    for device in range(4):
        (tmp_path / str(device)).touch()
    environ = {} if chosen is None else {"CUDA_VISIBLE_DEVICES": chosen}
    absent = tmp_path / "absent"
    assert visible_gpus(environ, tmp_path, absent) == expected
    assert visible_gpus(environ, absent, absent) == 0


def test_a_sandbox_without_the_drivers_folder_has_device_files(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia11", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert visible_gpus({}, tmp_path / "absent", tmp_path) == 2
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "1"}, tmp_path / "absent", tmp_path) == 1


def test_a_node_with_a_gpu_missing_is_refused_with_the_counts() -> None:
    for device in ("auto", "gpu"):
        with pytest.raises(ConfigError, match=r"7 GPUs for the 8 ranks .* --nproc-per-node 7.* --device cpu"):
            takes_gpu(device, 7, process())
        assert takes_gpu(device, 8, process())
        assert takes_gpu(device, 1, process()), "its own, where the launcher shows each rank no other"
    assert not takes_gpu("cpu", 7, process())
    assert not takes_gpu("auto", 0, process())


@pytest.mark.parametrize(("local_rank", "says"), [(0, f"> CPU path on {HOST}: 8 rank(s), no GPU\n"), (3, "")])
def test_the_cpu_path_is_said_once_a_node(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, local_rank: int, says: str
) -> None:
    monkeypatch.setattr(launch, "visible_gpus", lambda environ: 0)
    environ: dict[str, str] = {}
    _, on_gpu = settings(FLAGS.split(), process(local_rank=local_rank), environ)
    assert not on_gpu
    assert environ == {"CUDA_VISIBLE_DEVICES": ""}
    assert capsys.readouterr().out == says


def test_the_cpu_may_be_asked_for(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "visible_gpus", lambda environ: 7)
    environ: dict[str, str] = {}
    assert not settings([*FLAGS.split(), "--device", "cpu"], process(), environ)[1]
    assert "GPUs left alone (--device cpu)" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="7 GPUs for the 8 ranks"):
        settings(FLAGS.split(), process(), environ)


def test_too_few_nodes_for_the_replicas_are_found_among_the_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the words of the placement, and with the real numbers, however many nodes there are."""
    monkeypatch.setattr(launch, "visible_gpus", lambda environ: 0)
    flags = [*FLAGS.split(), "--moetion", "--moetion-replicas", "2"]
    with pytest.raises(ConfigError, match=r"2 replica\(s\) need 3 nodes and this run has 2 \(16 ranks, 8 a node\)"):
        settings(flags, process(), {"LOCAL_WORLD_SIZE": "8"})
    settings([*flags, "--moetion-ranks-per-node", "4"], process(), {"LOCAL_WORLD_SIZE": "8"})
    check_nodes(MoetionConfig(replicas=2), 24, 8)
    check_nodes(MoetionConfig(replicas=1), 20, 8)  # nodes of different sizes: for the store to say
    with pytest.raises(ConfigError, match=r"need 2 nodes and this run has 1 \(1 ranks, 1 a node\)"):
        check_nodes(MoetionConfig(replicas=1), 1, 1)


@pytest.mark.parametrize(("shared", "local_rank", "speaks"), [(True, 0, True), (True, 3, False), (False, 3, True)])
def test_a_shared_error_is_said_once_a_node_and_any_other_by_the_rank_that_has_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, shared: bool, local_rank: int, speaks: bool
) -> None:
    monkeypatch.setattr(launch, "SPEAKER_LIMIT_S", 0.0)
    error = StoreError("too small")
    error.shared = shared
    complain(error, process(rank=11, local_rank=local_rank), {})
    assert capsys.readouterr().err == (f"error: rank 11 on {HOST}: too small\n" if speaks else "")


def test_a_mistake_that_comes_again_at_a_restart_is_said_in_short(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """With ``torchrun``'s folders. What is new at a restart, as a mount that was lost, is said in full."""

    def attempt(number: int, text: str) -> str:
        file = tmp_path / "none_x" / f"attempt_{number}" / "0" / "error.json"
        file.parent.mkdir(parents=True)
        complain(ConfigError(text), process(rank=0), {"TORCHELASTIC_ERROR_FILE": str(file), "RANK": "0"})
        return capsys.readouterr().err.removeprefix(f"error: rank 0 on {HOST}: ").strip()

    long = "--num-layers 6 is not divisible by --pipeline-model-parallel-size 4, and so on and on"
    assert attempt(0, long) == long
    assert attempt(1, long) == "as before: --num-layers 6 is not divisible by --pipeline-model- [...]"
    assert attempt(2, "--data-path: no such file") == "--data-path: no such file"
    assert attempt(3, long) == long


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """The trainer, of which one local rank is slow to start."""
    script = tmp_path / "slow.py"
    script.write_text(
        "import os, sys, time\n"
        "from megatron_moetion.pretrain.launch import main\n"
        "time.sleep(1.0 * (os.environ['LOCAL_RANK'] == '0'))\n"
        "main(sys.argv[1:])\n"
    )
    return script


def test_a_mistake_is_said_even_where_the_rank_that_says_it_is_slow(program: Path) -> None:
    """``torchrun`` ends all ranks of a node once it sees one end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts"]
    command += ["1", str(program), *FLAGS.split(), "--fp16", "--bf16"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [
        f"error: rank 0 on {HOST}: --fp16 and --bf16 exclude each other; give one",
        f"error: rank 0 on {HOST}: as before: --fp16 and --bf16 exclude each other; give one",
    ]


def test_a_mistake_that_only_another_node_finds_is_said_there(tmp_path: Path) -> None:
    """A folder that is not mounted on the second node; its rank is the 8th of the run and the first of its node."""
    flags = FLAGS.replace("--mock-data", f"--data-path {tmp_path}/absent").split()
    environ = os.environ | {"RANK": "8", "WORLD_SIZE": "16", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "pretrain_gpt_moe.py"), *flags],
        capture_output=True, text=True, timeout=60, env=environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: rank 8 on {HOST}: --data-path: no such file: {tmp_path}/absent.bin")


@pytest.mark.parametrize(("code", "expected"), [(0, -signal.SIGABRT), (2, 2), (3, 3)])
def test_an_error_keeps_its_exit_code_whatever_the_teardown_would_do(code: int, expected: int) -> None:
    """A teardown that aborts, as with threads of a process group that still run. Without an error it takes place."""
    script = (
        "import atexit, os\n"
        "from megatron_moetion.ending import leave\n"
        "atexit.register(os.abort)\n"
        "print('said')\n"
        f"leave({code})\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == expected
    assert "said" in done.stdout or not code


CONNECT = "    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"


@pytest.mark.parametrize("connect", ["", CONNECT], ids=["before-groups", "with-groups"])
@pytest.mark.parametrize(("raised", "code"), [("KeyError('x')", 1), ("KeyboardInterrupt", 130)])
def test_what_nobody_expected_ends_the_process_although_threads_still_work(
    raised: str, code: int, connect: str
) -> None:
    """A thread of a pool, which Python would wait for; peers and the launcher wait for this process.

    torch's process group puts a hook of its own around what prints tracebacks.
    """
    script = (
        "import threading, time\n"
        "from torch import distributed as dist\n"
        "from megatron_moetion.pretrain import launch\n"
        "def run(argv):\n"
        f"{connect}"
        "    threading.Thread(target=time.sleep, args=(600,)).start()\n"
        f"    raise {raised}\n"
        "launch.run = run\n"
        "launch.main([])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=os.environ | {"RANK": "3"}
    )
    assert done.returncode == code
    assert "Traceback" in done.stderr
    assert f"error: rank 3 on {HOST}: {raised[:8]}" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(("left_with", "code", "said"), [("7", 7, ""), ("'no data'", 1, "no data")])
def test_a_script_that_leaves_with_a_code_is_gone_although_threads_still_work(
    left_with: str, code: int, said: str
) -> None:
    script = (
        "import sys, threading, time\n"
        "from megatron_moetion.ending import lead\n"
        "def program():\n"
        "    threading.Thread(target=time.sleep, args=(600,)).start()\n"
        f"    sys.exit({left_with})\n"
        "lead(program)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.strip()) == (code, said)
