# SPDX-License-Identifier: Apache-2.0
"""What state should be: a known function of the iteration and of all that has been done to get there. Pure.

Each iteration of a history has a *mark*, made from the mark before it, the iteration, and the attempt that computed it.
So what is done again after a recovery has other marks, and state of a dead history is told from that of the living one.
"""

from __future__ import annotations

import hashlib
import struct

START = b"\0" * 8
"""The mark of iteration 0."""


def mark_after(mark: bytes, iteration: int, attempt: int) -> bytes:
    """The mark of ``iteration``, from the one before it."""
    return hashlib.blake2b(mark + struct.pack("<qq", iteration, attempt), digest_size=8).digest()


def contents(mark: bytes, rank: int, unit: str, nbytes: int) -> bytes:
    """What a unit of a rank holds at this mark, where state does not follow from gradients."""
    return hashlib.shake_128(mark + struct.pack("<q", rank) + unit.encode()).digest(nbytes)


def tokens(rank: int, iteration: int, expert: int) -> int:
    """Tokens that a rank trains one of its experts on; some experts are far more popular than others."""
    return 1 + (expert * expert * 7 + iteration * (expert + 2) + rank) % (3 + 5 * expert)


def is_skipped(iteration: int) -> bool:
    """Whether gradients overflow in this iteration, so that the optimizer takes no step (mode ``exact``)."""
    return iteration % 7 == 5


def gradient(mark: bytes, rank: int, unit: str, nbytes: int, iteration: int) -> bytes:
    """The gradient of a unit in the iteration of this mark; now and then that of an expert is zero."""
    number = sum(unit.encode())
    if "expert" in unit and (iteration // 4 + number) % 3 == 0 and not is_skipped(iteration):
        return bytes(nbytes)
    return contents(mark, rank, f"{unit}.grad", nbytes)


def stepped(state: bytes, gradients: bytes, iteration: int) -> bytes:
    """State after an optimizer step: 3 w + g in unsigned 32-bit words; as it was where the step is skipped."""
    if is_skipped(iteration):
        return state
    words = [f"<{len(part) // 4}I" for part in (state, gradients)]
    pairs = zip(struct.unpack(words[0], state), struct.unpack(words[1], gradients), strict=True)
    return struct.pack(words[0], *((3 * w + g) & 0xFFFFFFFF for w, g in pairs))
