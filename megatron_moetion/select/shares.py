# SPDX-License-Identifier: Apache-2.0
"""How much of each expert's state lies on which rank. Pure: the same on all ranks that share the experts.

With expert data parallelism Megatron's distributed optimizer gives each rank one contiguous span of the flattened
experts. So most experts lie on one rank as a whole, and a snapshot is as late as the rank that sends most of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_moetion.arrays import Int64s

_SLACK = 0.1
"""Shards that a rank may fall short of its part: spans begin within an expert, so parts are no round numbers."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Shares:
    """Bytes of experts on the ranks that share them."""

    nbytes: Int64s
    """int64[experts, ranks]."""
    most_bytes: Int64s
    """int64[ranks]: what arenas have room for, of the experts of one snapshot."""

    @classmethod
    def of(cls, nbytes: Int64s, usual: int, most: int) -> Shares:
        """For snapshots of usually so many of all experts, and at most so many.

        A rank has room for as large a part of its shards as ``most`` is of the experts: all of them, or to the nearest
        whole shard, and at least for ``usual``.
        """
        each, total = nbytes.max(axis=0, initial=1), nbytes.sum(axis=0)
        whole = max(len(nbytes), 1) * each
        shards = np.maximum((2 * total * most + whole - 1) // (2 * whole), -(-total * usual // whole))
        return cls(nbytes=nbytes, most_bytes=total if most >= len(nbytes) else shards * each)

    @property
    def ranks(self) -> int:
        """How many ranks share the experts."""
        return int(self.nbytes.shape[1])

    def busiest_bytes(self, num_experts: int) -> int:
        """The most that any rank has to send of so many experts, if they are spread over the ranks: whole shards."""
        each, total = self._largest
        if not num_experts or not total:
            return 0
        shards = total * num_experts / (len(self.nbytes) * each)
        return max(1, math.ceil(shards - _SLACK)) * each

    @cached_property
    def _largest(self) -> tuple[int, int]:
        """Bytes of the largest shard, and of the rank that holds most."""
        return int(self.nbytes.max(initial=0)), int(self.nbytes.sum(axis=0).max(initial=0))
