# SPDX-License-Identifier: Apache-2.0
"""Who holds whose replicas. Pure.

Nodes form groups of ``holders + 1``; inside a group every node holds the state of all others, or a fragment of
it, so a group survives the loss of any ``replicas`` of its nodes. Nodes that do not fill a group join the last one,
which then is a ring: each node's state goes to the next ``holders``. (GEMINI, SOSP'23, calls this mixed placement
and shows that it maximises the odds of surviving simultaneous losses.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_moetion.coding import WHOLE, Coding, Part, coding_of
from megatron_moetion.errors import ConfigError


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
    """Placement groups, as node numbers."""
    coding: Coding

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


def place(node_keys: Sequence[str], replicas: int, coding_nodes: int = 0) -> Placement:
    """Place the ranks' replicas; ``node_keys[r]`` names the node that rank r runs on. See ``coding_of``."""
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
    groups = _groups(num_nodes, coding.holders)
    holders: list[tuple[int, ...]] = [()] * len(node_of)
    for group in groups:
        for position, node in enumerate(group):
            for local, rank in enumerate(members[node]):
                holders[rank] = tuple(
                    members[group[(position + step) % len(group)]][local] for step in range(1, coding.holders + 1)
                )
    parts = tuple(tuple(coding.part(position) for position in range(coding.holders)) for _ in node_of)
    return Placement(node_of=node_of, holders=tuple(holders), parts=parts, groups=groups, coding=coding)


def _by_value(pairs: Iterable[tuple[int, int]]) -> dict[int, tuple[int, ...]]:
    """For each first number of a pair the second ones, in order."""
    found: dict[int, list[int]] = defaultdict(list)
    for first, second in pairs:
        found[first].append(second)
    return {first: tuple(seconds) for first, seconds in found.items()}


def _groups(num_nodes: int, holders: int) -> tuple[tuple[int, ...], ...]:
    size = holders + 1
    starts = list(range(0, num_nodes - num_nodes % size, size))
    ends = [*starts[1:], num_nodes]
    return tuple(tuple(range(a, b)) for a, b in zip(starts, ends, strict=True))
