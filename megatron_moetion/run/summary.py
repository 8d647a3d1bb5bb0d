# SPDX-License-Identifier: Apache-2.0
"""Reports on a run's snapshots: drops as they come, state hashes where they are due, totals at the end."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from megatron_moetion.framework import StateAdapter
from megatron_moetion.observe.journal import Journal
from megatron_moetion.replicate.channel import Fabric
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
        """Where one is due: log a hash over the state of all ranks, to compare runs by. Collective then."""
        if not self._hash_interval or iteration % self._hash_interval:
            return
        ranks = self._fabric.gather(adapter.state_hash())
        whole = hashlib.blake2b("".join(ranks).encode(), digest_size=16).hexdigest()
        if self._fabric.rank == 0:
            self._journal.info(iteration, f"state hash {whole}")
        self._journal.event("state_hash", iteration=iteration, hash=whole)

    def drops(self, iteration: int, pipeline: Pipeline) -> None:
        """Log the first dropped snapshot of each kind; counts have the others."""
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

    def at_end(self, pipeline: Pipeline, layers: Mapping[str, tuple[int, int]], stable: int) -> None:
        """Totals over all ranks, as an event. Collective; ``ChannelError`` on a lost peer."""
        counts = pipeline.counts
        totals = self._fabric.gather(
            {
                "committed": counts.committed,
                "bytes": counts.bytes_committed,
                "full": self._state_bytes,
                "dropped": dict(counts.dropped),
                "layers": layers,
            }
        )
        self._journal.event(
            "summary",
            snapshots=min(t["committed"] for t in totals),
            dropped=sum(sum(t["dropped"].values()) for t in totals),
            snapshot_bytes_full=sum(t["full"] for t in totals),
            snapshot_bytes_mean=sum(t["bytes"] / max(t["committed"], 1) for t in totals),
            plt=share_lost([t["layers"] for t in totals]),
            stable=stable,
        )
