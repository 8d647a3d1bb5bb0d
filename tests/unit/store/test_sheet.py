# SPDX-License-Identifier: Apache-2.0
"""The sheet in an arena's header: what it says, that arenas have it, and what is no sheet."""

from __future__ import annotations

import base64
import json
import zlib

import pytest

from megatron_moetion.errors import CorruptArena
from megatron_moetion.store.sheet import Span, read_sheet, sheet_of
from megatron_moetion.store.spec import ArenaIdentity, ArenaSpec
from megatron_moetion.units import HOST_UNIT, Inventory, Region, Role, Unit, UnitKind

GUIDE = {"parameters": [{"numel": 40}], "tensors": {"w": 0}}


def inventory(guide: str = json.dumps(GUIDE)) -> Inventory:
    regions = tuple(
        Region(unit="u", tensor=tensor, role=role, dtype="float32", start=start, nbytes=80, address=4096)
        for tensor, role, start in (("w", Role.MASTER, 20), ("w", Role.EXP_AVG, 20), ("b", Role.MASTER, 0))
    )
    unit = Unit(name="u", kind=UnitKind.DENSE, regions=regions)
    host = Unit(name=HOST_UNIT, kind=UnitKind.HOST, regions=(), reserved_bytes=64)
    return Inventory(units=(unit, host), place="tp0 pp1", guide=guide)


def test_a_sheet_has_all_that_an_inventory_has_but_addresses() -> None:
    found = read_sheet(sheet_of(inventory()))
    assert found.place == "tp0 pp1"
    assert found.guide == GUIDE
    assert found.units == (
        (
            Span(tensor="w", role=Role.MASTER, dtype="float32", start=20, nbytes=80),
            Span(tensor="w", role=Role.EXP_AVG, dtype="float32", start=20, nbytes=80),
            Span(tensor="b", role=Role.MASTER, dtype="float32", start=0, nbytes=80),
        ),
        (),
    )


def test_an_arena_has_the_sheet_of_its_owner_and_its_layout_does_not_depend_on_the_guide() -> None:
    identity = ArenaIdentity(run_id="r", owner=0, world_size=1, topology="t", layout="l", mode="full", chunk_bytes=64)
    spec = ArenaSpec.of(identity, inventory(), {"u": 3, HOST_UNIT: 3})
    again = ArenaSpec.from_json(spec.to_json())
    assert again == spec
    assert read_sheet(again.sheet).guide == GUIDE
    assert inventory().fingerprint == inventory(guide="").fingerprint
    assert read_sheet(sheet_of(inventory(guide=""))).guide == {}


def packed(document: object) -> str:
    return base64.b64encode(zlib.compress(json.dumps(document).encode())).decode()


@pytest.mark.parametrize(
    "text", ["", "no base64!", base64.b64encode(b"no zlib").decode(), packed([]), packed({"version": 99})]
)
def test_what_is_no_sheet_is_refused(text: str) -> None:
    with pytest.raises(CorruptArena, match="the sheet of the arena cannot be read"):
        read_sheet(text)


def test_a_role_that_nobody_knows_is_refused() -> None:
    document = json.loads(zlib.decompress(base64.b64decode(sheet_of(inventory()))))
    document["units"][0][0][1] = 77
    with pytest.raises(CorruptArena, match="77"):
        read_sheet(packed(document))


def test_a_few_bytes_that_unpack_to_very_many_are_refused() -> None:
    many = base64.b64encode(zlib.compress(b'{"version":1,"tensors":[' + b"0," * (1 << 22) + b"0]}", 9)).decode()
    assert len(many) < 1 << 14
    with pytest.raises(CorruptArena, match="unpack to more"):
        read_sheet(many)


def test_a_sheet_of_much_repetition_is_read_all_the_same() -> None:
    guide = {"parameters": [{"numel": 40, "views": []}] * 20_000}
    assert read_sheet(sheet_of(inventory(json.dumps(guide)))).guide == guide
