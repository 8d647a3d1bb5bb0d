# SPDX-License-Identifier: Apache-2.0
"""A rank's book of experts: those to capture next, the cost of a fault now, the cost of past faults. Pure.

Experts are numbered by position, in the order of the adapter's token counters, which is the same on all ranks
that share them. ``counts`` are tokens that this rank has processed, exactly; ``totals`` are sums over the ranks
that share the experts, one snapshot old.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_moetion.select.policies import POLICIES, Popularity, choose, grow
from megatron_moetion.select.popularity import Ledger, tokens_lost_share
from megatron_moetion.select.shares import Shares


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The cost of a recovery to ``iteration``: for each expert the iteration it comes from, and this rank's tokens."""

    iteration: int
    captured: tuple[int, ...]
    now: tuple[int, ...]
    lost: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ExpertState:
    """One expert's account, in tokens of all ranks that share it."""

    name: str
    at_risk: int
    """Lost if a fault came now; one snapshot old."""
    staleness: int
    """Snapshots since its last capture, the coming one included."""
    lost: int
    """To the last fault."""
    lost_before: int
    """To all faults before that."""


@dataclass(frozen=True, kw_only=True)
class Excess:
    """The budget of lost tokens does not hold although K has grown as far as it can."""

    kind: str
    """``spent``: faults have cost too much already; ``at-risk``: a fault now would."""
    text: str
    """Why, for a person."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How experts are chosen."""

    policy: str
    reserved: int
    """The smallest K that a snapshot may have."""
    most: int
    """The largest K that there is room for."""
    staleness_cap: int
    interval: int
    """Iterations between snapshots."""
    lost_token_budget: float = 0.0
    """Most tokens that faults may have cost, as a share of those processed; 0: no limit."""
    shares: Shares | None = None
    """Where the experts' state lies; None: on one rank."""


