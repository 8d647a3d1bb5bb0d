# SPDX-License-Identifier: Apache-2.0
"""What ``gpu_check`` makes of its steps. Where those need a GPU, its tools and the trainer are stood in for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import gpu_check
import pytest
from gpu_check import CheckFailed, NotRun, Options, Run, judge

ROOT = Path(__file__).parents[3]


def options(folder: Path, *, on_gpu: bool = False) -> Options:
    return Options(results=folder, quick=True, on_gpu=on_gpu)


def run(curve: dict[int, tuple[str, float]], lost_tokens: int = 0) -> Run:
    return Run(curve=curve, resumed_from=10, lost_tokens=lost_tokens, plt=0.01)


WHOLE = {i: (f"0x{i:x}", 1.0) for i in range(1, gpu_check.ITERATIONS + 1)}


def trained(monkeypatch: pytest.MonkeyPatch, full: Run, popularity: Run) -> None:
    found = {"reference": run(WHOLE), "full": full, "exact": run(WHOLE), "popularity": popularity}
    monkeypatch.setattr(gpu_check, "train", lambda options, name, flags: found[name])


def test_training_passes_only_bitwise_and_with_its_losses_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(monkeypatch, run(WHOLE), run(WHOLE, lost_tokens=5))
    assert "full resumed from 10, exact from 10, all 20 losses bitwise" in gpu_check.run_training(options(tmp_path))
    trained(monkeypatch, run(WHOLE | {13: ("0xff", 1.0)}), run(WHOLE, lost_tokens=5))
    with pytest.raises(CheckFailed, match=r"full: 1 of 20 iterations differ from the reference, first \[13\]"):
        gpu_check.run_training(options(tmp_path))
    trained(monkeypatch, run(WHOLE), run({i: v for i, v in WHOLE.items() if i < 20}, lost_tokens=5))
    with pytest.raises(CheckFailed, match="reached 19"):
        gpu_check.run_training(options(tmp_path))


def test_a_verdict_is_passed_failed_or_not_run(tmp_path: Path) -> None:
    def fails(options: Options) -> str:
        raise CheckFailed("wrong bytes")

    def missing(options: Options) -> str:
        raise NotRun("no tool")

    found = [judge("s", action, options(tmp_path)) for action in (lambda o: "fine", fails, missing)]
    assert [(v.passed, v.finding) for v in found] == [(True, "fine"), (False, "wrong bytes"), (None, "no tool")]


def test_a_command_that_fails_or_hangs_is_named_with_its_log(tmp_path: Path) -> None:
    log = tmp_path / "step" / "log.txt"
    shout = "print('error: too hot'); print('====='); raise SystemExit(3)"
    with pytest.raises(CheckFailed, match=r"exit code 3, see step/log.txt: error: too hot"):
        gpu_check.execute([sys.executable, "-c", shout], log, 30)
    with pytest.raises(CheckFailed, match="not done after 0 s"):
        gpu_check.execute([sys.executable, "-c", "import time; time.sleep(30)"], log, 0.2)


def test_a_run_without_losses_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match="no losses"):
        gpu_check.read_run(tmp_path)


def test_the_table_is_kept_and_a_failure_is_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(monkeypatch, run(WHOLE), run(WHOLE, lost_tokens=0))
    arguments = [str(tmp_path), "--without-gpu", "--only", "train", "--only", "tests"]
    assert gpu_check.main(arguments) == 1
    steps = json.loads((tmp_path / "summary.json").read_text())["steps"]
    assert [(s["step"], s["passed"]) for s in steps] == [("train", False), ("tests", None)]
    trained(monkeypatch, run(WHOLE), run(WHOLE, lost_tokens=4))
    assert gpu_check.main(arguments) == 0


ON_GPU = "> GPU path on node0: 1 rank(s), NVIDIA H200"
PINNED = "[moetion] rank 0 iteration -1: arena pinned; captures land in it, packed on 8 SMs, small ones by kernel"
UNPINNED = "[moetion] rank 0 iteration -1: the arena could not be pinned (out of memory): captures go by way of 64 MiB"
WHOLE_RUN = [ON_GPU, PINNED, "RuntimeError: killed", ON_GPU, PINNED]


def trainer(said: Sequence[str]) -> Callable[..., str]:
    """In place of ``execute``: the trainer, with what a run that was killed once leaves behind."""

    def execute(command: Sequence[str], log: Path, limit_s: float, environment: Mapping[str, str] | None = None) -> str:
        assert command[-2:] == ["--device", "gpu"]
        log.parent.mkdir(parents=True)
        steps = [{"iteration": i, "loss_hex": h, "grad_norm": n} for i, (h, n) in WHOLE.items()]
        (log.parent / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
        if "--moetion" not in command:
            return "\n".join(line for line in said[:1] if line != PINNED)
        lost = 0 if "--moetion-mode" in command else 7
        events = [{"event": "recovered", "iteration": 10, "lost_tokens": lost}, {"event": "summary", "plt": 0.01}]
        (log.parent / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
        return "\n".join(said)

    return execute


def test_training_on_a_gpu_passes_where_the_runs_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "execute", trainer(WHOLE_RUN))
    assert "7 tokens lost" in gpu_check.run_training(options(tmp_path, on_gpu=True))


@pytest.mark.parametrize(
    ("said", "finding"),
    [
        (["> CPU path on node0: 1 rank(s), no GPU", *WHOLE_RUN[1:]], "reference: 0 of 1 attempts say"),
        ([ON_GPU, PINNED], "full: 1 of 2 attempts say that they were on a GPU"),
        ([*WHOLE_RUN[:3], "> CPU path on node0: 1 rank(s), no GPU"], "full: 1 of 2 attempts say"),
        ([*WHOLE_RUN, "> CPU path on node0: 1 rank(s), no GPU"], "full: 2 of 2 attempts say"),
        ([*WHOLE_RUN[:4], UNPINNED], r"full: the arena was pinned in 1 of 2 attempts: .*out of memory"),
        ([ON_GPU, ON_GPU], "full: the arena was pinned in 0 of 2 attempts: no line says so"),
    ],
)
def test_training_on_anything_else_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str], finding: str
) -> None:
    monkeypatch.setattr(gpu_check, "execute", trainer(said))
    with pytest.raises(CheckFailed, match=finding):
        gpu_check.run_training(options(tmp_path, on_gpu=True))


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tools that comes first in PATH; its ``nvidia-smi`` claims a GPU."""
    folder = tmp_path / "tools"
    folder.mkdir()
    tool(folder / "nvidia-smi", "echo 'NVIDIA H200, 580.1, 143771 MiB'")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def tool(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def found(results: Path) -> dict[str, tuple[bool | None, str]]:
    steps = json.loads((results / "summary.json").read_text())["steps"]
    return {s["step"]: (s["passed"], s["finding"]) for s in steps}


def test_no_step_passes_where_no_gpu_can_be_used(tmp_path: Path, tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real steps, on a machine of which only ``nvidia-smi`` says that it has a GPU."""
    tool(tools / "compute-sanitizer", 'shift 4; exec "$@"')
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    results = tmp_path / "results"
    steps = ["tests", "sanitizer", "train", "device_pack"]
    assert gpu_check.main([str(results), "--quick", *(f for step in steps for f in ("--only", step))]) == 1
    verdicts = found(results)
    assert [verdicts[step][0] for step in steps] == [False] * 4
    assert "MOETION_REQUIRE_GPU=1, but" in (results / "tests.log").read_text()
    assert "MOETION_REQUIRE_GPU=1, but" in (results / "sanitizer.log").read_text()
    assert "can use no GPU of this machine" in verdicts["train"][1]
    assert "nothing was measured" in verdicts["device_pack"][1]
    assert json.loads((results / "summary.json").read_text())["machine"].startswith("NVIDIA H200")


def test_the_sanitizer_must_say_what_it_found(tmp_path: Path, tools: Path) -> None:
    tool(tools / "compute-sanitizer", "echo '========= ERROR SUMMARY: 0 errors'")
    assert gpu_check.run_sanitizer(options(tmp_path, on_gpu=True)) == "ERROR SUMMARY: 0 errors"
    tool(tools / "compute-sanitizer", "echo '12 passed'")
    with pytest.raises(CheckFailed, match="no summary"):
        gpu_check.run_sanitizer(options(tmp_path, on_gpu=True))
    tool(tools / "compute-sanitizer", "exit 9")
    with pytest.raises(CheckFailed, match=r"exit code 9, see .*/sanitizer.log: no output"):
        gpu_check.run_sanitizer(options(tmp_path, on_gpu=True))


def test_targets_are_counted_and_those_missed_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def execute(command: Sequence[str], log: Path, limit_s: float) -> str:
        figures = [("fast", 1.0, True), ("slow", 9.0, False), ("for information", 3.0, None)]
        document = {"results": [{"name": n, "value": v, "met": m} for n, v, m in figures]}
        Path(command[command.index("--json") + 1]).write_text(json.dumps(document))
        return ""

    monkeypatch.setattr(gpu_check, "execute", execute)
    step = gpu_check.run_benchmark("device_pack")
    assert step(options(tmp_path, on_gpu=True)) == "1 of 2 targets met; missed: slow"


def test_steps_that_need_a_gpu_are_not_run_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    arguments = [str(tmp_path), "--without-gpu", "--quick"]
    assert gpu_check.main([*arguments, "--only", "tests", "--only", "sanitizer", "--only", "device_pack"]) == 0
    assert {passed for passed, _ in found(tmp_path).values()} == {None}


def test_a_machine_without_the_driver_is_refused_at_once(
    tmp_path: Path, tools: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the steps, which take an hour, and not after them."""
    tool(tools / "nvidia-smi", "exit 9")
    with pytest.raises(SystemExit):
        gpu_check.main([str(tmp_path)])
    assert "no GPU to check" in capsys.readouterr().err
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "gpu_check.sh"), str(tmp_path / "results")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "no NVIDIA GPU" in done.stderr
