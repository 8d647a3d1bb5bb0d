# SPDX-License-Identifier: Apache-2.0
"""What ``moetion plan`` prints: a table of at most 80 columns and a sentence, or JSON in bytes."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_moetion.plan.advice import Advice
from megatron_moetion.plan.choice import gib
from megatron_moetion.plan.costs import GRADIENT_DTYPES, Cost, RankState, Resources, shortage
from megatron_moetion.plan.parallel import Load, Parallel
from megatron_moetion.plan.shape import ModelShape
from megatron_moetion.replicate.placement import Placement
from megatron_moetion.replicate.survival import exposure, percent, shown
from megatron_moetion.select.budget import Limits

_COUNTS = (("", 1.0), ("K", 1e3), ("M", 1e6), ("B", 1e9), ("T", 1e12))
_GRADIENT_NAMES = {"float32": "fp32", "bfloat16": "bf16"}


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A model and how it is spread over ranks."""

    name: str
    shape: ModelShape
    parallel: Parallel
    nodes: int
    loads: tuple[Load, ...]
    """What a rank of each pipeline stage holds."""
    busiest: Load
    state: RankState
    """Of a rank of the busiest stage."""
    iteration_s: float | None
    mfu: float | None
    placement: Placement
    """Of replicas on the nodes."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that is shown."""

    state: RankState
    resources: Resources
    limits: Limits
    lost_token_budget: float
    costs: Sequence[Cost]
    """The first one is mode ``full``."""
    advice: Advice
    scenario: Scenario | None


def show(plan: Plan, *, as_json: bool) -> None:
    """Print it."""
    if as_json:
        print(json.dumps(_document(plan)))
        return
    console = Console()
    if plan.scenario:
        console.print("\n".join(_heading(plan.scenario, plan.resources)), highlight=False, soft_wrap=True)
    console.print(_table(plan))
    console.print(plan.advice.sentence, highlight=False, soft_wrap=True)


def size(nbytes: float) -> str:
    """Bytes for a table, in binary units: three digits and a letter."""
    value, letters = float(nbytes), iter(" KMGTPE")
    letter = next(letters)
    while value >= 999.5 and (more := next(letters, "")):
        value, letter = value / 1024, more
    digits = 0 if value >= 99.95 or letter == " " else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f}{letter}".strip()