class ExpertBook:
    """Popularity, staleness and losses of one rank's experts. Empty where nothing is selected (mode ``full``)."""

    def __init__(self, *, names: Sequence[str], layers: Sequence[str], rules: Rules) -> None:
        self.names = tuple(names)
        self._layers = tuple(layers)
        self._rules = rules
        self._turn = _turns(layers)
        self.ledger = Ledger(len(self.names))
        self._lost = [0] * len(self.names)
        self._lost_last = [0] * len(self.names)
        self._lost_everywhere = [0] * len(self.names)
        self._open_tokens = 0
        self.num_chosen = 0
        """Experts in the last snapshot."""

    def choose(self, iteration: int, counts: Sequence[int], num_experts: int) -> tuple[int, ...]:
        """The experts of the snapshot of ``iteration``: ``num_experts``, or more if the lost-token budget needs it."""
        ledger, rules = self.ledger, self._rules
        unsaved, staleness = ledger.unsaved, ledger.staleness
        seen = Popularity(unsaved=unsaved, staleness=staleness, average=ledger.average, turn=self._turn)
        order = POLICIES[rules.policy](seen)
        chosen = choose(order, staleness, num_experts, rules.reserved, rules.staleness_cap, rules.shares)
        if rules.lost_token_budget:
            # Counts are one snapshot old, at most an interval behind the losses: K errs on the large side.
            at_risk = [a + b for a, b in zip(unsaved, ledger.recent, strict=True)]
            processed = sum(ledger.totals)  # nothing is known of the first snapshot's tokens yet: take all
            allowance = int(rules.lost_token_budget * processed) - sum(self._lost_everywhere) if processed else -1
            chosen = grow(chosen, at_risk, allowance, rules.most, rules.shares)
        self._open_tokens = sum(unsaved) - sum(unsaved[e] for e in chosen)
        self.num_chosen = len(chosen)
        found = tuple(sorted(chosen))
        ledger.captured(iteration, found, counts)
        return found

    def choose_all(self, iteration: int, counts: Sequence[int]) -> None:
        """The baseline takes every expert."""
        self.ledger.captured(iteration, range(len(self.names)), counts)

    @property
    def projected_share(self) -> float:
        """The PLT of these experts after a fault now: lost to all faults, by tokens processed."""
        processed = sum(self.ledger.totals)
        return (sum(self._lost_everywhere) + self._open_tokens) / processed if processed else 0.0

    @property
    def past_budget(self) -> Excess | None:
        """Why the budget of lost tokens does not hold; None while it does, or in a run so young that it cannot."""
        budget = self._rules.lost_token_budget
        if not budget or self.projected_share <= budget:
            return None
        processed, lost = sum(self.ledger.totals), sum(self._lost_everywhere)
        if lost > budget * processed:
            return Excess(
                kind="spent",
                text=f"faults so far have cost {lost / processed:.2%} of the tokens of this rank's experts, more than "
                f"--moetion-lost-token-budget {budget:.2%}: from here on every snapshot takes as many experts as it "
                f"can, and the share falls again as training goes on",
            )
        if sum(self.ledger.recent) > budget * processed:
            return None  # the run has just begun: the tokens of one interval are more than the budget
        return Excess(
            kind="at-risk",
            text=f"a fault now could cost {self.projected_share:.2%} of the tokens of this rank's experts, more than "
            f"--moetion-lost-token-budget {budget:.2%}, although a snapshot takes {self._rules.most} of "
            f"{len(self.names)}: raise --moetion-max-experts-per-snapshot",
        )

    def experts(self) -> tuple[ExpertState, ...]:
        """Every expert's account."""
        ledger = self.ledger
        rows = zip(self.names, ledger.unsaved, ledger.staleness, self._lost_everywhere, self._lost_last, strict=True)
        return tuple(
            ExpertState(name=name, at_risk=unsaved, staleness=staleness, lost=last, lost_before=lost - last)
            for name, unsaved, staleness, lost, last in rows
        )

    def state(self) -> dict[str, Any]:
        """The part of the book that has to survive a fault; travels with the host state."""
        return {
            "lost": _packed(self._lost),
            "recent": _packed(self.ledger.recent),
            "history": _packed(self.ledger.history),
        }

    def losses(self, state: Mapping[str, Any], at: Mapping[str, int], iteration: int, now: Sequence[int]) -> Losses:
        """The cost of a recovery to ``iteration``; ``at``: the iteration that each expert comes from.

        ``state`` is the result of ``state()`` at ``iteration``, ``now`` the counts of then.
        """
        captured = tuple(at.get(name, iteration) for name in self.names)
        then = [now[position] if since == iteration else 0 for position, since in enumerate(captured)]
        for position, i, tokens in _unpacked(state["history"]).reshape(-1, 3).tolist():  # oldest first
            if i <= captured[position] < iteration:
                then[position] = tokens
        lost = tuple(a - b for a, b in zip(now, then, strict=True))
        return Losses(iteration=iteration, captured=captured, now=tuple(now), lost=lost)

    def recover(
        self,
        state: Mapping[str, Any],
        losses: Losses,
        *,
        totals: Sequence[int],
        lost: Sequence[int],
        lost_before: Sequence[int],
        recent: Sequence[int],
    ) -> None:
        """Go on from a recovery. What is lost once cannot be lost again: later losses count from now.

        ``totals``, ``lost`` and ``lost_before`` (``losses.lost`` and ``lost_until(state)``) are summed over the
        ranks that share the experts, and ``recent`` (``recent_until(state)``) is the mean of theirs: one of them may
        have heard the last counts late. All that later choices depend on is the same on these ranks.
        """
        self._lost = [before + new for before, new in zip(lost_until(state), losses.lost, strict=True)]
        self._lost_last = list(lost)
        self._lost_everywhere = [a + b for a, b in zip(lost, lost_before, strict=True)]
        ages = [-((i - losses.iteration) // self._rules.interval) for i in losses.captured]
        # At the beginning of a run little was known at T of the tokens of an interval.
        intervals = max(1, losses.iteration // self._rules.interval)
        recent = [max(r, -(-total // intervals)) for r, total in zip(recent, totals, strict=True)]
        self.ledger.seed(losses.captured, ages, totals, losses.now, recent)

    def layers(
        self, counts: Sequence[int], routed: Mapping[str, int], *, counted: bool = True
    ) -> dict[str, tuple[int, int]]:
        """Per MoE layer: tokens lost to all faults so far, and tokens routed, both on this rank.

        For a layer that is not in ``routed``, because its router does not count drops, processed tokens stand in.
        Not ``counted``: another rank reports the same experts' tokens, though not those that were routed here.
        """
        found: dict[str, tuple[int, int]] = {}
        for layer, lost, processed in zip(self._layers, self._lost, counts, strict=True):
            before = found.get(layer, (0, 0))
            found[layer] = (before[0] + lost * counted, before[1] + processed * counted)
        return {layer: (lost, routed.get(layer, processed)) for layer, (lost, processed) in found.items()}


def lost_until(state: Mapping[str, Any]) -> list[int]:
    """Tokens that faults had cost each expert on this rank; ``state`` is the result of ``ExpertBook.state``."""
    return [int(tokens) for tokens in _unpacked(state["lost"])]


def recent_until(state: Mapping[str, Any]) -> list[int]:
    """Tokens between the last two snapshots that this rank had heard of; ``state`` as in ``lost_until``."""
    return [int(tokens) for tokens in _unpacked(state["recent"])]


def mean_recent(sums: Sequence[int]) -> list[int]:
    """The mean over ranks, rounded up, from the sums of ``[*recent_until(state), 1]`` over these ranks."""
    *tokens, ranks = sums
    return [-(-t // ranks) for t in tokens]


def _packed(numbers: Sequence[int] | npt.NDArray[np.int64]) -> bytes:
    return np.array(numbers, dtype="<i8").tobytes()


def _unpacked(data: bytes) -> npt.NDArray[np.int64]:
    return np.frombuffer(data, dtype="<i8")


def share_lost(layers_of_ranks: Sequence[Mapping[str, Sequence[int]]]) -> float:
    """PLT over all ranks, from each rank's ``ExpertBook.layers``."""
    lost: dict[str, int] = {}
    routed: dict[str, int] = {}
    for layers in layers_of_ranks:
        for layer, (a, b) in layers.items():
            lost[layer] = lost.get(layer, 0) + a
            routed[layer] = routed.get(layer, 0) + b
    return tokens_lost_share([lost[k] for k in sorted(lost)], [routed[k] for k in sorted(lost)])


def _turns(layers: Sequence[str]) -> tuple[int, ...]:
    """The first expert of each layer, then the second of each, and so on: each expert's place in that round."""
    seen: dict[str, int] = {}
    numbers = []
    for layer in layers:
        numbers.append(seen.get(layer, 0))
        seen[layer] = numbers[-1] + 1
    order = sorted(range(len(layers)), key=lambda e: (numbers[e], e))
    turns = [0] * len(layers)
    for turn, e in enumerate(order):
        turns[e] = turn
    return tuple(turns)
