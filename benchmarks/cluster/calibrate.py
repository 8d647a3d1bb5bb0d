# SPDX-License-Identifier: Apache-2.0
"""Fits what the model does not know to some measured configurations, and predicts the others.

Unknown of a layout are six numbers: seconds of a micro batch and of an iteration's rest, the share of a link's rate
that messages see (above 1 where ranks of a host, which are in step here, take turns), the weight of a snapshot's stream
there, and the processor time of a snapshot and of its bytes. They are fitted, by least squares of relative errors, to
iterations without snapshots and to the two arms that send at once, in the configurations that are marked as known.
Bytes come from the links' counters and from the snapshots. All else is the model.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cluster.measure import ARMS, BLOCK_ITERATIONS, SEQUENCE_BYTES, SETTLING_ITERATIONS
from benchmarks.cluster.run import simulate
from benchmarks.cluster.snapshots import Policy, Toll
from benchmarks.cluster.training import Machines, Work
from benchmarks.replication_overhead import HOSTS, RANKS_PER_HOST, STALENESS_CAP
from megatron_moetion.config import MoetionConfig
from megatron_moetion.plan.costs import RankState

RESULTS = Path(__file__).resolve().parent.parent / "results"
RANKS = HOSTS * RANKS_PER_HOST
PROCESSORS = 2
UNLIMITED_BYTES_PER_S = 1.5e9
"""What a link without a limit carries on this kind of machine, about: it is bound by processors."""
COLLECTIVES = 4
"""Of one pass without a pipeline: dispatch and combine, of two layers."""
EXPERTS, CHOSEN = 32, 2
"""Of a rank, and in a snapshot of mode ``popularity``."""
LATENCY_S = 2e-3
"""Assumed: of a message, threads at both ends woken."""
GUESS = {
    "micro_batch_s": 0.1,
    "fixed_s": 0.1,
    "weight": 1.5,
    "link_share": 0.95,
    "snapshot_s": 0.01,
    "byte_s": 3e-9,
}
FITTED = ("off", "full-eager", "popularity-eager")
STEPS, DELTA = 8, 0.05
Found = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes of one layout, from counters. Of a rank."""

    micro_batch_bytes: float
    """That it sends over the network for one micro batch."""
    rest_bytes: float
    """The same once an iteration."""
    state: RankState


def relative(times: Mapping[str, Any], arm: str) -> float:
    """Iteration time of an arm by that without snapshots: the median over cycles."""
    pairs = zip(times[arm]["block_s"], times["off"]["block_s"], strict=True)
    return statistics.median(with_s / without_s for with_s, without_s in pairs)


def iteration_s(times: Mapping[str, Any]) -> float:
    """Without snapshots: the median of blocks."""
    return statistics.median(times["off"]["block_s"])


