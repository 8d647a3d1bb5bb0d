# SPDX-License-Identifier: Apache-2.0
"""The strongest guarantee that fits: which mode a run takes, and one line that shows all of them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_moetion.plan.costs import Cost, Resources, Shortage, shortage

STRONGEST_FIRST = ("full", "exact", "popularity")
"""``full`` and ``exact`` lose nothing; ``exact`` replays steps of the optimizer; ``popularity`` loses tokens."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The mode to take. Where none fits it is the weakest there is, in the form that lacks least."""

    cost: Cost
    """Of the mode that is taken, with its period or its experts a snapshot."""
    shortage: Shortage
    """What is missing; nothing where it fits."""
    line: str
    """For a log: the mode, the reason, and each mode with its bytes, its memory and what a fault would cost."""

    @property
    def mode(self) -> str:
        """``full``, ``exact`` or ``popularity``."""
        return self.cost.mode

    @property
    def period(self) -> int:
        """Iterations; 0 except in mode ``exact``."""
        return self.cost.period

    @property
    def experts(self) -> int:
        """K, experts in a snapshot; 0 except in mode ``popularity``."""
        return self.cost.experts

    @property
    def fits(self) -> bool:
        """Whether nothing is missing."""
        return not self.shortage


def choose(costs: Iterable[Cost], resources: Resources, *, lost_token_budget: float) -> Choice:
    """The strongest mode that fits, of those that ``costs`` holds.

    ``full`` where it fits; else ``exact`` with the smallest period that fits, since a recovery replays least then; else
    ``popularity`` with the most experts a snapshot that fit; else the weakest of the modes, in the form that lacks
    least. ``costs`` may hold a mode several times, with other periods or experts a snapshot, and need not hold all
    modes: see ``costs_of``. What ``resources`` does not know is no limit. ``lost_token_budget`` is
    ``--moetion-lost-token-budget``, for the line.
    """
    every = list(costs)
    assert every, "there is at least one mode to choose from"
    best = [_best(mode, every, resources) for mode in STRONGEST_FIRST if any(c.mode == mode for c in every)]
    taken = next((c for c in best if not shortage(c, resources)), best[-1])
    missing = shortage(taken, resources)
    why = f"nothing fits, and it is the weakest: {lacks(missing)}" if missing else _why(best, taken, resources)
    modes = "; ".join(f"{named(c)} {_shown(c, resources)}, {fault(c, lost_token_budget)}" for c in best)
    return Choice(cost=taken, shortage=missing, line=f"mode {taken.mode!r}{_form(taken)}, {why}. {modes}")


def named(cost: Cost) -> str:
    """A mode with its period or its K, in one word: ``exact P=8``."""
    if cost.period:
        return f"{cost.mode} P={cost.period}"
    return f"{cost.mode} K={cost.experts}" if cost.experts else cost.mode


def fault(cost: Cost, lost_token_budget: float) -> str:
    """What a fault costs in a mode, besides the iterations after the stable one."""
    if cost.mode == "exact":
        return f"a fault replays up to {cost.replayed_steps} optimizer steps, {cost.replayed_steps_idle} at worst"
    if cost.mode == "popularity":
        bound = f"up to {lost_token_budget:.2%} of experts' tokens" if lost_token_budget else "experts' tokens"
        return f"a fault loses {bound}"
    return "a fault replays and loses nothing"


def lacks(missing: Shortage) -> str:
    """What is missing, for a person."""
    found = [
        f"{gib(nbytes)} GiB {of}"
        for nbytes, of in (
            (missing.link_bytes, "an iteration on the link"),
            (missing.node_bytes, "of memory a node"),
            (missing.device_bytes, "of GPU memory a rank"),
        )
        if nbytes
    ]
    return f"{' and '.join(found)} {'are' if found else 'is'} missing"


def gib(nbytes: float) -> str:
    """Bytes in GiB, for a person: three digits or more, without the unit."""
    value = nbytes / 2**30
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 0.1 or not value else 4
    return f"{value:,.{digits}f}"


def _best(mode: str, costs: Sequence[Cost], resources: Resources) -> Cost:
    """The form of a mode that fits and costs a fault least; where none fits, the one that lacks least."""
    forms = sorted((c for c in costs if c.mode == mode), key=lambda c: (c.period, -c.experts))
    fitting = (c for c in forms if not shortage(c, resources))
    return next(fitting, None) or min(forms, key=lambda c: _excess(c, resources))


def _excess(cost: Cost, resources: Resources) -> float:
    """How many times what there is a mode takes, of what is scarcest."""
    pairs = (
        (cost.sent_bytes, resources.link_bytes),
        (cost.node_bytes, resources.node_bytes),
        (cost.device_bytes, resources.device_bytes),
    )
    return max((taken / max(there, 1) for taken, there in pairs if there is not None), default=0.0)


def _why(best: Sequence[Cost], taken: Cost, resources: Resources) -> str:
    stronger = best[: best.index(taken)]
    there = [
        f"{gib(nbytes)} GiB {of}"
        for nbytes, of in (
            (resources.link_bytes, "an iteration on the link"),
            (resources.node_bytes, "of memory a node"),
            (resources.device_bytes, "of GPU memory a rank"),
        )
        if nbytes is not None
    ]
    what = f"the strongest that fits {', '.join(there)}" if there else "the strongest; no limits are known"
    reasons = [f"for {named(c)} {lacks(shortage(c, resources))}" for c in stronger]
    return "; ".join([what, *reasons])


def _form(cost: Cost) -> str:
    if cost.period:
        return f" with period {cost.period}"
    return f" with {cost.experts} experts a snapshot" if cost.experts else ""


def _shown(cost: Cost, resources: Resources) -> str:
    missing = shortage(cost, resources)
    marks = ["!" if nbytes else "" for nbytes in (missing.link_bytes, missing.node_bytes, missing.device_bytes)]
    device = f", {gib(cost.device_bytes)}{marks[2]} GiB of a GPU" if cost.device_bytes else ""
    return (
        f"sends {gib(cost.sent_bytes)}{marks[0]} GiB an iteration, takes {gib(cost.node_bytes)}{marks[1]} GiB a node"
        f"{device}"
    )
