# SPDX-License-Identifier: Apache-2.0
"""What ``gpu_check`` makes of its parts: verdicts, limits, the plan, the table and ``summary.json``."""

from __future__ import annotations

import os
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from gpu_check import main as command
from gpu_check.machine import NoGpu, commit_of, machine_here
from gpu_check.part import (
    CheckFailed,
    Finding,
    Late,
    NotRun,
    Outcome,
    Part,
    Setting,
    execute,
    judge,
    need_gpus,
    need_store,
)
from gpu_check_support import fake_torch, figure, machine, parts_of, setting, tool

ROOT = Path(__file__).parents[3]


def part(action: object, **changes: object) -> Part:
    return replace(Part(name="one", about="", limit_s=60, action=action), **changes)  # type: ignore[arg-type]


def raising(error: Exception) -> object:
    def action(setting: Setting) -> Finding:
        raise error

    return action


def test_a_part_ends_in_one_of_five_ways(tmp_path: Path) -> None:
    fine = Finding(text="fine", figures=(figure("speed", 1.0, True), figure("for information", 2.0)))
    slow = Finding(text="slow", figures=(figure("speed", 9.0, False),))
    actions = [
        lambda s: fine, lambda s: slow, raising(CheckFailed("wrong")), raising(Late("stopped")), raising(NotRun("none"))
    ]  # fmt: skip
    verdicts = [judge(part(action), setting(tmp_path), 5.0) for action in actions]
    assert [v.outcome for v in verdicts] == list(Outcome)
    assert [v.finding for v in verdicts] == ["fine", "slow", "wrong", "stopped", "none"]
    assert [v.outcome.is_good for v in verdicts] == [True, False, False, False, True]
    assert verdicts[0].figures == fine.figures


def test_a_bug_of_the_check_ends_one_part_only(tmp_path: Path) -> None:
    verdict = judge(part(raising(KeyError("results"))), setting(tmp_path), 5.0)
    assert (verdict.outcome, verdict.finding) == (Outcome.FAILED, "KeyError: 'results'; see one/traceback.txt")
    assert "raise error" in (tmp_path / "one" / "traceback.txt").read_text()


def test_a_part_learns_its_deadline(tmp_path: Path) -> None:
    left: list[float] = []
    judge(part(lambda s: left.append(s.left_s) or Finding(text="")), setting(tmp_path), 5.0)
    assert 4.0 < left[0] <= 5.0


def test_a_command_that_fails_is_named_with_its_log(tmp_path: Path) -> None:
    log = tmp_path / "step" / "log.txt"
    shout = [sys.executable, "-c", "print('error: too hot'); print('====='); raise SystemExit(3)"]
    with pytest.raises(CheckFailed, match=r"exit code 3, see step/log.txt: error: too hot"):
        execute(shout, log, 30)
    assert "too hot" in execute(shout, log, 30, may_fail=True)
    with pytest.raises(CheckFailed, match=r"exit code 4, .*: no output"):
        execute([sys.executable, "-c", "raise SystemExit(4)"], log, 30)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_late_command_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    """Its child has a session of its own, as the ranks of torchrun have."""
    child = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(60)"
    parent = (
        "import subprocess, sys, time;"
        f"subprocess.Popen([sys.executable, '-c', {child!r}, sys.argv[1]], start_new_session=True); time.sleep(60)"
    )
    note = tmp_path / "pid"

    class AfterTheChild(threading.Thread):
        def run(self) -> None:
            while not note.exists() or not note.read_text():
                time.sleep(0.01)

    waiter = AfterTheChild()
    waiter.start()
    with pytest.raises(Late, match=r"not done in time; see step/log.txt"):
        execute([sys.executable, "-c", parent, str(note)], tmp_path / "step" / "log.txt", 5.0)
    waiter.join(10)
    deadline = time.monotonic() + 10
    while is_running(int(note.read_text())) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(int(note.read_text()))


@pytest.mark.parametrize(
    ("gpus", "needed", "reason"), [(0, 1, "needs a GPU"), (1, 2, "needs 2 GPUs, this machine has 1")]
)
def test_what_needs_more_gpus_is_not_run(tmp_path: Path, gpus: int, needed: int, reason: str) -> None:
    with pytest.raises(NotRun, match=reason):
        need_gpus(setting(tmp_path, gpus=gpus), needed)
    need_gpus(setting(tmp_path, gpus=needed), needed)


def test_a_store_without_room_is_named(tmp_path: Path) -> None:
    need_store(setting(tmp_path), 1)
    with pytest.raises(NotRun, match=r"MiB free and the arenas need .*--shm-size.*--store"):
        need_store(setting(tmp_path), 1 << 60)


