# SPDX-License-Identifier: Apache-2.0
"""Who holds whose replicas. Pure.

Nodes form groups of ``holders + 1``, where each rank has so many holders: as many as there are replicas, or more that
keep a fragment each (``coding.py``). Inside a group every node holds the state of all others, so a group survives the
loss of any ``replicas`` of its nodes. A larger group is a ring: each node's state goes to the next holders. Without
failure domains, nodes that do not fill a group join the last one. (GEMINI, SOSP'23, calls this mixed placement and
shows that it maximises the odds of surviving simultaneous losses.)

Failure domains are nested: a node's is a path of names, the outermost first. With them there are G = nodes //
(replicas + 1) groups, as equal in size as can be. In any placement where all nodes hold equally much, c nodes of a
domain hold c * (replicas + 1) copies, which are of different states only if there are as many nodes: c <= G. So more
than G nodes in a domain have two copies of some state. Up to G have none: dealt out in turn, nodes that stand side by
side fall into different groups.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from math import comb

from megatron_moetion.coding import WHOLE, Coding, Part, coding_of
from megatron_moetion.errors import ConfigError

Domain = tuple[str, ...]
"""The names of a failure domain, the outermost first; empty where it is not known."""

_LOOKS = 16
"""Exchanges of two nodes that are tried, for each node of the run, before all are dealt out anew."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Nodes by rank, and for each rank the ranks that hold its replicas (its buddies)."""

    node_of: tuple[int, ...]
    """Node number of each rank."""
    holders: tuple[tuple[int, ...], ...]
    """For each owner the holding ranks, each on another node."""
    parts: tuple[tuple[Part, ...], ...]
    """For each owner what each of these keeps of its captures."""
    groups: tuple[tuple[int, ...], ...]
    """Placement groups, as node numbers; each is a ring in this order."""
    domains: tuple[Domain, ...]
    """Failure domain of each node; all are empty where that of any node is not known."""
    coding: Coding
    unknown: tuple[int, ...] = ()
    """Nodes whose domain is not known, where that of others is."""

    @property
    def num_nodes(self) -> int:
        """Nodes of the run."""
        return len(self._ranks)

    def ranks_on(self, node: int) -> tuple[int, ...]:
        """Ranks of one node, in order."""
        return self._ranks[node]

    def owners_held_by(self, rank: int) -> tuple[int, ...]:
        """Ranks whose replicas this rank holds."""
        return self._owners.get(rank, ())

    def part_at(self, holder: int, owner: int) -> Part:
        """What a holder keeps of an owner's captures; all of them on the owner's own node."""
        found = zip(self.holders[owner], self.parts[owner], strict=True)
        return next((part for rank, part in found if rank == holder), WHOLE)

    @cached_property
    def _ranks(self) -> Mapping[int, tuple[int, ...]]:
        return _by_value((node, rank) for rank, node in enumerate(self.node_of))

    @cached_property
    def _owners(self) -> Mapping[int, tuple[int, ...]]:
        return _by_value((holder, owner) for owner, holders in enumerate(self.holders) for holder in holders)


def place(node_keys: Sequence[str], replicas: int, domains: Sequence[str] = (), coding_nodes: int = 0) -> Placement:
    """Place the ranks' replicas; ``node_keys[r]`` names the node that rank r runs on.

    ``domains[r]``: that node's failure domain, such as ``switch1/rack2``, or "" where another rank of the node says it.
    Unless all nodes have one, none counts. As few nodes of a group share a domain as can be, and none where a domain
    has no more than nodes // (replicas + 1) nodes. The result follows from the arguments alone. ``ConfigError`` where
    nodes are too few, or do not run equally many ranks. For ``coding_nodes`` see ``coding_of``.
    """
    coding = coding_of(replicas, coding_nodes)
    order = {key: number for number, key in enumerate(dict.fromkeys(node_keys))}
    node_of = tuple(order[key] for key in node_keys)
    num_nodes = len(order)
    members = _by_value((node, rank) for rank, node in enumerate(node_of))
    sizes = {len(m) for m in members.values()}
    if len(sizes) != 1:
        listed = ", ".join(f"{key}: {len(members[n])}" for key, n in order.items())
        raise ConfigError(f"nodes must run equally many ranks; they run {listed}")
    if coding.is_on and num_nodes < coding_nodes:
        raise ConfigError(
            f"--moetion-coding-nodes {coding_nodes} needs as many nodes and this run has {num_nodes} ({len(node_keys)} "
            f"ranks, {sizes.pop()} a node). Add nodes, or leave it out for whole copies"
        )
    if num_nodes < replicas + 1:
        raise ConfigError(
            f"{replicas} replica(s) need {replicas + 1} nodes and this run has {num_nodes} "
            f"({len(node_keys)} ranks, {sizes.pop()} a node). Add nodes, emulate them with "
            f"--moetion-ranks-per-node, or accept with --moetion-replicas 0 that nothing survives the loss of a node"
        )
    where, unknown = _domains(members, domains)
    groups = _apart(where, coding.holders) if replicas and any(where) else _consecutive(num_nodes, coding.holders)
    holders: list[tuple[int, ...]] = [()] * len(node_of)
    for group in groups:
        for position, node in enumerate(group):
            for local, rank in enumerate(members[node]):
                holders[rank] = tuple(
                    members[group[(position + step) % len(group)]][local] for step in range(1, coding.holders + 1)
                )
    parts = tuple(tuple(coding.part(position) for position in range(coding.holders)) for _ in node_of)
    return Placement(
        node_of=node_of,
        holders=tuple(holders),
        parts=parts,
        groups=groups,
        domains=where,
        coding=coding,
        unknown=unknown,
    )


