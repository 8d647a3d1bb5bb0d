# SPDX-License-Identifier: Apache-2.0
"""Our modes on clusters that we do not have: simulated iterations with snapshots, then runs with faults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from benchmarks.cluster.faults import Faults, Protection, simulate_faults
from benchmarks.cluster.papers import MICRO_BATCHES, MTBF_S, NUM_FAULTS
from benchmarks.cluster.run import Seen, simulate
from benchmarks.cluster.snapshots import Policy, Toll
from benchmarks.cluster.sparsity import Published, published
from benchmarks.cluster.training import Machines, Work
from megatron_moetion.config import MoetionConfig
from megatron_moetion.plan.costs import RankState, Resources, smallest_period
from megatron_moetion.plan.presets import MACHINES

BACKWARD = 2.0
"""Time of a backward pass, in forward passes."""
REBUILD_S = 60.0
"""Assumed: until the copies of a lost node are there again."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What modes run on, beside links and processors."""

    name: str
    nodes: int
    pcie_bytes_per_s: float
    """Of a rank, from device to host."""
    node_share: float
    """Of faults that take a node's memory."""


@dataclass(frozen=True, kw_only=True)
class Ours:
    """One mode on one cluster."""

    cluster: str
    mode: str
    bytes_a_parameter: int
    seen: Seen
    slowdown: float
    node_bytes: int
    """Host memory of a node."""
    ettr: Mapping[str, float]
    """By MTBF; with a restart where its key says so."""


def on_their_cluster(given: Mapping[str, float], restart_s: float) -> list[Ours]:
    """Our modes on the cluster of MoEvement's evaluation, at 12 and at 8 bytes a parameter."""
    world = Machines(
        machines=int(given["stages"]),
        ranks=int(given["gpus_a_node"]),
        processors=None,
        link_bytes_per_s=given["node_bytes_per_s"],
    )
    turns = given["micro_batches"] + given["stages"] - 1
    wire_s = 2 * given["message_bytes"] * given["gpus_a_node"] / given["node_bytes_per_s"]
    turn_s = given["iteration_s"] / turns - wire_s
    work = Work(
        stages=int(given["stages"]),
        micro_batches=int(given["micro_batches"]),
        forward_s=turn_s / (1 + BACKWARD),
        backward_s=turn_s * BACKWARD / (1 + BACKWARD),
        message_bytes=int(given["message_bytes"]),
    )
    parameters = given["parameters"] / (given["nodes"] * given["gpus_a_node"])
    found = []
    for each, gradient in ((12, 4), (8, 2)):
        state = RankState(
            dense_parameters=round(parameters * (1 - given["expert_share"])),
            expert_parameters=round(parameters * given["expert_share"]),
            num_experts=int(given["experts_a_rank"]),
            gradient_bytes=gradient,
            exp_avg_bytes=(each - 4) // 2,
            exp_avg_sq_bytes=(each - 4) // 2,
        )
        cluster = Cluster(
            name="12 nodes, A100",
            nodes=int(given["nodes"]),
            pcie_bytes_per_s=given["pcie_bytes_per_s"],
            node_share=1.0,
        )
        found += modes(cluster, world, work, state, restart_s, MTBF_S)
    return found


def at_scale(given: Mapping[str, float], restart_s: float) -> list[Ours]:
    """Our modes on published models, on DGX H100 nodes with one interface for replicas."""
    machine = MACHINES["dgx-h100"]
    found = []
    for run in published():
        world, work = _as_simulated(run, machine.gpus, machine.interface_gb_per_s * 1e9)
        mtbf = MTBF_S | {"trace": given["mtbf_trace_s"] * 16384 / (run.nodes * machine.gpus)}
        cluster = Cluster(
            name=run.name,
            nodes=run.nodes,
            pcie_bytes_per_s=given["pcie_bytes_per_s"],
            node_share=given["node_share"],
        )
        found += modes(cluster, world, work, run.state, restart_s, mtbf)
    return found


def _as_simulated(run: Published, gpus: int, link_bytes_per_s: float) -> tuple[Machines, Work]:
    """One stage on each of two nodes: what a link sees of a longer pipeline is the same."""
    turn_s = run.iteration_s / (MICRO_BATCHES + 1)
    work = Work(
        stages=2,
        micro_batches=MICRO_BATCHES,
        forward_s=turn_s / (1 + BACKWARD),
        backward_s=turn_s * BACKWARD / (1 + BACKWARD),
        message_bytes=4096 * 7168 * 2,
    )
    return Machines(machines=2, ranks=gpus, processors=None, link_bytes_per_s=link_bytes_per_s), work


def modes(
    cluster: Cluster, world: Machines, work: Work, state: RankState, restart_s: float, mtbf_s: Mapping[str, float]
) -> list[Ours]:
    """Each mode with the schedule that it has on a GPU; ``exact`` with the smallest period that fits half the link."""
    off = simulate(world, work, iterations=4, settling=2)
    link = int(world.link_bytes_per_s / world.ranks / 2 * off.iteration_s)
    exact = smallest_period(state, Resources(link_bytes=link))
    found = []
    for mode in ("full", "exact", "popularity"):
        if mode == "exact" and exact is None:
            continue
        period = exact.period if exact is not None and mode == "exact" else 0
        policy = Policy(mode=mode, schedule="steady", state=state, period=period, config=MoetionConfig())
        seen = simulate(
            world, work, policy, Toll(device_bytes_per_s=cluster.pcie_bytes_per_s), iterations=12, settling=12
        )
        protection = Protection(
            iteration_s=seen.iteration_s,
            useful_s=off.iteration_s,
            interval=max(1, round(1 / max(seen.whole, 1e-3))),
            delay_s=max(0.0, seen.lag_s - 0.5 * seen.iteration_s / max(seen.whole, 1e-3)),
        )
        ettr = {}
        for name, mtbf in mtbf_s.items():
            faults = Faults(mtbf_s=mtbf, nodes=cluster.nodes, node_share=cluster.node_share, rebuild_s=REBUILD_S)
            for suffix, seconds in (("", 0.0), (", restart", restart_s)):
                outcome = simulate_faults(replace(protection, restart_s=seconds), faults, number=NUM_FAULTS)
                ettr[name + suffix] = outcome.ettr
        name = f"exact P={period}" if period else mode
        found.append(
            Ours(
                cluster=cluster.name,
                mode=name,
                bytes_a_parameter=state.bytes_a_parameter,
                seen=seen,
                slowdown=seen.iteration_s / off.iteration_s - 1,
                node_bytes=policy.cost.node_bytes,
                ettr=ettr,
            )
        )
    return found
