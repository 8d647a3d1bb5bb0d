# SPDX-License-Identifier: Apache-2.0
"""What a run does about ranks that hang: it watches them, ends in time, and tells the next attempt when it did."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from typing import Any

from megatron_moetion.errors import NOT_OURS, HungPeer, StoreError, understood
from megatron_moetion.replicate.channel import Fabric
from megatron_moetion.replicate.watchdog import Hang, Watchdog, named, speaks
from megatron_moetion.run.running import Prepared, Running
from megatron_moetion.store.files import clear, open_regular
from megatron_moetion.store.node import NodeFolder

HANG_NOTE = "hung.json"
"""Beside the arenas: when and why an attempt has ended itself."""
_NOTE_BYTES_MAX = 1 << 12


@dataclass(frozen=True, kw_only=True)
class Ended:
    """An attempt that has ended itself because ranks were silent."""

    unix_s: float
    """When that was decided."""
    detect_s: float
    """Since the last word of these ranks."""

    def phases(self, start_unix_s: float) -> dict[str, float]:
        """Seconds until the next attempt's process began, which was then."""
        return {"detect": self.detect_s, "restart": max(0.0, start_unix_s - self.unix_s)}

    def write(self, node: NodeFolder) -> None:
        """Leave it where the next attempt on this node finds it. ``OSError`` where that fails."""
        scratch = node.path / f".{HANG_NOTE}.{os.getpid()}"
        scratch.write_text(json.dumps(asdict(self)))
        scratch.rename(node.path / HANG_NOTE)


def take_ended(node: NodeFolder) -> Ended | None:
    """What the last attempt has left on this node, if it ended itself; ranks of a node that come later find it gone."""
    path = node.path / HANG_NOTE
    try:
        with open(open_regular(path, os.O_RDONLY)) as note:
            found = json.loads(note.read(_NOTE_BYTES_MAX))
        ended = Ended(unix_s=float(found["unix_s"]), detect_s=float(found["detect_s"]))
    except (OSError, StoreError, *NOT_OURS):  # there is none
        ended = None
    clear(path)
    return ended


def ended_before(fabric: Fabric, node: NodeFolder) -> Ended | None:
    """The last attempt's end, by any node's note; the same on all ranks. Collective."""
    mine = take_ended(node)
    latest = fabric.reduce(None if mine is None else asdict(mine), _later)
    with understood("when it has ended"):
        return None if latest is None else Ended(unix_s=float(latest["unix_s"]), detect_s=float(latest["detect_s"]))


def _later(one: Any, other: Any) -> Any:
    both = [note for note in (one, other) if note is not None]
    return max(both, key=lambda note: note["unix_s"]) if both else None


def watch(prepared: Prepared, running: Running) -> None:
    """Watch the other ranks until this run is closed or abandoned. Collective."""
    fabric, journal, limit_s = prepared.fabric, prepared.journal, prepared.config.hang_timeout_s
    hosts = fabric.gather(prepared.host.name)
    if fabric.world_size == 1:
        return

    def last_words(hang: Hang) -> None:
        decided_s = prepared.host.clock.unix_ns() / 1e9
        if prepared.node.position == 0 or speaks(fabric.rank, hang.silent_s):
            journal.warn(
                running.protection.iteration,
                f"{named(hang.silent_s, hosts)}: no sign of life for {hang.detect_s:.0f} s, and no step has ended here "
                f"for {hang.stalled_s:.0f} s. This process ends with exit code {HungPeer.exit_code}, so that its "
                f"supervisor restarts the job (--moetion-hang-timeout-s {limit_s})",
            )
        journal.event("hung", silent_s=dict(hang.silent_s), stalled_s=hang.stalled_s, detect_s=hang.detect_s)
        Ended(unix_s=decided_s, detect_s=hang.detect_s).write(prepared.node)
        sys.stdout.flush()
        sys.stderr.flush()

    watchdog = Watchdog(
        fabric=fabric,
        limit_s=limit_s,
        steps=lambda: running.protection.steps,
        hosts=hosts,
        say=lambda text: journal.warn(running.protection.iteration, text),
        last_words=last_words,
        end=lambda: prepared.host.end(HungPeer.exit_code),
        clock=prepared.host.clock,
        threads=prepared.host.threads,
    )
    prepared.undo.callback(watchdog.close)
    prepared.leaving.callback(watchdog.close)