def repeated_iterations(cost: Cost, resources: Resources) -> int | None:
    """Iterations that a fault repeats because a snapshot takes several; None where the mode cannot run so."""
    if not shortage(cost, resources).link_bytes:
        return 0
    if cost.mode == "exact":
        return None
    return -(-cost.sent_bytes // max(resources.link_bytes or 1, 1)) - 1


def _document(plan: Plan) -> dict[str, Any]:
    return {
        "model": _model(plan.scenario) if plan.scenario else None,
        "state": asdict(plan.state),
        "resources": asdict(plan.resources),
        "most_experts_per_snapshot": plan.limits.most,
        "modes": [_figures(c, plan) for c in plan.costs],
        "recommendation": asdict(plan.advice),
    }


def _model(found: Scenario) -> dict[str, Any]:
    return {
        "name": found.name,
        "total_parameters": found.shape.total_parameters,
        "active_parameters": found.shape.active_parameters,
        "prediction_parameters": found.shape.prediction_parameters,
        "nodes": found.nodes,
        "world_size": found.parallel.world_size,
        "dense_shards": found.parallel.dense_shards,
        "expert_shards": found.parallel.expert_shards,
        "stages": [asdict(load) for load in found.loads],
        "busiest_stage": found.busiest.stage,
        "iteration_s": found.iteration_s,
        "survival": _survival(found.placement),
    }


def _survival(placement: Placement) -> dict[str, Any]:
    """Odds that every rank's state survives so many lost nodes, or the loss of one failure domain drawn by chance."""
    found = exposure(placement)
    return {
        "lost_nodes": {str(lost): float(value) for lost, value in shown(placement).items()},
        "lost_domain": float(found.odds) if found.domains else None,
        "nodes_with_two_copies_in_a_domain": len(found.exposed),
    }


def _figures(cost: Cost, plan: Plan) -> dict[str, Any]:
    missing = shortage(cost, plan.resources)
    return {
        **asdict(cost),
        "rank_bytes": cost.rank.total_bytes,
        "share_of_full": cost.snapshot_bytes / plan.costs[0].snapshot_bytes,
        "fits_link": None if plan.resources.link_bytes is None else not missing.link_bytes,
        "fits_memory": None if plan.resources.node_bytes is None else not missing.node_bytes,
        "repeated_iterations": repeated_iterations(cost, plan.resources),
        "lost_token_share": _lost_share(cost, plan),
    }


def _lost_share(cost: Cost, plan: Plan) -> float | None:
    """The most that faults may cost, as a share of the tokens that experts processed; None: no limit."""
    if cost.mode != "popularity":
        return 0.0
    return plan.lost_token_budget or None


def _heading(found: Scenario, resources: Resources) -> list[str]:
    shape, parallel, busy = found.shape, found.parallel, found.busiest
    more = f" and {_count(shape.prediction_parameters)} for multi-token prediction" if shape.mtp_num_layers else ""
    sizes = [
        f"{name} {value}"
        for name, value in (
            ("TP", parallel.tensor_model_parallel_size),
            ("PP", parallel.pipeline_model_parallel_size),
            ("CP", parallel.context_parallel_size),
            ("EP", parallel.expert_model_parallel_size),
            ("ETP", parallel.expert_tensor),
        )
    ]
    owned = f"the state of {_count(busy.dense_owned)} dense parameters ({_share(parallel.dense_shards)})"
    if busy.num_experts:
        experts = f"{_count(busy.expert_owned)} of its {busy.num_experts} experts"
        owned += f" and {experts} ({_share(parallel.expert_shards)})"
    busiest = f"ranks of stage {busy.stage} of 0 to {len(found.loads) - 1} hold most: {owned}"
    lines = [
        f"{found.name}: {_count(shape.total_parameters)} parameters, {_count(shape.active_parameters)} active{more}",
        f"{parallel.world_size} GPUs on {found.nodes} nodes: {', '.join(sizes)}",
        busiest,
    ]
    if found.iteration_s is not None:
        mfu = f" (MFU {found.mfu:.0%})" if found.mfu else ""
        link = "" if resources.link_bytes is None else f"; a rank may send {gib(resources.link_bytes)} GiB in it"
        lines.append(f"iteration: {found.iteration_s:.3g} s{mfu}{link}")
    return [wrapped for line in lines for wrapped in textwrap.wrap(line, 80)]


def _share(shards: int) -> str:
    return f"a share of {shards}" if shards > 1 else "all of them"


def _count(number: float) -> str:
    """Of parameters, with three digits, as in the names of models: 46.7B."""
    letter, factor = next((one for one in _COUNTS if number / one[1] < 999.5), _COUNTS[-1])
    return f"{number / factor:.3g}{letter}"


def _table(plan: Plan) -> Table:
    state, resources = plan.state, plan.resources
    gradients = _GRADIENT_NAMES[GRADIENT_DTYPES[state.gradient_bytes]]
    table = Table(
        title=f"{size(plan.costs[0].snapshot_bytes)} bytes of state a rank, {state.ranks_per_node} rank(s) a node, "
        f"{_copies(state)}, {gradients} gradients",
        caption=_caption(plan),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("mode", no_wrap=True)
    for name in (
        "snap-\nshot",
        "of\nfull",
        "sent",
        "host,\na rank",
        "host,\na node",
        "on\nGPU",
        "itera-\ntions",
        "steps",
        "tokens",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for cost in plan.costs:
        missing = shortage(cost, resources)
        again, lost = repeated_iterations(cost, resources), _lost_share(cost, plan)
        table.add_row(
            (f"{cost.mode} P={cost.period}" if cost.period else cost.mode) + (" *" if _is_advised(cost, plan) else ""),
            size(cost.snapshot_bytes),
            f"{cost.snapshot_bytes / plan.costs[0].snapshot_bytes:.0%}",
            _marked(cost.sent_bytes, missing.link_bytes),
            size(cost.rank.total_bytes),
            _marked(cost.node_bytes, missing.node_bytes),
            size(cost.device_bytes),
            "-" if again is None else str(again),
            f"{cost.replayed_steps}-{cost.replayed_steps_idle}" if cost.replayed_steps else "0",
            "no limit" if lost is None else f"{lost:.3g}" if not lost else f"{lost:.2%}",
        )
    return table


def _copies(state: RankState) -> str:
    """What other nodes keep."""
    coding = state.coding
    return f"any {coding.data} of {coding.holders} fragments" if coding.is_on else f"{state.replicas} replica(s)"


def _odds(placement: Placement) -> list[str]:
    values = ", ".join(f"{percent(value)} of {lost}" for lost, value in shown(placement).items())
    lines = [f"Odds that all state survives lost nodes: {values}"]
    found = exposure(placement)
    if found.domains:
        kept = "fragments" if placement.coding.is_on else "copies"
        two = f"; {len(found.exposed)} nodes have two {kept} in one" if found.exposed else ""
        lines.append(f"and one of {found.domains} failure domains: {percent(found.odds)}{two}")
    return lines


def _is_advised(cost: Cost, plan: Plan) -> bool:
    return (cost.mode, cost.period) == (plan.advice.mode, plan.advice.period)


def _marked(nbytes: int, missing_bytes: int) -> str:
    return f"[red]{size(nbytes)}[bold]![/bold][/red]" if missing_bytes else size(nbytes)


def _caption(plan: Plan) -> str:
    state, limits = plan.state, plan.limits
    lines = []
    if state.num_experts:
        more = f", up to {limits.most} for the budget of lost tokens" if limits.most > limits.usual else ""
        lines.append(f"popularity: {limits.usual} of {state.num_experts} experts a snapshot{more}")
    lines += [
        "K, M, G, T: binary units; snapshot, sent: bytes of a rank an iteration",
        "The last three are the price of a fault: iterations run again, besides",
        "the one or two in flight; optimizer steps replayed, the larger number for",
        "experts without recent gradients; share of experts' tokens lost, at most",
    ]
    if state.replicas:
        lost = "node" if state.replicas == 1 else f"{state.replicas} nodes"
        held = "fragments" if state.coding.is_on else "copies"
        lines.append(f"Any {lost} of {state.coding.holders + 1} that hold each other's {held} may be lost at once")
        lines += _odds(plan.scenario.placement) if plan.scenario else []
    else:
        lines.append("Without replicas a lost node costs all that is in memory")
    marks = ["*: recommended"] if plan.advice.mode else []
    if plan.resources != Resources():
        marks.append("!: does not fit the link, or the memory")
    if marks:
        lines.append("; ".join(marks))
    return "\n".join(lines)
