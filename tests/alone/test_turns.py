# SPDX-License-Identifier: Apache-2.0
"""Whose turn it is among threads. Tests that run beside this one would take turns too: nothing else runs meanwhile."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from megatron_moetion import _C


@pytest.mark.parametrize("isa", _C.available_isas())
def test_a_caller_that_comes_again_and_again_lets_others_in(isa: str) -> None:
    """The training thread freezes state while another one verifies a large snapshot, a small part at a time."""
    shared = _C.HostPool(2, isa)
    part, source, target = (np.zeros(size, dtype=np.uint8) for size in (1 << 20, 64, 64))
    span = np.array([(part.ctypes.data, part.nbytes)], dtype=np.int64)
    row = np.array([(source.ctypes.data, target.ctypes.data, 64)], dtype=np.int64)
    is_over, parts = threading.Event(), [0]

    def verify() -> None:
        found = np.empty(1, dtype=np.uint64)
        while not is_over.is_set():
            shared.digest(span, found)
            parts[0] += 1

    other = threading.Thread(target=verify)
    other.start()
    passed = []
    while parts[0] < 3000 and len(passed) < 1_000_000:
        before = parts[0]
        shared.scatter(row)
        passed.append(parts[0] - before)
    is_over.set()
    other.join()
    # One part or two pass a caller, now and then some more while it waits for the interpreter. A mutex without an order
    # lets hundreds pass before it wakes the caller that waits.
    assert sum(n for n in passed if n > 10) < 3000 / 2
