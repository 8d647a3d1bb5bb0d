# SPDX-License-Identifier: Apache-2.0
"""Pure: what the events of ranks say about a recovery, beside the run that had no fault."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Events = Sequence[Mapping[str, Any]]

UNNOTICED = "restored unnoticed"
WHOLE = "restored right"
OLDER = "fell back to an older copy"
REFUSED = "refused"
FROM_ZERO = "began from zero"
LOSSY_SOUND = "restored without it"


@dataclass(frozen=True)
class Truth:
    """Of the run without a fault: each rank's digest and marked bytes after each iteration."""

    digests: Sequence[Mapping[int, str]]
    needles: Sequence[Mapping[int, str]]

    @staticmethod
    def of(ranks: Sequence[Events]) -> Truth:
        steps = [[event for event in events if event["event"] == "step"] for events in ranks]
        return Truth(
            [{event["iteration"]: event["digest"] for event in events} for events in steps],
            [{event["iteration"]: event["needle"] for event in events} for events in steps],
        )


@dataclass(frozen=True)
class Recovery:
    """``resumed``: the iteration that all ranks came back to; None: they began from zero, or not at all."""

    resumed: int | None
    lost: int | None
    seconds: float | None
    """From the fault until the first new iteration was over on all ranks."""
    load_s: float | None
    """Of it, inside of the system, on the slowest rank."""
    bitwise: bool | None
    """Whether state was that of the run without a fault, at the resumed iteration and after every one since."""
    problem: str = ""


def reached(ranks: Sequence[Events]) -> int:
    """The newest iteration that all ranks finished."""
    return min(max((e["iteration"] for e in events if e["event"] == "step"), default=0) for events in ranks)


def recovery(before: Sequence[Events], after: Sequence[Events], fault_s: float, truth: Truth) -> Recovery:
    """What became of a run; ``before`` and ``after`` the fault each rank's events."""
    starts = [next((e for e in events if e["event"] == "started"), None) for events in after]
    if any(start is None for start in starts):
        return Recovery(None, None, None, None, None, "not every rank came back")
    at = {start["at"] for start in starts if start is not None}
    if len(at) != 1:
        return Recovery(None, None, None, None, False, f"ranks came back to iterations {sorted(at)}")
    resumed = at.pop()
    lost = max(0, reached(before) - resumed)  # a copy may be whole before a rank has said that it is done
    load = max(start["seconds"] for start in starts if start is not None)
    steps = [[e for e in events if e["event"] == "step"] for events in after]
    if not all(steps):
        return Recovery(resumed or None, lost, None, load, None, "not every rank trained on")
    seconds = max(events[0]["over_s"] for events in steps) - fault_s
    if resumed == 0:
        return Recovery(None, lost, seconds, load, None, "there was no copy that all ranks could read")
    same = all(
        start is not None
        and start["digest"] == right.get(resumed)
        and all(e["digest"] == right.get(e["iteration"]) for e in events)
        for start, events, right in zip(starts, steps, truth.digests, strict=True)
    )
    return Recovery(resumed, lost, seconds, load, same)


def flip_verdict(after: Sequence[Events], newest: int, rank: int, flipped: str, truth: Truth) -> str:
    """What a system did with a flipped bit in a copy of ``rank``'s state.

    ``newest``: the iteration of which every rank had a whole copy; ``flipped``: the marked bytes with the flipped bit,
    in hex. A mode that restores some state from older iterations on purpose is judged by the marked bytes.
    """
    starts = [next((e for e in events if e["event"] == "started"), None) for events in after]
    if any(start is None for start in starts):
        return REFUSED
    if any(start["at"] == 0 for start in starts if start is not None):
        return FROM_ZERO
    found = starts[rank]
    assert found is not None
    if all(s is not None and s["digest"] == d.get(s["at"]) for s, d in zip(starts, truth.digests, strict=True)):
        return WHOLE if found["at"] == newest else OLDER
    if found["needle"] == flipped:
        return UNNOTICED
    others = all(
        s is not None and (r == rank or s["digest"] == d.get(s["at"]))
        for r, (s, d) in enumerate(zip(starts, truth.digests, strict=True))
    )
    is_known = found["needle"] in {n for i, n in truth.needles[rank].items() if i <= found["at"]}
    return LOSSY_SOUND if is_known and not others else UNNOTICED
