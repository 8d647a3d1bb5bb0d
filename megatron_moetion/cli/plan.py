# SPDX-License-Identifier: Apache-2.0
"""``moetion plan``: the cost of a run, from a model's shape and parallel sizes or from one rank's state."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import Field, fields, replace
from typing import Any

from megatron_moetion.cli.plan_output import Plan, Scenario, show
from megatron_moetion.config import MoetionConfig
from megatron_moetion.errors import ConfigError
from megatron_moetion.plan.advice import recommend
from megatron_moetion.plan.costs import (
    SHARE,
    RankState,
    Resources,
    cost_of_exact,
    cost_of_full,
    cost_of_popularity,
)
from megatron_moetion.plan.parallel import Parallel, busiest, loads
from megatron_moetion.plan.presets import MACHINES, MODELS, Machine
from megatron_moetion.plan.shape import ModelShape
from megatron_moetion.replicate.placement import Placement, place
from megatron_moetion.select.budget import Limits, experts_per_snapshot

SHOWN_PERIODS = (2, 4, 8, 16, 32)
_GRADIENTS = {"fp32": 4, "bf16": 2}
_MOMENTS = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
_SUFFIXES = {"K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
_DESCRIPTION = """\
Compute before a run the cost of each mode on one rank and one node, with Adam,
and the strongest mode that fits the link and the memory. Describe the model in
one of three ways:

  moetion plan --preset deepseek-v3 --nodes 128 ...
  moetion plan --num-layers 32 --hidden-size 4096 ... --nodes 8
      with the flags of pretrain_gpt.py that decide sizes
  moetion plan --dense-parameters 25M --expert-parameters 705M --experts 64
      the state of one rank

