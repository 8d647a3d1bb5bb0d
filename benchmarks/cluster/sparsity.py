# SPDX-License-Identifier: Apache-2.0
"""Where sparsity pays: which mode is the strongest that fits, by bytes of a rank, iteration, bandwidth and memory.

The choice is the product's ``choose`` over the product's ``costs_of``. Published models are placed in the picture with
the state of their busiest rank and their iteration, as ``moetion plan`` has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.cluster.run import simulate
from benchmarks.cluster.snapshots import Policy
from benchmarks.cluster.training import Machines, Work
from megatron_moetion.config import MoetionConfig
from megatron_moetion.plan.choice import STRONGEST_FIRST, choose
from megatron_moetion.plan.costs import SHARE, Cost, RankState, Resources, costs_of
from megatron_moetion.plan.parallel import Parallel, busiest
from megatron_moetion.plan.presets import MACHINES, MODELS
from megatron_moetion.plan.shape import ModelShape
from megatron_moetion.select.budget import experts_per_snapshot

EXPERT_SHARE, EXPERTS = 0.9, 16
"""Of a rank's parameters, and how many experts they are: those of large models are 0.88 to 0.99, and 7 to 48."""
RANKS_A_NODE = 8
PARAMETERS = np.geomspace(2e7, 4e9, 400)
"""Of a rank: what its optimizer holds."""
REFERENCE = 1e9
NODE_GB_PER_S = (1.25, 10.0, 50.0)
"""Of one node to others; its ranks share it."""
NODE_GIB = (512, 1024)
"""Memory of a node for arenas."""
BYTES = ((12, 4), (8, 2))
"""Of a parameter: main value and moments; and of a gradient."""
NOTHING = "nothing"
COLOURS = ("#0072B2", "#56B4E9", "#E69F00", "#EEEEEE")


@dataclass(frozen=True, kw_only=True)
class Panel:
    """What one picture shows: the same links and memory, all sizes and iterations."""

    node_gb_per_s: float
    node_gib: int
    bytes_a_parameter: int
    gradient_bytes: int

    def resources(self, iteration_s: float) -> Resources:
        """Of a rank in such an iteration, as ``moetion plan`` reckons them."""
        link = self.node_gb_per_s * 1e9 / RANKS_A_NODE * SHARE * iteration_s
        return Resources(link_bytes=int(link), node_bytes=self.node_gib << 30)

    def state(self, parameters: float) -> RankState:
        """A rank with so many parameters."""
        moments = (self.bytes_a_parameter - 4) // 2
        return RankState(
            dense_parameters=round(parameters * (1 - EXPERT_SHARE)),
            expert_parameters=round(parameters * EXPERT_SHARE),
            num_experts=EXPERTS,
            gradient_bytes=self.gradient_bytes,
            exp_avg_bytes=moments,
            exp_avg_sq_bytes=moments,
            ranks_per_node=RANKS_A_NODE,
        )


PANELS = tuple(
    Panel(node_gb_per_s=rate, node_gib=gib, bytes_a_parameter=each, gradient_bytes=gradient)
    for each, gradient in BYTES
    for gib in NODE_GIB
    for rate in NODE_GB_PER_S
)


def chosen(costs: Sequence[Cost], resources: Resources) -> str:
    """The mode that a run would take; ``NOTHING`` where none fits."""
    choice = choose(costs, resources, lost_token_budget=0.0)
    return choice.mode if choice.fits else NOTHING


@cache
def costs(state: RankState) -> tuple[Cost, ...]:
    """All that a run may choose from."""
    return costs_of(state, experts_per_snapshot(MoetionConfig(), state.num_experts))


def edges(panel: Panel, parameters: npt.NDArray[np.float64]) -> dict[str, npt.NDArray[np.float64]]:
    """For each mode, the shortest iteration in which it fits, in seconds, by a rank's parameters; infinite: none.

    Bytes and memory grow with parameters, so one size is reckoned and the others follow.
    """
    forms = costs(panel.state(REFERENCE))
    times = parameters / REFERENCE
    link, node = panel.resources(1.0).link_bytes or 1, panel.resources(1.0).node_bytes or 0
    found = {}
    for mode in STRONGEST_FIRST:
        sent = np.array([[c.sent_bytes] for c in forms if c.mode == mode])
        held = np.array([[c.node_bytes] for c in forms if c.mode == mode])
        found[mode] = np.where(held * times <= node, sent * times / link, np.inf).min(axis=0)
    return found


# -- published models ----------------------------------------------------------------------------------------