def micro_batches(configuration: Mapping[str, Any]) -> int:
    """Of a rank in an iteration; one sequence each."""
    return int(configuration["batch"] * configuration["pp"] // RANKS)


def of_sweep(name: str, batch: int, known: Sequence[float | None]) -> list[dict[str, Any]]:
    """A committed sweep of ``replication_overhead`` in the form of ``measure``: PP 2 x EP 2; ``known``: rates."""
    document = json.loads((RESULTS / f"{name}.json").read_text())
    figures, found = {r["name"]: r["value"] for r in document["results"]}, []
    for rate in (None, 100.0, 200.0):
        link = "unlimited" if rate is None else f"{rate:g} Mbit/s"
        off_s = figures[f"{link}: iteration without snapshots"]
        arms: dict[str, dict[str, Any]] = {"off": {"block_s": [off_s] * 3}}
        for arm in ARMS[1:]:
            ends = ("", ", lower end of 95%", ", upper end of 95%")
            arms[arm] = {
                "block_s": [off_s * (1 + figures[f"{link}: {arm}: slowdown{end}"]) for end in ends],
                "snapshot_bytes": figures[f"unlimited: {arm}: bytes a snapshot, all ranks"] * 1e6,
            }
        configuration = {"pp": 2, "ep": 2, "batch": batch, "rate_mbit": rate, "is_known": rate in known}
        found.append({"configuration": configuration, "arms": arms})
    return found


def traffic(known: Sequence[Mapping[str, Any]]) -> Traffic:
    """From two configurations with different batches, on unlimited links."""
    free = [m for m in known if m["configuration"]["rate_mbit"] is None]
    counted = sorted(
        (micro_batches(m["configuration"]), m["arms"]["off"]["link_bytes"] / RANKS_PER_HOST)
        for m in free
        if "link_bytes" in m["arms"]["off"]
    )
    each, rest = float(SEQUENCE_BYTES), 0.0  # where nothing was counted: hidden states alone
    if len(counted) > 1:
        (few, less), (many, more) = counted[0], counted[-1]
        each = (more - less) / (many - few)
        rest = max(0.0, less - few * each)
    full, some = (free[0]["arms"][arm]["snapshot_bytes"] / RANKS for arm in ("full-eager", "popularity-eager"))
    experts = (full - some) / (1 - CHOSEN / EXPERTS)
    state = RankState(
        dense_parameters=round((full - experts) / 12),
        expert_parameters=round(experts / 12),
        num_experts=EXPERTS,
        host_state_bytes=1,
        ranks_per_node=RANKS_PER_HOST,
    )
    return Traffic(micro_batch_bytes=each, rest_bytes=rest, state=state)


def predict(configuration: Mapping[str, Any], arm: str, found: Found, of: Traffic) -> float:
    """Seconds of an iteration, measured as a block is: an arm that sends at once begins anew, the other is settled."""
    rate, count = configuration["rate_mbit"], micro_batches(configuration)
    world = Machines(
        machines=HOSTS,
        ranks=RANKS_PER_HOST,
        processors=PROCESSORS,
        link_bytes_per_s=UNLIMITED_BYTES_PER_S if rate is None else rate * 1e6 / 8 * found["link_share"],
        latency_s=LATENCY_S,
    )
    is_pipeline = configuration["pp"] > 1
    work = Work(
        stages=configuration["pp"],
        micro_batches=count,
        forward_s=found["micro_batch_s"] / 3,
        backward_s=found["micro_batch_s"] * 2 / 3,
        message_bytes=round(of.micro_batch_bytes) if is_pipeline else 0,
        collectives=0 if is_pipeline else COLLECTIVES,
        collective_bytes=of.micro_batch_bytes / (2 * COLLECTIVES),
        sync_bytes=0.0 if is_pipeline else of.rest_bytes,
        fixed_s=found["fixed_s"],
    )
    if arm == "off":
        return simulate(world, work, iterations=2, settling=1).iteration_s
    mode, schedule = arm.split("-")
    config = MoetionConfig(mode=mode, schedule=schedule, staleness_cap=STALENESS_CAP, lost_token_budget=0.0)
    policy = Policy(mode=mode, schedule=schedule, state=of.state, config=config)
    toll = Toll(snapshot_s=found["snapshot_s"], byte_s=found["byte_s"], weight=found["weight"])
    settling = SETTLING_ITERATIONS if schedule == "eager" else 12
    return simulate(world, work, policy, toll, iterations=BLOCK_ITERATIONS, settling=settling).iteration_s


def fit(known: Sequence[Mapping[str, Any]], of: Traffic) -> dict[str, float]:
    """The six numbers, from the configurations that are known."""
    measured = np.log([v for m in known for v in _observed(m)])

    def errors(logs: np.ndarray) -> np.ndarray:
        found = dict(zip(GUESS, np.exp(logs).tolist(), strict=True))
        return np.log([v for m in known for v in _modelled(m, found, of)]) - measured

    return dict(zip(GUESS, np.exp(least_squares(errors, np.log(list(GUESS.values())))).tolist(), strict=True))


def least_squares(errors: Callable[[np.ndarray], np.ndarray], start: np.ndarray) -> np.ndarray:
    """Levenberg and Marquardt's method with differences for derivatives; few unknowns, and noise that is larger."""
    at, now, damping = start, errors(start), 1e-2
    for _ in range(STEPS):
        slopes = np.stack([(errors(at + DELTA * unit) - now) / DELTA for unit in np.eye(len(at))], axis=1)
        for _ in range(6):
            square = slopes.T @ slopes
            step = np.linalg.solve(square + damping * np.diag(np.diag(square) + 1e-9), -slopes.T @ now)
            tried = at + np.clip(step, -1.0, 1.0)
            then = errors(tried)
            if then @ then < now @ now:
                at, now, damping = tried, then, damping / 3
                break
            damping *= 4
        else:
            return at
    return at


def _observed(measured: Mapping[str, Any]) -> list[float]:
    """Seconds without snapshots, then what arms take in these."""
    return [iteration_s(measured["arms"]), *(relative(measured["arms"], arm) for arm in FITTED[1:])]


def _modelled(measured: Mapping[str, Any], found: Found, of: Traffic) -> list[float]:
    times = [predict(measured["configuration"], arm, found, of) for arm in FITTED]
    return [times[0], *(t / times[0] for t in times[1:])]


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One figure of one configuration."""

    configuration: Mapping[str, Any]
    arm: str
    """``off``: seconds of an iteration; else the arm's iteration by that without snapshots."""
    measured: float
    predicted: float
    low: float
    """The least and the most of the cycles that were measured."""
    high: float

    @property
    def error(self) -> float:
        """Relative to what was measured."""
        return self.predicted / self.measured - 1


def compare(measured: Mapping[str, Any], found: Found, of: Traffic) -> list[Compared]:
    """All arms of one configuration."""
    times = {arm: predict(measured["configuration"], arm, found, of) for arm in ARMS}
    compared = []
    for arm in ARMS:
        blocks = measured["arms"][arm]["block_s"]
        if arm != "off":
            blocks = [a / b for a, b in zip(blocks, measured["arms"]["off"]["block_s"], strict=True)]
        compared.append(
            Compared(
                configuration=measured["configuration"],
                arm=arm,
                measured=iteration_s(measured["arms"]) if arm == "off" else relative(measured["arms"], arm),
                predicted=times[arm] if arm == "off" else times[arm] / times["off"],
                low=min(blocks),
                high=max(blocks),
            )
        )
    assert all(math.isfinite(c.predicted) for c in compared)
    return compared
