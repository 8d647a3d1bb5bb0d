# SPDX-License-Identifier: Apache-2.0
"""Placement: any ``replicas`` nodes of a group may vanish, and nobody holds more than it places."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moetion.errors import ConfigError
from megatron_moetion.replicate.placement import enclosing, in_common, place

RUNS = st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(1, 3)).map(lambda t: (t[0], t[0] + 1 + t[1], t[2]))
"""(replicas, nodes, ranks a node), with enough nodes."""


def node_keys(nodes: int, ranks: int, scattered: bool) -> list[str]:
    keys = [f"node{n}" for n in range(nodes) for _ in range(ranks)]
    return keys[::2] + keys[1::2] if scattered else keys


DOMAINS = st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xyz")).map("/".join), min_size=9, max_size=9)
"""Of nodes, by number: nested ones."""
NO_DOMAINS: st.SearchStrategy[list[str]] = st.just([])


def domains_of(keys: Sequence[str], domains: Sequence[str]) -> list[str]:
    """By rank."""
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return [domains[numbers[key]] for key in keys] if domains else []


@given(RUNS, st.booleans(), NO_DOMAINS | DOMAINS)
def test_every_owner_is_held_on_other_nodes_of_its_group(
    run: tuple[int, int, int], scattered: bool, domains: list[str]
) -> None:
    replicas, nodes, ranks = run
    keys = node_keys(nodes, ranks, scattered)
    placement = place(keys, replicas, domains_of(keys, domains))
    assert placement.num_nodes == nodes
    assert sorted(n for g in placement.groups for n in g) == list(range(nodes))
    for owner, holders in enumerate(placement.holders):
        home = placement.node_of[owner]
        group = next(g for g in placement.groups if home in g)
        where = [placement.node_of[h] for h in holders]
        assert len(where) == len(set(where)) == replicas
        assert home not in where
        assert set(where) <= set(group)


@given(RUNS, st.booleans(), NO_DOMAINS | DOMAINS)
def test_any_replicas_nodes_may_vanish(run: tuple[int, int, int], scattered: bool, domains: list[str]) -> None:
    replicas, nodes, ranks = run
    keys = node_keys(nodes, ranks, scattered)
    placement = place(keys, replicas, domains_of(keys, domains))
    for lost in combinations(range(nodes), replicas):
        for owner, holders in enumerate(placement.holders):
            assert any(placement.node_of[r] not in lost for r in (owner, *holders))


@given(RUNS, st.booleans(), NO_DOMAINS | DOMAINS)
def test_everyone_holds_as_many_as_it_places(run: tuple[int, int, int], scattered: bool, domains: list[str]) -> None:
    replicas, nodes, ranks = run
    keys = node_keys(nodes, ranks, scattered)
    placement = place(keys, replicas, domains_of(keys, domains))
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


Groups = list[tuple[int, ...]]


def partitions(nodes: tuple[int, ...], least: int) -> Iterator[Groups]:
    """All ways to part nodes into groups of ``least`` and more."""
    if not nodes:
        yield []
        return
    first, rest = nodes[0], nodes[1:]
    for size in range(least - 1, len(nodes)):
        for others in combinations(rest, size):
            for more in partitions(tuple(n for n in rest if n not in others), least):
                yield [(first, *others), *more]


def sharing(groups: Sequence[Sequence[int]], domains: Sequence[str]) -> int:
    """Levels of domains that pairs of a group share."""
    paths = [tuple(domain.split("/")) for domain in domains]
    return sum(in_common(paths[a], paths[b]) for group in groups for a, b in combinations(group, 2))


SMALL = st.integers(1, 3).flatmap(
    lambda replicas: st.tuples(
        st.just(replicas),
        st.integers(replicas + 1, 8).flatmap(lambda n: st.lists(st.sampled_from("abcd"), min_size=n, max_size=n)),
    )
)
"""(replicas, failure domains by node)."""


@given(SMALL)
def test_no_two_copies_share_a_domain_wherever_any_groups_can_avoid_it(small: tuple[int, list[str]]) -> None:
    replicas, domains = small
    nodes = tuple(range(len(domains)))
    placement = place([str(n) for n in nodes], replicas, domains)
    can_be_avoided = any(not sharing(groups, domains) for groups in partitions(nodes, replicas + 1))
    assert (sharing(placement.groups, domains) == 0) is can_be_avoided
    assert can_be_avoided is (max(Counter(domains).values()) <= len(nodes) // (replicas + 1))


@given(SMALL, st.lists(st.sampled_from("xyz"), min_size=8, max_size=8))
def test_where_it_cannot_be_avoided_as_little_is_shared_as_can_be(
    small: tuple[int, list[str]], racks: list[str]
) -> None:
    replicas, switches = small
    domains = [f"{switch}/{rack}" for switch, rack in zip(switches, racks, strict=False)]
    nodes = tuple(range(len(domains)))
    placement = place([str(n) for n in nodes], replicas, domains)
    count = len(nodes) // (replicas + 1)
    sizes = sorted(len(group) for group in placement.groups)
    assert (len(sizes), sizes[-1] - sizes[0] <= 1) == (count, True)
    even = [g for g in partitions(nodes, replicas + 1) if sorted(map(len, g)) == sizes]
    assert sharing(placement.groups, domains) == min(sharing(groups, domains) for groups in even)


@given(st.integers(1, 3), st.lists(st.tuples(*[st.integers(0, n) for n in (1, 3, 6)]), min_size=4, max_size=60))
def test_a_domain_of_any_level_is_in_a_group_no_more_often_than_it_must(
    replicas: int, places: list[tuple[int, ...]]
) -> None:
    domains = ["/".join(map(str, each)) for each in places]
    placement = place([str(n) for n in range(len(domains))], replicas, domains)
    sizes = Counter(enclosing(placement.domains))
    count = len(domains) // (replicas + 1)
    for domain, size in sizes.items():
        inside = [sum(placement.domains[n][: len(domain)] == domain for n in group) for group in placement.groups]
        if size <= count:
            assert max(inside) <= 1
    pairs = sum(-(-s // count) - 1 for s in sizes.values())
    assert (sharing(placement.groups, domains) > 0) is (pairs > 0)


def test_the_farthest_domain_comes_first() -> None:
    domains = ["s1/r1", "s1/r2", "s2/r3", "s2/r4"]
    assert place(list("abcd"), 1, domains).groups == ((0, 2), (1, 3))
    crossed = ["s1/r1", "s2/r3", "s1/r2", "s2/r4"]
    assert sharing(place(list("abcd"), 1, crossed).groups, crossed) == 0


def test_unless_all_nodes_have_a_domain_none_counts() -> None:
    known = place(list("abcd"), 1, ["x", "x", "y", "y"])
    assert known.groups == ((0, 2), (1, 3))
    in_part, without = place(list("abcd"), 1, ["x", "x", "", "y"]), place(list("abcd"), 1)
    assert (in_part.groups, in_part.domains) == (without.groups, without.domains)
    assert (in_part.unknown, without.unknown) == ((2,), ())
    said_once = place(list("aabbccdd"), 1, ["x", "", "x", "", "", "y", "y", ""])
    assert (said_once.groups, said_once.domains) == (known.groups, (("x",), ("x",), ("y",), ("y",)))


@st.composite
def racks_and_a_spare(draw: st.DrawFn) -> tuple[int, list[str], int, str]:
    """Replicas, racks of neighbouring nodes, a node that is lost, and where the spare stands that replaces it."""
    replicas = draw(st.integers(1, 3))
    count = draw(st.integers(2, 8))
    num_nodes = count * (replicas + 1)
    sizes: list[int] = []
    while sum(sizes) < num_nodes:
        sizes.append(draw(st.integers(1, min(count, num_nodes - sum(sizes)))))
    domains = [f"rack{number}" for number, size in enumerate(sizes) for _ in range(size)]
    lost = draw(st.integers(0, num_nodes - 1))
    return replicas, domains, lost, draw(st.sampled_from([*domains, "elsewhere"]))


@given(racks_and_a_spare())
def test_a_spare_changes_its_own_group_and_one_more_at_most(case: tuple[int, list[str], int, str]) -> None:
    replicas, domains, lost, spare = case
    keys = [f"node{n}" for n in range(len(domains))]
    before = place(keys, replicas, domains)
    assert sharing(before.groups, domains) == 0
    keys[lost], domains[lost] = "spare", spare
    after = place(keys, replicas, domains)
    changed = set(after.groups) - set(before.groups)
    assert len(changed) in (0, 2)
    assert not changed or any(lost in group for group in changed)
    if max(Counter(domains).values()) <= len(domains) // (replicas + 1):
        assert sharing(after.groups, domains) == 0


def test_a_spare_in_the_lost_nodes_domain_changes_nothing() -> None:
    domains = [f"rack{n % 5}" for n in range(40)]
    keys = [f"node{n}" for n in range(40)]
    before = place(keys, 2, domains)
    assert place([*keys[:17], "spare", *keys[18:]], 2, domains).holders == before.holders


@given(st.integers(2, 6), st.integers(0, 40))
def test_rings_cost_as_little_as_published(copies: int, more: int) -> None:
    """GEMINI, SOSP'23: of the sets of as many nodes as there are copies, at most 2m - 3 more than needed are fatal."""
    num_nodes = copies + more
    placement = place([str(n) for n in range(num_nodes)], copies - 1)
    fatal = {
        frozenset(placement.node_of[r] for r in (owner, *holders)) for owner, holders in enumerate(placement.holders)
    }
    assert len(fatal) - -(-num_nodes // copies) <= max(0, 2 * copies - 3)
    assert len(fatal) <= comb(num_nodes, copies)
