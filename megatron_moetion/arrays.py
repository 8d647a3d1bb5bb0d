# SPDX-License-Identifier: Apache-2.0
"""Names for the arrays that rooms hand to each other."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Int64s = npt.NDArray[np.int64]
"""Addresses, sizes, slots, unit numbers and tables of them."""
Digests = npt.NDArray[np.uint64]
Flags = npt.NDArray[np.bool_]


def counted(counts: Int64s) -> Int64s:
    """0 ... ``counts[0]`` - 1, then 0 ... ``counts[1]`` - 1 and so on, int64[counts.sum()]."""
    starts = np.cumsum(counts) - counts
    return np.arange(int(counts.sum()), dtype=np.int64) - np.repeat(starts, counts)
