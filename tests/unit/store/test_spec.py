# SPDX-License-Identifier: Apache-2.0
"""Whose an arena is, and what its header says of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support import identity

from megatron_moetion.errors import CorruptArena, IdentityMismatch
from megatron_moetion.store.spec import ArenaShape, ArenaSpec, Layout, arena_name, check_identity

SMALL, LARGE = 64, 8192
SPEC = ArenaSpec(identity=identity(), units=(("small", 1, SMALL), ("large", 1, LARGE)), slots=((SMALL, 4), (LARGE, 2)))
SHAPE = ArenaShape.of(SPEC)


def test_an_arena_is_named_after_its_owner() -> None:
    assert arena_name(7) == "rank00007.arena"


def test_pages_and_slots_lie_behind_the_header_in_blocks() -> None:
    layout = Layout.of(SPEC)
    assert layout.page_starts == (4096, 8192)
    assert layout.slot_starts.tolist() == [12288, 16384, 20480, 24576, 28672, 40960]
    assert layout.slot_sizes.tolist() == [SMALL] * 4 + [LARGE] * 2
    assert layout.pools == {SMALL: (0, 4), LARGE: (4, 2)}
    assert layout.nbytes == SPEC.nbytes == 53248


@pytest.mark.parametrize(
    ("field", "theirs"),
    [("run_id", "other"), ("world_size", 16), ("topology", "tp1 pp4"), ("mode", "popularity"), ("chunk_bytes", 8192),
     ("format_version", 99)],
)  # fmt: skip
def test_a_stranger_is_refused_and_both_sides_are_named(field: str, theirs: object) -> None:
    # What follows from such a difference, another layout and other slots, is not told.
    found = ArenaSpec(identity=identity(layout="ffff", **{field: theirs}), units=SPEC.units, slots=((SMALL, 5),))
    ours = getattr(SPEC.identity, field)
    with pytest.raises(IdentityMismatch) as refusal:
        check_identity(found, SPEC.identity, SHAPE, "/store/rank00000.arena")
    flag = f"--moetion-{field.replace('_', '-')}" if field in ("run_id", "mode", "chunk_bytes") else field
    assert f"({flag}: the arena has {theirs!r}, this run has {ours!r})" in str(refusal.value)
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize(
    ("units", "slots", "chunk_bytes"),
    [
        ((("small", 1, 1 << 63),), ((SMALL, 1),), 4096),
        ((("small", 1, SMALL),), ((1 << 70, 0),), 4096),
        ((("small", 1, SMALL),), ((SMALL, 1 << 49),), 4096),
        ((("small", 1, SMALL),), (), 1 << 64),
    ],
)
def test_sizes_that_no_memory_has_are_not_computed_with(
    units: tuple[tuple[str, int, int], ...], slots: tuple[tuple[int, int], ...], chunk_bytes: int
) -> None:
    spec = ArenaSpec(identity=identity(chunk_bytes=chunk_bytes), units=units, slots=slots)
    with pytest.raises(CorruptArena, match="larger than any memory"):
        ArenaSpec.from_json(spec.to_json())


def test_another_model_is_refused_in_words() -> None:
    found = ArenaSpec(identity=identity(layout="ffff"), units=SPEC.units, slots=((SMALL, 5),))
    with pytest.raises(
        IdentityMismatch, match=r"\(layout: the model, or how it is spread over ranks, is another one\)"
    ):
        check_identity(found, SPEC.identity, SHAPE, "/store/rank00000.arena")


def test_another_owner_of_this_run_is_no_stranger() -> None:
    other = ArenaSpec(identity=identity(owner=1, layout="its own"), units=(), slots=())
    check_identity(other, SPEC.identity, ArenaShape.of(other), "x")
    check_identity(SPEC, SPEC.identity, SHAPE, "x")


def test_the_same_owner_with_other_slots_is_refused() -> None:
    found = ArenaSpec(identity=identity(), units=SPEC.units, slots=((SMALL, 5),))
    with pytest.raises(IdentityMismatch, match=r"\(slots: room for other captures than this run makes\)"):
        check_identity(found, SPEC.identity, SHAPE, "x")
    with pytest.raises(IdentityMismatch, match=r"room for 2 experts a snapshot, this run wants 0; .*experts-per"):
        check_identity(replace(found, experts=2), SPEC.identity, SHAPE, "x")
    check_identity(ArenaSpec.from_json(replace(SPEC, experts=2).to_json()), SPEC.identity, SHAPE, "x")


def test_a_header_of_another_shape_is_corrupt() -> None:
    endless = SPEC.to_json().decode().replace(f'"slots":[[{SMALL}', '"slots":[[Infinity')
    assert "Infinity" in endless
    deep = b"[" * 100_000 + b"]" * 100_000
    small = b'{"identity": {"run_id": "x"}, "units": [], "slots": []}'
    for document in (b"{}", b"[]", b"not json", b"null", b"7", small, endless.encode(), deep):
        with pytest.raises(CorruptArena, match="format"):
            ArenaSpec.from_json(document)
