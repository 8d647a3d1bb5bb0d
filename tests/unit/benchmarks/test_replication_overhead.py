# SPDX-License-Identifier: Apache-2.0
"""What counts as a snapshot that became whole, and what is not said where none did."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.replication_overhead import LAYOUTS, Layout, headline, whole_in_time


def block(**whole: float) -> dict[str, Any]:
    """Two iterations of 2 s each are counted, from 10 s on; ``whole`` says when snapshots became whole."""
    return {"seconds": [2.0, 2.0], "steps": [[5, 12.0], [6, 14.0]], "whole": whole}


def test_snapshots_count_that_became_whole_while_iterations_were_counted() -> None:
    assert whole_in_time(block()) == 0
    assert whole_in_time(block(**{"3": 9.9, "4": 10.5, "5": 14.0, "6": 14.1})) == 2


def test_every_layout_gives_a_rank_as_many_experts() -> None:
    assert [Layout(pp=pp, ep=ep).experts_per_rank for pp, ep in LAYOUTS] == [32, 32]


def arm(slowdown: float, whole: float) -> dict[str, float]:
    found = {"slowdown": slowdown, "high": slowdown, "whole": whole, "bytes": 10.0, "experts": 2.0}
    return {**found, "experts_share": 0.9}


@pytest.mark.parametrize(("whole", "expected"), [(0.5, 0.6 / 0.5 / 0.01), (0.0, None)])
def test_a_frequency_is_not_known_where_no_snapshot_became_whole(whole: float, expected: float | None) -> None:
    arms = {"full-eager": arm(0.6, 1.0), "full-bubble": arm(0.6, whole), "popularity-bubble": arm(0.01, 1.0)}
    found = {r.name: r.value for r in headline({200.0: arms}, Layout(pp=1, ep=4))}
    assert found["200 Mbit/s: frequency of ours / full-eager"] == pytest.approx(60)
    value = found["200 Mbit/s: frequency of ours / full-bubble"]
    assert value is None if expected is None else value == pytest.approx(expected)
