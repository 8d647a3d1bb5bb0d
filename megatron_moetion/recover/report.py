# SPDX-License-Identifier: Apache-2.0
"""What surveys found: of each arena, for the rank that looked; of all arenas together, for everybody. Pure.

Only summaries reach all ranks. The captures of an arena are told to its owner alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_moetion.coding import WHOLE, Part
from megatron_moetion.errors import understood
from megatron_moetion.store.manifest import NO_RECORDS, Branch, Page, Records

_TEXTS_MAX = 3
"""Problems that are told to all ranks; the others are counted."""


@dataclass(frozen=True, kw_only=True)
class History:
    """The history that an arena belongs to, and how far it had come."""

    lineage: int = 0
    epoch: int = 0
    stable: int = -1
    branches: tuple[Branch, ...] = ()

    @classmethod
    def of(cls, page: Page) -> History:
        """As a manifest page has it."""
        return cls(lineage=page.lineage, epoch=page.epoch, stable=page.stable, branches=page.branches)

    @property
    def age(self) -> tuple[int, int, int]:
        """Grows from history to history: of two of one run, the greater one went on."""
        return (self.lineage, self.epoch, self.stable)

    def goes_on_in(self, newest: History) -> bool:
        """Whether arenas with this history are of use in ``newest``.

        A node may come back with memory from before the run began anew, or from a recovery that was cut short on it and
        then took place without it, to another iteration perhaps.
        """
        nonces = {b.epoch: b.nonce for b in newest.branches}
        return self.lineage == newest.lineage and all(nonces.get(b.epoch, b.nonce) == b.nonce for b in self.branches)

    def fruitless(self, iteration: int) -> int:
        """How often in a row the run has recovered, so far, without that anything later than ``iteration`` is left."""
        later = [b.iteration < iteration for b in reversed(self.branches)]
        return later.index(True) if True in later else len(later)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> History:
        """Inverse of ``to_json``."""
        return cls(**{**raw, "branches": tuple(Branch(**b) for b in raw["branches"])})


@dataclass(frozen=True, kw_only=True)
class ArenaReport:
    """One arena of this node, as found."""

    path: str
    owner: int = -1
    part: Part = WHOLE
    """What of each capture is there."""
    history: History = History()
    records: Records = NO_RECORDS
    """Captures whose bytes verify, as their owner lists them."""
    damaged: int = 0
    """Captures that are listed and do not verify."""
    problem: str | None = None
    """Why it cannot be used at all, or is not ours to use; then it has no captures."""
    foreign: bool = False
    """The arena is sound and belongs to another run, topology or model."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What is known of all arenas that some ranks have surveyed. The same size for any number of them."""

    newest: History | None = None
    """The history that went on; None without a sound arena."""
    found: int = 0
    """Arenas."""
    began: bool = False
    """Whether the run had trained: False only if every arena was still waiting for its first baseline."""
    damaged: int = 0
    """Captures that do not verify."""
    problems: int = 0
    """Arenas that cannot be used at all."""
    texts: tuple[str, ...] = ()
    """Why, of the first ones."""
    foreign: str | None = None
    """Why the first foreign one is foreign."""

    @classmethod
    def of(cls, reports: Sequence[ArenaReport]) -> Summary:
        """Of one rank's reports."""
        problems = [r.problem for r in reports if r.problem]
        return cls(
            newest=max((r.history for r in reports if not r.problem), key=lambda h: h.age, default=None),
            found=len(reports),
            began=any(r.problem or r.history.stable >= 0 for r in reports),
            damaged=sum(r.damaged for r in reports),
            problems=len(problems),
            texts=tuple(problems[:_TEXTS_MAX]),
            foreign=next((r.problem for r in reports if r.foreign), None),
        )

    def followed_by(self, later: Summary) -> Summary:
        """This, of lower ranks, and what later ranks found, as one."""
        histories = [h for h in (self.newest, later.newest) if h is not None]
        return Summary(
            newest=max(histories, key=lambda h: h.age, default=None),
            found=self.found + later.found,
            began=self.began or later.began,
            damaged=self.damaged + later.damaged,
            problems=self.problems + later.problems,
            texts=(*self.texts, *later.texts)[:_TEXTS_MAX],
            foreign=self.foreign or later.foreign,
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Summary:
        """Inverse of ``to_json``."""
        with understood("what it has found"):
            newest = History.from_json(raw["newest"]) if raw["newest"] is not None else None
            return cls(**{**raw, "newest": newest, "texts": tuple(raw["texts"])})


def of_history(reports: Sequence[ArenaReport], newest: History) -> tuple[ArenaReport, ...]:
    """The reports; those of a history that did not go on in ``newest`` are marked as of no use."""
    why = "belongs to a history of this run that did not go on"
    return tuple(
        r if r.problem or r.history.goes_on_in(newest) else replace(r, problem=f"{r.path} {why}", records=NO_RECORDS)
        for r in reports
    )
