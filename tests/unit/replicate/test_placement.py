# SPDX-License-Identifier: Apache-2.0
"""Placement: any ``replicas`` nodes of a group may vanish, and nobody holds more than it places."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moetion.errors import ConfigError
from megatron_moetion.replicate.placement import place

RUNS = st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(1, 3)).map(lambda t: (t[0], t[0] + 1 + t[1], t[2]))
"""(replicas, nodes, ranks a node), with enough nodes."""


def node_keys(nodes: int, ranks: int, scattered: bool) -> list[str]:
    keys = [f"node{n}" for n in range(nodes) for _ in range(ranks)]
    return keys[::2] + keys[1::2] if scattered else keys


@given(RUNS, st.booleans())
def test_every_owner_is_held_on_other_nodes_of_its_group(run: tuple[int, int, int], scattered: bool) -> None:
    replicas, nodes, ranks = run
    placement = place(node_keys(nodes, ranks, scattered), replicas)
    assert placement.num_nodes == nodes
    assert sorted(n for g in placement.groups for n in g) == list(range(nodes))
    for owner, holders in enumerate(placement.holders):
        home = placement.node_of[owner]
        group = next(g for g in placement.groups if home in g)
        where = [placement.node_of[h] for h in holders]
        assert len(where) == len(set(where)) == replicas
        assert home not in where
        assert set(where) <= set(group)


@given(RUNS, st.booleans())
def test_any_replicas_nodes_may_vanish(run: tuple[int, int, int], scattered: bool) -> None:
    replicas, nodes, ranks = run
    placement = place(node_keys(nodes, ranks, scattered), replicas)
    for lost in combinations(range(nodes), replicas):
        for owner, holders in enumerate(placement.holders):
            assert any(placement.node_of[r] not in lost for r in (owner, *holders))


@given(RUNS, st.booleans())
def test_everyone_holds_as_many_as_it_places(run: tuple[int, int, int], scattered: bool) -> None:
    replicas, nodes, ranks = run
    placement = place(node_keys(nodes, ranks, scattered), replicas)
    for rank in range(nodes * ranks):
        held = placement.owners_held_by(rank)
        assert len(held) == replicas
        assert all(rank in placement.holders[o] for o in held)
        assert rank in placement.ranks_on(placement.node_of[rank])


def test_nodes_that_fill_no_group_join_the_last_one() -> None:
    assert place(["a", "b", "c", "d", "e"], 1).groups == ((0, 1), (2, 3, 4))
    assert place(["a", "b", "c", "d", "e"], 1).holders == ((1,), (0,), (3,), (4,), (2,))


def test_too_few_nodes_name_the_numbers_and_the_ways_out() -> None:
    with pytest.raises(ConfigError, match=r"2 replica\(s\) need 3 nodes and this run has 2 \(4 ranks, 2 a node\)") as e:
        place(["a", "a", "b", "b"], 2)
    assert "--moetion-ranks-per-node" in str(e.value)
    assert "--moetion-replicas 0" in str(e.value)


def test_uneven_nodes_are_named() -> None:
    with pytest.raises(ConfigError, match="they run a: 2, b: 1"):
        place(["a", "a", "b"], 1)
