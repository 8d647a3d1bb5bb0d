# SPDX-License-Identifier: Apache-2.0
"""Which units of a rank are put together at a time, and what cannot be replayed away from its machines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from mirrors import eventually, running
from support import POOL

from megatron_moetion.coding import WHOLE
from megatron_moetion.errors import ConfigError, CorruptArena
from megatron_moetion.export.assemble import Chosen, batches, memory_bytes, refuse
from megatron_moetion.export.survey import Owner, Source
from megatron_moetion.store.sheet import Sheet, Span
from megatron_moetion.units import Role, UnitKind


def owner(*units: tuple[str, UnitKind, tuple[Span, ...]]) -> Any:
    """A rank with these units, of 100 bytes each."""
    spec = SimpleNamespace(units=[(name, kind, 100) for name, kind, _ in units], part=WHOLE)
    arena = SimpleNamespace(spec=spec)
    return SimpleNamespace(
        rank=3,
        units=[(name, kind) for name, kind, _ in units],
        sheet=SimpleNamespace(units=tuple(spans for _, _, spans in units)),
        sources=[SimpleNamespace(arena=arena)],
    )


def spans(role: Role = Role.MASTER, dtype: str = "float32") -> tuple[Span, ...]:
    return (Span(tensor="weight", role=role, dtype=dtype, start=0, nbytes=64),)


DENSE = ("layers.0.dense", UnitKind.DENSE)
EXPERT = ("layers.0.experts.0", UnitKind.EXPERT)
LOGS = (("layers.0.dense.grad", UnitKind.LOG), ("layers.0.experts.0.grad", UnitKind.LOG))
HOST = ("host", UnitKind.HOST, ())


def test_units_without_a_log_are_written_one_by_one() -> None:
    rank = owner((*DENSE, spans()), HOST, (*EXPERT, spans()))
    assert list(batches(rank)) == [[0], [2]]
    assert memory_bytes(rank) == 100


def test_slices_of_one_tensor_are_put_together_with_their_logs() -> None:
    """A third slice has another one, and the last unit of the first tensor is listed behind it."""
    first, other = spans(), (Span(tensor="other", role=Role.MASTER, dtype="float32", start=0, nbytes=64),)
    logs = [(*LOGS[0], spans(Role.GRAD)), (*LOGS[1], tuple(replace(s, role=Role.GRAD) for s in other))]
    rank = owner((*DENSE, first), (*EXPERT, other), *logs, HOST, ("layers.0.dense#1", UnitKind.DENSE, first))
    assert sorted(batches(rank)) == [[0, 2, 5], [1, 3]]
    assert memory_bytes(rank) == 300


def test_what_has_scales_is_put_together() -> None:
    rank = owner((*DENSE, spans(Role.EXP_AVG, "float16")), HOST, (*EXPERT, spans()))
    assert list(batches(rank)) == [[0, 2]]


def test_logged_steps_on_state_in_less_than_fp32_are_refused() -> None:
    rank = owner((*DENSE, spans(Role.REMAINDER, "int16")), (*LOGS[0], spans(Role.GRAD)), HOST)
    with pytest.raises(ConfigError, match=r"rank 3 has captures and logged gradients .*in less than fp32"):
        refuse(rank)


def test_logged_steps_of_another_optimizer_than_adam_are_refused() -> None:
    rank = owner((*DENSE, spans()), (*LOGS[0], spans(Role.GRAD)), HOST)
    rank.sheet.guide = {"optimizers": [{"name": "FusedAdam"}, {"name": "SGD"}]}
    with pytest.raises(ConfigError, match=r"optimizer 1 of the run is a SGD.*a restart of the run"):
        refuse(rank)


def test_the_same_captured_whole_can_be_exported() -> None:
    refuse(owner((*DENSE, spans(Role.REMAINDER, "int16")), HOST))


def test_captures_are_rebuilt_from_fragments_and_compared_with_what_was_captured(tmp_path: Path) -> None:
    """Of four nodes two are left that have fragments of rank 0, and none that has all of it."""
    with running(tmp_path, 4, 2, coding_nodes=4) as ranks:
        ranks.step(1)
        own = ranks.own(0)
        expected = {r.key: own.payload(r.slot).tobytes() for r in own.page.records}
        arenas = [ranks.held(holder, 0) for holder in ranks.placement.holders[0][1:]]
        assert all(eventually(lambda a=a: len(a.page.records) == len(expected)) for a in arenas)  # type: ignore[misc]
        sources = tuple(Source(arena=a, records=a.whole_records(a.page.records)) for a in arenas)
        rank = Owner(rank=0, sheet=cast(Sheet, None), units=[], sources=sources, chosen=tuple(expected))
        chosen = Chosen(rank, POOL)
        assert {r.key: chosen.payload(r.slot).tobytes() for r in chosen.records} == expected
        chosen.require_intact(chosen.records, POOL)
        for record in arenas[1].page.records:
            arenas[1].payload(record.slot)[70] ^= 1
        with pytest.raises(CorruptArena, match="captures changed while they were read"):
            chosen.payload(chosen.records[0].slot)
