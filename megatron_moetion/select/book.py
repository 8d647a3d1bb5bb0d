# SPDX-License-Identifier: Apache-2.0
"""A rank's book of experts: which to capture next, what a fault would cost, what faults have cost. Pure.

Experts are numbered by position, in the order of the adapter's token counters, which is the same on all ranks
that share them. ``counts`` are tokens that this rank has processed, exactly; ``totals`` are sums over the ranks
that share the experts, one snapshot old.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_moetion.select.policies import unsaved_tokens
from megatron_moetion.select.popularity import Ledger, tokens_lost_share


@dataclass(frozen=True, kw_only=True)
class Losses:
    """What a recovery to ``iteration`` costs: for each expert the iteration it comes from, and this rank's tokens."""

    iteration: int
    captured: tuple[int, ...]
    now: tuple[int, ...]
    lost: tuple[int, ...]


class ExpertBook:
    """Popularity, staleness and losses of one rank's experts. Empty where nothing is selected (mode ``full``)."""

    def __init__(
        self, *, names: Sequence[str], layers: Sequence[str], reserved: int, staleness_cap: int, interval: int
    ) -> None:
        self._interval = interval
        self.names = tuple(names)
        self._layers = tuple(layers)
        self._reserved = reserved
        self._staleness_cap = staleness_cap
        self.ledger = Ledger(len(self.names))
        self._lost = [0] * len(self.names)

    def choose(self, iteration: int, counts: Sequence[int], num_experts: int) -> tuple[int, ...]:
        """The experts that the snapshot of ``iteration`` takes: so many, at least as many as were ``reserved``."""
        ledger = self.ledger
        chosen = unsaved_tokens(ledger.unsaved, ledger.staleness, num_experts, self._reserved, self._staleness_cap)
        ledger.captured(iteration, chosen, counts)
        return chosen

    def choose_all(self, iteration: int, counts: Sequence[int]) -> None:
        """The baseline takes every expert."""
        self.ledger.captured(iteration, range(len(self.names)), counts)

    def state(self) -> dict[str, Any]:
        """What has to survive a fault; travels with the host state."""
        return {"lost": list(self._lost), "history": self.ledger.history}

    def losses(self, state: Mapping[str, Any], at: Mapping[str, int], iteration: int, now: Sequence[int]) -> Losses:
        """The cost of a recovery to ``iteration``, where ``at`` tells from which iteration each expert comes.

        ``state`` is what ``state()`` returned at ``iteration``, ``now`` the counts of then.
        """
        captured = tuple(at.get(name, iteration) for name in self.names)
        then = []
        for position, since in enumerate(captured):
            known = [tokens for i, tokens in state["history"][position] if i <= since]
            then.append(now[position] if since == iteration else known[-1] if known else 0)
        lost = tuple(a - b for a, b in zip(now, then, strict=True))
        return Losses(iteration=iteration, captured=captured, now=tuple(now), lost=lost)

    def recover(self, state: Mapping[str, Any], losses: Losses, totals: Sequence[int]) -> None:
        """Go on from a recovery. What is lost once cannot be lost again: later losses count from now."""
        self._lost = [before + new for before, new in zip(state["lost"], losses.lost, strict=True)]
        ages = [-((i - losses.iteration) // self._interval) for i in losses.captured]
        self.ledger.seed(losses.captured, ages, totals, losses.now)

    def layers(self, counts: Sequence[int]) -> dict[str, tuple[int, int]]:
        """Per MoE layer: tokens lost to all faults so far, and tokens processed, both on this rank."""
        found: dict[str, tuple[int, int]] = {}
        for layer, lost, processed in zip(self._layers, self._lost, counts, strict=True):
            before = found.get(layer, (0, 0))
            found[layer] = (before[0] + lost, before[1] + processed)
        return found


def share_lost(layers_of_ranks: Sequence[Mapping[str, Sequence[int]]]) -> float:
    """PLT over all ranks, from each rank's ``ExpertBook.layers``."""
    lost: dict[str, int] = {}
    processed: dict[str, int] = {}
    for layers in layers_of_ranks:
        for layer, (a, b) in layers.items():
            lost[layer] = lost.get(layer, 0) + a
            processed[layer] = processed.get(layer, 0) + b
    return tokens_lost_share([lost[k] for k in sorted(lost)], [processed[k] for k in sorted(lost)])
