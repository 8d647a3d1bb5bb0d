# SPDX-License-Identifier: Apache-2.0
"""What a survey found in each arena, and which of the arenas belong to the present history. Pure.

Reports travel as JSON; nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_moetion.store.manifest import Branch, Record


@dataclass(frozen=True, kw_only=True)
class ArenaReport:
    """One arena as found."""

    path: str
    node: int
    owner: int = -1
    epoch: int = 0
    stable: int = -1
    lineage: int = 0
    branches: tuple[Branch, ...] = ()
    captures: tuple[Record, ...] = ()
    """Captures whose bytes verify."""
    damaged: int = 0
    """Captures that are listed and do not verify."""
    problem: str | None = None
    """Why it cannot be used at all, or is not ours to use; then it has no captures."""
    foreign: bool = False
    """The arena is sound and belongs to another run, topology or model."""

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> ArenaReport:
        """Inverse of ``to_json``."""
        values = dict(raw)
        values["branches"] = tuple(Branch(**b) for b in raw["branches"])
        values["captures"] = tuple(Record(**c) for c in raw["captures"])
        return cls(**values)


def current_history(reports: Sequence[ArenaReport]) -> tuple[ArenaReport, ...]:
    """The reports, those of other histories marked as of no use.

    A node may come back with memory from before the run began anew, or from a recovery that was cut short on it and
    then took place without it, to another iteration perhaps. The history that went on is the one of the newest
    lineage, the latest epoch, the newest stable iteration.
    """
    sound = [r for r in reports if not r.problem]
    if not sound:
        return tuple(reports)
    newest = max(sound, key=lambda r: (r.lineage, r.epoch, r.stable))
    nonces = {b.epoch: b.nonce for b in newest.branches}

    def is_dead(report: ArenaReport) -> bool:
        forked = any(nonces.get(b.epoch, b.nonce) != b.nonce for b in report.branches)
        return not report.problem and (report.lineage < newest.lineage or forked)

    why = "belongs to a history of this run that did not go on"
    return tuple(replace(r, problem=f"{r.path} {why}", captures=()) if is_dead(r) else r for r in reports)
