# SPDX-License-Identifier: Apache-2.0
"""What a plan says beforehand is what arenas of real inventories take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import identity

from megatron_moetion.config import MAX_PERIOD, MoetionConfig
from megatron_moetion.errors import ConfigError
from megatron_moetion.plan.costs import RankState, cost_of_exact, cost_of_full, cost_of_popularity
from megatron_moetion.select.budget import Limits, exact_copies, experts_per_snapshot, full_copies, popularity_copies
from megatron_moetion.select.rotation import SPARE_LOGS, STATE_SLOTS
from megatron_moetion.snapshot.gradlog import GradientLog, gradient_log
from megatron_moetion.store.manifest import Page
from megatron_moetion.store.sharedfile import create_arena
from megatron_moetion.store.spec import ArenaSpec
from megatron_moetion.units import HOST_UNIT, Inventory, Region, Role, Unit, UnitKind

DENSE = (300_001, 64, 17_000)
"""Elements of the tensors of one layer's dense part."""
EXPERT = (60_000, 1_003, 60_000)
LAYERS, EXPERTS = 2, 4
HOST_BYTES = 100_000
Roles = dict[Role, tuple[str, int]]
ADAM: Roles = {Role.MASTER: ("float32", 4), Role.EXP_AVG: ("float32", 4), Role.EXP_AVG_SQ: ("float32", 4)}
REMAINDERS: Roles = {Role.MODEL: ("bfloat16", 2), Role.REMAINDER: ("int16", 2)}


def unit(
    name: str, sizes: tuple[int, ...], gradient_bytes: int, expert: int | None = None, state: Roles = ADAM
) -> Unit:
    roles = dict(state)
    if gradient_bytes:
        roles[Role.GRAD] = ({2: "bfloat16", 4: "float32"}[gradient_bytes], gradient_bytes)
    regions = [
        Region(unit=name, tensor=f"{name}.{i}", role=role, dtype=dtype, start=0, nbytes=n * size, address=4096)
        for i, n in enumerate(sizes)
        for role, (dtype, size) in roles.items()
    ]
    if expert is None:  # a router's bias
        regions.append(
            Region(unit=name, tensor="bias", role=Role.BUFFER, dtype="float32", start=0, nbytes=16, address=4096)
        )
    kind = UnitKind.DENSE if expert is None else UnitKind.EXPERT
    return Unit(name=name, kind=kind, regions=tuple(regions), layer=0, expert=expert)


def inventory(gradient_bytes: int = 0, state: Roles = ADAM) -> Inventory:
    """What a small model of several layers would have; no memory is behind it."""
    units = []
    for layer in range(LAYERS):
        units.append(unit(f"layers.{layer}.dense", DENSE, gradient_bytes, None, state))
        units += [unit(f"layers.{layer}.experts.{e}", EXPERT, gradient_bytes, e, state) for e in range(EXPERTS)]
    host = Unit(name=HOST_UNIT, kind=UnitKind.HOST, regions=(), reserved_bytes=HOST_BYTES)
    return Inventory(units=(*units, host))


def like_it(**changes: Any) -> RankState:
    fields: dict[str, Any] = {
        "dense_parameters": LAYERS * sum(DENSE),
        "expert_parameters": LAYERS * EXPERTS * sum(EXPERT),
        "num_experts": LAYERS * EXPERTS,
        "host_state_bytes": HOST_BYTES,
    }
    return RankState(**{**fields, **changes})


def limits(total: int = LAYERS * EXPERTS, **changes: Any) -> Limits:
    return experts_per_snapshot(MoetionConfig(mode="popularity", **changes), total)


def cut(gradient_bytes: int, period: int) -> GradientLog:
    return gradient_log(inventory(gradient_bytes), period)


def slots_bytes(units: Inventory, found: dict[str, int]) -> int:
    return sum(size * count for size, count in ArenaSpec.of(identity(), units, found).slots)


def close(nbytes: int) -> Any:
    return pytest.approx(nbytes, rel=0.01)