# -- the machine ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_gpus_are_those_that_torch_can_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    tool(tmp_path / "nvidia-smi", "echo 580.1")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setitem(sys.modules, "torch", fake_torch(gpus))
    found = machine_here(on_gpu=True)
    assert (found, found.on_gpu) == (machine(gpus), True)
    assert str(found) == f"{gpus} x NVIDIA H200, driver 580.1, torch 2.11.0+cu130 (CUDA 13.0)"
    assert not machine_here(on_gpu=False).on_gpu


def test_a_gpu_that_torch_cannot_use_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the parts, of which some would train on the CPU."""
    tool(tmp_path / "nvidia-smi", "echo 'NVIDIA H200'")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setitem(sys.modules, "torch", fake_torch(0))
    with pytest.raises(NoGpu, match=r"built for CUDA 13.0, can use no GPU of this machine \(nvidia-smi: NVIDIA H200\)"):
        machine_here(on_gpu=True)
    tool(tmp_path / "nvidia-smi", "exit 9")
    with pytest.raises(SystemExit) as left:
        command.main([str(tmp_path / "results")])
    assert left.value.code == 2
    assert "nvidia-smi: none" in capsys.readouterr().err


def test_a_copy_of_the_tree_without_git_has_no_commit(tmp_path: Path) -> None:
    assert commit_of(tmp_path) is None
    assert commit_of(ROOT) is None or len(commit_of(ROOT) or "") >= 40


# -- the command ---------------------------------------------------------------------------------------------------


def test_all_parts_but_the_long_ones_run_within_eight_minutes_on_one_gpu() -> None:
    parts = command.chosen(None)
    assert [p.name for p in parts] == [
        "tests", "sanitizer", "engines", "speed", "sms", "arena", "step", "connections", "train", "multi"
    ]  # fmt: skip
    assert sum(p.limit_s for p in parts if p.name != "multi") <= 480
    plan = command.plan_of(parts, machine(1), 1.0)
    assert plan.startswith("seconds at most: tests 60, sanitizer 50, ")
    assert "multi" not in plan
    assert plan.endswith("together 480")
    assert "multi 300" in command.plan_of(parts, machine(2), 2.0)


def test_parts_run_alone_in_their_own_order() -> None:
    assert [p.name for p in command.chosen(["train", "tests"])] == ["tests", "train"]
    assert [p.name for p in command.chosen(["host_pack"])] == ["host_pack"]


@pytest.fixture
def two_parts(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """``good`` and ``other``, whose actions a test may change."""
    actions: dict[str, object] = {"good": lambda s: Finding(text="well [sic]"), "other": raising(NotRun("no GPU"))}
    made = tuple(
        part(lambda s, name=name: actions[name](s), name=name)
        for name in actions  # type: ignore[operator, misc]
    )
    monkeypatch.setattr(command, "PARTS", made)
    return actions


def test_a_verdict_that_is_bad_is_the_exit_code(tmp_path: Path, two_parts: dict[str, object]) -> None:
    arguments = [str(tmp_path), "--without-gpu", "--store", str(tmp_path)]
    assert command.main(arguments) == 0
    missed = Finding(text="", figures=(figure("f", 2, False),))
    for bad in (raising(CheckFailed("x")), raising(Late("x")), lambda s: missed):
        two_parts["other"] = bad
        assert command.main(arguments) == 1


def test_the_summary_keeps_the_parts_of_earlier_calls(tmp_path: Path, two_parts: dict[str, object]) -> None:
    arguments = [str(tmp_path), "--without-gpu", "--store", str(tmp_path), "--quick"]
    assert command.main([*arguments, "--only", "good"]) == 0
    assert list(parts_of(tmp_path)) == ["good"]
    assert command.main([*arguments, "--only", "other"]) == 0
    found = parts_of(tmp_path)
    assert {name: entry["outcome"] for name, entry in found.items()} == {"good": "passed", "other": "not run"}
    assert found["other"]["finding"] == "no GPU"
    for entry in found.values():
        assert entry["hardware"]["gpus"] == []
        assert entry["versions"]["torch"]
        assert {"date", "commit", "command", "quick", "limit_s", "seconds", "figures"} <= entry.keys()


def test_a_part_that_is_interrupted_is_the_last(tmp_path: Path, two_parts: dict[str, object]) -> None:
    def interrupted(setting: Setting) -> Finding:
        raise KeyboardInterrupt

    two_parts["good"] = interrupted
    assert command.main([str(tmp_path), "--without-gpu", "--store", str(tmp_path)]) == 130
    assert not (tmp_path / "summary.json").exists()


def test_a_store_that_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main([str(tmp_path), "--without-gpu", "--store", str(tmp_path / "nowhere")])
    assert "nowhere: no folder that can be written" in capsys.readouterr().err
