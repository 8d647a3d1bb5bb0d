# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of the accuracy study: what it compares, and what its intervals are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from benchmarks.accuracy_under_faults.repayable import lost_at, share_repaid
from benchmarks.accuracy_under_faults.study import CORE, EXTRA, FIXED_FAULTS, SEEDS, TRAIN_ITERATIONS, arms, jobs
from benchmarks.accuracy_under_faults.tables import BASE, OLD, differences, figures, interval, table
from megatron_moetion.config import MoetionConfig
from megatron_moetion.select.budget import experts_per_snapshot


def test_the_interval_is_students() -> None:
    mean, low, high = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0
    assert (high - 3.0) == pytest.approx(2.776 * math.sqrt(2.5) / math.sqrt(5)) == pytest.approx(3.0 - low)
    assert all(map(math.isnan, interval([1.0])[1:]))


def run(model: str, arm: str, seed: int, loss: float, **more: Any) -> dict[str, Any]:
    curve = {str(i): loss + (TRAIN_ITERATIONS - i) / 100 for i in range(25, TRAIN_ITERATIONS + 1, 25)}
    return {"model": model, "arm": arm, "seed": seed, "loss": loss, "curve": curve, "loads": [[4, 2, 1, 1]], "plt": 0.0,
            **more}  # fmt: skip


def test_differences_are_paired_by_seed() -> None:
    found = {BASE: {s: run("E8", BASE, s, 2.0 + s) for s in (1, 2, 3)}}
    found["default"] = {s: run("E8", "default", s, 2.0 + s + 0.01 * s) for s in (2, 3)}
    assert differences(found, "default") == pytest.approx([0.02, 0.03])
    assert differences(found, OLD) == pytest.approx([len(FIXED_FAULTS) * 50 / 100] * 3), "how much less was done"
    names = [r.name for r in figures({"E8": found})]
    assert "E8: default: difference of loss, upper end" in names
    assert "| default | 2 | +0.0250 (" in table({"E8": found})


def test_a_better_arm_is_no_miss_and_a_worse_one_is() -> None:
    def met(extra: float) -> bool | None:
        found = {BASE: {s: run("E8", BASE, s, 2.0) for s in SEEDS}}
        found["default"] = {s: run("E8", "default", s, 2.0 + extra + 0.001 * s) for s in SEEDS}
        return next(r.met for r in figures({"E8": found}) if r.name.endswith("default: difference of loss, upper end"))

    assert met(0.0)
    assert not met(0.05)


@pytest.mark.parametrize("model", [*CORE, *EXTRA], ids=lambda m: m.name)
def test_every_arm_has_settings_that_are_allowed(model: Any) -> None:
    found = arms(model, SEEDS[0])
    assert found[0].name == BASE
    for arm in found:
        words = (arm.flags or "").split()
        given = {
            k.removeprefix("--moetion-").replace("-", "_"): v for k, v in zip(words[::2], words[1::2], strict=True)
        }
        kinds = {"experts_per_snapshot": int, "staleness_cap": int, "lost_token_budget": float}
        config = MoetionConfig(**{k: kinds.get(k, str)(v) for k, v in given.items()})  # type: ignore[arg-type]
        experts_per_snapshot(config, 2 * model.experts)
        assert all(0 < fault < TRAIN_ITERATIONS - 1 for fault in arm.faults)
    assert [j[0] for j in jobs()[: len(CORE)]] == list(CORE), "the core grid first"


def test_cold_experts_owe_and_hot_ones_can_pay() -> None:
    """One hot expert is captured in every snapshot and drops tokens; the others are stale and never full."""
    loads = np.tile(np.array([[100.0, 10, 10, 8]]), (60, 1, 1)).reshape(60, 1, 4)
    lost = lost_at(loads, capacity=40, fault=30, num_experts=2, cap=8, policy="unsaved-tokens")
    assert lost[0, 0] == 0 < lost[0, 1:].sum()
    own = share_repaid(loads, 1.25, [30], 2, 8, "unsaved-tokens", by_own_debt=True)
    load = share_repaid(loads, 1.25, [30], 2, 8, "unsaved-tokens", by_own_debt=False)
    assert own == 0.0
    assert load == 1.0
