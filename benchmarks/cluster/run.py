# SPDX-License-Identifier: Apache-2.0
"""One run of the model: training with snapshots of one policy, or without any."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import simpy

from benchmarks.cluster.snapshots import Agreement, Fates, Policy, Ranks, Toll
from benchmarks.cluster.training import Cluster, Machines, Unwatched, Work

SETTLING = 12
"""Iterations that are left out: rhythm, sizes and slots settle."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one run came to. Bytes are those of a rank and an iteration."""

    iteration_s: float
    """The median."""
    iterations_s: tuple[float, ...]
    sent_bytes: float = 0.0
    packed_bytes: float = 0.0
    whole: float = 1.0
    """Share of iterations whose snapshot became whole."""
    lost_iterations: float = 0.0
    """That a fault at a random moment costs, the one that it interrupts by half."""
    lag_s: float = 0.0
    """Time since the end of the iteration T, at a random moment."""
    waited_s: float = 0.0
    """Of an iteration: training waits for snapshots."""
    link_busy: float = 0.0
    """Share of time in which a machine's link carries anything."""


def simulate(
    world: Machines,
    work: Work,
    policy: Policy | None = None,
    toll: Toll | None = None,
    *,
    iterations: int = 24,
    settling: int = SETTLING,
) -> Seen:
    """Run ``settling + iterations`` iterations and look at the last ones."""
    env = simpy.Environment()
    cluster = Cluster(env, world, work)
    agreement = Agreement()
    watchers = [
        Unwatched()
        if policy is None
        else Ranks(env, policy, toll or Toll(), agreement, cluster.links[m], cluster.processors[m], world.ranks)
        for m in range(world.machines)
    ]
    cluster.train(watchers, settling + iterations)
    ends = np.array([0.0, *cluster.ends_s])
    each = np.diff(ends)[settling:]
    busy = cluster.links[0].busy_s / env.now if env.now else 0.0
    if policy is None:
        return Seen(iteration_s=float(np.median(each)), iterations_s=tuple(each.tolist()), link_busy=busy)
    fates = [w.fates for w in watchers if isinstance(w, Ranks)]
    lost, lag = _exposure(ends, fates, settling)
    counted = range(settling + 1, settling + iterations)  # the last one's snapshot has had no time
    whole = set.intersection(*(set(f.whole_s) for f in fates))
    return Seen(
        iteration_s=float(np.median(each)),
        iterations_s=tuple(each.tolist()),
        sent_bytes=fates[0].sent_bytes / len(ends[1:]),
        packed_bytes=fates[0].packed_bytes / len(ends[1:]),
        whole=len(whole & set(counted)) / max(len(counted), 1),
        lost_iterations=lost,
        lag_s=lag,
        waited_s=fates[0].waited_s / len(ends[1:]),
        link_busy=busy,
    )


def _exposure(ends: np.ndarray, fates: list[Fates], settling: int) -> tuple[float, float]:
    """Iterations lost and seconds since T's end, at moments spread evenly over what is counted."""
    held = {i: max(f.whole_s[i] for f in fates) for i in set.intersection(*(set(f.whole_s) for f in fates))}
    held[0] = 0.0
    moments = np.linspace(ends[settling], ends[-1], 64 * (len(ends) - 1 - settling), endpoint=False)
    lost, lags = [], []
    for moment in moments:
        reached = int(np.searchsorted(ends, moment, side="right")) - 1
        newest = max(i for i, since in held.items() if since <= moment)
        share = (moment - ends[reached]) / (ends[reached + 1] - ends[reached])
        lost.append(reached - newest + share)
        lags.append(moment - ends[newest])
    return float(np.mean(lost)), float(np.mean(lags))
