# SPDX-License-Identifier: Apache-2.0
"""What choosing experts by their tokens is worth, by how evenly the router spreads them. Choices are the product's.

Every expert is captured once in E / K snapshots on average, whoever chooses. With even routing all experts have as many
tokens at risk as they are old, so the best that any policy can do is to take the oldest: a round. A choice by tokens
comes to the same round then, and one by chance leaves twice as much at risk. Only uneven routing gives a policy
something to know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from megatron_moetion.select.policies import POLICIES, Popularity, choose
from megatron_moetion.select.popularity import Ledger

EXPERTS, CHOSEN, CAP = 64, 4, 64
TOKENS = 64_000
"""Routed to these experts in an iteration."""
DRIFT = 50
"""Iterations after which other experts are popular, where any are."""
SNAPSHOTS, WARM_UP = 1200, 200
POLICIES_SHOWN = (*POLICIES, "random")
Draw = Callable[[np.random.Generator, int], npt.NDArray[np.int64]]
"""Tokens of each expert in an iteration, int64[EXPERTS]."""


def _exactly(chance: np.random.Generator, iteration: int) -> npt.NDArray[np.int64]:
    return np.full(EXPERTS, TOKENS // EXPERTS, dtype=np.int64)


def _evenly(chance: np.random.Generator, iteration: int) -> npt.NDArray[np.int64]:
    return chance.multinomial(TOKENS, np.full(EXPERTS, 1 / EXPERTS)).astype(np.int64)


def _skewed(exponent: float) -> Draw:
    """Shares fall with the rank of an expert; which is which changes every ``DRIFT`` iterations."""
    shares = np.arange(1, EXPERTS + 1, dtype=np.float64) ** -exponent
    shares /= shares.sum()

    def draw(chance: np.random.Generator, iteration: int) -> npt.NDArray[np.int64]:
        order = np.random.default_rng(iteration // DRIFT).permutation(EXPERTS)
        return chance.multinomial(TOKENS, shares[order]).astype(np.int64)

    return draw


ROUTING: Mapping[str, Draw] = {
    "exactly even": _exactly,
    "even, with chance": _evenly,
    "Zipf 0.5": _skewed(0.5),
    "Zipf 1": _skewed(1.0),
    "Zipf 1.5": _skewed(1.5),
}


def at_risk(policy: str, draw: Draw, *, snapshots: int = SNAPSHOTS, seed: int = 0) -> float:
    """Tokens that a fault right after a snapshot would lose, on average, in those of one iteration.

    ``policy`` is one of the product's, or ``random``. A snapshot an iteration of ``CHOSEN`` experts; none is dropped.
    """
    tokens_of, chance = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    ledger, totals = Ledger(EXPERTS), np.zeros(EXPERTS, dtype=np.int64)
    ledger.captured(0, range(EXPERTS), totals.tolist())
    ledger.settle(0, whole=True)
    lost = []
    for iteration in range(1, snapshots + 1):
        totals = totals + draw(tokens_of, iteration)
        ledger.update(totals.tolist())
        unsaved, staleness = ledger.unsaved, ledger.staleness
        seen = Popularity(unsaved=unsaved, staleness=staleness, average=ledger.average, turn=tuple(range(EXPERTS)))
        order = chance.permutation(EXPERTS).tolist() if policy == "random" else POLICIES[policy](seen)
        chosen = choose(order, staleness, CHOSEN, -(-EXPERTS // CAP), CAP)
        ledger.captured(iteration, chosen, totals.tolist())
        ledger.settle(iteration, whole=True)
        if iteration > WARM_UP:
            lost.append(sum(unsaved) - sum(unsaved[e] for e in chosen))
    return float(np.mean(lost)) / TOKENS


def even_bound() -> float:
    """The least that any policy leaves at risk with even routing: ages 0 to E / K - 1. Iterations' tokens."""
    return (EXPERTS / CHOSEN - 1) / 2
