# SPDX-License-Identifier: Apache-2.0
"""``moetion plan``: the cost of a run."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_moetion.config import MoetionConfig
from megatron_moetion.errors import ConfigError
from megatron_moetion.plan.advice import gib, recommend
from megatron_moetion.plan.costs import (
    Cost,
    RankState,
    Resources,
    cost_of_exact,
    cost_of_full,
    cost_of_popularity,
    shortage,
)
from megatron_moetion.select.budget import Limits, experts_per_snapshot

SHOWN_PERIODS = (2, 4, 8, 16, 32)
SHARE = 0.5
"""Share of a link's bandwidth for snapshots: training needs the rest."""
_GRADIENTS = {"fp32": 4, "bf16": 2}
_MOMENTS = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
_SUFFIXES = {"K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}


def add(commands: Any) -> None:
    """Adds the command to the parser's subparsers."""
    plan = commands.add_parser(
        "plan",
        help="the cost of each mode: bytes per snapshot, memory, steps to replay; and a period that fits",
        description="Compute before a run the cost of each mode on one rank and one node, with Adam, and a mode and "
        "period that fit the link and the memory. Counts may end in K, M, G or B (both 10^9).",
    )
    state = plan.add_argument_group("the state of one rank")
    state.add_argument(
        "--dense-parameters",
        required=True,
        metavar="N",
        help="parameters outside experts that this rank's optimizer holds: with the distributed optimizer its share",
    )
    state.add_argument(
        "--expert-parameters", default="0", metavar="N", help="parameters of all its experts together, counted likewise"
    )
    state.add_argument(
        "--experts", type=int, default=0, metavar="E", help="experts of this rank, over all its layers together"
    )
    state.add_argument(
        "--gradients",
        choices=tuple(_GRADIENTS),
        default="fp32",
        help="type that gradients are reduced in; mode 'exact' logs them (default: fp32)",
    )
    for flag in ("--exp-avg-dtype", "--exp-avg-sq-dtype"):
        state.add_argument(
            flag,
            choices=tuple(_MOMENTS),
            default="fp32",
            help="Megatron's flag, with --use-precision-aware-optimizer; main parameters take 4 bytes with each "
            "--main-params-dtype, and with remainders (default: fp32)",
        )
    state.add_argument(
        "--host-state-mib", type=float, default=1.0, metavar="MIB", help="random states, cursors, counters (default: 1)"
    )
    settings = plan.add_argument_group("settings of MoEtion")
    settings.add_argument("--replicas", type=int, default=1, help="as --moetion-replicas (default: 1)")
    settings.add_argument("--ranks-per-node", type=int, default=8, help="default: 8")
    settings.add_argument(
        "--period",
        type=int,
        default=0,
        metavar="P",
        help=f"mode 'exact': look at this period only; default: {', '.join(map(str, SHOWN_PERIODS))} are shown, and "
        "the smallest that fits is recommended",
    )
    settings.add_argument(
        "--experts-per-snapshot", type=int, default=0, metavar="K", help="mode 'popularity'; default: as in a run"
    )
    settings.add_argument(
        "--lost-token-budget",
        type=float,
        metavar="SHARE",
        help="mode 'popularity', as --moetion-lost-token-budget; 0 saves memory for experts",
    )
    resources = plan.add_argument_group("the machine")
    resources.add_argument("--iteration-s", type=float, metavar="S", help="duration of an iteration, in seconds")
    resources.add_argument(
        "--gb-per-s",
        type=float,
        metavar="B",
        help="bandwidth of one rank to other nodes, in 10^9 bytes a second; ranks that share a network card share it",
    )
    resources.add_argument(
        "--share",
        type=float,
        metavar="SHARE",
        help=f"share of it for snapshots; training needs the rest (default: {SHARE})",
    )
    resources.add_argument(
        "--node-memory-gib",
        type=float,
        metavar="GIB",
        help="memory of a node for arenas: the size of /dev/shm, usually half of the node's memory",
    )
    plan.add_argument("--json", action="store_true", help="print the figures as JSON, in bytes")
    plan.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> int:
    state = RankState(
        dense_parameters=_count("--dense-parameters", args.dense_parameters),
        expert_parameters=_count("--expert-parameters", args.expert_parameters),
        num_experts=args.experts,
        gradient_bytes=_GRADIENTS[args.gradients],
        exp_avg_bytes=_MOMENTS[args.exp_avg_dtype],
        exp_avg_sq_bytes=_MOMENTS[args.exp_avg_sq_dtype],
        host_state_bytes=round(_positive("--host-state-mib", args.host_state_mib) * 2**20),
        replicas=args.replicas,
        ranks_per_node=args.ranks_per_node,
    )
    MoetionConfig(mode="exact", period=args.period)  # refuses a period that a run would refuse
    budget = {} if args.lost_token_budget is None else {"lost_token_budget": args.lost_token_budget}
    limits = experts_per_snapshot(
        MoetionConfig(mode="popularity", experts_per_snapshot=args.experts_per_snapshot, **budget), args.experts
    )
    memory = args.node_memory_gib
    resources = Resources(
        link_bytes=_link_bytes(args),
        node_bytes=None if memory is None else round(_positive("--node-memory-gib", memory) * 2**30),
    )
    periods = (args.period,) if args.period else SHOWN_PERIODS
    costs = [cost_of_full(state), cost_of_popularity(state, limits), *(cost_of_exact(state, p) for p in periods)]
    advice = recommend(state, resources, limits, args.period)
    if args.json:
        document = {
            "state": asdict(state),
            "resources": asdict(resources),
            "most_experts_per_snapshot": limits.most,
            "modes": [_figures(c, costs[0], resources) for c in costs],
            "recommendation": asdict(advice),
        }
        print(json.dumps(document))
        return 0
    console = Console()
    console.print(_table(state, costs, resources, limits))
    console.print(advice.sentence, highlight=False, soft_wrap=True)
    return 0


def _figures(cost: Cost, full: Cost, resources: Resources) -> dict[str, Any]:
    missing = shortage(cost, resources)
    return {
        **asdict(cost),
        "rank_bytes": cost.rank.total_bytes,
        "share_of_full": cost.snapshot_bytes / full.snapshot_bytes,
        "fits_link": None if resources.link_bytes is None else not missing.link_bytes,
        "fits_memory": None if resources.node_bytes is None else not missing.node_bytes,
    }


def _table(state: RankState, costs: Sequence[Cost], resources: Resources, limits: Limits) -> Table:
    gradients = next(name for name, size in _GRADIENTS.items() if size == state.gradient_bytes)
    table = Table(
        title=f"{gib(costs[0].snapshot_bytes)} GiB of state a rank, {state.ranks_per_node} rank(s) a node, "
        f"{state.replicas} replica(s), {gradients} gradients; in GiB",
        caption=_caption(state, resources, limits),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("mode", no_wrap=True)
    for name in (
        "snapshot",
        "of\nfull",
        "host,\na rank",
        "=\nstate",
        "+\nlog",
        "+ in\nflight",
        "host,\na node",
        "on\nGPU",
        "replay,\nsteps",
    ):
        table.add_column(name, justify="right", overflow="fold")
    for cost in costs:
        missing = shortage(cost, resources)
        table.add_row(
            f"{cost.mode} P={cost.period}" if cost.period else cost.mode,
            _marked(cost.snapshot_bytes, missing.link_bytes),
            f"{cost.snapshot_bytes / costs[0].snapshot_bytes:.0%}",
            gib(cost.rank.total_bytes),
            gib(cost.rank.state_bytes),
            gib(cost.rank.log_bytes),
            gib(cost.rank.pending_bytes),
            _marked(cost.node_bytes, missing.node_bytes),
            gib(cost.device_bytes),
            str(cost.replayed_steps),
        )
    return table


def _marked(nbytes: int, missing_bytes: int) -> str:
    return f"[red]{gib(nbytes)}[bold]![/bold][/red]" if missing_bytes else gib(nbytes)


def _caption(state: RankState, resources: Resources, limits: Limits) -> str:
    lines = ["replay: worst case; twice that for experts without recent gradients"]
    if state.num_experts:
        more = f", up to {limits.most} for the budget of lost tokens" if limits.most > limits.usual else ""
        lines.insert(0, f"popularity: {limits.usual} of {state.num_experts} experts a snapshot{more}")
    if resources != Resources():
        lines.append("!: does not fit the link, or the memory")
    return "\n".join(lines)


def _link_bytes(args: argparse.Namespace) -> int | None:
    """Bytes that one rank may send in an iteration; None if no flag speaks of the link."""
    if args.iteration_s is None and args.gb_per_s is None:
        if args.share is not None:
            raise ConfigError(f"--share {args.share} is of --iteration-s x --gb-per-s; give these too")
        return None
    if args.iteration_s is None or args.gb_per_s is None:
        raise ConfigError("--iteration-s and --gb-per-s give an iteration's bytes on a link only together; give both")
    share = SHARE if args.share is None else _positive("--share", args.share)
    if share > 1:
        raise ConfigError(f"--share is {share}; it must not be more than 1")
    seconds, rate = _positive("--iteration-s", args.iteration_s), _positive("--gb-per-s", args.gb_per_s)
    return int(seconds * rate * 1e9 * share)


def _count(flag: str, text: str) -> int:
    """A number of parameters, as 1200000, 1.2e6 or 1.2M."""
    factor = _SUFFIXES.get(text[-1:].upper(), 1.0)
    try:
        found = float(text[:-1] if text[-1:].upper() in _SUFFIXES else text) * factor
    except ValueError:
        found = math.nan
    if not math.isfinite(found) or found < 0:
        raise ConfigError(f"{flag} is {text!r}; it must be a number such as 1200000, 1.2e6 or 1.2M")
    return round(found)


def _positive(flag: str, value: float) -> float:
    if not math.isfinite(value) or value <= 0:
        raise ConfigError(f"{flag} is {value}; it must be more than 0")
    return value