def in_common(one: Domain, other: Domain) -> int:
    """How many levels of failure domains two nodes share, from the outermost on."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def enclosing(domains: Iterable[Domain]) -> Iterator[Domain]:
    """The domains of all levels that each of these lies in, itself too."""
    return (domain[:depth] for domain in domains for depth in range(1, len(domain) + 1))


def _by_value(pairs: Iterable[tuple[int, int]]) -> dict[int, tuple[int, ...]]:
    """For each first number of a pair the second ones, in order."""
    found: dict[int, list[int]] = defaultdict(list)
    for first, second in pairs:
        found[first].append(second)
    return {first: tuple(seconds) for first, seconds in found.items()}


def _domains(
    members: Mapping[int, Sequence[int]], domains: Sequence[str]
) -> tuple[tuple[Domain, ...], tuple[int, ...]]:
    """Of each node what the first of its ranks says that says anything, and the nodes that alone say nothing."""
    said = [next((domains[r] for r in ranks if domains and domains[r]), "") for ranks in members.values()]
    if all(said):
        return tuple(tuple(text.split("/")) for text in said), ()
    unknown = tuple(node for node, text in enumerate(said) if not text)
    return ((),) * len(said), unknown if any(said) else ()


def _consecutive(num_nodes: int, replicas: int) -> tuple[tuple[int, ...], ...]:
    size = replicas + 1
    starts = list(range(0, num_nodes - num_nodes % size, size))
    ends = [*starts[1:], num_nodes]
    return tuple(tuple(range(a, b)) for a, b in zip(starts, ends, strict=True))


def _apart(domains: Sequence[Domain], replicas: int) -> tuple[tuple[int, ...], ...]:
    """Groups whose nodes share as few levels of domains as can be, added up over pairs.

    Nodes are dealt out by number, which is right where domains are ranges of nodes. What then still shares a domain
    changes places with another node. So a node that is replaced by one of another domain changes its own group and one
    other at most there, and not all of them.
    """
    count = len(domains) // (replicas + 1)
    groups = _dealt(range(len(domains)), count)
    if not _moved_apart(groups, domains):
        groups = _dealt(sorted(range(len(domains)), key=lambda node: (domains[node], node)), count)
    return tuple(tuple(sorted(group)) for group in groups)


def _dealt(nodes: Sequence[int], count: int) -> list[list[int]]:
    return [list(nodes[first::count]) for first in range(count)]


def _moved_apart(groups: list[list[int]], domains: Sequence[Domain]) -> bool:
    """Exchange nodes of groups as long as that brings sharing down; whether it is then as low as can be."""
    group_of = {node: number for number, group in enumerate(groups) for node in group}

    def shared(node: int, group: list[int], without: int = -1) -> int:
        """What the node shares, or would share, with the others of a group."""
        return sum(in_common(domains[node], domains[n]) for n in group if n not in (node, without))

    excess = sum(shared(node, groups[number]) for node, number in group_of.items()) // 2
    excess -= _least(domains, len(groups))
    looks, num_nodes = _LOOKS * len(domains), len(domains)
    for node in range(num_nodes):
        if not excess:
            break
        for other in ((node + step) % num_nodes for step in range(1, num_nodes)):
            here, there = groups[group_of[node]], groups[group_of[other]]
            if not (now := shared(node, here)):
                break
            if here is there:
                continue
            looks -= 1
            if looks < 0:
                return False
            now += shared(other, there)
            gain = now - shared(node, there, other) - shared(other, here, node)
            if gain > 0:
                here[here.index(node)], there[there.index(other)] = other, node
                group_of[node], group_of[other] = group_of[other], group_of[node]
                excess -= gain
    return not excess


def _least(domains: Sequence[Domain], count: int) -> int:
    """What pairs of a group share at least: the nodes of each domain are spread evenly over all groups."""
    spread = (divmod(size, count) for size in Counter(enclosing(domains)).values())
    return sum(more * comb(each + 1, 2) + (count - more) * comb(each, 2) for each, more in spread)
