# SPDX-License-Identifier: Apache-2.0
"""Units, regions and inventories: what is accepted, where bytes lie, what a fingerprint covers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moetion.units import ALIGNMENT_BYTES, Inventory, Region, Role, Unit, UnitKind, align_up, total_bytes


def region(nbytes: int = 100, unit: str = "u", **changes: Any) -> Region:
    plain = Region(unit=unit, tensor="t", role=Role.MASTER, dtype="float32", start=0, nbytes=nbytes, address=4096)
    return replace(plain, **changes)


def dense(*regions: Region, name: str = "u") -> Unit:
    return Unit(name=name, kind=UnitKind.DENSE, regions=regions)


@pytest.mark.parametrize("wrong", [{"nbytes": 0}, {"nbytes": -4}, {"start": -1}, {"address": 0}])
def test_a_region_without_bytes_or_place_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="region t of unit u"):
        region(**wrong)


def test_a_unit_takes_only_its_own_regions() -> None:
    with pytest.raises(ValueError, match="unit u was given regions of another unit"):
        dense(region(), region(unit="other"))


def test_an_expert_has_a_number_and_nothing_else_has() -> None:
    with pytest.raises(ValueError, match="EXPERT with expert=None"):
        Unit(name="u", kind=UnitKind.EXPERT, regions=(region(),))
    with pytest.raises(ValueError, match="DENSE with expert=3"):
        Unit(name="u", kind=UnitKind.DENSE, regions=(region(),), expert=3)


@pytest.mark.parametrize("reserved", [0, 64])
def test_a_unit_has_regions_or_reserved_bytes(reserved: int) -> None:
    regions = (region(),) if reserved else ()
    with pytest.raises(ValueError, match="needs regions or reserved_bytes"):
        Unit(name="u", kind=UnitKind.HOST, regions=regions, reserved_bytes=reserved)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=20))
def test_regions_lie_in_order_aligned_and_apart(sizes: list[int]) -> None:
    unit = dense(*(region(n) for n in sizes))
    ends = [o + n for o, n in zip(unit.offsets, sizes, strict=True)]
    assert all(o % ALIGNMENT_BYTES == 0 for o in unit.offsets)
    assert all(0 <= b - a < ALIGNMENT_BYTES for a, b in zip(ends, (*unit.offsets[1:], unit.nbytes), strict=True))
    assert unit.nbytes % ALIGNMENT_BYTES == 0
    assert total_bytes([unit, unit]) == 2 * unit.nbytes


def test_a_unit_without_regions_has_its_reserved_size() -> None:
    assert Unit(name="host", kind=UnitKind.HOST, regions=(), reserved_bytes=65).nbytes == 128


def test_an_inventory_refuses_one_name_twice() -> None:
    with pytest.raises(ValueError, match=r"units named twice: \['u'\]"):
        Inventory(units=(dense(region()), dense(region())))


def test_an_inventory_numbers_its_units() -> None:
    units = Inventory(units=(dense(region(unit="a"), name="a"), dense(region(unit="b"), name="b")))
    assert units.index == {"a": 0, "b": 1}
    assert units.of_kind(UnitKind.DENSE) == (0, 1)
    assert units.of_kind(UnitKind.EXPERT) == ()
    assert units.nbytes == 2 * align_up(100)


def test_a_fingerprint_covers_meaning_and_not_addresses() -> None:
    def print_of(one: Region) -> str:
        return Inventory(units=(dense(one),)).fingerprint

    assert print_of(region(address=64)) == print_of(region(address=8192))
    changes: list[dict[str, Any]] = [
        {"tensor": "x"}, {"role": Role.EXP_AVG}, {"dtype": "int32"}, {"start": 8}, {"nbytes": 104},
    ]  # fmt: skip
    prints = {print_of(region(**c)) for c in changes} | {print_of(region())}
    assert len(prints) == len(changes) + 1


def test_shards_of_one_name_and_size_differ_in_the_rank_that_has_them() -> None:
    units = (dense(region()), Unit(name="host", kind=UnitKind.HOST, regions=(), reserved_bytes=64))
    first, second = (Inventory(units=units, place=place) for place in ("tp0", "tp1"))
    assert first.fingerprint != second.fingerprint
    assert first.with_host_bytes(8).place == "tp0"
    assert first.with_host_bytes(8).fingerprint != second.with_host_bytes(8).fingerprint
