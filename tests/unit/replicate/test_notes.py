# SPDX-License-Identifier: Apache-2.0
"""Notes of many ranks, combined in the order of a tree or of another."""

from __future__ import annotations

import random

from megatron_moetion.observe.notes import KINDS, Note
from megatron_moetion.replicate.notes import merge_notes


def note(rank: int, text: str = "") -> Note:
    return Note(ranks=1, rank=rank, iteration=rank, text=text or f"rank {rank}")


def test_counts_add_up_and_the_lowest_rank_is_quoted() -> None:
    merged = merge_notes({"disk": note(5), "slow": note(5)}, {"disk": note(2)})
    assert merged == {"disk": Note(ranks=2, rank=2, iteration=2, text="rank 2"), "slow": note(5)}


def test_any_order_of_combination_gives_the_same() -> None:
    chance = random.Random(3)
    kinds = [f"kind {k:02}" for k in range(3 * KINDS)]
    ranks = [{kind: note(rank) for kind in chance.sample(kinds, 9)} for rank in range(40)]
    results = []
    for _ in range(5):
        left = list(ranks)
        chance.shuffle(left)
        while len(left) > 1:
            at = chance.randrange(len(left) - 1)
            left[at : at + 2] = [merge_notes(left[at], left[at + 1])]
        results.append(left[0])
    assert all(result == results[0] for result in results)
    assert len(results[0]) == KINDS
    assert all(results[0][kind].ranks == sum(kind in said for said in ranks) for kind in results[0])
