# SPDX-License-Identifier: Apache-2.0
"""The quickstart's pure parts: reading what runs wrote, the summary, the checks, the picture, the losing of a node."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import quickstart
from quickstart_plot import draw
from quickstart_summary import (
    Fault,
    Run,
    RunError,
    check,
    differences,
    read_json_lines,
    read_run,
    recovery_seconds,
    summarise,
    unequal_iterations,
)

ISSUE_KEYS = {
    "mode", "iterations", "killed_at_iteration", "resumed_from_iteration", "lost_iterations", "recovery_seconds",
    "snapshot_bytes_full", "snapshot_bytes_mean", "final_loss", "fault_free_final_loss", "loss_curve_max_abs_diff",
    "validation_loss", "fault_free_validation_loss", "plt",
}  # fmt: skip
KILL_TIME = 1000.0
PHASES = {"survey": 0.02, "fetch": 0.3, "verify": 0.05, "restore": 0.1, "resync": 0.05}


def loss_at(iteration: int, drift: float = 0.0) -> float:
    return 2.0 + 3.5 * math.exp(-iteration / 18) + 0.08 * math.sin(1.7 * iteration) + drift


def steps(first: int, last: int, attempt: int, drift: float = 0.0) -> list[dict]:
    """0.5 s an iteration; the first attempt ends when it is killed, the second begins to train 18.3 s later."""
    start = KILL_TIME - 15 if attempt == 0 else KILL_TIME + 18.3
    return [
        {
            "iteration": i,
            "loss": loss_at(i, drift),
            "loss_hex": loss_at(i, drift).hex(),
            "time": start + 0.5 * (i - first + 1),
            "attempt": attempt,
        }
        for i in range(first, last + 1)
    ]


def write_run(folder: Path, documents: list[dict], events: list[dict] | None = None) -> None:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    if events is not None:
        (folder / "report.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))


def reference(folder: Path, iterations: int = 60) -> Run:
    write_run(folder / "fault-free", [*steps(1, iterations, 0), {"iteration": iterations, "validation_loss": 2.05}])
    return read_run("fault-free", folder / "fault-free")


def faulted(folder: Path, mode: str, *, drift: float = 0.0, resumed: int = 29, iterations: int = 60) -> Run:
    """Killed when iteration 30 was logged; iteration 31 was logged all the same; resumed at ``resumed``."""
    half = iterations // 2
    documents = [*steps(1, half + 1, 0), *steps(resumed + 1, iterations, 1, drift)]
    documents.append({"iteration": iterations, "validation_loss": 2.05 + drift})
    events = [
        {"event": "recovered", "iteration": resumed, "epoch": 1, "attempt": 1, "phases_s": PHASES, "time": 1018.0,
         "process_start": 1000.6, "plt": 0.01},
        {"event": "summary", "snapshots": 60, "dropped": 0, "snapshot_bytes_full": 8_000_000,
         "snapshot_bytes_mean": 8e6 if mode == "full" else 2.5e6, "plt": 0.012 if mode == "popularity" else 0.0},
    ]  # fmt: skip
    write_run(folder / mode, documents, events)
    return read_run(mode, folder / mode, Fault(iteration=half, time=KILL_TIME))


def test_later_attempts_overwrite_iterations(tmp_path):
    run = faulted(tmp_path, "popularity", drift=0.01)
    assert sorted(run.curve()) == list(range(1, 61))
    assert run.curve()[29] == loss_at(29)
    assert run.curve()[30] == loss_at(30, 0.01)
    assert max(run.curve_of_attempt(0)) == 31


def test_torn_and_missing_files_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_json_lines(path) == []
    path.write_text('{"iteration": 1}\n{"iterat\n[1]\n{"iteration": 2}\n{"iteration": 3')
    assert read_json_lines(path) == [{"iteration": 1}, {"iteration": 2}]


def test_summary_has_the_promised_keys_and_values(tmp_path):
    entry = summarise(faulted(tmp_path, "full"), reference(tmp_path))
    assert set(entry) == ISSUE_KEYS
    assert entry["mode"] == "full"
    assert entry["iterations"] == 60
    assert entry["killed_at_iteration"] == 30
    assert entry["resumed_from_iteration"] == 29
    assert entry["lost_iterations"] == 2  # 31 was completed, 29 came back
    assert entry["loss_curve_max_abs_diff"] == 0.0
    assert entry["final_loss"] == entry["fault_free_final_loss"] == loss_at(60)
    assert entry["validation_loss"] == entry["fault_free_validation_loss"] == 2.05
    assert entry["snapshot_bytes_full"] == 8_000_000
    assert entry["plt"] == 0.0
    json.dumps(entry)


def test_recovery_phases_add_up_to_the_time_without_training(tmp_path):
    phases = recovery_seconds(faulted(tmp_path, "full"))
    assert list(phases) == ["detect", "restart", "survey", "fetch", "verify", "restore", "resync", "first_step"]
    assert phases["detect"] == pytest.approx(0.6)
    assert phases["restart"] == pytest.approx(17.4 - sum(PHASES.values()))
    assert phases["first_step"] == pytest.approx(0.8)
    assert sum(phases.values()) == pytest.approx(18.8)


def test_figures_that_were_not_reported_are_null(tmp_path):
    run = faulted(tmp_path, "full")
    silent = Run(**{**vars(run), "events": run.events[:1]})
    entry = summarise(silent, reference(tmp_path))
    assert entry["snapshot_bytes_mean"] is None
    assert entry["plt"] == 0.01


def test_a_run_without_a_recovery_is_refused(tmp_path):
    with pytest.raises(RunError, match="reports no recovery"):
        summarise(reference(tmp_path), reference(tmp_path / "other"))


@pytest.mark.parametrize("mode", ["full", "exact"])
def test_bitwise_modes_must_be_bitwise_equal_in_every_attempt(tmp_path, mode):
    fault_free = reference(tmp_path)
    check(faulted(tmp_path, mode), fault_free)
    drifted = faulted(tmp_path / "drifted", mode, drift=1e-15)
    assert unequal_iterations(drifted, fault_free)[0] == 30
    with pytest.raises(RunError, match="not bitwise equal to the fault-free run: iterations 30"):
        check(drifted, fault_free)
    overwritten = faulted(tmp_path / "overwritten", mode)
    overwritten.steps[5]["loss_hex"] = (9.0).hex()
    with pytest.raises(RunError, match="iterations 6 differ"):
        check(overwritten, fault_free)


def test_mode_full_must_end_with_the_same_validation_loss(tmp_path):
    run = faulted(tmp_path, "full")
    with pytest.raises(RunError, match="validation loss"):
        check(Run(**{**vars(run), "validation_loss": 2.06}), reference(tmp_path))


def test_mode_popularity_may_differ_after_the_fault_only(tmp_path):
    fault_free = reference(tmp_path)
    run = faulted(tmp_path, "popularity", drift=0.01)
    check(run, fault_free)
    assert max(differences(run, fault_free).values()) == pytest.approx(0.01)
    run.steps[2]["loss_hex"] = (9.0).hex()
    with pytest.raises(RunError, match="before the fault"):
        check(run, fault_free)


def test_a_missing_iteration_is_named(tmp_path):
    run = faulted(tmp_path, "full")
    with pytest.raises(RunError, match="60"):
        differences(Run(**{**vars(run), "steps": run.steps[:-1]}), reference(tmp_path))


def test_the_picture_is_written(tmp_path):
    fault_free = reference(tmp_path)
    runs = [
        faulted(tmp_path, mode, drift=0.02 if mode == "popularity" else 0.0, resumed=28) for mode in quickstart.MODES
    ]
    entries = [summarise(run, fault_free) for run in runs]
    draw(tmp_path / "deep" / "loss.png", fault_free, runs, entries)
    assert (tmp_path / "deep" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_losing_a_node_kills_its_ranks_and_only_its_memory(tmp_path):
    sleepers = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(2)]
    for node in (0, 1):
        folder = tmp_path / "run" / f"node{node}"
        folder.mkdir(parents=True)
        (folder / "arena").write_bytes(b"state")
    for rank, sleeper in zip((2, 3), sleepers, strict=True):
        owner = {"pid": sleeper.pid, "rank": rank, "attempt": 0}
        (tmp_path / "run" / "node1" / f"rank{rank:05d}.pid").write_text(json.dumps(owner))
    assert quickstart.lose_node(tmp_path, "run", 1) == [2, 3]
    assert [sleeper.wait(timeout=10) for sleeper in sleepers] == [-9, -9]
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "node0", "arena"]


def test_a_node_without_its_processes_cannot_be_lost(tmp_path):
    with pytest.raises(RunError, match="0 processes instead of 2"):
        quickstart.lose_node(tmp_path, "run", 1)


def test_the_reference_knows_nothing_of_moetion(tmp_path):
    job = quickstart.Job(name="fault-free", iterations=24, folder=tmp_path, store=None)
    assert not [argument for argument in job.command() if "moetion-" in argument or argument == "--moetion"]
    job = quickstart.Job(name="full", iterations=24, folder=tmp_path, store=tmp_path / "store")
    assert "--moetion" in job.command()


@pytest.mark.parametrize("mode", quickstart.MODES)
def test_every_mode_is_shown_with_its_default_settings(tmp_path, mode):
    """What table and picture say; other flags only name places."""
    job = quickstart.Job(name=mode, iterations=24, folder=tmp_path, store=tmp_path / "store")
    given = {argument for argument in job.command() if argument.startswith("--moetion-")}
    places = {"--moetion-store", "--moetion-run-id", "--moetion-ranks-per-node", "--moetion-report"}
    assert given == {"--moetion-mode", *places}


def test_a_failed_run_ends_with_its_log_and_exit_code_1(tmp_path):
    broken = (
        "import quickstart; quickstart.MODEL_FLAGS = ['--no-such-flag']; quickstart.RANKS = 1; "
        "raise SystemExit(quickstart.main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", broken, "--out", str(tmp_path)],
        cwd=Path(quickstart.__file__).parent, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "error: run 'fault-free' ended with exit code" in done.stderr
    assert "log.txt" in done.stderr
    assert not (tmp_path / "summary.json").exists()


def test_gpus_are_used_where_there_is_one_for_each_rank_and_the_kernels_are_built() -> None:
    chosen = {(gpus, built): quickstart.device_for(gpus, built) for gpus in (0, 1, 3, 4, 8) for built in (False, True)}
    assert {use for use, device in chosen.items() if device == "cpu"} == {
        (1, False), (1, True), (3, False), (3, True), (4, False), (8, False)
    }  # fmt: skip
