# SPDX-License-Identifier: Apache-2.0
"""How mode ``exact`` cuts state: slices that cover every parameter once, and for each its gradient."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moetion.errors import UnsupportedState
from megatron_moetion.snapshot.gradlog import GradientLog, gradient_log
from megatron_moetion.store.chains import chain_layout
from megatron_moetion.units import HOST_UNIT, LOG_SUFFIX, Inventory, Region, Role, Unit, UnitKind

CUT = 64
"""Elements that cuts are at multiples of."""
STATE_ROLES = (Role.MASTER, Role.EXP_AVG, Role.EXP_AVG_SQ)
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "int16": 2, "uint8": 1}
PERIODS = st.integers(1, 20)


class Builder:
    """Random units at made-up addresses that do not overlap."""

    def __init__(self, seed: int, largest: int) -> None:
        self.draw = random.Random(seed)
        self.largest = largest
        self.address = 4096
        self.units: list[Unit] = []

    def region(
        self, unit: str, tensor: str, role: Role, elements: int, dtype: str = "float32", start: int = 0
    ) -> Region:
        nbytes = elements * ITEMSIZE[dtype]
        self.address += 64 * self.draw.randint(1, 4) + nbytes
        at = self.address - nbytes
        return Region(
            unit=unit, tensor=tensor, role=role, dtype=dtype, start=start, nbytes=nbytes, address=at,
            at_once=role in (Role.GRAD, Role.BUFFER),
        )  # fmt: skip

    def parameter(self, unit: str, tensor: str) -> list[Region]:
        """One or two spans, as sharded optimizers leave them; perhaps without moments, or with a bf16 gradient."""
        roles = STATE_ROLES[: self.draw.choice((1, 2, 3, 3))]
        gradient = self.draw.choice(("float32", "bfloat16"))
        start = self.draw.choice((0, 0, 64, 977))
        found = []
        for _ in range(self.draw.choice((1, 1, 2))):
            elements = self.draw.randint(1, self.largest)
            found += [self.region(unit, tensor, role, elements, start=start) for role in roles]
            found.append(self.region(unit, tensor, Role.GRAD, elements, gradient, start))
            start += elements + self.draw.randint(0, 100)
        self.draw.shuffle(found)
        return found

    def add(self, name: str, kind: UnitKind, parameters: int, buffers: int, expert: int | None = None) -> None:
        regions = [r for p in range(parameters) for r in self.parameter(name, f"{name}.{p}")]
        regions += [self.region(name, f"{name}.bias{b}", Role.BUFFER, self.draw.randint(1, 40)) for b in range(buffers)]
        self.units.append(Unit(name=name, kind=kind, regions=tuple(regions), layer=3, expert=expert))

    def inventory(self) -> Inventory:
        """Experts, dense units with parameters, buffers or both, frozen units, and a host state, in any order."""
        for number in range(self.draw.randint(0, 3)):
            self.add(f"dense{number}", UnitKind.DENSE, *self.draw.choice(((1, 0), (3, 0), (0, 1), (2, 2))))
        for number in range(self.draw.randint(0, 4)):
            self.add(f"experts.{number}", UnitKind.EXPERT, self.draw.randint(1, 2), 0, expert=number)
        for number in range(self.draw.randint(0, 2)):
            weight = self.region(f"frozen{number}", "w", Role.WEIGHT, self.draw.randint(1, self.largest))
            self.units.append(Unit(name=weight.unit, kind=UnitKind.FROZEN, regions=(weight,)))
        self.units.append(Unit(name=HOST_UNIT, kind=UnitKind.HOST, regions=(), reserved_bytes=1000))
        self.draw.shuffle(self.units)
        return Inventory(units=tuple(self.units))


INVENTORIES = st.builds(
    lambda seed, largest: Builder(seed, largest).inventory(), st.integers(0, 10**6), st.sampled_from((1, 63, 200, 5000))
)


def big_inventory() -> Inventory:
    """A little of everything, and enough of it for equal groups."""
    builder = Builder(0, 90_000)
    builder.add("dense", UnitKind.DENSE, 5, 1)
    for number in range(6):
        builder.add(f"experts.{number}", UnitKind.EXPERT, 2, 0, expert=number)
    return Inventory(units=tuple(builder.units))


def is_parameter(region: Region) -> bool:
    return region.role in (*STATE_ROLES, Role.GRAD)


def with_parameters(inventory: Inventory) -> list[Unit]:
    return [u for u in inventory.units if any(is_parameter(r) for r in u.regions)]


def named(log: GradientLog, numbers: tuple[int, ...]) -> list[str]:
    return [log.inventory.units[n].name for n in numbers]


def spans(region: Region) -> tuple[int, int]:
    """First and last element but one, of the whole parameter."""
    return region.start, region.start + region.nbytes // ITEMSIZE[region.dtype]


@given(INVENTORIES, PERIODS)
def test_slices_cover_every_byte_of_every_parameter_once(inventory: Inventory, period: int) -> None:
    log = gradient_log(inventory, period)
    pieces = [r for u in (*log.log_of, *log.log_of.values()) for r in log.inventory.units[u].regions]
    whole = [r for u in inventory.units for r in u.regions if is_parameter(r)]
    assert sum(r.nbytes for r in pieces) == sum(r.nbytes for r in whole)
    for region in whole:
        mine = [p for p in pieces if region.address <= p.address < region.address + region.nbytes]
        at, start = region.address, region.start
        for piece in sorted(mine, key=lambda p: p.address):
            assert (piece.address, piece.start) == (at, start), "no gap, no overlap"
            assert (piece.tensor, piece.role, piece.dtype, piece.device) == (
                region.tensor, region.role, region.dtype, region.device,
            )  # fmt: skip
            at += piece.nbytes
            start = spans(piece)[1]
        assert at == region.address + region.nbytes


@given(INVENTORIES, PERIODS)
def test_a_log_is_the_gradient_of_the_same_elements(inventory: Inventory, period: int) -> None:
    log = gradient_log(inventory, period)
    for number, other in log.log_of.items():
        unit, gradients = log.inventory.units[number], log.inventory.units[other]
        assert gradients.kind is UnitKind.LOG
        assert gradients.name == unit.name + LOG_SUFFIX
        assert all(r.role is Role.GRAD and r.at_once for r in gradients.regions)
        assert all(r.role in STATE_ROLES and not r.at_once for r in unit.regions)
        masters = [r for r in unit.regions if r.role is Role.MASTER]
        assert [(r.tensor, spans(r)) for r in gradients.regions] == [(r.tensor, spans(r)) for r in masters]
        for moment in unit.regions:
            assert (moment.tensor, spans(moment)) in {(r.tensor, spans(r)) for r in masters}


@given(INVENTORIES, PERIODS)
def test_every_slice_has_one_turn_a_period_in_the_order_of_the_state(inventory: Inventory, period: int) -> None:
    log = gradient_log(inventory, period)
    assert len(log.groups) == period
    turns = [u for group in log.groups for u in group]
    assert sorted(turns) == turns == list(log.log_of)
    assert log.state_bytes == sum(log.group_bytes)
    assert log.log_bytes == sum(log.inventory.units[u].nbytes for u in log.log_of.values())


@given(INVENTORIES, PERIODS)
def test_few_units_are_cut_and_their_slices_are_of_their_kind(inventory: Inventory, period: int) -> None:
    log = gradient_log(inventory, period)
    cut = with_parameters(inventory)
    assert len(cut) <= len(log.log_of) <= len(cut) + period - 1
    slices = [log.inventory.units[u] for u in log.log_of]
    for unit in cut:
        mine = [s for s in slices if s.name.partition("#")[0] == unit.name]
        assert [s.name for s in mine] in ([unit.name], [f"{unit.name}#{i}" for i in range(len(mine))])
        assert all((s.kind, s.layer, s.expert) == (unit.kind, unit.layer, unit.expert) for s in mine)


@given(INVENTORIES, PERIODS)
def test_what_is_no_parameter_stays_as_it_is(inventory: Inventory, period: int) -> None:
    log = gradient_log(inventory, period)
    members = {*log.log_of, *log.log_of.values()}
    others = {u.name: u for i, u in enumerate(log.inventory.units) if i not in members}
    expected = {}
    for unit in inventory.units:
        rest = tuple(r for r in unit.regions if not is_parameter(r))
        if unit.kind is UnitKind.HOST or (rest and len(rest) == len(unit.regions)):
            expected[unit.name] = unit
        elif rest:
            name = f"{unit.name}.buffers"
            regions = tuple(replace(r, unit=name) for r in rest)
            expected[name] = Unit(name=name, kind=UnitKind.DENSE, layer=unit.layer, regions=regions)
    assert others == expected
    assert set(named(log, log.always)) == {n for n, u in expected.items() if u.kind is not UnitKind.FROZEN}


@given(INVENTORIES, PERIODS)
def test_an_arena_knows_the_same_chains(inventory: Inventory, period: int) -> None:
    log = gradient_log(inventory, period)
    layout = chain_layout([(u.name, int(u.kind), u.nbytes) for u in log.inventory.units])
    assert layout.log_of == log.log_of
    assert layout.always == set(log.always)


@given(INVENTORIES, PERIODS)
def test_groups_are_equal_but_for_where_cuts_may_be(inventory: Inventory, period: int) -> None:
    """A cut is at a multiple of 64 elements, and no slice of a span is smaller; each region is padded to 64 bytes."""
    log = gradient_log(inventory, period)
    state = [r for u in inventory.units for r in u.regions if r.role in STATE_ROLES]
    mean = sum(r.nbytes for r in state) / period
    for group, nbytes in zip(log.groups, log.group_bytes, strict=True):
        padding = 63 * sum(len(log.inventory.units[u].regions) for u in group)
        assert nbytes <= mean + 1 + (2 * CUT - 1) * 4 * len(STATE_ROLES) + padding


@pytest.mark.parametrize("period", range(1, 65))
def test_groups_of_much_state_are_within_a_tenth_of_the_mean(period: int) -> None:
    log = gradient_log(big_inventory(), period)
    mean = log.state_bytes / period
    padding = 63 * max(sum(len(log.inventory.units[u].regions) for u in group) for group in log.groups)
    assert mean > 10 * ((2 * CUT - 1) * 4 * len(STATE_ROLES) + padding), "or there is too little of it"
    assert max(log.group_bytes) <= 1.1 * mean
    assert min(log.group_bytes) >= 0.9 * mean


@given(st.integers(0, 10**6), PERIODS)
@settings(max_examples=20)
def test_the_same_state_is_cut_the_same_way(seed: int, period: int) -> None:
    one, other = (gradient_log(Builder(seed, 5000).inventory(), period) for _ in range(2))
    assert one == other
    assert one.inventory.fingerprint == other.inventory.fingerprint


def test_no_cut_leaves_a_slice_of_less_than_64_elements() -> None:
    builder = Builder(0, 1)
    sizes = (64 * 5 + 63, 64 * 3 + 1, 64)
    regions = [
        builder.region("dense", f"w{n}", role, size)
        for n, size in enumerate(sizes)
        for role in (*STATE_ROLES, Role.GRAD)
    ]
    inventory = Inventory(units=(Unit(name="dense", kind=UnitKind.DENSE, regions=tuple(regions)),))
    for period in range(1, 12):
        log = gradient_log(inventory, period)
        pieces = [r for u in log.log_of for r in log.inventory.units[u].regions]
        assert min(r.nbytes // 4 for r in pieces) >= CUT
        assert all(r.start % CUT == 0 for r in pieces)


@given(INVENTORIES, PERIODS)
def test_what_a_step_needs_whole_is_in_one_slice_with_its_gradient(inventory: Inventory, period: int) -> None:
    """Every second parameter; the others are cut as before, and all bytes have a turn."""

    def marked(unit: Unit) -> Unit:
        names = {r.tensor for r in unit.regions if r.role is Role.MASTER}
        whole = set(sorted(names)[::2])
        together = lambda r: f"{r.tensor}+{r.start}" if r.tensor in whole else ""
        return replace(unit, regions=tuple(replace(r, together=together(r)) for r in unit.regions))

    inventory = Inventory(units=tuple(marked(u) for u in inventory.units))
    log = gradient_log(inventory, period)
    whole = [r for u in inventory.units for r in u.regions if r.together and r.role in (*STATE_ROLES, Role.GRAD)]
    found = [r for u in log.inventory.units for r in u.regions if r.together and r.role in (*STATE_ROLES, Role.GRAD)]
    key = lambda r: (r.address, r.nbytes)
    assert sorted(map(key, found)) == sorted(map(key, whole))
    state = sum(r.nbytes for u in inventory.units for r in u.regions if r.role in STATE_ROLES)
    assert sum(r.nbytes for s in log.log_of for r in log.inventory.units[s].regions) == state
    assert sorted(u for group in log.groups for u in group) == sorted(log.log_of)


def test_state_without_one_gradient_is_refused() -> None:
    builder = Builder(0, 1)
    state = [builder.region("dense", "w", role, 100, start=977) for role in STATE_ROLES]
    gradient = builder.region("dense", "w", Role.GRAD, 100, start=977)
    for regions, found in ((state, 0), ([*state, gradient, gradient], 2)):
        inventory = Inventory(units=(Unit(name="dense", kind=UnitKind.DENSE, regions=tuple(regions)),))
        with pytest.raises(
            UnsupportedState, match=f"w from element 977: mode 'exact' needs its gradient and found {found}"
        ):
            gradient_log(inventory, 4)
    alone = Inventory(units=(Unit(name="dense", kind=UnitKind.DENSE, regions=(gradient,)),))
    with pytest.raises(UnsupportedState, match="there is a gradient and no state that it changes"):
        gradient_log(alone, 4)
    elsewhere = builder.region("dense", "w", Role.GRAD, 100, start=1077)
    inventory = Inventory(units=(Unit(name="dense", kind=UnitKind.DENSE, regions=(*state, elsewhere)),))
    with pytest.raises(UnsupportedState):
        gradient_log(inventory, 4)


def test_a_rank_without_parameters_has_nothing_to_cut() -> None:
    inventory = Inventory(units=(Unit(name=HOST_UNIT, kind=UnitKind.HOST, regions=(), reserved_bytes=10),))
    log = gradient_log(inventory, 4)
    assert (log.inventory, log.groups, log.log_of, log.always) == (inventory, ((), (), (), ()), {}, (0,))
    assert (log.state_bytes, log.log_bytes, log.group_bytes) == (0, 0, (0, 0, 0, 0))


def scaled(builder: Builder, unit: str, tensor: str, elements: int, together: str) -> list[Region]:
    """A shard of FP8 and fp16 state, with remainders, that has two scales."""
    types = {Role.MODEL: "bfloat16", Role.REMAINDER: "int16", Role.EXP_AVG: "uint8", Role.EXP_AVG_SQ: "float16"}
    found = [builder.region(unit, tensor, role, elements, dtype) for role, dtype in types.items()]
    found.append(builder.region(unit, tensor, Role.GRAD, elements, "bfloat16"))
    found += [builder.region(unit, f"{tensor}.{n}", Role.SCALE, 1) for n in ("a", "b")]
    return [replace(r, together=together) for r in found]


@pytest.mark.parametrize("period", [1, 2, 4, 9])
def test_what_shares_a_scale_is_never_cut_and_groups_stay_even(period: int) -> None:
    builder = Builder(0, 1)
    units = []
    for number in range(10):
        regions = [r for t in range(12) for r in scaled(builder, f"u{number}", f"u{number}.{t}", 1000, f"{number} {t}")]
        units.append(Unit(name=f"u{number}", kind=UnitKind.DENSE, regions=tuple(regions)))
    inventory = Inventory(units=tuple(units))
    log = gradient_log(inventory, period)
    pieces = [r for u in log.log_of for r in log.inventory.units[u].regions]
    wanted = [r for u in units for r in u.regions if r.role is not Role.GRAD]
    assert sorted((r.address, r.nbytes) for r in pieces) == sorted((r.address, r.nbytes) for r in wanted)
    for number, other in log.log_of.items():
        mine = {r.together for r in log.inventory.units[number].regions}
        assert mine == {r.together for r in log.inventory.units[other].regions}
        assert all(sum(r.role is Role.SCALE for r in pieces if r.together == name) == 2 for name in mine)
    slices = [{r.together for r in log.inventory.units[u].regions} for u in log.log_of]
    assert sum(map(len, slices)) == 120, "each in one slice"
    assert max(log.group_bytes) - min(log.group_bytes) <= 2 * log.state_bytes / 120 + 64 * 100
