# SPDX-License-Identifier: Apache-2.0
"""Pictures come from committed results, and speak in words."""

from __future__ import annotations

from pathlib import Path

from benchmarks import exact_mode, pictures, replication_overhead
from benchmarks.accuracy_under_faults import tables
from benchmarks.accuracy_under_faults.study import CORE, arms


def test_every_picture_of_committed_results_can_be_drawn(tmp_path: Path) -> None:
    drawn = pictures.draw_all(tmp_path)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    images = {path.name for path in (pictures.ROOT / "docs" / "images").glob("*.png")}
    assert images - {path.name for path in drawn} == {"quickstart.png", "schedule.png"}


def test_every_arm_has_words() -> None:
    assert set(replication_overhead.IN_PICTURES) == set(replication_overhead.ARMS) - {"off"}
    studied = {arm.name for model in CORE for arm in arms(model, 2)}
    assert set(tables.IN_PICTURES) == (studied - {tables.BASE}) | {tables.OLD}
    assert [exact_mode.in_words(model) for model in exact_mode.MODELS] == [
        "8 experts, fp32 gradients", "64 experts, fp32 gradients", "64 experts, bf16 gradients",
    ]  # fmt: skip
