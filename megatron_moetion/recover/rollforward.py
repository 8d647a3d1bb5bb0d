# SPDX-License-Identifier: Apache-2.0
"""From captures of several ages to one iteration: the optimizer's own steps, on the logged gradients.

An optimizer's step works element by element, so it does not matter to one slice what the others hold. Slices
of different ages share tensors and one step count. So the oldest go first: before step t + 1 is replayed, every slice
that was captured at t is written into live state, over whatever the replay so far has made of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Protocol

from megatron_moetion.arrays import Bytes
from megatron_moetion.framework import StepReplayer
from megatron_moetion.snapshot.packer import Packer
from megatron_moetion.store.manifest import Record


class Payloads(Protocol):
    """The bytes of captures by slot: an arena, or captures of several."""

    def payload(self, slot: int) -> Bytes:
        """A capture's bytes."""
        ...


def roll_forward(
    packer: Packer,
    arena: Payloads,
    records: Sequence[Record],
    *,
    log_of: Mapping[int, int],
    to: int,
    replayer: StepReplayer,
) -> int:
    """Bring live state to iteration ``to``; returns how many steps were replayed.

    ``records``: verified captures and gradients, as a plan chose them. Units without a log are written as they are.
    """
    slice_of = {log: unit for unit, log in log_of.items()}
    captured: dict[int, list[Record]] = defaultdict(list)
    logged: dict[int, dict[int, Record]] = defaultdict(dict)
    for record in records:
        if record.unit in log_of:
            captured[record.iteration].append(record)
        elif record.unit in slice_of:
            logged[record.iteration][record.unit] = record
        else:
            packer.scatter(record.unit, arena.payload(record.slot))
    replayed = 0
    for iteration in range(min(captured, default=to), to + 1):
        if iteration in logged:
            for unit in slice_of:  # a slice that is written later may be stepped on anything that is a number
                gradient = logged[iteration].get(unit)
                if gradient is None or gradient.is_zero:
                    packer.clear(unit)
                else:
                    packer.scatter(unit, arena.payload(gradient.slot))
            replayed += replayer.replay(iteration)
        for record in captured[iteration]:
            packer.scatter(record.unit, arena.payload(record.slot))
    return replayed
