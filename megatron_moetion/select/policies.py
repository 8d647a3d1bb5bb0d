# SPDX-License-Identifier: Apache-2.0
"""Which experts go into a snapshot. Pure: numbers in, positions out, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def unsaved_tokens(
    unsaved: Sequence[int], staleness: Sequence[int], num_experts: int, reserved: int, cap: int
) -> tuple[int, ...]:
    """The ``num_experts`` (K) experts whose loss would cost most, without letting any pass the staleness cap.

    ``unsaved[e]`` counts tokens since e's last capture; ``staleness[e]`` counts snapshots since then, this one
    included (1: captured by the previous snapshot). Most unsaved tokens first is the greedy choice that
    minimises the expected tokens lost; ties go to the staler, then the lower position.

    ``reserved`` is the smallest K that a later snapshot may have; K may be larger now.

    The cap is kept by reservation: with d(e) = cap - staleness(e) + 1 snapshots left in which e must be taken
    (this one included), at most R * s experts may have d <= s, for every s, with R the reserved K. If that holds before
    the choice, R * cap >= E, and the choice takes at least ``count(d <= s) - R * (s - 1)`` of those with d <= s, it
    holds again afterwards. So a group that was captured together (the baseline, say) is spread over the cap instead
    of expiring at once. Should drops have broken it, the most overdue go first. O(E log E + E cap).
    """
    order = sorted(range(len(unsaved)), key=lambda e: (-unsaved[e], -staleness[e], e))
    deadline = cap + 1 - np.asarray(staleness, dtype=np.int64)
    chosen: list[int] = []
    taken = np.zeros(len(unsaved), dtype=bool)
    overdue = sorted(set(deadline[deadline < 1].tolist()))
    for s in (*overdue, *range(1, cap + 1)):
        due = deadline <= s
        missing = min(int(due.sum()) - reserved * max(s - 1, 0), num_experts) - int((due & taken).sum())
        for e in order if missing > 0 else ():
            if due[e] and not taken[e] and len(chosen) < num_experts:
                chosen.append(e)
                taken[e] = True
                missing -= 1
                if missing == 0:
                    break
    for e in order:
        if len(chosen) >= num_experts:
            break
        if not taken[e]:
            chosen.append(e)
            taken[e] = True
    return tuple(sorted(chosen))
