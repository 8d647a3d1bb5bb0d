# SPDX-License-Identifier: Apache-2.0
"""What each mode takes, known before a run: bytes a snapshot, memory, steps to replay. Pure.

A made-up rank's state is sliced and given slots by the functions that a run uses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import ceil

from megatron_moetion.coding import Coding, coding_of
from megatron_moetion.config import MAX_PERIOD, MIN_PERIOD
from megatron_moetion.errors import ConfigError
from megatron_moetion.select.budget import Limits, exact_copies, full_copies, popularity_copies
from megatron_moetion.snapshot.gradlog import GradientLog, gradient_log
from megatron_moetion.units import ALIGNMENT_BYTES, HOST_UNIT, Inventory, Region, Role, Unit, UnitKind, total_bytes

GRADIENT_DTYPES = {4: "float32", 2: "bfloat16"}
"""What gradients are reduced in, by bytes an element."""
MOMENT_DTYPES = {4: "float32", 2: "bfloat16", 1: "uint8"}
"""What Adam keeps moments in, by bytes an element; uint8 stands for FP8."""
SHARE = 0.5
"""Share of a link's bandwidth for snapshots: training needs the rest."""
TRIED_PERIODS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Of mode ``exact``, where a run chooses one."""
_MASTER_BYTES = 4
"""An fp32 value; as much with 16 bits of it in the bf16 parameter, or in fp16 beside the parameter."""


@dataclass(frozen=True, kw_only=True)
class RankState:
    """The training state of one rank, with Adam, and where copies of it go. ``ConfigError`` where that cannot be."""

    dense_parameters: int
    """Parameters in every snapshot, as this rank's optimizer holds them: with the distributed optimizer its shard."""
    expert_parameters: int
    """Parameters of all experts together, counted in the same way."""
    num_experts: int
    """Experts of this rank, over all its layers; of one size."""
    gradient_bytes: int = 4
    """Bytes of one element of a gradient."""
    exp_avg_bytes: int = 4
    """Bytes of one element of the first moment; less than 4 with a precision-aware optimizer."""
    exp_avg_sq_bytes: int = 4
    """The same of the second one."""
    host_state_bytes: int = 1 << 20
    """Random states, cursors, the log of the optimizer's steps."""
    replicas: int = 1
    coding_nodes: int = 0
    """See ``coding_of``."""
    ranks_per_node: int = 8

    def __post_init__(self) -> None:
        for name in ("dense_parameters", "expert_parameters", "num_experts", "replicas"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name.replace('_', ' ')}: {getattr(self, name)}; it must not be negative")
        for name in ("host_state_bytes", "ranks_per_node"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name.replace('_', ' ')}: {getattr(self, name)}; it must be at least 1")
        if self.gradient_bytes not in GRADIENT_DTYPES:
            raise ConfigError(f"gradients of {self.gradient_bytes} bytes an element; there are those of 4 and of 2")
        for moment in (self.exp_avg_bytes, self.exp_avg_sq_bytes):
            if moment not in MOMENT_DTYPES:
                raise ConfigError(f"moments of {moment} bytes an element; there are those of 4, of 2 and of 1")
        if not self.dense_parameters + self.expert_parameters:
            raise ConfigError("a rank without parameters has nothing to capture")
        if (self.num_experts > 0) != (self.expert_parameters > 0) or self.num_experts > self.expert_parameters:
            raise ConfigError(
                f"{self.num_experts} experts with {self.expert_parameters} parameters in all of them together; "
                f"give both, or neither for a model without experts"
            )

        coding_of(self.replicas, self.coding_nodes)

    @property
    def coding(self) -> Coding:
        """What other nodes keep."""
        return coding_of(self.replicas, self.coding_nodes)

    @property
    def parameters(self) -> int:
        """All of the rank's parameters."""
        return self.dense_parameters + self.expert_parameters

    @property
    def bytes_a_parameter(self) -> int:
        """Of one capture, gradients aside: the main value and two moments."""
        return _MASTER_BYTES + self.exp_avg_bytes + self.exp_avg_sq_bytes


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """Shared memory of a node that arenas take, by what it is for, in bytes."""

    state_bytes: int
    """One capture of each unit: the least that the stable iteration needs."""
    log_bytes: int
    """Gradients of a period (mode ``exact``)."""
    pending_bytes: int
    """All other slots: for snapshots in flight, or waiting for agreement."""

    @property
    def total_bytes(self) -> int:
        """The sum of the three, in bytes."""
        return self.state_bytes + self.log_bytes + self.pending_bytes

    def times(self, number: float) -> HostMemory:
        """The memory of ``number`` equal arenas."""
        return HostMemory(
            state_bytes=ceil(self.state_bytes * number),
            log_bytes=ceil(self.log_bytes * number),
            pending_bytes=ceil(self.pending_bytes * number),
        )


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one mode takes."""

    mode: str
    period: int = 0
    """Iterations; 0 except in mode ``exact``."""
    experts: int = 0
    """K, experts in a snapshot; 0 except in mode ``popularity``."""
    snapshot_bytes: int
    """Bytes that leave one rank's device in an iteration."""
    sent_bytes: int
    """Bytes that one rank sends to others in an iteration: the snapshot, once a replica."""
    arena: HostMemory
    """The arena of one owner's captures."""
    rank: HostMemory
    """The arenas that one rank opens: its own, and those of the ranks that it is a buddy of."""
    node_bytes: int
    """Host memory of all ranks of one node."""
    device_bytes: int = 0
    """GPU memory where gradients wait to be packed; without a GPU, memory of the process."""
    replayed_steps: int = 0
    """Optimizer steps that a recovery replays, at most, if every slice had gradients recently."""
    replayed_steps_idle: int = 0
    """The same if a slice had none: its capture may be as old as two periods."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a link carries and a node holds, in bytes; None: not known, and no limit."""

    link_bytes: int | None = None
    """What one rank can send in an iteration."""
    node_bytes: int | None = None
    """Host memory of a node."""
    device_bytes: int | None = None
    """GPU memory of a rank that training leaves."""


