# SPDX-License-Identifier: Apache-2.0
"""What ``gpu_check`` makes of its steps. The steps themselves need a GPU; ``--without-gpu`` tries the training."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gpu_check
import pytest
from gpu_check import CheckFailed, NotRun, Options, Run, judge


def options(folder: Path) -> Options:
    return Options(results=folder, quick=True, on_gpu=False)


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
