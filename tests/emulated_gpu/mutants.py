# SPDX-License-Identifier: Apache-2.0
"""Faults put into the kernels' PTX, each of which the emulator or the kernels' cases must see."""

from __future__ import annotations

import re


def reads_vectors_unaligned(ptx: str) -> str:
    """A 16-byte load of an address that is a multiple of 8 only."""
    return _replaced(r"(ld\.global\.cs\.v2\.u64\s+\{[^}]*\}, \[%\w+)\]", r"\1+8]", ptx)


def reads_past_a_piece(ptx: str) -> str:
    """Single bytes are read one too far."""
    return _replaced(r"(ld(?:\.global\.cs)?\.u8\s+%\w+, \[%\w+)\]", r"\1+1]", ptx)


def writes_past_a_chunk(ptx: str) -> str:
    """Single bytes are written one too far."""
    return _replaced(r"(st(?:\.global\.cs)?\.u8\s+\[%\w+)\]", r"\1+1]", ptx)


def leaves_a_step_of_the_shuffle_out(ptx: str) -> str:
    """The sums of two halves of a warp are not added."""
    return _replaced(r"(shfl\.sync\.bfly\.b32\s+%\w+\|%\w+, %\w+, )%?\w+,", r"\g<1>0,", ptx, count=2)


def a_lane_leaves_before_the_shuffle(ptx: str) -> str:
    """Thread 5 of a block ends where the others begin."""
    leave = r"\1 .reg .pred %leaves; setp.eq.s32 %leaves, \2, 5; @%leaves ret;"
    return _replaced(r"(mov\.u32\s+(%\w+), %tid\.x;)", leave, ptx)


MUTANTS = (
    reads_vectors_unaligned,
    reads_past_a_piece,
    writes_past_a_chunk,
    leaves_a_step_of_the_shuffle_out,
    a_lane_leaves_before_the_shuffle,
)


def _replaced(pattern: str, by: str, ptx: str, count: int = 0) -> str:
    """All places, or the first ``count``."""
    mutant, found = re.subn(pattern, by, ptx, count=count)
    assert found > 0, f"the PTX has no {pattern}"
    return mutant