@dataclass(frozen=True, kw_only=True)
class Shortage:
    """How many bytes are missing; 0: it fits."""

    link_bytes: int = 0
    node_bytes: int = 0
    device_bytes: int = 0

    def __bool__(self) -> bool:
        return bool(self.link_bytes or self.node_bytes or self.device_bytes)


def cost_of_full(state: RankState) -> Cost:
    """Mode ``full``: all state in every snapshot."""
    units = _units(state)
    return _cost(_copies(state), "full", units, full_copies(units), total_bytes(units))


def cost_of_popularity(state: RankState, limits: Limits) -> Cost:
    """Mode ``popularity``: snapshots of ``limits.usual`` experts, and room for ``limits.most``."""
    units = _units(state)
    experts = [u for u in units if u.kind is UnitKind.EXPERT]
    always = total_bytes(u for u in units if u.kind is not UnitKind.EXPERT)
    return _cost(
        _copies(state),
        "popularity",
        units,
        popularity_copies(units, limits.most),
        always + total_bytes(experts[: limits.usual]),
        experts=limits.usual,
    )


def cost_of_exact(state: RankState, period: int) -> Cost:
    """Mode ``exact``: one of ``period`` slices of the state, and all gradients."""
    # Slices do not tell experts from the rest, so one unit stands for both.
    whole = _unit(state, "state", UnitKind.DENSE, state.parameters, with_gradient=True)
    log = gradient_log(Inventory(units=(whole, _host(state))), period)
    return _cost_of_log(_copies(state), log)


def shortage(cost: Cost, resources: Resources) -> Shortage:
    """What is missing for a mode to fit."""

    def missing(taken: int, there: int | None) -> int:
        return 0 if there is None else max(0, taken - there)

    return Shortage(
        link_bytes=missing(cost.sent_bytes, resources.link_bytes),
        node_bytes=missing(cost.node_bytes, resources.node_bytes),
        device_bytes=missing(cost.device_bytes, resources.device_bytes),
    )


def costs_of_exact(state: RankState) -> Iterator[Cost]:
    """Mode ``exact`` with each period that a run may have, the smallest first."""
    return (cost_of_exact(state, period) for period in range(MIN_PERIOD, MAX_PERIOD + 1))


def costs_of(state: RankState, limits: Limits, period: int = 0) -> tuple[Cost, ...]:
    """All that a run may choose from: ``full``, ``exact`` with each period, ``popularity`` with each K.

    ``period``: the only one of mode ``exact``; 0: all. A rank without experts has no mode ``popularity``: it would
    hold the same bytes as ``full``.
    """
    exact = [cost_of_exact(state, period)] if period else costs_of_exact(state)
    return cost_of_full(state), *exact, *(_costs_of_popularity(state, limits) if state.num_experts else ())


def _costs_of_popularity(state: RankState, limits: Limits) -> Iterator[Cost]:
    """Each K that a run may have: experts are of one size, and the arena has room for ``limits.most`` with all of them.

    Units are made for the two ends only; a rank may have thousands.
    """
    least, most = (cost_of_popularity(state, replace(limits, usual=k)) for k in (limits.fewest, limits.usual))
    each = (most.snapshot_bytes - least.snapshot_bytes) // max(limits.usual - limits.fewest, 1)
    for more in range(limits.usual - limits.fewest + 1):
        snapshot_bytes = least.snapshot_bytes + more * each
        yield replace(
            least,
            experts=limits.fewest + more,
            snapshot_bytes=snapshot_bytes,
            sent_bytes=ceil(snapshot_bytes * state.coding.share),
        )


@dataclass(frozen=True, kw_only=True)
class Copies:
    """Where copies of a rank's state go."""

    coding: Coding
    ranks_per_node: int