def large(**changes: Any) -> RankState:
    """1.2e9 dense parameters and eight experts with 4e8."""
    fields: dict[str, Any] = {"dense_parameters": 1_200_000_000, "expert_parameters": 400_000_000, "num_experts": 8}
    return RankState(**{**fields, **changes})


@pytest.mark.parametrize("period", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("gradient_bytes", [2, 4])
def test_exact_is_what_a_real_inventory_takes(gradient_bytes: int, period: int) -> None:
    log = cut(gradient_bytes, period)
    cost = cost_of_exact(like_it(gradient_bytes=gradient_bytes), period)
    always = sum(log.inventory.units[u].nbytes for u in log.always)
    assert cost.arena.total_bytes == close(slots_bytes(log.inventory, exact_copies(log)))
    assert cost.snapshot_bytes == close(max(log.group_bytes) + log.log_bytes + always)
    assert cost.arena.state_bytes == close(log.state_bytes + always)
    assert cost.arena.log_bytes == close(period * log.log_bytes)
    assert cost.device_bytes == close(log.log_bytes)


@pytest.mark.parametrize(
    ("moments", "sizes"),
    [
        ({Role.EXP_AVG: ("bfloat16", 2), Role.EXP_AVG_SQ: ("bfloat16", 2)}, (2, 2)),
        ({Role.EXP_AVG: ("float16", 2), Role.EXP_AVG_SQ: ("float32", 4)}, (2, 4)),
        ({Role.EXP_AVG: ("uint8", 1), Role.EXP_AVG_SQ: ("uint8", 1)}, (1, 1)),
    ],
)
@pytest.mark.parametrize("master", [{Role.MASTER: ("float32", 4)}, REMAINDERS])
def test_fewer_bytes_of_a_precision_aware_optimizer(master: Roles, moments: Roles, sizes: tuple[int, int]) -> None:
    state = like_it(gradient_bytes=2, exp_avg_bytes=sizes[0], exp_avg_sq_bytes=sizes[1])
    assert state.bytes_a_parameter == 4 + sum(sizes)
    real = inventory(0, master | moments)
    assert cost_of_full(state).snapshot_bytes == close(real.nbytes)
    log = gradient_log(inventory(2, master | moments), 4)
    cost = cost_of_exact(state, 4)
    assert cost.arena.total_bytes == close(slots_bytes(log.inventory, exact_copies(log)))
    assert cost.arena.state_bytes == close(log.state_bytes + sum(log.inventory.units[u].nbytes for u in log.always))


def test_moments_of_other_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="moments of 3 bytes an element"):
        like_it(exp_avg_sq_bytes=3)


def test_full_and_popularity_are_what_a_real_inventory_takes() -> None:
    units = inventory().units
    full = cost_of_full(like_it())
    assert full.arena.total_bytes == close(slots_bytes(inventory(), full_copies(units)))
    assert full.snapshot_bytes == full.arena.state_bytes == close(inventory().nbytes)
    for chosen in (limits(), limits(lost_token_budget=0.0), limits(max_experts_per_snapshot=3)):
        cost = cost_of_popularity(like_it(), chosen)
        assert cost.arena.total_bytes == close(slots_bytes(inventory(), popularity_copies(units, chosen.most)))
        taken = [u for u in units if u.kind is not UnitKind.EXPERT]
        taken += [u for u in units if u.kind is UnitKind.EXPERT][: chosen.usual]
        assert cost.snapshot_bytes == close(sum(u.nbytes for u in taken))
        assert cost.experts == chosen.usual


@pytest.mark.parametrize("mode", ["full", "popularity", "exact"])
def test_digests_and_pages_of_a_real_file_add_less_than_one_percent(mode: str, tmp_path: Path) -> None:
    if mode == "exact":
        log = cut(2, 4)
        spec = ArenaSpec.of(identity(chunk_bytes=1 << 20), log.inventory, exact_copies(log))
        cost = cost_of_exact(like_it(gradient_bytes=2), 4)
    else:
        spec = ArenaSpec.of(
            identity(chunk_bytes=1 << 20),
            inventory(),
            full_copies(inventory().units) if mode == "full" else popularity_copies(inventory().units, 2),
        )
        chosen = replace(limits(), usual=2, most=2)
        cost = cost_of_full(like_it()) if mode == "full" else cost_of_popularity(like_it(), chosen)
    arena = create_arena(tmp_path / "rank00000.arena", spec, Page())
    try:
        assert cost.arena.total_bytes == close(Path(arena.name).stat().st_size)
    finally:
        arena.remove()


