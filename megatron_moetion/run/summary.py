# SPDX-License-Identifier: Apache-2.0
"""Reports on a run's snapshots: drops as they come, state hashes where they are due, totals at the end."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from megatron_moetion.errors import ChannelError
from megatron_moetion.framework import StateAdapter
from megatron_moetion.observe.journal import Journal
from megatron_moetion.observe.notes import Note
from megatron_moetion.replicate.channel import Fabric
from megatron_moetion.replicate.notes import merge_notes
from megatron_moetion.replicate.pipeline import Pipeline
from megatron_moetion.select.book import share_lost


class Summary:
    """One rank's part. ``state_bytes``: of a full snapshot of this rank; ``hash_interval``: iterations, 0: never."""

    def __init__(self, *, fabric: Fabric, journal: Journal, state_bytes: int, hash_interval: int) -> None:
        self._fabric = fabric
        self._journal = journal
        self._state_bytes = state_bytes
        self._hash_interval = hash_interval

    def state_hash(self, iteration: int, adapter: StateAdapter) -> None:
        """Where one is due: log a hash over the state of all ranks, to compare runs by. Collective then.

        On a lost peer there is none.
        """
        if not self._hash_interval or iteration % self._hash_interval:
            return
        try:
            ranks = self._fabric.gather(adapter.state_hash())
        except ChannelError as error:
            self._journal.warn_once("state-hash", iteration, f"there is no state hash of this iteration: {error}")
            return
        whole = hashlib.blake2b("".join(ranks).encode(), digest_size=16).hexdigest()
        if self._fabric.rank == 0:
            self._journal.info(iteration, f"state hash {whole}")
        self._journal.event("state_hash", iteration=iteration, hash=whole)

    def drops(self, iteration: int, pipeline: Pipeline) -> None:
        """Report the first dropped snapshot of each kind; counts have the others."""
        for reason, count in pipeline.counts.dropped.copy().items():  # other threads add to it
            if count:
                why = ": ".join(filter(None, (reason, pipeline.details.get(reason))))
                self._journal.warn_once(
                    f"drop-{reason}", iteration, f"a snapshot was dropped ({why}); training goes on, counts follow"
                )
        for reason in pipeline.counts.left_out.copy():
            self._journal.warn_once(
                f"left-out-{reason}",
                iteration,
                f"captures were left out ({reason}); the snapshot is whole without them",
            )

    def at_end(self, iteration: int, pipeline: Pipeline, layers: Mapping[str, tuple[int, int]], stable: int) -> bool:
        """Totals over all ranks, as an event, and what is left to be said; whether all were there. Collective.

        On a lost peer there is no summary.
        """
        counts = pipeline.counts
        mine = {
            "snapshots": counts.committed,
            "dropped": sum(counts.dropped.values()),
            "full": self._state_bytes,
            "mean": counts.bytes_committed / max(counts.committed, 1),
            "layers": layers,
            "notes": {kind: asdict(note) for kind, note in self._journal.take_notes().items()},
        }
        try:
            total = self._fabric.reduce(mine, add)
        except ChannelError as error:
            self._journal.warn_once("summary", iteration, f"the summary is missing: {error}")
            return False
        self._journal.hear(_notes(total))
        self._journal.event(
            "summary",
            snapshots=total["snapshots"],
            dropped=total["dropped"],
            snapshot_bytes_full=total["full"],
            snapshot_bytes_mean=total["mean"],
            plt=share_lost([total["layers"]]),
            stable=stable,
        )
        return True


def add(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The totals of two sets of ranks together. Associative, but for the rounding of the mean."""
    layers: dict[str, tuple[int, int]] = {}
    for layer, (lost, routed) in (*one["layers"].items(), *other["layers"].items()):
        before = layers.get(layer, (0, 0))
        layers[layer] = before[0] + lost, before[1] + routed
    return {
        "snapshots": min(one["snapshots"], other["snapshots"]),
        **{name: one[name] + other[name] for name in ("dropped", "full", "mean")},
        "layers": layers,
        "notes": {kind: asdict(note) for kind, note in merge_notes(_notes(one), _notes(other)).items()},
    }


def _notes(totals: Mapping[str, Any]) -> dict[str, Note]:
    return {kind: Note(**note) for kind, note in totals["notes"].items()}
