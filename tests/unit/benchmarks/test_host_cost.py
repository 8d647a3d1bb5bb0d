# SPDX-License-Identifier: Apache-2.0
"""Both ranks take every snapshot in each mode, and figures are what they say."""

from __future__ import annotations

import pytest

from benchmarks.host_cost import MODES, PERIOD, Measured, measure, results_of


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_takes_every_snapshot_and_each_thread_its_time(mode: str) -> None:
    found = measure(mode, layers=2, blocks=2, experts=4)
    assert found.units == 2 * (1 + 4) + 1
    assert found.dropped == 0
    assert sorted(found.cpu_s) == ["holding", "packing", "sending", "training"]
    assert all(len(blocks) == 2 and min(blocks) > 0 for blocks in found.cpu_s.values())


def test_a_figure_is_the_median_of_blocks_by_iteration_and_by_unit() -> None:
    cpu_s = {"training": [0.1, 0.3, 0.2], "packing": [0.4, 0.4, 0.4], "sending": [0.5, 0.1, 0.3]}
    measured = Measured(mode="full", units=50, cpu_s=cpu_s, dropped=3)
    values = {r.name.removeprefix("full, 50 units: "): (r.value, r.unit) for r in results_of(measured)}
    assert values == {
        "CPU": (pytest.approx(900 / PERIOD), "ms/iteration"),  # of 1.0, 0.8 and 0.9 s
        "all threads": (pytest.approx(900_000 / PERIOD / 50), "us/unit/iteration"),
        "training thread": (pytest.approx(200_000 / PERIOD / 50), "us/unit/iteration"),
        "packing thread": (pytest.approx(400_000 / PERIOD / 50), "us/unit/iteration"),
        "sending thread": (pytest.approx(300_000 / PERIOD / 50), "us/unit/iteration"),
        "snapshots dropped": (3.0, ""),
    }