def costs_of_inventory(
    mode: str, inventory: Inventory, copies: Copies, *, limits: Limits | None = None, period: int = 0
) -> tuple[Cost, ...]:
    """What a mode takes for the units that a run has: ``exact`` with several periods, ``popularity`` with two K.

    Each rank has as many costs of a mode, so that they can be compared. The inventory is that mode's, for ``exact``
    with gradients; ``limits`` are those of the rank's experts. ``period``: the only one. Raises as ``gradient_log``.
    Host state is taken as it is without the modes' own.
    """
    units = inventory.units
    changing = total_bytes(u for u in units if u.kind is not UnitKind.FROZEN)
    if mode == "full":
        return (_cost(copies, mode, units, full_copies(units), changing),)
    if mode == "exact":
        logs = (gradient_log(inventory, p) for p in ((period,) if period else TRIED_PERIODS))
        return tuple(_cost_of_log(copies, log) for log in logs)
    assert limits is not None, "mode popularity takes experts"
    experts = sorted((u.nbytes for u in units if u.kind is UnitKind.EXPERT), reverse=True)
    slots = popularity_copies(units, limits.most)
    taken = ((k, changing - sum(experts) + sum(experts[:k])) for k in (limits.fewest, limits.usual))
    return tuple(_cost(copies, mode, units, slots, nbytes, experts=k) for k, nbytes in taken)


def smallest_period(state: RankState, resources: Resources) -> Cost | None:
    """Mode ``exact`` with the smallest period that fits the link and the memory; None where no period does."""
    return next((c for c in costs_of_exact(state) if not shortage(c, resources)), None)


def _units(state: RankState) -> tuple[Unit, ...]:
    """The rank's state without gradients; experts of unequal size are rounded up to one size."""
    dense = (_unit(state, "dense", UnitKind.DENSE, state.dense_parameters),) if state.dense_parameters else ()
    each = -(-state.expert_parameters // max(state.num_experts, 1))
    experts = (_unit(state, f"experts.{e}", UnitKind.EXPERT, each, expert=e) for e in range(state.num_experts))
    return (*dense, *experts, _host(state))


def _unit(
    state: RankState,
    name: str,
    kind: UnitKind,
    parameters: int,
    *,
    with_gradient: bool = False,
    expert: int | None = None,
) -> Unit:
    roles = {
        Role.MASTER: ("float32", _MASTER_BYTES),
        Role.EXP_AVG: (MOMENT_DTYPES[state.exp_avg_bytes], state.exp_avg_bytes),
        Role.EXP_AVG_SQ: (MOMENT_DTYPES[state.exp_avg_sq_bytes], state.exp_avg_sq_bytes),
    }
    if with_gradient:
        roles[Role.GRAD] = (GRADIENT_DTYPES[state.gradient_bytes], state.gradient_bytes)
    regions = tuple(
        Region(
            unit=name, tensor=name, role=role, dtype=dtype, start=0, nbytes=parameters * size, address=ALIGNMENT_BYTES
        )
        for role, (dtype, size) in roles.items()
    )
    return Unit(name=name, kind=kind, regions=regions, expert=expert)


def _copies(state: RankState) -> Copies:
    return Copies(coding=state.coding, ranks_per_node=state.ranks_per_node)


def _cost_of_log(copies: Copies, log: GradientLog) -> Cost:
    period = len(log.groups)
    return _cost(
        copies,
        "exact",
        log.inventory.units,
        exact_copies(log),
        max(log.group_bytes) + log.log_bytes + total_bytes(log.inventory.units[u] for u in log.always),
        period=period,
        device_bytes=log.log_bytes,
        replayed_steps=period,
        replayed_steps_idle=2 * period,
    )


def _host(state: RankState) -> Unit:
    return Unit(name=HOST_UNIT, kind=UnitKind.HOST, regions=(), reserved_bytes=state.host_state_bytes)


def _cost(
    copies: Copies,
    mode: str,
    units: tuple[Unit, ...],
    slots: Mapping[str, int],
    snapshot_bytes: int,
    *,
    period: int = 0,
    experts: int = 0,
    device_bytes: int = 0,
    replayed_steps: int = 0,
    replayed_steps_idle: int = 0,
) -> Cost:
    once = total_bytes(u for u in units if u.kind is not UnitKind.LOG)
    logs = period * total_bytes(u for u in units if u.kind is UnitKind.LOG)
    everything = sum(slots[u.name] * u.nbytes for u in units)
    arena = HostMemory(state_bytes=once, log_bytes=logs, pending_bytes=everything - once - logs)
    rank = arena.times(1 + copies.coding.share)
    return Cost(
        mode=mode,
        period=period,
        experts=experts,
        snapshot_bytes=snapshot_bytes,
        sent_bytes=ceil(snapshot_bytes * copies.coding.share),
        arena=arena,
        rank=rank,
        node_bytes=rank.total_bytes * copies.ranks_per_node,
        device_bytes=device_bytes,
        replayed_steps=replayed_steps,
        replayed_steps_idle=replayed_steps_idle,
    )