RUNS: tuple[tuple[str, str, int, dict[str, Any], int, int], ...] = (
    ("Mixtral 8x7B, 64 GPUs", "mixtral-8x7b", 8, {"expert_model_parallel_size": 8}, 1024, 4096),
    (
        "Qwen3-235B, 256 GPUs",
        "qwen3-235b-a22b",
        32,
        {
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 8,
            "expert_model_parallel_size": 32,
            "expert_tensor_parallel_size": 1,
            "account_for_embedding_in_pipeline_split": True,
            "account_for_loss_in_pipeline_split": True,
        },
        1024,
        4096,
    ),
    (
        "DeepSeek-V3, 1024 GPUs",
        "deepseek-v3",
        128,
        {
            "pipeline_model_parallel_size": 16,
            "expert_model_parallel_size": 64,
            "pipeline_model_parallel_layout": "Et*3|(tt|)*29m|L",
        },
        8192,
        4096,
    ),
    (
        "DeepSeek-V3, 16384 GPUs",
        "deepseek-v3",
        2048,
        {
            "pipeline_model_parallel_size": 16,
            "expert_model_parallel_size": 64,
            "pipeline_model_parallel_layout": "Et*3|(tt|)*29m|L",
        },
        8192,
        4096,
    ),
)
MFU, MACHINE = 0.3, "dgx-h100"


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published model in a layout of Megatron's, on DGX H100 nodes."""

    name: str
    nodes: int
    state: RankState
    iteration_s: float


def published(bytes_a_parameter: int = 12, gradient_bytes: int = 4) -> tuple[Published, ...]:
    """The runs of ``RUNS``."""
    machine, moments, found = MACHINES[MACHINE], (bytes_a_parameter - 4) // 2, []
    for name, preset, nodes, sizes, batch, length in RUNS:
        shape = ModelShape(**MODELS[preset])
        world = nodes * machine.gpus
        load = busiest(shape, Parallel(world_size=world, use_distributed_optimizer=True, **sizes))
        state = RankState(
            dense_parameters=load.dense_owned,
            expert_parameters=load.expert_owned,
            num_experts=load.num_experts,
            gradient_bytes=gradient_bytes,
            exp_avg_bytes=moments,
            exp_avg_sq_bytes=moments,
            ranks_per_node=machine.gpus,
        )
        flops = batch * length * shape.flops_a_token(length)
        iteration_s = flops / (MFU * machine.peak_tflops * 1e12 * world)
        found.append(Published(name=name, nodes=nodes, state=state, iteration_s=iteration_s))
    return tuple(found)


def shortest_s(panel: Panel, run: Published) -> dict[str, float | None]:
    """For each mode, the shortest iteration in which it fits this run's busiest rank; None: not into the memory."""
    moments = (panel.bytes_a_parameter - 4) // 2
    state = replace(run.state, gradient_bytes=panel.gradient_bytes, exp_avg_bytes=moments, exp_avg_sq_bytes=moments)
    resources, found = panel.resources(1.0), {}
    for mode in STRONGEST_FIRST:
        held = (c for c in costs(state) if c.mode == mode and c.node_bytes <= (resources.node_bytes or 0))
        least = min((c.sent_bytes for c in held), default=None)
        found[mode] = None if least is None else least / (resources.link_bytes or 1)
    return found


# -- the same, as events -------------------------------------------------------------------------------------

CHECKED_PARAMETERS = 1e9
CHECKED = (2.0, 1.2, 0.8, 0.5)


@dataclass(frozen=True, kw_only=True)
class Checked:
    """Mode ``full`` near its edge, simulated."""

    slowdown: float
    whole: float


def checked() -> dict[float, Checked]:
    """Iterations of so many times the shortest one in which ``full`` fits half of 10 GB/s, in a pipeline of two."""
    panel = next(p for p in PANELS if p.node_gb_per_s == 10 and p.bytes_a_parameter == 12)
    state = panel.state(CHECKED_PARAMETERS)
    edge_s = next(c.sent_bytes for c in costs(state) if c.mode == "full") / (panel.resources(1.0).link_bytes or 1)
    world = Machines(machines=2, ranks=RANKS_A_NODE, processors=None, link_bytes_per_s=10e9)
    found = {}
    for share in CHECKED:
        turn_s = share * edge_s / 17
        work = Work(
            stages=2, micro_batches=16, forward_s=turn_s / 3, backward_s=turn_s * 2 / 3, message_bytes=4096 * 4096 * 2
        )
        off = simulate(world, work, iterations=2, settling=1)
        seen = simulate(world, work, Policy(mode="full", schedule="steady", state=state), iterations=16, settling=12)
        found[share] = Checked(slowdown=seen.iteration_s / off.iteration_s - 1, whole=seen.whole)
    return found
