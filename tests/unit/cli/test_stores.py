# SPDX-License-Identifier: Apache-2.0
"""``moetion list``, ``status``, ``verify`` and ``clean``: what they print, how they end, and what they leave alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from session_job import Job
from stores import OPTIONS, left_by_a_job, living_job

from megatron_moetion import cli
from megatron_moetion.cli import clean
from megatron_moetion.inspect import look
from megatron_moetion.store.sharedfile import open_arena

COMMANDS = ("list", "status", "verify", "clean")


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stores of crashed jobs of several modes."""
    found = tmp_path_factory.mktemp("left")
    left_by_a_job(found, "tools-run")
    left_by_a_job(found, "experts", mode="popularity")
    return found


@pytest.fixture
def store(left: Path, tmp_path: Path) -> Path:
    """A copy of them that a test may change."""
    return Path(shutil.copytree(left, tmp_path / "store"))


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def run(capsys: pytest.CaptureFixture[str], *words: str | Path, code: int = 0) -> str:
    assert cli.main([str(word) for word in words]) == code
    return capsys.readouterr().out


def document(capsys: pytest.CaptureFixture[str], *words: str | Path, code: int = 0) -> dict[str, Any]:
    shown = run(capsys, *words, "--json", code=code)
    assert shown.count("\n") == 1
    found: dict[str, Any] = json.loads(shown)
    return found


