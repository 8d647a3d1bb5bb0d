# SPDX-License-Identifier: Apache-2.0
"""Everything that differs between modes: the contents of snapshots, the captures to keep, and the way back.

A ``Blueprint`` is a mode before ranks have settled sizes; it builds the ``SnapshotMode`` of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_moetion.config import MoetionConfig
from megatron_moetion.observe.journal import Journal
from megatron_moetion.recover.plan import Choose
from megatron_moetion.replicate.agreement import Agreed
from megatron_moetion.replicate.channel import Fabric
from megatron_moetion.replicate.pipeline import Skip
from megatron_moetion.schedule.scheduler import Carried
from megatron_moetion.select.book import ExpertState
from megatron_moetion.snapshot.capture import Captured, Contents
from megatron_moetion.snapshot.packer import Packer
from megatron_moetion.store.arena import Arena
from megatron_moetion.store.manifest import Record
from megatron_moetion.store.node import NodeFolder
from megatron_moetion.store.retention import Retention, Settled
from megatron_moetion.store.spec import ArenaIdentity, ArenaSpec
from megatron_moetion.units import Inventory


@dataclass(frozen=True, kw_only=True)
class Remark:
    """A log line, said once for each ``kind``."""

    kind: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Vote:
    """The size of snapshots that this rank's links afford."""

    mask: int
    """63 bits. Ranks AND theirs, so a size is taken if all of them vote for it."""
    remark: Remark | None = None
    """Why snapshots are smaller than they could be."""


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The cost of a recovery for this rank, in tokens."""

    by_expert: Mapping[str, int] = field(default_factory=dict)
    """Experts that lost tokens, by unit name."""
    layers: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """By layer: tokens lost to all faults so far, and tokens routed."""


class Staged(Protocol):
    """The copies that the last ``Packer.freeze`` made."""

    def staged(self, unit: int, region: int) -> npt.NDArray[np.uint8]:
        """Bytes of an ``at_once`` region, uint8[nbytes]; good until the next freeze. Waits for a device."""
        ...


@dataclass(frozen=True, kw_only=True)
class Site:
    """A rank before sizes are settled."""

    config: MoetionConfig
    identity: ArenaIdentity
    """Complete except for ``layout`` and ``period``, which follow from the sizes."""
    inventory: Inventory
    """The adapter's."""
    node: NodeFolder
    local_ranks: int
    """Ranks of this machine."""
    fabric: Fabric
    """For modes that have something of their own to say to other ranks."""
    expert_peers: tuple[int, ...]
    """See ``StateAdapter``."""
    journal: Journal


class Blueprint(Protocol):
    """A mode before ranks have settled the sizes of snapshots and arenas."""

    def facts(self, site: Site) -> dict[str, Any]:
        """The sizes that this rank affords, if the settings depend on them; JSON-able. Talks to no other rank.

        ``ConfigError`` where the settings cannot be kept.
        """
        ...

    def build(self, site: Site, facts: Sequence[Mapping[str, Any]]) -> SnapshotMode:
        """The mode, from the facts of all ranks, by rank. Ranks may have different settings: they are refused later.

        ``ConfigError`` where the settings cannot be kept on some rank.
        """
        ...


