# SPDX-License-Identifier: Apache-2.0
"""Months of training with faults: what is done, what is done again, and what waits. Placement is the product's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import simpy

from benchmarks.cluster.resources import Waiting
from megatron_moetion.replicate.placement import place


@dataclass(frozen=True, kw_only=True)
class Protection:
    """What a way to keep state comes to in a run without faults, and after one."""

    iteration_s: float
    """With snapshots."""
    useful_s: float
    """The same iteration without any."""
    interval: int = 1
    """Iterations between snapshots that a run can go back to."""
    delay_s: float = 0.0
    """From the end of an iteration until its snapshot can be gone back to."""
    restart_s: float = 0.0
    """From a fault until training goes on at T."""
    replay_share: float = 1.0
    """Time of an iteration that is done again, by that of a new one."""
    replicas: int | None = 1
    """Copies in other nodes' memory; None: no node's loss reaches the state."""


@dataclass(frozen=True, kw_only=True)
class Faults:
    """How a cluster fails."""

    mtbf_s: float
    """Between faults anywhere in it."""
    nodes: int
    node_share: float = 1.0
    """Of faults that take the memory of a node with them."""
    rebuild_s: float = 0.0
    """Until a lost node's replicas are there again; a second loss before that may cost state."""
    disk_interval_s: float = 3600.0
    """Between checkpoints on disk, for state of which all copies are lost."""
    disk_restart_s: float = 600.0

    def __post_init__(self) -> None:
        if self.mtbf_s <= 0 or self.nodes < 1:
            raise ValueError(f"a fault every {self.mtbf_s} s on {self.nodes} nodes; both must be above 0")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of a run with faults."""

    ettr: float
    """Effective training time ratio: the time that the same iterations take without snapshots and faults, by the time
    that they took."""
    faults: int
    lost_iterations: float
    """Done again, by fault."""
    down_s: float
    """By fault."""
    from_disk: int
    """Faults after which all copies of some state were gone."""


class _Run:
    """One run. It goes from fault to fault: between two of them it restarts, then trains."""

    def __init__(self, env: simpy.Environment, protection: Protection, faults: Faults, seed: int) -> None:
        self._env, self._protection, self._faults = env, protection, faults
        self._chance = np.random.default_rng(seed)
        self._placement = place([str(n) for n in range(faults.nodes)], protection.replicas or 0)
        self._incomplete: dict[int, float] = {}  # nodes whose copies are not there, until when
        self._done = 0.0  # iterations up to here were done before
        self.stable = 0.0
        """T."""
        self.lost = self.down_s = 0.0
        self.from_disk = 0

    def train(self, number: int) -> Waiting:
        """Until so many faults have come."""
        restart_s = 0.0
        for _ in range(number):
            until_fault_s = float(self._chance.exponential(self._faults.mtbf_s))
            yield self._env.timeout(until_fault_s)
            self.down_s += min(restart_s, until_fault_s)
            trained_s = max(0.0, until_fault_s - restart_s)
            at = self._after(self.stable, trained_s)
            whole = self._after(self.stable, max(0.0, trained_s - self._protection.delay_s))
            self._done = max(self._done, at)
            restart_s, there = self._protection.restart_s, self.stable
            self.stable = max(there, whole // self._protection.interval * self._protection.interval)
            if self._chance.random() < self._faults.node_share and self._costs_state():
                self.from_disk += 1
                restart_s = self._faults.disk_restart_s
                on_disk = self._faults.disk_interval_s / self._protection.iteration_s
                self.stable = min(self.stable, at // on_disk * on_disk)
            self.lost += at - self.stable

    def _after(self, begin: float, seconds: float) -> float:
        """Iterations that are done after training for so long from here on."""
        again_s = self._protection.iteration_s * self._protection.replay_share
        again = max(0.0, self._done - begin)
        if seconds < again * again_s:
            return begin + seconds / again_s
        return begin + again + (seconds - again * again_s) / self._protection.iteration_s

    def _costs_state(self) -> bool:
        """A node is lost: whether that leaves some state without a copy."""
        if self._protection.replicas is None:
            return False
        node, now = int(self._chance.integers(self._faults.nodes)), self._env.now
        self._incomplete = {n: until for n, until in self._incomplete.items() if until > now}
        self._incomplete[node] = now + self._faults.rebuild_s
        holders = self._placement.holders  # a node is a rank here
        return any({owner, *holders[owner]} <= set(self._incomplete) for owner in self._incomplete)


def simulate_faults(protection: Protection, faults: Faults, *, number: int = 2000, seed: int = 0) -> Outcome:
    """A run with so many faults, each at a random moment; the same seed gives the same faults."""
    env = simpy.Environment()
    run = _Run(env, protection, faults, seed)
    env.run(env.process(run.train(number)))
    return Outcome(
        ettr=run.stable * protection.useful_s / env.now,
        faults=number,
        lost_iterations=run.lost / number,
        down_s=run.down_s / number,
        from_disk=run.from_disk,
    )
