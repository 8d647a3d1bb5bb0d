# SPDX-License-Identifier: Apache-2.0
"""Who may hold a rank's replicas in place of a holder that stays away. Pure."""

from __future__ import annotations

from megatron_moetion.replicate.placement import Placement

ASKED_MAX = 3
"""Nodes that are asked for room each time that a holder stays away."""


def substitutes_of(owner: int, placement: Placement) -> tuple[int, ...]:
    """Ranks to ask, in this order: on the next nodes of the ring of all nodes, each at the owner's place in its node.

    Nodes of the owner and of its holders are passed over. At most ``ASKED_MAX``.
    """
    home = placement.node_of[owner]
    place = placement.ranks_on(home).index(owner)
    taken = {home, *(placement.node_of[h] for h in placement.holders[owner])}
    num_nodes = placement.num_nodes
    ring = ((home + step) % num_nodes for step in range(1, num_nodes))
    found: list[int] = []
    for node in ring:
        if len(found) == ASKED_MAX:
            break
        if node not in taken:
            found.append(placement.ranks_on(node)[place])
    return tuple(found)