def damage(arena: Path, unit: str, iteration: int) -> None:
    """Flip a bit of a capture."""
    opened = open_arena(arena)
    number = [name for name, _, _ in opened.spec.units].index(unit)
    slot = next(r.slot for r in opened.page.records if r.key == (number, iteration))
    opened.payload(slot)[7] ^= 1
    opened.close()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_terminal_and_says_how(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    shown = capsys.readouterr().out
    assert f"usage: moetion {command}" in shown
    assert "--store DIR" in shown
    assert "--json" in shown
    assert max(map(len, shown.splitlines())) <= 80


# -- list ----------------------------------------------------------------------------------------------------------


def test_list_in_80_columns_without_colours(left: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = run(capsys, "list", "--store", left)
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    (row,) = [line.split() for line in shown.splitlines() if "tools-run" in line]
    assert row[2:7] == ["2", "of", "2", "full", "6"]
    assert row[-3] == "-"


def test_list_as_a_document(left: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "list", "--store", left)
    assert set(found) == {"stores", "runs", "unreadable"}
    experts, full = found["runs"]
    assert set(full) == {
        "run_id", "store", "user", "nodes", "mode", "period", "world_size", "ranks_here", "epoch", "stable", "newest",
        "memory_bytes", "processes", "in_use", "began", "started", "problems",
    }  # fmt: skip
    assert (full["run_id"], full["mode"], full["ranks_here"], full["newest"]) == ("tools-run", "full", [0, 1], 6)
    assert (full["nodes"], full["world_size"], full["in_use"], full["processes"]) == (2, 2, False, [])
    assert (experts["run_id"], experts["mode"]) == ("experts", "popularity")
    assert full["memory_bytes"] > 4 * 64_000
    assert 0 <= time.time() - full["began"] < 600


def test_list_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(capsys, "list", "--store", tmp_path) == f"no run lies in {tmp_path}\n"
    monkeypatch.setattr(look, "SHARED_MEMORY", tmp_path)
    assert document(capsys, "list") == {"stores": [], "runs": [], "unreadable": []}
    assert cli.main(["list", "--store", str(tmp_path / "missing")]) == 2
    assert "cannot be read: No such file" in capsys.readouterr().err


def test_list_shows_stores_of_all_users_and_names_closed_ones(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(look, "SHARED_MEMORY", tmp_path)
    store.rename(tmp_path / "moetion-1")
    (tmp_path / "moetion-2").mkdir()
    listdir = os.listdir

    def refuse(path: Any) -> list[str]:
        if "moetion-2" in str(path) or "experts" in str(path):
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    monkeypatch.setattr(look.os, "listdir", refuse)
    found = document(capsys, "list")
    assert [r["run_id"] for r in found["runs"]] == ["tools-run"]
    closed = [tmp_path / "moetion-1" / "experts", tmp_path / "moetion-2"]
    assert found["unreadable"] == [f"{path} cannot be read: Permission denied" for path in closed]
    assert run(capsys, "list").count("not shown: ") == 2
    assert cli.main(["status", "experts", "--store", str(tmp_path / "moetion-1")]) == 2
    assert "experts cannot be read: Permission denied" in capsys.readouterr().err


def test_a_long_name_and_a_damaged_arena_do_not_break_the_list(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "n" * 200
    (store / "tools-run").rename(store / name)
    for arena in (store / name).glob("node*/*.arena"):
        arena.write_bytes(b"MOETION3" + bytes(100))
    shown = run(capsys, "list", "--store", store)
    table = shown[: shown.index(f"{name}: ")]
    assert max(map(len, table.splitlines())) <= 80
    assert shown.count("is not an arena, or its header is damaged") == 0
    assert shown.count("does not verify") == 4


# -- status --------------------------------------------------------------------------------------------------------


def test_status_in_80_columns(left: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = run(capsys, "status", "tools-run", "--store", left)
    assert "\x1b" not in shown
    table = [line for line in shown.splitlines() if re.search(r" (own|replica) ", line)]
    assert [line.split()[:3] for line in table] == [
        ["0", "1", "own"], ["0", "2", "replica"], ["1", "1", "replica"], ["1", "2", "own"],
    ]  # fmt: skip
    assert max(map(len, table)) <= 80
    assert "run tools-run: mode full, 2 rank(s), toy" in shown
    assert "no process of this machine uses it" in shown
    assert "goes on from iteration 6; each rank has at least 2 complete copies here" in shown


def test_status_as_a_document(left: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "status", "tools-run", "--store", left)
    assert set(found) == {
        "run_id", "time", "mode", "period", "topology", "world_size", "began", "epoch", "recoveries", "stable",
        "newest", "vetoed", "in_use", "memory_bytes", "recovery", "experts", "ranks", "nodes", "not_known",
    }  # fmt: skip
    assert found["recovery"] == {
        "iteration": 6, "newest_of_ranks_here": 6, "missing_ranks": [], "copies_least": 2, "reason": None,
    }  # fmt: skip
    assert 0 < found["stable"] <= found["newest"] == 6
    assert [r["complete_copies"] for r in found["ranks"]] == [2, 2]
    assert set(found["nodes"][0]) == {
        "path", "problem", "processes", "ranks", "started", "memory_bytes", "free_bytes", "arenas",
    }  # fmt: skip
    assert set(found["nodes"][0]["arenas"][0]) == {
        "path", "rank", "copy", "problem", "size_bytes", "epoch", "stable", "newest", "reaches", "captures",
        "captured_bytes",
    }  # fmt: skip
    assert found["experts"] is None
    assert len(found["not_known"]) == 2


def test_status_of_experts(left: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "status", "experts", "--store", left)["experts"]
    assert set(found) == {"experts", "longest", "mean", "tokens_at_risk", "iterations_at_risk", "stalest"}
    assert found["experts"] == 4
    assert found["longest"] >= 1
    assert found["tokens_at_risk"] > 0
    assert set(found["stalest"][0]) == {"name", "iteration", "staleness", "tokens_per_iteration", "at_risk"}
    assert "the stalest" in run(capsys, "status", "experts", "--store", left)


def test_status_of_some_nodes_says_what_is_missing(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    node = store / "tools-run" / "node0"
    found = document(capsys, "status", "tools-run", "--store", node)
    assert found["recovery"]["copies_least"] == 1
    (node / "rank00001.arena").unlink()
    found = document(capsys, "status", "tools-run", "--store", node)
    assert found["recovery"] == {
        "iteration": None, "newest_of_ranks_here": 6, "missing_ranks": [1], "copies_least": 0, "reason": None,
    }  # fmt: skip
    assert "no copy of rank(s) 1 lies here" in run(capsys, "status", "tools-run", "--store", node)
    both = document(capsys, "status", "tools-run", "--store", node, store / "tools-run" / "node1")
    assert (both["recovery"]["iteration"], both["recovery"]["copies_least"]) == (6, 1)


@pytest.mark.parametrize("mode", ["full", "popularity"])
@pytest.mark.parametrize("loss", ["a snapshot", "a node", "a capture on both nodes"])
def test_a_restart_goes_where_the_tools_say(
    tmp_path: Path, mode: str, loss: str, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = left_by_a_job(tmp_path, mode=mode, late=6 if loss == "a snapshot" else 0)
    if loss == "a node":
        shutil.rmtree(nodes[0])
    if loss == "a capture on both nodes":
        for node in nodes:
            damage(node / "rank00001.arena", "layers.0.dense", 6)
    said = document(capsys, "status", "tools-run", "--store", tmp_path)["recovery"]
    sound = document(capsys, "verify", "tools-run", "--store", tmp_path, code=int("capture" in loss))["recovery"]
    assert said["iteration"] == (5 if loss == "a snapshot" else 6)
    assert sound["iteration"] == (6 if loss == "a node" else 5)
    assert sound["copies_least"] == (1 if loss == "a node" else 2)
    resumed, _ = Job(tmp_path, 1, mode=mode, run_id="tools-run", **OPTIONS[mode]).start()
    assert resumed is not None
    assert resumed.iteration == sound["iteration"]


def test_who_has_read_enough_may_close_the_pipe(left: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "megatron_moetion.cli",
        "status",
        "tools-run",
        "--store",
        str(left),
        "--watch",
        "0.01",
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(30) == 141
        assert process.stderr.read() == ""


def test_status_of_what_cannot_be_recovered(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arena in (store / "tools-run").glob("node*/*.arena"):
        arena.write_bytes(b"broken")
    found = document(capsys, "status", "tools-run", "--store", store, code=3)
    assert found["recovery"]["iteration"] is None
    assert found["mode"] is None
    shown = run(capsys, "status", "tools-run", "--store", store, code=3)
    assert "nothing can be recovered from here" in shown
    assert "is not an arena" in shown


def test_status_of_a_run_that_is_not_there(left: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "mine", "--store", str(left)]) == 2
    assert "these are: experts, tools-run" in capsys.readouterr().err
    assert cli.main(["status", "tools-run", "--store", str(left), "--watch", "0"]) == 2
    assert "--watch is 0" in capsys.readouterr().err


def test_status_repeats_until_it_is_interrupted(
    left: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("megatron_moetion.cli.status.time.sleep", sleep)
    assert cli.main(["status", "tools-run", "--store", str(left), "--watch", "2", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["newest"] for line in lines] == [6, 6, 6]
    assert slept == [2, 2, 2]


# -- verify --------------------------------------------------------------------------------------------------------


def test_verify_what_is_whole(left: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "verify", "tools-run", "--store", left)
    assert set(found) == {
        "run_id", "whole", "captures", "captured_bytes", "seconds", "damaged", "problems", "gone", "arenas", "recovery",
    }  # fmt: skip
    assert set(found["arenas"][0]) == {"path", "rank", "captures", "damaged", "released", "pages"}
    assert (found["whole"], found["damaged"], found["problems"], len(found["arenas"])) == (True, [], [], 4)
    assert found["captures"] == sum(arena["captures"] for arena in found["arenas"]) > 4 * 12
    assert {arena["pages"] for arena in found["arenas"]} == {2}
    assert "all are whole" in run(capsys, "verify", "tools-run", "--store", left)


def test_verify_names_what_is_damaged_and_where_it_is_whole(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine, other = (store / "tools-run" / f"node{n}" / "rank00000.arena" for n in (0, 1))
    damage(mine, "layers.0.dense", 6)
    found = document(capsys, "verify", "tools-run", "--store", store, code=1)
    expected = {"path": str(mine), "rank": 0, "unit": "layers.0.dense", "iteration": 6, "whole_copies": [str(other)]}
    assert found["damaged"] == [expected]
    assert (found["recovery"]["iteration"], found["recovery"]["copies_least"]) == (6, 1)
    shown = run(capsys, "verify", "tools-run", "--store", store, code=1)
    assert f"damaged: layers.0.dense of rank 0 at iteration 6 in {mine}; a whole copy is in {other}" in shown
    damage(other, "layers.0.dense", 6)
    found = document(capsys, "verify", "tools-run", "--store", store, code=1)
    assert [d["whole_copies"] for d in found["damaged"]] == [[], []]
    assert found["recovery"]["iteration"] == 5
    assert "no whole copy lies here" in run(capsys, "verify", "tools-run", "--store", store, code=1)


def test_verify_names_arenas_that_cannot_be_used(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken, foreign = (store / "tools-run" / "node0" / f"rank0000{n}.arena" for n in (0, 1))
    broken.write_bytes(broken.read_bytes()[:40] + b"?" + broken.read_bytes()[41:])
    foreign.write_bytes(b"MOETION9" + foreign.read_bytes()[8:])
    found = document(capsys, "verify", "tools-run", "--store", store, code=1)
    assert [p["path"] for p in found["problems"]] == [str(broken), str(foreign)]
    assert "the header does not verify" in found["problems"][0]["problem"]
    assert "another version" in found["problems"][1]["problem"]
    assert found["recovery"]["copies_least"] == 1


def test_verify_without_arenas_or_with_no_thread(
    left: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty" / "node0").mkdir(parents=True)
    (tmp_path / "empty" / "node0" / "node.id").touch()
    assert cli.main(["verify", "empty", "--store", str(tmp_path)]) == 2
    assert "has no arena" in capsys.readouterr().err
    assert cli.main(["verify", "tools-run", "--store", str(left), "--threads", "0"]) == 2
    assert "--threads is 0" in capsys.readouterr().err


def test_verify_says_how_far_it_is(
    left: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_moetion.cli.verify._NOTE_EVERY_S", 0.0)
    assert cli.main(["verify", "tools-run", "--store", str(left), "--json"]) == 0
    shown = capsys.readouterr()
    json.loads(shown.out)
    assert re.search(r"^\[moetion\] verified \d+ KiB of \d+ KiB, ", shown.err, re.MULTILINE)


def test_beside_a_job_that_trains_all_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with living_job(tmp_path, mode="popularity") as job:
        newest = []
        for _ in range(8):
            found = document(capsys, "verify", "tools-run", "--store", tmp_path)
            assert found["whole"]
            status = document(capsys, "status", "tools-run", "--store", tmp_path)
            assert [p["pid"] for p in status["nodes"][0]["processes"]] == [job.pid]
            assert status["recovery"]["iteration"] >= status["stable"]
            newest.append(status["newest"])
            (row,) = document(capsys, "list", "--store", tmp_path)["runs"]
            assert (row["in_use"], row["processes"]) == (True, [job.pid])
        assert newest == sorted(newest)
        assert newest[-1] > newest[0]
        assert job.poll() is None


# -- clean ---------------------------------------------------------------------------------------------------------


def test_clean_removes_one_run_and_says_what_it_holds(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = run(capsys, "clean", "tools-run", "--store", store, "--yes")
    assert "the state of all 2 rank(s) at iteration 6, the only copy that is known here" in shown
    assert "removed tools-run, " in shown
    assert os.listdir(store) == ["experts"]


def test_clean_says_that_other_nodes_may_hold_more(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for node in (0, 1):
        (store / "tools-run" / f"node{node}" / "rank00001.arena").unlink()
    (found,) = document(capsys, "clean", "tools-run", "--store", store, "--yes")["runs"]
    assert found["holds"].startswith("the state of rank(s) 0 of 2 at iteration 6, the only copy")
    assert found["holds"].endswith("other nodes may hold more")


def test_clean_without_yes_and_without_a_terminal_removes_nothing(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["clean", "--all", "--store", str(store)]) == 2
    shown = capsys.readouterr()
    assert "tools-run: " in shown.out
    assert "give --yes" in shown.err
    found = document(capsys, "clean", "--all", "--store", store, code=2)
    assert [(r["run_id"], r["removed"], r["kept_because"]) for r in found["runs"]] == [
        ("experts", False, None),
        ("tools-run", False, None),
    ]
    assert set(found["runs"][0]) == {"run_id", "path", "memory_bytes", "holds", "kept_because", "removed"}
    assert sorted(os.listdir(store)) == ["experts", "tools-run"]


@pytest.mark.parametrize(
    ("answer", "left_over"), [("y", []), ("YES", []), ("", ["tools-run"]), ("yeah", ["tools-run"])]
)
def test_clean_asks_on_a_terminal(
    store: Path, answer: str, left_over: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(store / "experts")
    asked: list[str] = []

    def ask(question: str) -> str:
        asked.append(question)
        return answer

    for stream in ("stdin", "stdout"):
        monkeypatch.setattr(getattr(clean.sys, stream), "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", ask)
    assert cli.main(["clean", "--all", "--store", str(store)]) == (2 if left_over else 0)
    assert len(asked) == 1
    assert re.fullmatch(r"remove 1 run\(s\), \d+ KiB\? \[y/N\] ", asked[0])
    assert os.listdir(store) == left_over


def test_clean_refuses_a_living_run_by_name_and_all_passes_it_over(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(store / "tools-run")
    with living_job(store) as job:
        assert cli.main(["clean", "tools-run", "--store", str(store), "--yes"]) == 2
        assert f"run tools-run stays: it is in use by process {job.pid}" in capsys.readouterr().err
        found = document(capsys, "clean", "--all", "--store", store, "--yes")
        assert [(r["run_id"], r["removed"]) for r in found["runs"]] == [("experts", True), ("tools-run", False)]
        assert f"process {job.pid}" in found["runs"][1]["kept_because"]
        assert os.listdir(store) == ["tools-run"]
        assert job.poll() is None
    run(capsys, "clean", "tools-run", "--store", store, "--yes")
    assert os.listdir(store) == []


def test_clean_leaves_a_run_whose_launcher_is_still_there(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_id = f"launched-{os.getpid()}"  # of this test's process alone: others run beside it
    (store / "tools-run").rename(store / run_id)
    sleep = "print('up', flush=True); import sys; sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", sleep, "--rdzv-id", run_id], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as launcher:
        assert launcher.stdout is not None
        launcher.stdout.readline()
        assert cli.main(["clean", run_id, "--store", str(store), "--yes"]) == 2
        shown = capsys.readouterr().err
        assert f"process {launcher.pid}" in shown
        assert "may be about to start it again" in shown
        launcher.kill()
    assert (store / run_id).is_dir()


def test_clean_touches_no_links_and_nothing_of_another_user(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (store / "tools-run").rename(tmp_path / "elsewhere")
    (store / "tools-run").symlink_to(tmp_path / "elsewhere")
    assert cli.main(["clean", "tools-run", "--store", str(store), "--yes"]) == 2
    assert "tools-run is a link" in capsys.readouterr().err
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert cli.main(["clean", "experts", "--store", str(store), "--yes"]) == 2
    assert "only that user may remove it" in capsys.readouterr().err
    assert len(list((tmp_path / "elsewhere").glob("node*/*.arena"))) == 4
    assert len(list((store / "experts").glob("node*/*.arena"))) == 4


def test_a_run_that_starts_after_it_was_looked_at_stays(
    store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clean, "why_not", lambda folder, nodes: None)
    (store / "tools-run").rename(store / "other")
    with living_job(store) as job:
        assert cli.main(["clean", "--all", "--store", str(store), "--yes"]) == 2
        shown = capsys.readouterr()
        assert f"tools-run/node0 is still in use by process {job.pid}" in shown.err
        assert re.findall(r"^removed (\w+),", shown.out, re.MULTILINE) == ["experts", "other"]
        assert os.listdir(store) == ["tools-run"]
        assert job.poll() is None


def test_what_a_cut_short_removal_left_goes_with_the_next(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (store / "tools-run").rename(store / ".removed-0123")
    assert [r["run_id"] for r in document(capsys, "list", "--store", store)["runs"]] == ["experts"]
    run(capsys, "clean", "--all", "--store", store, "--yes")
    assert os.listdir(store) == []


@pytest.mark.parametrize("words", [[], ["tools-run", "--all"], ["mine"]])
def test_clean_needs_one_run_or_all(words: list[str], store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["clean", *words, "--store", str(store), "--yes"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert sorted(os.listdir(store)) == ["experts", "tools-run"]


def test_clean_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "clean", "--all", "--store", tmp_path) == f"nothing to remove in {tmp_path}\n"
