# SPDX-License-Identifier: Apache-2.0
"""Who may hold a rank's replicas in place of a holder that stays away. Pure."""

from __future__ import annotations

from heapq import nsmallest

from megatron_moetion.replicate.placement import Placement, in_common

ASKED_MAX = 3
"""Nodes that are asked for room each time that a holder stays away."""


def substitutes_of(owner: int, placement: Placement) -> tuple[int, ...]:
    """Ranks to ask, in this order: on the next nodes of the ring of all nodes, each at the owner's place in its node.

    Nodes of the owner and of its holders are passed over. Nodes that share less of their failure domain with these come
    first. At most ``ASKED_MAX``.
    """
    home = placement.node_of[owner]
    place = placement.ranks_on(home).index(owner)
    taken = {home, *(placement.node_of[h] for h in placement.holders[owner])}
    num_nodes, domains = placement.num_nodes, placement.domains
    ring = (node for step in range(1, num_nodes) if (node := (home + step) % num_nodes) not in taken)

    def shared(node: int) -> int:
        return max(in_common(domains[node], domains[other]) for other in taken)

    return tuple(placement.ranks_on(node)[place] for node in nsmallest(ASKED_MAX, ring, shared))
