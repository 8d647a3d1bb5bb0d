# SPDX-License-Identifier: Apache-2.0
"""Memory and processes that a script took are given back, also those of one that was killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from left_behind import end, temporary_store


def test_a_store_is_gone_however_its_runs_end(tmp_path: Path) -> None:
    def runs(error: BaseException | None) -> None:
        with temporary_store(tmp_path, "check") as store:
            (store / "rank0.arena").write_text("state")
            if error is not None:
                raise error

    runs(None)
    with pytest.raises(KeyboardInterrupt):
        runs(KeyboardInterrupt())
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_script_left_is_removed_and_what_others_use_is_not(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    names = [f"moetion-check-{os.getuid()}-{pid}-x" for pid in (gone.pid, os.getpid())]
    others = [f"moetion-quickstart-{os.getuid()}-{gone.pid}-x", f"moetion-check-{os.getuid() + 1}-{gone.pid}-x"]
    for name in (*names, *others, "moetion-check-notes"):
        (tmp_path / name).mkdir()
    with temporary_store(tmp_path, "check"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([names[1], *others, "moetion-check-notes"])


def test_a_command_that_is_over_needs_no_end() -> None:
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    process.wait()
    end(process)
    assert process.returncode == 3
