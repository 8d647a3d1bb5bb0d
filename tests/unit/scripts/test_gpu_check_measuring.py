# SPDX-License-Identifier: Apache-2.0
"""The parts of ``gpu_check`` that run a tool or a benchmark, which are stood in for."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from gpu_check import measuring
from gpu_check.part import CheckFailed, NotRun
from gpu_check_support import figure, setting, tool

ROOT = Path(__file__).parents[3]


class Benchmarks:
    """In place of ``execute``: benchmarks that write these figures."""

    def __init__(self, *figures: dict[str, Any]) -> None:
        self.figures = figures
        self.commands: list[Sequence[str]] = []
        self.environments: list[Mapping[str, str]] = []

    def __call__(
        self, command: Sequence[str], log: Path, limit_s: float, environment: Mapping[str, str] | None = None
    ) -> str:
        assert (ROOT / command[1]).is_file()
        self.commands.append(command)
        self.environments.append(environment or {})
        path = Path(command[command.index("--json") + 1])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"results": list(self.figures)}))
        return ""

    def flag(self, name: str, call: int = -1) -> str:
        command = self.commands[call]
        return command[command.index(name) + 1]


def installed(monkeypatch: pytest.MonkeyPatch, *figures: dict[str, Any]) -> Benchmarks:
    benchmarks = Benchmarks(*figures)
    monkeypatch.setattr(measuring, "execute", benchmarks)
    return benchmarks


# -- tools ---------------------------------------------------------------------------------------------------------


def test_tests_and_sanitizer_need_a_gpu(tmp_path: Path) -> None:
    for action in (measuring.run_tests, measuring.run_sanitizer):
        with pytest.raises(NotRun, match="needs a GPU"):
            action(setting(tmp_path))


def test_tests_fail_where_no_gpu_can_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real command, on a machine that only claims to have a GPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(CheckFailed, match=r"exit code \d, see tests/log.txt"):
        measuring.run_tests(setting(tmp_path, gpus=1))
    assert "MOETION_REQUIRE_GPU=1, but" in (tmp_path / "tests" / "log.txt").read_text()


@pytest.fixture
def sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of ``compute-sanitizer``, first in PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'tools'}:{os.environ['PATH']}")
    return tmp_path / "tools" / "compute-sanitizer"


def test_the_sanitizer_must_say_what_it_found(tmp_path: Path, sanitizer: Path) -> None:
    tool(sanitizer, "echo '========= ERROR SUMMARY: 0 errors'")
    assert measuring.run_sanitizer(setting(tmp_path, gpus=1)).text == "ERROR SUMMARY: 0 errors"
    tool(sanitizer, "echo '12 passed'")
    with pytest.raises(CheckFailed, match="no summary"):
        measuring.run_sanitizer(setting(tmp_path, gpus=1))
    tool(sanitizer, "exit 9")
    with pytest.raises(CheckFailed, match=r"exit code 9, see sanitizer/log.txt: no output"):
        measuring.run_sanitizer(setting(tmp_path, gpus=1))


@pytest.mark.parametrize("said", ["Error: Device not supported. Please refer to", "Error: LibraryNotLoaded"])
def test_an_unsupported_machine_is_no_failure_of_the_sanitizer(tmp_path: Path, sanitizer: Path, said: str) -> None:
    tool(sanitizer, f"echo '========= {said}'; echo '========= ERROR SUMMARY: 3 errors'; exit 9")
    with pytest.raises(NotRun, match=f"cannot work on this machine: {said}"):
        measuring.run_sanitizer(setting(tmp_path, gpus=1))


def test_the_sanitizer_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring.shutil, "which", lambda name, path=None: None)
    with pytest.raises(NotRun, match="comes with the CUDA toolkit"):
        measuring.run_sanitizer(setting(tmp_path, gpus=1))


# -- benchmarks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gpus", "device"), [(0, "model:0"), (1, "cuda:0"), (8, "cuda:0")])
def test_the_link_is_asked_on_this_checks_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, device: str
) -> None:
    benchmarks = installed(monkeypatch, figure("link", 55.0))
    assert measuring.run_link("speed")(setting(tmp_path, gpus=gpus, quick=True)).text == "link: 55 s"
    assert (benchmarks.flag("--device"), benchmarks.flag("--only")) == (device, "speed")
    assert "--quick" in benchmarks.commands[0]


def test_figures_that_miss_their_targets_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = [figure("fast", 0.5, True), figure("slow", 9.0, False), figure("for information", 3.0)]
    installed(monkeypatch, *figures)
    found = measuring.run_benchmark("device_pack")(setting(tmp_path, gpus=1))
    assert found.text == "1 of 2 targets met: slow: 9 s (target <= 1); fast: 0.5 s"
    assert list(found.figures) == figures


def test_a_benchmark_that_measured_nothing_fails_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, figure("ratio", None))
    with pytest.raises(CheckFailed, match="nothing was measured"):
        measuring.run_benchmark("device_pack")(setting(tmp_path, gpus=1))
    with pytest.raises(NotRun, match="needs a GPU"):
        measuring.run_benchmark("device_pack")(setting(tmp_path))


def test_figures_of_an_earlier_call_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, figure("link", 55.0))
    measuring.run_link("speed")(setting(tmp_path))
    monkeypatch.setattr(measuring, "execute", lambda *args: "")
    with pytest.raises(FileNotFoundError):
        measuring.run_link("speed")(setting(tmp_path))


def test_an_arena_without_room_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmarks = installed(monkeypatch, figure("arena", None))
    with pytest.raises(NotRun, match="room"):
        measuring.run_arena(setting(tmp_path, gpus=1))
    assert "--mib" not in benchmarks.commands[0]
    assert Path(benchmarks.flag("--store")).parent == tmp_path
    assert list(tmp_path.glob("moetion-*")) == [], "whatever a late benchmark leaves, goes"


MEASURED = figure("full: iteration over none, median", 0.004, True)


@pytest.mark.parametrize(("gpus", "model", "device"), [(0, "toy", "cpu"), (1, "whole", "gpu"), (2, "whole", "gpu")])
def test_the_step_is_told_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, model: str, device: str
) -> None:
    benchmarks = installed(monkeypatch, MEASURED)
    text = measuring.run_step(setting(tmp_path, gpus=gpus, left_s=100.0)).text
    assert text == "1 of 1 targets met: full: iteration over none, median: 0.004 s"
    assert (benchmarks.flag("--model"), benchmarks.flag("--device")) == (model, device)
    assert float(benchmarks.flag("--seconds")) == (85 if gpus else measuring.TOY_STEP_S)
    assert benchmarks.environments[0]["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"


def test_the_step_is_measured_in_each_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmarks = installed(monkeypatch, MEASURED)
    found = measuring.run_connections(setting(tmp_path, gpus=1, left_s=80.0))
    assert [f["name"].split(":")[0] for f in found.figures] == list(measuring.CONNECTIONS)
    assert [e["CUDA_DEVICE_MAX_CONNECTIONS"] for e in benchmarks.environments] == ["1", "8", "32", "8"]
    assert benchmarks.environments[-1]["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert {benchmarks.flag("--model", call) for call in range(4)} == {"small"}
    assert [float(benchmarks.flag("--seconds", call)) for call in range(2)] == [17, 23], "of what is left, its share"
    installed(monkeypatch, MEASURED)
    assert len(measuring.run_connections(setting(tmp_path, gpus=1, quick=True)).figures) == 1


def test_a_step_without_time_or_memory_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, figure("none: iteration, median", 0.3), figure("full: iteration over none, median", None))
    with pytest.raises(NotRun, match=r"no mode's arena has room; see step/log.txt"):
        measuring.run_step(setting(tmp_path, gpus=1))
    with pytest.raises(NotRun, match="too few to measure a step in"):
        measuring.run_step(setting(tmp_path, gpus=1, left_s=10.0))
