# SPDX-License-Identifier: Apache-2.0
"""Experts whose state several ranks hold shards of: the iterations that all shards have. Pure.

These ranks combine tables of a fixed size, row by row: one row an expert, with the iterations of its captures.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from megatron_moetion.arrays import Int64s

ITERATIONS_MAX = 64
"""Iterations that are told of one expert, or of one rank: the newest ones. More never wait for an agreement."""
_NONE, _ANY = -1, -2
"""In place of an iteration. A row of ``_ANY``: this rank has no shard of the expert, and sets no limit."""


def words_of(names: Sequence[str], captured: Mapping[str, Collection[int]]) -> list[int]:
    """One rank's table, row by row: for each expert the iterations that it has captures of.

    ``captured`` has the experts of which the rank has a shard, also those of which no capture is left.
    """
    table = np.full((len(names), ITERATIONS_MAX), _NONE, dtype=np.int64)
    for row, name in zip(table, names, strict=True):
        if name in captured:
            newest = sorted(captured[name], reverse=True)[:ITERATIONS_MAX]
            row[: len(newest)] = newest
        else:
            row[:] = _ANY
    return [int(word) for word in table.ravel()]


def common(mine: Sequence[int], theirs: Sequence[int]) -> list[int]:
    """Two tables to one: of each expert the iterations that are in both. Commutative and associative."""
    a, b = _table(mine), _table(theirs)
    both = np.sort(np.concatenate([a, b], axis=1), axis=1)
    twice = np.where(both[:, 1:] == both[:, :-1], both[:, 1:], _NONE)  # no iteration is in one row twice
    found = np.sort(twice, axis=1)[:, ::-1][:, :ITERATIONS_MAX]
    found = np.where(a[:, :1] == _ANY, b, np.where(b[:, :1] == _ANY, a, found))
    return [int(word) for word in found.ravel()]


def iterations_of(names: Sequence[str], words: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """What a combined table says: for each expert the iterations that all its shards have, the newest first.

    Experts of which no rank has a shard are left out.
    """
    rows = zip(names, _table(words), strict=True)
    return {name: tuple(row[row >= 0].tolist()) for name, row in rows if row[0] != _ANY}


def captured_at(common: Mapping[str, Sequence[int]], iteration: int) -> dict[str, int]:
    """Where each expert is captured that a recovery to ``iteration`` loads: the newest common one until then."""
    return {name: next(i for i in iterations if i <= iteration) for name, iterations in common.items()}


def _table(words: Sequence[int]) -> Int64s:
    return np.array(words, dtype=np.int64).reshape(-1, ITERATIONS_MAX)
