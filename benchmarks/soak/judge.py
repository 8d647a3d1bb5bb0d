# SPDX-License-Identifier: Apache-2.0
"""What became of each fault, and whether a run is the one without faults. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from benchmarks.soak.story import Fault, causes_restart
from benchmarks.soak.trainers import Step

STEPS_TO_SURVIVE = 3
"""Iterations that training goes on for, in the same processes, after a fault is over that it has survived."""
RECOVERED, SURVIVED = "recovered", "survived"
NOT_MET = "not met"
"""Training went past a coordinate inside a rank that does not come there in every iteration."""
OVERTAKEN = "overtaken"
"""Another fault caused a restart before it was seen to be survived."""
OPEN = "open"
"""The run ended before anything came of it."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """Ranks that have found a state to train from."""

    time_s: float
    iteration: int
    """Of that state."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one fault."""

    number: int
    kind: str
    iteration: int
    """The last one that had ended."""
    ranks: tuple[int, ...]
    point: str
    outcome: str
    seconds: float | None = None
    """Recovered: until the first step after it. Survived: the longest step."""
    lost_iterations: int | None = None
    """Recovered: that were trained again."""


def outcome_of(
    fault: Fault,
    happened_s: float,
    over_s: float | None,
    steps: Sequence[Step],
    starts: Sequence[Start],
    next_s: float = math.inf,
) -> Outcome | None:
    """What became of a fault that happened then and was over then; None while that is open.

    ``next_s``: when the next fault happened that training cannot go on after.
    """
    reached = max((step for step in steps if step.time_s <= happened_s), key=lambda step: step.time_s, default=None)
    at = reached.iteration if reached else 0
    about: dict[str, Any] = {
        "number": fault.number, "kind": fault.kind, "ranks": fault.ranks, "point": fault.point, "iteration": at,
    }  # fmt: skip
    again = [start for start in starts if start.time_s > happened_s]
    ends_s = [*(start.time_s for start in again), math.inf][1:]
    for start, end_s in zip(again, ends_s, strict=True):
        first = next((step for step in steps if start.time_s < step.time_s < end_s), None)
        if first is not None and start.time_s > next_s and not causes_restart(fault.kind):
            return Outcome(**about, outcome=OVERTAKEN)
        if first is not None:
            return Outcome(
                **about,
                outcome=RECOVERED,
                seconds=first.time_s - happened_s,
                lost_iterations=None if fault.in_recovery else max(0, at - start.iteration),
            )
    if again or over_s is None or causes_restart(fault.kind):
        return None
    since = [step for step in steps if step.time_s > over_s]
    if len(since) < STEPS_TO_SURVIVE:
        return None
    marks = [reached.time_s if reached else happened_s, *(s.time_s for s in steps if s.time_s > happened_s)]
    longest = max(later - earlier for earlier, later in pairwise(marks))
    return Outcome(**about, outcome=SURVIVED, seconds=longest)


def differences(steps: Sequence[Step], reference: Mapping[int, str], last: int) -> list[str]:
    """What is otherwise than without faults: every execution of an iteration counts, and none may be missing."""
    found = [
        f"iteration {s.iteration} in attempt {s.attempt}: loss {s.loss}, not {reference.get(s.iteration)}"
        for s in steps
        if s.loss != reference.get(s.iteration)
    ]
    missing = sorted(set(range(1, last + 1)) - {s.iteration for s in steps})
    return found + ([f"iterations {missing} were never trained"] if missing else [])


def gaps(steps: Sequence[Step], starts: Sequence[Start]) -> list[str]:
    """Places where training went on otherwise than with the next iteration, or with that of a start."""
    found, begins = [], {start.iteration + 1 for start in starts} | {1}
    for before, after in pairwise(steps):
        if after.iteration not in {before.iteration, before.iteration + 1} | begins:
            found.append(f"iteration {after.iteration} came after {before.iteration}")
    return found


def wrong_hashes(found: Sequence[tuple[int, str]], reference: Mapping[int, str]) -> list[str]:
    """Hashes of the whole state that are not those of the run without faults."""
    return [f"state after iteration {i}: {h}, not {reference.get(i)}" for i, h in found if h != reference.get(i)]
