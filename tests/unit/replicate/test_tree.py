# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from megatron_moetion.replicate.tree import Place, depth_of, place_of


def places(members: list[int], ranks_per_host: int, arity: int) -> dict[int, Place]:
    return {rank: place_of(rank, members, ranks_per_host, arity) for rank in members}


CASES = [
    (list(range(1)), 1, 4),
    (list(range(2)), 2, 4),
    (list(range(3)), 1, 2),
    (list(range(64)), 8, 4),
    (list(range(100)), 7, 3),
    (list(range(257)), 1, 4),
    ([3, 5, 40, 41, 42, 100, 7], 8, 2),
    ([511, 0, 256, 8], 8, 4),
]


@pytest.mark.parametrize(("members", "per_host", "arity"), CASES)
def test_every_member_but_the_lowest_has_a_lower_parent_that_knows_it(
    members: list[int], per_host: int, arity: int
) -> None:
    found = places(members, per_host, arity)
    for rank, place in found.items():
        if rank == min(members):
            assert place.parent is None
        else:
            assert place.parent is not None
            assert place.parent < rank
            assert rank in found[place.parent].children
    assert sum(len(p.children) for p in found.values()) == len(members) - 1


@pytest.mark.parametrize(("members", "per_host", "arity"), CASES)
def test_what_is_below_a_member_and_itself_are_neighbours_in_order(
    members: list[int], per_host: int, arity: int
) -> None:
    found = places(members, per_host, arity)

    def walk(rank: int) -> list[int]:
        return [rank, *(r for child in found[rank].children for r in walk(child))]

    assert walk(min(members)) == sorted(members)


@pytest.mark.parametrize(("members", "per_host", "arity"), CASES)
def test_members_of_a_node_hang_on_its_lowest_and_a_leader_has_few_leaders_below(
    members: list[int], per_host: int, arity: int
) -> None:
    for rank, place in places(members, per_host, arity).items():
        leader = min(m for m in members if m // per_host == rank // per_host)
        if rank != leader:
            assert place == Place(parent=leader, children=())
        assert sum(c // per_host != rank // per_host for c in place.children) <= arity


@pytest.mark.parametrize("num_nodes", [1, 2, 5, 6, 21, 22, 85, 2048])
def test_the_depth_is_logarithmic(num_nodes: int) -> None:
    found = places(list(range(num_nodes)), 1, 4)

    def depth(rank: int) -> int:
        parent = found[rank].parent
        return 0 if parent is None else 1 + depth(parent)

    assert max(map(depth, found)) == depth_of(num_nodes)
    assert depth_of(2048) == 6