class SnapshotMode(Protocol):
    """One rank's snapshots, from the first to the last. Used by the training thread alone.

    The order of a step is ``Session.on_step_end``'s. No method waits for another rank except ``wait``, and
    ``recovered`` and ``resume``, which are collective. The defaults are those of a mode that captures all state anew
    each time.
    """

    name: str
    inventory: Inventory
    """The units that captures are made of."""
    spec: ArenaSpec
    """Of this rank's arena."""
    note: str | None = None
    """Why sizes are not the usual ones, for a person."""
    loses_tokens: bool = False
    """Whether the state that a recovery finds may be older than its iteration, in part."""
    waits_for_replication: bool = False
    """Whether training waits for the last snapshot to be replicated, for at most ``max_stall_ms``."""
    choose: Choose
    """Which captures a recovery loads of one rank."""
    shared: Sequence[str] = ()
    """Experts of which a recovery loads the newest capture that all their shards have, by unit name.

    In the same order on all ranks that share them, also those of which this rank has no shard.
    """

    def retention(self, spec: ArenaSpec) -> Retention:
        """Which captures of an arena with this specification must stay."""
        ...

    # -- a step ---------------------------------------------------------------------------------------

    def packed(self, captured: Captured) -> None:
        """The last snapshot is packed or dropped on this rank."""
        return

    def settle(self, agreed: Agreed) -> Settled:
        """Learn the result of a round, of all rounds in order; returns the captures that arenas may release now."""
        return Settled(stable=agreed.stable, whole=agreed.recoverable)

    def exchange(self, iteration: int) -> None:
        """Other messages between ranks, now and then. Does not wait."""
        return

    def note_step(self, iteration: int, before: int, *, stepped: bool = True) -> str | None:
        """An iteration is over, the first after the snapshot of ``before``; why it cannot be captured, if so.

        ``stepped``: False where the loop says that it took no optimizer step.
        """
        return None

    def recoverable(self, rounds: Mapping[int, bool]) -> Iterable[int]:
        """The iterations that this rank can recover; ``rounds``: whether recent snapshots are whole here."""
        return [i for i, is_whole in rounds.items() if is_whole]

    def given_up(self) -> Iterable[int]:
        """Iterations that this rank will never be able to recover, although there are snapshots of them."""
        return ()

    def vote(self, carried: Carried) -> Vote:
        """The largest snapshot that this rank's links afford."""
        ...

    def contributed(self, number: int, staged: Staged) -> None:
        """What ``recoverable`` returned has been said in this round; the mode's own words to other ranks follow."""
        return

    def contents(self, iteration: int) -> tuple[Contents | Skip, Remark | None]:
        """The contents of this iteration's snapshot; ``Skip`` where there must be none."""
        ...

    def host_state(self) -> dict[str, Any]:
        """The part of the mode that has to survive a fault; travels with the adapter's host state."""
        return {}

    def wait(self, timeout_s: float) -> None:
        """Return once the mode has heard what other ranks had to say so far, or after the timeout."""
        return

    # -- start and recovery ---------------------------------------------------------------------------

    def baseline(self, iteration: int, staged: Staged) -> Contents:
        """The first snapshot of a run, which holds all state."""
        ...

    def write_back(
        self, packer: Packer, arena: Arena, records: Sequence[Record], adapter_state: Mapping[str, Any], to: int
    ) -> int:
        """Bring live state to iteration ``to`` from verified captures; returns the optimizer steps replayed.

        ``adapter_state`` is the adapter's part of the host state of that iteration.
        """
        for record in records:
            packer.scatter(record.unit, arena.payload(record.slot))
        return 0

    def recovered(
        self,
        iteration: int,
        captured_at: Mapping[str, int],
        state: Mapping[str, Any],
        staged: Staged,
        add_up: Callable[[Sequence[int]], Sequence[int]],
    ) -> Losses:
        """Live state is at ``iteration`` on all ranks; returns this rank's losses.

        ``captured_at``: the iteration that each of the ``shared`` experts comes from; ``state`` is what ``host_state``
        returned at ``iteration``; ``add_up`` adds counts over the ranks that share experts: every rank calls it
        equally often.
        """
        return Losses()

    def resume(self, iteration: int, lost: Mapping[str, int]) -> None:
        """All ranks have recovered and lost these tokens together, by expert. Collective."""
        return

    # -- observers ------------------------------------------------------------------------------------

    def scalars(self) -> dict[str, float]:
        """Numbers for a dashboard."""
        return {}

    def experts(self) -> tuple[ExpertState, ...]:
        """Tokens at risk and lost, of each expert of this rank's layers; empty where experts are not chosen."""
        return ()

    def layers(self, staged: Staged) -> dict[str, tuple[int, int]]:
        """By layer: tokens lost to all faults so far, and tokens routed, on this rank; where tokens are counted."""
        return {}

    def describe(self) -> str:
        """The contents of a snapshot, for the line at the start; begins with a comma, or is empty."""
        return ""
