# SPDX-License-Identifier: Apache-2.0
"""What share of lost tokens raised capacities can make up for, on the loads of a real run. Pure.

Two ways to raise them are compared on the same loads, faults and selections: each expert by its *own* debt (room for
those that lost tokens), and each by its *load* (room for those that drop tokens; what the product does).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_moetion.recover.capacity import CapacityRules, boosts, repaid
from megatron_moetion.select.book import ExpertBook, Rules

Loads = npt.NDArray[np.float64]
"""Tokens routed, [iterations, layers, experts]; one router call an iteration."""


def capacity_of(loads: Loads, factor: float | None) -> int:
    """Tokens that an expert processes at most in an iteration; a dropless model (None) has no such limit."""
    return 10**9 if factor is None else math.ceil(factor * loads[0].sum(axis=-1)[0] / loads.shape[2])


def lost_at(loads: Loads, capacity: int, fault: int, num_experts: int, cap: int, policy: str) -> Loads:
    """Tokens lost by each expert, [layers, experts], at a recovery to iteration ``fault`` (from 1)."""
    processed = np.minimum(loads, capacity).reshape(len(loads), -1)
    names = [str(e) for e in range(processed.shape[1])]
    layers = [str(e // loads.shape[2]) for e in range(processed.shape[1])]
    rules = Rules(
        policy=policy, reserved=-(-len(names) // cap), most=len(names), staleness_cap=cap, interval=1,
        lost_token_budget=0.0,
    )  # fmt: skip
    book, totals, saved = ExpertBook(names=names, layers=layers, rules=rules), np.zeros(len(names)), {}
    book.choose_all(0, [0] * len(names))
    saved = dict.fromkeys(range(len(names)), 0.0)
    for iteration in range(1, fault + 1):
        book.ledger.update([int(t) for t in totals])  # one snapshot late
        totals = totals + processed[iteration - 1]
        for e in book.choose(iteration, [int(t) for t in totals], num_experts):
            saved[e] = float(totals[e])
    lost = np.array([totals[e] - saved[e] for e in range(len(names))])
    return lost.reshape(loads.shape[1:])


def share_repaid(
    loads: Loads, factor: float, faults: Sequence[int], num_experts: int, cap: int, policy: str, by_own_debt: bool
) -> float:
    """Share of all lost tokens that is made up for until capacity is back at the base."""
    rules = CapacityRules(iterations=50)
    capacity = capacity_of(loads, factor)
    total = paid = 0.0
    for fault in (f for f in faults if f < len(loads)):
        debt = lost_at(loads, capacity, fault, num_experts, cap, policy)
        recent = loads[max(0, fault - 10) : fault].mean(axis=0)
        total += debt.sum()
        for passed in range(min(rules.iterations, len(loads) - fault)):
            now = loads[fault + passed]
            if by_own_debt:
                wanted = np.minimum(rules.max_boost - 1, debt / (rules.iterations * np.maximum(recent, 1)))
                raised = 1 + wanted * (1 - passed / rules.iterations)
            else:
                raised = boosts(recent, debt, passed, factor, rules)
            room = np.minimum(np.ceil(capacity * raised), now.sum(axis=-1, keepdims=True))
            beyond = np.minimum(now, room) - np.minimum(now, capacity)
            left = np.maximum(debt - beyond, 0) if by_own_debt else repaid(debt, beyond)
            paid += debt.sum() - left.sum()
            debt = left
            recent = recent + (now - recent) / 10
    return paid / total if total else 0.0
