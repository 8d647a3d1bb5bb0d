# SPDX-License-Identifier: Apache-2.0
"""What a placement survives: losses of nodes drawn by chance, and of whole failure domains. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from math import comb

from megatron_moetion.replicate.placement import Domain, Placement, enclosing, in_common

LOST_NODES = (1, 2, 3)
"""Simultaneous losses whose odds are shown."""
_NAMED_MAX = 4
"""Groups, or domains, that a line names."""


def odds(placement: Placement, lost: int) -> Fraction:
    """The probability that every rank's state survives where ``lost`` nodes are lost at once, all sets alike. Exact.

    Counted are the sets of nodes that cost no rank's state. Copies and fragments stay within a group, so the sets of
    all groups multiply.
    """
    alike = {len(group): group for group in placement.groups}  # rings: in those of one size as many sets are harmless
    harmless = {
        size: [_harmless(placement, group, number) for number in range(min(lost, size) + 1)]
        for size, group in alike.items()
    }
    ways = [1] + [0] * lost  # by number of lost nodes
    for here in (harmless[len(group)] for group in placement.groups):
        ways = [sum(here[n] * ways[m - n] for n in range(min(m, len(here) - 1) + 1)) for m in range(lost + 1)]
    return Fraction(ways[lost], comb(placement.num_nodes, lost))


def shown(placement: Placement) -> dict[int, Fraction]:
    """``odds`` by lost nodes, as many as there are."""
    return {lost: odds(placement, lost) for lost in LOST_NODES if lost <= placement.num_nodes}


def percent(value: Fraction) -> str:
    """For a person: with as many digits as it takes to tell it from certainty."""
    if value in (0, 1):
        return f"{int(value * 100)}%"
    digits = next(d for d in range(1, 20) if round(value * 100, d) < 100)
    return f"{float(value * 100):.{digits}f}%"


@dataclass(frozen=True, kw_only=True)
class Exposure:
    """What failure domains put at risk, beyond what all nodes share."""

    domains: int
    """Of the outermost level at which nodes differ; 0: none are known, or all nodes are in one."""
    around: Domain
    """What all nodes lie in."""
    sharing: tuple[tuple[Domain, tuple[int, ...]], ...]
    """Nodes of one group that share a domain."""
    exposed: tuple[int, ...]
    """Nodes whose state has two copies, or two fragments, in one domain; what a node has of its own counts."""
    fatal: tuple[tuple[Domain, int], ...]
    """Domains of any level whose loss costs the state of so many nodes."""

    @property
    def odds(self) -> Fraction:
        """The probability that all state survives the loss of one of ``domains``, all alike. There must be one."""
        depth = len(self.around) + 1
        return 1 - Fraction(sum(len(domain) == depth for domain, _ in self.fatal), self.domains)


def exposure(placement: Placement) -> Exposure:
    """Where copies, or fragments, lie together although nodes differ."""
    domains, copies = placement.domains, _copies(placement)
    first, last = min(domains), max(domains)
    around = first[: in_common(first, last)]
    depth = len(around) + 1
    sharing = []
    for group in placement.groups:
        together: dict[Domain, list[int]] = defaultdict(list)
        for node in group:
            if len(domains[node]) >= depth:
                together[domains[node][:depth]].append(node)
        sharing += [(_innermost(domains, nodes), tuple(nodes)) for nodes in together.values() if len(nodes) > 1]
    exposed = [node for node, nodes in copies.items() if _share(nodes, domains, depth)]
    fatal: Counter[Domain] = Counter()
    for node, nodes in copies.items():
        inside = Counter(enclosing([domains[n] for n in nodes]))
        fatal.update(d for d in enclosing([domains[node]]) if len(d) >= depth and inside[d] > placement.coding.losses)
    return Exposure(
        domains=len({d[:depth] for d in domains if len(d) >= depth}),
        around=around,
        sharing=tuple(sharing),
        exposed=tuple(exposed),
        fatal=tuple(sorted(fatal.items())),
    )


def describe(placement: Placement) -> str:
    """A line for the start of a run with replicas."""
    sizes = Counter(len(group) for group in placement.groups)
    groups = " and ".join(f"{count} of {size}" for size, count in sorted(sizes.items()))
    survived = ", ".join(f"{percent(value)} of {lost}" for lost, value in shown(placement).items())
    return f"placement: groups of nodes: {groups}; odds that all state survives lost nodes: {survived}"


def describe_domains(placement: Placement) -> tuple[str, bool]:
    """A line about failure domains where they are known, and whether it is a warning. "" where none are."""
    found, num_nodes = exposure(placement), placement.num_nodes
    kept = "fragments" if placement.coding.is_on else "copies"
    if placement.unknown:
        nodes = _listed([str(node) for node in placement.unknown])
        return (
            f"failure domains: those of {num_nodes - len(placement.unknown)} of {num_nodes} nodes are known, so none "
            f"counts; SLURM says nothing on node(s) {nodes}. Start all ranks by srun, or give a file with "
            f"--moetion-failure-domains",
            True,
        )
    if not any(placement.domains):
        return "", False
    if not found.domains:
        return f"failure domains: all nodes are in {_name(found.around)}, which placement cannot change", False
    if not found.sharing:
        return f"failure domains: {found.domains}; no two {kept} of a state are in one of them", False
    size = len(placement.holders[0]) + 1
    sharing = _listed([f"nodes {_and(nodes)} share {_name(domain)}" for domain, nodes in found.sharing])
    text = (
        f"failure domains: the state of {len(found.exposed)} of {num_nodes} nodes has two {kept} in one domain, since "
        f"a domain has more than {num_nodes // size} nodes, one for each group: {sharing}"
    )
    if found.fatal:
        lost = _listed([f"{_name(domain)} ({count} nodes)" for domain, count in found.fatal])
        text += f". The loss of one of these domains would cost state: {lost}"
    return text, True


def _copies(placement: Placement) -> dict[int, frozenset[int]]:
    """For each node the nodes that have its ranks' state, itself too."""
    homes = {node: placement.ranks_on(node)[0] for node in range(placement.num_nodes)}
    node_of, holders = placement.node_of, placement.holders
    return {node: frozenset({node, *(node_of[h] for h in holders[rank])}) for node, rank in homes.items()}


