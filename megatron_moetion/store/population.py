# SPDX-License-Identifier: Apache-2.0
"""How a mapping got its memory. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Population:
    """How a mapping got its memory."""

    nbytes: int
    seconds: float
    """From the request to the last page."""
    num_threads: int
    huge_bytes: int
    """Bytes in huge pages."""
    no_huge: str | None
    """Why there can be no huge pages."""
    numa: str
    """Where the memory is, for a person; "" where that makes no difference."""
    problem: str | None
    """What the kernel refused: the wish for a NUMA node, or to map pages ahead."""

    def __str__(self) -> str:
        share = self.huge_bytes / self.nbytes
        huge = "yes" if share > 0.99 else f"no, {self.no_huge}" if self.no_huge else f"for {share:.0%}"
        threads = f"{self.num_threads} thread{'s' * (self.num_threads > 1)}"
        return (
            f"populated {self.seconds:.1f} s ({'; '.join(filter(None, (threads, f'huge pages: {huge}', self.numa)))})"
        )
