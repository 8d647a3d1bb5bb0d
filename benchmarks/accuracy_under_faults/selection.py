# SPDX-License-Identifier: Apache-2.0
"""What a fault costs under each policy, at equal bytes, on the loads of real runs.

With constant loads l_e and K captures a snapshot, an expert that is captured every t_e snapshots has lost l_e * t_e / 2
tokens at a random fault, and the 1 / t_e add up to K. In turn (t_e = E / K) that is E * sum(l) / (2 K) for all
experts. Most unsaved tokens first makes all l_e * t_e equal, which comes to the same sum. The least possible, with t_e
in proportion to 1 / sqrt(l_e), is sum(sqrt(l))^2 / (2 K). So no policy can gain more than E * sum(l) / sum(sqrt(l))^2
by the skew alone; what is measured also has loads that change and periods that are whole numbers. Our own derivation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.accuracy_under_faults.repayable import Loads, capacity_of, lost_at
from megatron_moetion.select.policies import POLICIES

FAULTS_FROM = 0.6
"""Faults are spread over what is left of the run after this share of it."""
NUM_FAULTS = 10


def gain_bound(loads: Loads) -> float:
    """How many times fewer tokens than in turn any policy can lose by the skew of constant loads."""
    mean = loads[int(FAULTS_FROM * len(loads)) :].mean(axis=0)
    return float(mean.size * mean.sum() / np.sqrt(mean).sum() ** 2)


def lost_by_policy(loads: Loads, factor: float | None, num_experts: int, cap: int) -> dict[str, float]:
    """Mean tokens lost at a fault, by policy; ``num_experts`` (K) counts those of all layers."""
    capacity = capacity_of(loads, factor)
    faults = np.linspace(FAULTS_FROM * len(loads), len(loads), NUM_FAULTS, dtype=int)
    return {
        policy: float(np.mean([lost_at(loads, capacity, int(f), num_experts, cap, policy).sum() for f in faults]))
        for policy in POLICIES
    }


def table(name: str, loads: Loads, factor: float | None, sizes: Sequence[tuple[int, int]]) -> list[str]:
    """Rows of markdown, one for each (K of a layer, staleness cap)."""
    layers, experts = loads.shape[1:]
    capped = np.minimum(loads, capacity_of(loads, factor))
    rows = []
    for k, cap in sizes:
        lost = lost_by_policy(loads, factor, k * layers, cap)
        ratio = lost["sequential"] / lost["unsaved-tokens"]
        cells = [f"{lost[p]:,.0f}" for p in ("unsaved-tokens", "popularity-ema", "sequential")]
        rows.append(
            f"| {name} | {k} of {experts}, {cap} | {' | '.join(cells)} | {ratio:.2f} | {gain_bound(capped):.2f} |"
        )
    return rows