Flags of the model may change what a preset says. docs/sizing.md has examples."""


def add(commands: Any) -> None:
    """Adds the command to the parser's subparsers."""
    plan = commands.add_parser(
        "plan",
        help="the cost of each mode: bytes per snapshot, memory, the price of a fault; and the strongest that fits",
        usage="moetion plan (--preset MODEL | --num-layers N ... | --dense-parameters N ...) [--nodes N] [FLAGS]",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    model = plan.add_argument_group("the model, by Megatron's flags; --preset gives those of a published one")
    model.add_argument("--preset", choices=tuple(MODELS), help="its flags, and --use-distributed-optimizer")
    for each in fields(ModelShape):
        _add_field(model, each)
    parallel = plan.add_argument_group("parallel sizes, by Megatron's flags; data parallel is what remains")
    for each in fields(Parallel):
        if each.name != "world_size":
            _add_field(parallel, each)
    _add_rank(plan)
    _add_optimizer(plan)
    _add_settings(plan)
    _add_machine(plan)
    plan.add_argument("--json", action="store_true", help="print the figures as JSON, in bytes")
    plan.set_defaults(run=_plan)


def _add_field(group: Any, of: Field[Any]) -> None:
    """The flag of a field; None where it is not given, so that a preset's value stays."""
    flag, how = of.metadata.get("flag", "--" + of.name.replace("_", "-")), {"help": of.metadata["help"]}
    if isinstance(of.default, bool):
        group.add_argument(flag, dest=of.name, action="store_const", const=not of.default, default=None, **how)
    elif "choices" in of.metadata:
        group.add_argument(flag, dest=of.name, choices=of.metadata["choices"], default=None, **how)
    elif isinstance(of.default, int):
        group.add_argument(flag, dest=of.name, type=int, default=None, metavar="N", **how)
    else:
        group.add_argument(flag, dest=of.name, default=None, metavar="TEXT", **how)


def _add_rank(plan: argparse.ArgumentParser) -> None:
    state = plan.add_argument_group("or the state of one rank, instead of the model and parallel sizes")
    state.add_argument(
        "--dense-parameters",
        metavar="N",
        help="parameters outside experts that this rank's optimizer holds: with the distributed optimizer its share. "
        "Counts may end in K, M, G or B (both 10^9) or T",
    )
    state.add_argument(
        "--expert-parameters", metavar="N", help="parameters of all its experts together, counted likewise"
    )
    state.add_argument("--experts", type=int, metavar="E", help="experts of this rank, over all its layers together")


def _add_optimizer(plan: argparse.ArgumentParser) -> None:
    state = plan.add_argument_group("what is stored of a parameter")
    state.add_argument(
        "--gradients",
        choices=tuple(_GRADIENTS),
        default="fp32",
        help="type that gradients are reduced in; mode 'exact' logs them (default: fp32)",
    )
    state.add_argument(
        "--grad-reduce-in-bf16", dest="gradients", action="store_const", const="bf16", help="Megatron's flag for bf16"
    )
    state.add_argument(
        "--accumulate-allreduce-grads-in-fp32",
        dest="gradients",
        action="store_const",
        const="fp32",
        help="Megatron's flag for fp32",
    )
    state.add_argument(
        "--use-precision-aware-optimizer", action="store_true", help="Megatron's flag; the next two say what it stores"
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


def _add_settings(plan: argparse.ArgumentParser) -> None:
    settings = plan.add_argument_group("settings of MoEtion")
    settings.add_argument("--replicas", type=int, default=1, help="as --moetion-replicas (default: 1)")
    settings.add_argument(
        "--coding-nodes", type=int, default=0, help="as --moetion-coding-nodes (default: whole copies)"
    )
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


def _add_machine(plan: argparse.ArgumentParser) -> None:
    machine = plan.add_argument_group("the machine")
    machine.add_argument("--nodes", type=int, metavar="N", help="needed with a model")
    machine.add_argument(
        "--nodes-per-domain",
        type=int,
        metavar="N",
        help="with a model: consecutive nodes that are lost together, such as those of a rack "
        "(--moetion-failure-domains)",
    )
    machine.add_argument(
        "--machine", choices=tuple(MACHINES), help="its GPUs, half of its memory, one interface, its peak TFLOPS"
    )
    machine.add_argument(
        "--gpus-per-node", "--ranks-per-node", dest="ranks_per_node", type=int, metavar="N", help="default: 8"
    )
    machine.add_argument(
        "--node-memory-gib",
        type=float,
        metavar="GIB",
        help="memory of a node for arenas: the size of /dev/shm, usually half of the node's memory",
    )
    machine.add_argument(
        "--nic-gb-per-s",
        type=float,
        metavar="B",
        help="bandwidth of a node to others for replicas, in 10^9 bytes a second; its ranks share it. A line of "
        "400 Gb/s has 50, and TCP reaches less: measure it with iperf3",
    )
    machine.add_argument(
        "--interfaces",
        type=int,
        metavar="N",
        help="with --machine: its interfaces that replicas travel over; default: 1, the one of GLOO_SOCKET_IFNAME",
    )
    machine.add_argument("--gb-per-s", type=float, metavar="B", help="the same bandwidth of one rank alone")
    machine.add_argument(
        "--share",
        type=float,
        metavar="SHARE",
        help=f"share of it for snapshots; training needs the rest (default: {SHARE})",
    )
    machine.add_argument("--iteration-s", type=float, metavar="S", help="duration of an iteration, in seconds")
    machine.add_argument(
        "--mfu",
        type=float,
        metavar="SHARE",
        help="instead of it, with a model: the share of peak TFLOPS that training reaches, such as 0.4",
    )
    machine.add_argument("--global-batch-size", type=int, metavar="N", help="sequences an iteration, for --mfu")
    machine.add_argument("--seq-length", type=int, metavar="N", help="tokens of a sequence, for --mfu")
    machine.add_argument("--peak-tflops", type=float, metavar="T", help="of one GPU, for --mfu without --machine")


def _plan(args: argparse.Namespace) -> int:
    machine = MACHINES[args.machine] if args.machine else None
    ranks_per_node = args.ranks_per_node
    if ranks_per_node is None:
        ranks_per_node = machine.gpus if machine else 8
    stored: dict[str, Any] = {
        "gradient_bytes": _GRADIENTS[args.gradients],
        "exp_avg_bytes": _MOMENTS[args.exp_avg_dtype],
        "exp_avg_sq_bytes": _MOMENTS[args.exp_avg_sq_dtype],
        "host_state_bytes": round(_positive("--host-state-mib", args.host_state_mib) * 2**20),
        "replicas": args.replicas,
        "coding_nodes": args.coding_nodes,
        "ranks_per_node": ranks_per_node,
    }
    scenario = _scenario(args, machine, stored)
    state = scenario.state if scenario else _one_rank(args, stored)
    MoetionConfig(mode="exact", period=args.period)  # refuses a period that a run would refuse
    config = _popularity(args, state.num_experts)
    limits = experts_per_snapshot(config, state.num_experts)
    resources = _resources(args, machine, ranks_per_node, scenario)
    periods = (args.period,) if args.period else SHOWN_PERIODS
    advice = recommend(state, resources, limits, args.period, lost_token_budget=config.lost_token_budget)
    if advice.mode == "popularity":
        limits = replace(limits, usual=advice.experts)
    elif advice.shortage and not args.period:
        limits = replace(limits, usual=limits.fewest)  # even this does not fit
    if advice.mode == "exact":
        periods = tuple(sorted({*periods, advice.period}))
    costs = (cost_of_full(state), *(cost_of_exact(state, p) for p in periods), *_lossy(state, limits))
    found = Plan(
        state=state,
        resources=resources,
        limits=limits,
        lost_token_budget=config.lost_token_budget,
        costs=costs,
        advice=advice,
        scenario=scenario,
    )
    show(found, as_json=args.json)
    return 0


def _lossy(state: RankState, limits: Limits) -> tuple[Any, ...]:
    return (cost_of_popularity(state, limits),) if state.num_experts else ()


def _popularity(args: argparse.Namespace, num_experts: int) -> MoetionConfig:
    """Settings of mode ``popularity``; more experts a snapshot than there are are a mistake here."""
    if args.experts_per_snapshot > num_experts:
        raise ConfigError(
            f"--experts-per-snapshot {args.experts_per_snapshot} is more than the {num_experts} experts of a rank, "
            f"over all its layers"
        )
    budget = {} if args.lost_token_budget is None else {"lost_token_budget": args.lost_token_budget}
    return MoetionConfig(mode="popularity", experts_per_snapshot=args.experts_per_snapshot, **budget)


def _one_rank(args: argparse.Namespace, stored: Mapping[str, Any]) -> RankState:
    """The state that the flags of one rank say."""
    if args.dense_parameters is None:
        raise ConfigError(
            "give a model: --preset, or --num-layers, --hidden-size and the other flags of pretrain_gpt.py; or the "
            "state of one rank: --dense-parameters, --expert-parameters and --experts"
        )
    for flag in ("--mfu", "--nodes", "--nodes-per-domain"):
        if getattr(args, flag[2:].replace("-", "_")) is not None:
            raise ConfigError(f"{flag} needs a model: --preset, or --num-layers and the other flags of pretrain_gpt.py")
    return RankState(
        dense_parameters=_count("--dense-parameters", args.dense_parameters),
        expert_parameters=_count("--expert-parameters", args.expert_parameters or "0"),
        num_experts=args.experts or 0,
        **stored,
    )


def _scenario(args: argparse.Namespace, machine: Machine | None, stored: Mapping[str, Any]) -> Scenario | None:
    """The model and how it is spread, with the state of its busiest rank; None where flags speak of one rank."""
    given = {
        kind: {f.name: value for f in fields(kind) if (value := getattr(args, f.name, None)) is not None}
        for kind in (ModelShape, Parallel)
    }
    if not args.preset and not given[ModelShape]:
        if spread := [name for name in given[Parallel]]:
            raise ConfigError(
                f"--{spread[0].replace('_', '-')} needs a model: --preset, or --num-layers and the other flags of "
                f"pretrain_gpt.py"
            )
        return None
    for flag in ("--dense-parameters", "--expert-parameters", "--experts"):
        if getattr(args, flag[2:].replace("-", "_")) is not None:
            raise ConfigError(f"{flag} is of one rank's state; with a model it is computed: leave it out")
    if args.nodes is None:
        raise ConfigError("--nodes is needed with a model")
    if args.nodes <= args.replicas:
        raise ConfigError(
            f"{args.replicas} replica(s) need {args.replicas + 1} nodes and there are {args.nodes}: give --replicas "
            f"{max(args.nodes - 1, 0)} or more --nodes"
        )
    if args.nodes < args.coding_nodes:
        raise ConfigError(f"--coding-nodes {args.coding_nodes} needs as many nodes and there are {args.nodes}")
    shape = ModelShape(**{**(MODELS[args.preset] if args.preset else {}), **given[ModelShape]})
    implied = {"use_distributed_optimizer": True} if args.preset else {}
    world = args.nodes * max(stored["ranks_per_node"], 1)
    parallel = Parallel(world_size=world, **{**implied, **given[Parallel]})
    load = busiest(shape, parallel)
    state = RankState(
        dense_parameters=load.dense_owned,
        expert_parameters=load.expert_owned,
        num_experts=load.num_experts,
        **stored,
    )
    return Scenario(
        name=args.preset or "the model",
        shape=shape,
        parallel=parallel,
        nodes=args.nodes,
        loads=loads(shape, parallel),
        busiest=load,
        state=state,
        iteration_s=_iteration_s(args, machine, shape, world),
        mfu=args.mfu,
        placement=_placement(args),
    )


def _placement(args: argparse.Namespace) -> Placement:
    """Of the nodes, by number."""
    per_domain = args.nodes_per_domain
    if per_domain is not None and per_domain < 1:
        raise ConfigError(f"--nodes-per-domain is {per_domain}; it must be at least 1")
    nodes = [str(node) for node in range(args.nodes)]
    domains = [str(n // per_domain) for n in range(args.nodes)] if per_domain else ()
    return place(nodes, args.replicas, domains, args.coding_nodes)


def _iteration_s(args: argparse.Namespace, machine: Machine | None, shape: ModelShape, world: int) -> float | None:
    """Given, or from the share of peak TFLOPS that training reaches; None where neither is known."""
    if args.mfu is None:
        return None if args.iteration_s is None else _positive("--iteration-s", args.iteration_s)
    if args.iteration_s is not None:
        raise ConfigError("--iteration-s and --mfu both say how long an iteration takes; give one")
    if _positive("--mfu", args.mfu) > 1:
        raise ConfigError(f"--mfu is {args.mfu}; it is a share, such as 0.4")
    peak = args.peak_tflops or (machine.peak_tflops if machine else None)
    for flag, value in (
        ("--global-batch-size", args.global_batch_size),
        ("--seq-length", args.seq_length),
        ("--peak-tflops, or --machine,", peak),
    ):
        if value is None:
            raise ConfigError(f"--mfu needs {flag} too")
        _positive(flag, value)
    assert peak is not None
    flops = shape.flops_a_token(args.seq_length) * args.global_batch_size * args.seq_length
    return float(flops / (args.mfu * peak * 1e12 * world))


def _resources(
    args: argparse.Namespace, machine: Machine | None, ranks_per_node: int, scenario: Scenario | None
) -> Resources:
    memory = args.node_memory_gib
    if memory is None and machine:
        memory = machine.memory_gib / 2
    rate = _rank_gb_per_s(args, machine, ranks_per_node)
    seconds = scenario.iteration_s if scenario else args.iteration_s
    said = args.gb_per_s is not None or args.nic_gb_per_s is not None
    if (seconds is None) != (rate is None) and (seconds is not None or said):
        raise ConfigError(
            "an iteration's bytes on a link follow from its duration (--iteration-s or --mfu) and the bandwidth "
            "(--nic-gb-per-s, --gb-per-s or --machine) only together; give both"
        )
    if args.share is not None and (seconds is None or rate is None):
        raise ConfigError(f"--share {args.share} is of --iteration-s x --gb-per-s; give these too")
    share = SHARE if args.share is None else _positive("--share", args.share)
    if share > 1:
        raise ConfigError(f"--share is {share}; it must not be more than 1")
    link = None
    if seconds is not None and rate is not None:
        link = int(_positive("--iteration-s", seconds) * rate * 1e9 * share)
    return Resources(
        link_bytes=link,
        node_bytes=None if memory is None else round(_positive("--node-memory-gib", memory) * 2**30),
    )


def _rank_gb_per_s(args: argparse.Namespace, machine: Machine | None, ranks_per_node: int) -> float | None:
    """Bandwidth of one rank to other nodes; None where nothing is said of it."""
    if args.interfaces is not None:
        if machine is None:
            raise ConfigError(f"--interfaces {args.interfaces} is of a --machine; give it too, or --nic-gb-per-s")
        if not 1 <= args.interfaces <= machine.interfaces:
            raise ConfigError(f"--interfaces is {args.interfaces}; {args.machine} has 1 to {machine.interfaces}")
    given = [flag for flag in ("--gb-per-s", "--nic-gb-per-s", "--interfaces") if _of(args, flag) is not None]
    if len(given) > 1:
        raise ConfigError(f"{given[0]} and {given[1]} both say how fast the network is; give one")
    if args.gb_per_s is not None:
        return _positive("--gb-per-s", args.gb_per_s)
    node = args.nic_gb_per_s
    if node is None and machine:
        node = (args.interfaces or 1) * machine.interface_gb_per_s
    return None if node is None else _positive("--nic-gb-per-s", node) / max(ranks_per_node, 1)


def _of(args: argparse.Namespace, flag: str) -> Any:
    return getattr(args, flag[2:].replace("-", "_"))


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
