# SPDX-License-Identifier: Apache-2.0
"""Traces are written whole or cut short, read back, measured and drawn; ``moetion report`` ties it together."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_moetion import cli
from megatron_moetion.errors import ConfigError
from megatron_moetion.observe import report
from megatron_moetion.observe.trace import BUFFERED, LANES, Trace, trace_name


def write(folder: Path, rank: int, iterations: int = 4, close: bool = True) -> Path:
    """Iterations of one second; 0.25 s of pipeline in each, and a slice of replication that half overlaps it."""
    path = folder / trace_name(rank, 0)
    trace = Trace(path, rank)
    trace.open()
    for number in range(1, iterations + 1):
        at = 100.0 + number
        trace.add("iteration", at, at + 1, number)
        trace.add("pipeline", at + 0.5, at + 0.75, 1000)
        trace.add("pipeline", at + 0.8, at + 0.9, 0)  # sends nothing between nodes
        trace.add("replication", at + 0.65, at + 0.85, 5000)
    if close:
        trace.close()
    return path


def test_a_trace_is_valid_json_with_named_lanes(tmp_path: Path) -> None:
    events = json.loads(write(tmp_path, 3).read_text())
    names = [e["args"]["name"] for e in events if e["ph"] == "M"]
    assert names == ["rank 3", *LANES]
    spans = [e for e in events if e["ph"] == "X"]
    assert len(spans) == 16
    assert spans[1] == {
        "name": "pipeline", "ph": "X", "ts": 101_500_000.0, "dur": 250_000.0, "pid": 3, "tid": 3,
        "args": {"bytes": 1000},
    }  # fmt: skip


def test_a_trace_that_was_cut_short_is_read_up_to_there(tmp_path: Path) -> None:
    path = write(tmp_path, 0, iterations=BUFFERED)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert 0 < len(report.read_traces(tmp_path)) < 4 * BUFFERED


def test_an_open_trace_shows_what_was_flushed_and_stops_at_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_moetion.observe.trace.EVENTS_MAX", 100)
    write(tmp_path, 0, iterations=500)
    assert len(report.read_traces(tmp_path)) == 100


def test_what_travelled_beside_traffic(tmp_path: Path) -> None:
    write(tmp_path, 0)
    chosen = report.between_iterations(report.read_traces(tmp_path), 2, 3)
    (found,) = report.overlap_with_traffic(chosen)
    assert (found.rank, found.replicated_bytes) == (0, 10_000)
    assert found.replicating_s == pytest.approx(0.4)
    assert found.beside_traffic_s == pytest.approx(0.2)


def test_the_report_draws_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in range(2):
        write(tmp_path, rank)
    assert cli.main(["report", str(tmp_path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["iterations"] == [3, 4]
    assert [r["rank"] for r in document["ranks"]] == [0, 1]
    assert Path(document["chart"]).read_bytes().startswith(b"\x89PNG")
    vector = tmp_path / "chart.svg"
    assert cli.main(["report", str(tmp_path), "-o", str(vector), "--iterations", "2"]) == 0
    assert "<svg" in vector.read_text()
    assert "50.0%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], r"holds no \*.trace.json; train with --moetion-trace-dir"),
        (["--iterations", "7:9"], "no rank has an iteration in 7 to 9; the traces hold 1 to 4"),
        (["-o", "x.bmp"], r"cannot draw x.bmp; its name must end in .pdf, .png, .svg"),
        (["-o", "gantt"], r"cannot draw gantt; its name must end in"),
        (["-o", "/dev/null/gantt.png"], "/dev/null/gantt.png cannot be written: .*; name another file with -o"),
        (["-o", "/proc/gantt.svg"], "/proc/gantt.svg cannot be written"),
        (["--iterations", "3:2"], "the first must not be after the last"),
        (["--iterations", "x"], "must be FIRST:LAST"),
    ],
)
def test_wrong_input_is_exit_code_2_and_one_line(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if arguments:
        write(tmp_path, 0)
    assert cli.main(["report", str(tmp_path), *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.match(f"error: .*{says}", shown.err)
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read: .*Is a directory"),
        (b"\xff\xfe binary", "cannot be read: "),
        (b"[\n[1, 2],\n", r"is not a trace of this version: \[1, 2\]; move it away"),
        (b'[\n{"ph": "X", "ts": 1, "dur": 2, "pid": 3, "tid": 99, "args": {"bytes": 1}},\n', "is not a trace of this"),
    ],
    ids=["folder", "binary", "no event", "unknown lane"],
)
def test_a_file_that_is_no_trace_is_named_in_one_line(
    content: bytes | None, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, 0)
    stranger = tmp_path / "other.trace.json"
    if content is None:
        stranger.mkdir()
    else:
        stranger.write_bytes(content)
    assert cli.main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert re.match(f"error: {stranger} {says}", error)
    assert error.count("\n") == 1


def test_ranks_that_were_killed_before_their_trace_was_written_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 2 is killed with all that it traced still in memory, and traces again after the restart."""
    for rank in range(2):
        write(tmp_path, rank)
    (tmp_path / trace_name(2, 0)).touch()
    (tmp_path / trace_name(3, 0)).touch()
    again = Trace(tmp_path / trace_name(2, 1), 2)
    again.open()
    again.add("iteration", 205, 206, 5)
    again.close()
    assert cli.main(["report", str(tmp_path), "--iterations", "3:4"]) == 0
    assert "not traced in these iterations: rank 2, 3\n" in capsys.readouterr().out
    assert cli.main(["report", str(tmp_path), "--iterations", "3:4", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [r["rank"] for r in document["ranks"]] == [0, 1]
    assert document["ranks_without"] == [2, 3]


def test_traces_without_a_whole_iteration_are_said_so(tmp_path: Path) -> None:
    trace = Trace(tmp_path / trace_name(0, 0), 0)
    trace.open()
    trace.add("replication", 1.0, 2.0, 3)
    trace.close()
    with pytest.raises(ConfigError, match="no whole iteration yet"):
        report.middle_iterations(report.read_traces(tmp_path))
