# SPDX-License-Identifier: Apache-2.0
"""What of a trace is in its file although its process was killed."""

from __future__ import annotations

from pathlib import Path

from megatron_moetion.observe.report import read_traces
from megatron_moetion.observe.trace import FLUSH_S, Trace


def iterations(folder: Path) -> list[int]:
    return [bar.value for bar in read_traces(folder) if bar.lane == "iteration"]


def test_what_was_before_a_fault_is_in_the_file_but_for_the_last_second(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "rank00000.attempt0.trace.json", 0)
    trace.open()
    for number in range(1, 41):  # ten iterations a second; then the process is killed
        begin_s = 100 + number * FLUSH_S / 10
        trace.add("compute", begin_s, begin_s + 0.01, 0)
        trace.add("iteration", begin_s, begin_s + FLUSH_S / 10, number)
    found = iterations(tmp_path)
    assert found == list(range(1, len(found) + 1))
    assert 30 <= len(found) <= 40
    trace.close()
    assert iterations(tmp_path) == list(range(1, 41))
