# SPDX-License-Identifier: Apache-2.0
"""The sheet of an arena: what the bytes of its captures are, for a reader that has not the model. Pure.

It lists the regions of each unit as the owner's inventory has them, and holds the adapter's guide, which says where a
checkpoint on disk has each tensor. It stands in the arena's header, so every replica has it, and a snapshot carries
none of it. As text it is Base64 of zlib of JSON; the header's digest covers it.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_moetion.errors import NOT_OURS, CorruptArena
from megatron_moetion.units import Inventory, Region, Role

SHEET_VERSION = 1
_RATIO_MAX = 16
"""Bytes of text for one that is stored."""
_TEXT_BYTES_MIN = 1 << 16
"""What a sheet may have however small it is stored."""
_STATE = (Role.MASTER, Role.EXP_AVG, Role.EXP_AVG_SQ)


@dataclass(frozen=True, kw_only=True)
class Span:
    """A region without an address: elements from ``start`` on of a tensor, ``nbytes`` of them."""

    tensor: str
    role: Role
    dtype: str
    start: int
    nbytes: int

    @classmethod
    def of(cls, region: Region) -> Span:
        """What stays of a region when its process has gone."""
        return cls(tensor=region.tensor, role=region.role, dtype=region.dtype, start=region.start, nbytes=region.nbytes)


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """``units``: the regions of each unit, by its number, in the order of its capture's bytes."""

    place: str
    """See ``Inventory``."""
    units: tuple[tuple[Span, ...], ...]
    guide: dict[str, Any]
    """The adapter's; empty where it gave none."""


def sheet_of(inventory: Inventory) -> str:
    """The sheet of a rank with this inventory, as an arena's header has it."""
    tensors: dict[str, int] = {}
    units = [
        [[tensors.setdefault(r.tensor, len(tensors)), int(r.role), r.dtype, r.start, r.nbytes] for r in unit.regions]
        for unit in inventory.units
    ]
    document = {
        "version": SHEET_VERSION,
        "place": inventory.place,
        "tensors": list(tensors),
        "units": units,
        "guide": json.loads(inventory.guide) if inventory.guide else {},
    }
    text = json.dumps(document, separators=(",", ":")).encode()
    packed = zlib.compress(text)
    if len(text) > _text_bytes_max(packed):
        packed = zlib.compress(text, 0)
    return base64.b64encode(packed).decode()


def _text_bytes_max(packed: bytes) -> int:
    """What a reader unpacks of so many bytes at most: a text that is nothing but repetition is stored as it is."""
    return _TEXT_BYTES_MIN + _RATIO_MAX * len(packed)


def _unpacked(packed: bytes) -> bytes:
    """``ValueError`` where there is more, or less, than there may be."""
    reader = zlib.decompressobj()
    text = reader.decompress(packed, _text_bytes_max(packed))
    if not reader.eof:
        raise ValueError(f"its {len(packed)} bytes are cut off, or unpack to more than {_text_bytes_max(packed)}")
    return text


def export_problem(guide: Mapping[str, Any]) -> str | None:
    """Why the state of the rank that a guide is of cannot become a checkpoint on disk; None if it can."""
    problem = guide.get("problem", "the framework gave no guide to its tensors")
    return None if problem is None else str(problem)


def has_scales(sheet: Sheet) -> bool:
    """Whether an optimizer keeps its state in less than fp32."""
    spans = (span for spans in sheet.units for span in spans)
    return any(
        span.role in (Role.MODEL, Role.REMAINDER, Role.SCALE) or (span.role in _STATE and span.dtype != "float32")
        for span in spans
    )


def replay_problem(sheet: Sheet) -> str | None:
    """Why the optimizer's steps since a rank's captures cannot be repeated in another process; None if they can."""
    if has_scales(sheet):
        return (
            "captures and logged gradients (mode 'exact') of an optimizer that keeps its state in less than fp32: how "
            "its steps round is known on its own machines only; restart the run there"
        )
    problem = sheet.guide.get("replay_problem")
    return None if problem is None else str(problem)


def read_sheet(text: str) -> Sheet:
    """Inverse of ``sheet_of``; ``CorruptArena`` where the text is none of this version."""
    try:
        raw = json.loads(_unpacked(base64.b64decode(text, validate=True)))
        if raw["version"] != SHEET_VERSION:
            raise ValueError(f"its version is {raw['version']!r}, and this program reads {SHEET_VERSION}")
        tensors = [str(name) for name in raw["tensors"]]
        units = tuple(
            tuple(
                Span(tensor=tensors[t], role=Role(role), dtype=str(dtype), start=int(start), nbytes=int(nbytes))
                for t, role, dtype, start, nbytes in regions
            )
            for regions in raw["units"]
        )
        return Sheet(place=str(raw["place"]), units=units, guide=dict(raw["guide"]))
    except (*NOT_OURS, zlib.error) as error:
        raise CorruptArena(f"the sheet of the arena cannot be read: {error}") from error