def test_bytes_a_parameter() -> None:
    state = large()
    n = state.parameters
    exact = cost_of_exact(state, 8)
    assert exact.snapshot_bytes == close((12 // 8 + 4) * n + n // 2)
    assert exact.arena.total_bytes == close((STATE_SLOTS * 12 + 4 * (8 + SPARE_LOGS)) * n)
    assert exact.device_bytes == close(4 * n)
    assert cost_of_exact(replace(state, gradient_bytes=2), 8).device_bytes == close(2 * n)
    full = cost_of_full(state)
    assert (full.snapshot_bytes, full.arena.total_bytes) == (close(12 * n), close(3 * 12 * n))
    assert (full.arena.log_bytes, full.device_bytes, full.replayed_steps) == (0, 0, 0)
    some = cost_of_popularity(state, limits(8, lost_token_budget=0.0))
    dense, expert = 12 * state.dense_parameters, 12 * state.expert_parameters // 8
    assert some.snapshot_bytes == close(dense + 2 * expert)
    assert some.arena.total_bytes == close(3 * dense + (8 + 2 * 2) * expert)
    usual = cost_of_popularity(state, limits(8))
    assert usual.arena.total_bytes == close(3 * dense + 2 * 8 * expert), (
        "the budget of lost tokens may want half of them"
    )
    assert cost_of_popularity(state, limits(8, max_experts_per_snapshot=8)).arena == full.arena


def test_a_rank_holds_the_arenas_of_its_buddies_and_a_node_those_of_its_ranks() -> None:
    for replicas in (0, 1, 2):
        cost = cost_of_exact(large(replicas=replicas, ranks_per_node=4), 8)
        assert cost.rank == cost.arena.times(1 + replicas)
        assert cost.rank.total_bytes == cost.arena.total_bytes * (1 + replicas)
        assert cost.node_bytes == 4 * cost.rank.total_bytes
        assert cost.sent_bytes == replicas * cost.snapshot_bytes


def test_steps_to_replay() -> None:
    cost = cost_of_exact(large(), 6)
    assert (cost.period, cost.replayed_steps, cost.replayed_steps_idle) == (6, 6, 12)


def test_models_without_experts_and_with_nothing_else() -> None:
    dense = RankState(dense_parameters=1_000_000, expert_parameters=0, num_experts=0)
    assert cost_of_popularity(dense, limits(0)).arena == cost_of_full(dense).arena
    experts = RankState(dense_parameters=0, expert_parameters=1_000_000, num_experts=3)
    assert cost_of_full(experts).snapshot_bytes == close(12_000_000 + (1 << 20))
    tiny = RankState(dense_parameters=1, expert_parameters=0, num_experts=0)
    assert cost_of_exact(tiny, MAX_PERIOD).period == MAX_PERIOD


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dense_parameters": -1}, "dense parameters: -1; it must not be negative"),
        ({"replicas": -1}, "replicas: -1; it must not be negative"),
        ({"ranks_per_node": 0}, "ranks per node: 0; it must be at least 1"),
        ({"host_state_bytes": 0}, "host state bytes: 0; it must be at least 1"),
        ({"gradient_bytes": 8}, "gradients of 8 bytes"),
        ({"dense_parameters": 0, "expert_parameters": 0, "num_experts": 0}, "nothing to capture"),
        ({"num_experts": 0}, "0 experts with 400000000 parameters"),
        ({"expert_parameters": 0}, "8 experts with 0 parameters"),
        ({"expert_parameters": 7}, "8 experts with 7 parameters"),
    ],
)
def test_state_that_cannot_be_is_refused(changes: dict[str, int], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        large(**changes)