def _harmless(placement: Placement, group: Sequence[int], number: int) -> int:
    """Sets of so many nodes of a group that cost no state: a lost node's, with more of those that keep it than may be.

    ``group`` is a ring: each node's state is kept by the nodes behind it.
    """
    losses, size = placement.coding.losses, len(group)
    if number <= losses:
        return comb(size, number)
    if size == placement.coding.holders + 1:
        return 0  # each node has the state of all others
    near = [sum(1 << (first + step) % size for step in range(placement.coding.holders + 1)) for first in range(size)]
    lost = ((some, sum(1 << place for place in some)) for some in combinations(range(size), number))
    return sum(all((near[place] & mask).bit_count() <= losses for place in some) for some, mask in lost)


def _share(nodes: Iterable[int], domains: Sequence[Domain], depth: int) -> bool:
    return any(in_common(domains[a], domains[b]) >= depth for a, b in combinations(nodes, 2))


def _innermost(domains: Sequence[Domain], nodes: Sequence[int]) -> Domain:
    first, last = min(domains[n] for n in nodes), max(domains[n] for n in nodes)
    return first[: in_common(first, last)]


def _name(domain: Domain) -> str:
    return "/".join(domain)


def _and(nodes: Sequence[int]) -> str:
    return " and ".join([", ".join(map(str, nodes[:-1])), str(nodes[-1])])


def _listed(texts: Sequence[str]) -> str:
    more = len(texts) - _NAMED_MAX
    return "; ".join([*texts[:_NAMED_MAX], *([f"and {more} more"] if more > 0 else [])])
