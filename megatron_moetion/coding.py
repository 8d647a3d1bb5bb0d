# SPDX-License-Identifier: Apache-2.0
"""What other nodes keep of a rank's captures: whole copies, or fragments of which some rebuild a capture. Pure.

A capture is cut into ``data`` rows, and ``parity`` more are computed from them (Reed-Solomon; ``snapshot/codec.py``).
Each holder keeps one fragment: a row, and before it what says which capture it is of. Any ``data`` different fragments
rebuild the capture.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moetion.errors import ConfigError
from megatron_moetion.units import align_up

FRAGMENTS_MAX = 32
"""Data and parity together: what the library takes."""
FRAME_BYTES = 64
"""Of a fragment, before its row: the digest of the whole capture, 8 bytes, and zeros."""


@dataclass(frozen=True, kw_only=True, order=True)
class Part:
    """What of each capture an arena holds: all of it, or fragment ``number`` of ``data`` + ``parity``."""

    number: int = 0
    """From 1; 0: the whole. Numbers up to ``data`` are rows of the capture as they are."""
    data: int = 1
    parity: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether captures stand in the arena as they were captured."""
        return self.number == 0

    def row_bytes(self, nbytes: int) -> int:
        """Bytes of each row of a capture of so many bytes; rows end in zeros where they do not come out even."""
        return align_up(-(-nbytes // self.data))

    def stored_bytes(self, nbytes: int) -> int:
        """What a capture of so many bytes takes in such an arena."""
        return nbytes if self.is_whole or not nbytes else FRAME_BYTES + self.row_bytes(nbytes)

    @classmethod
    def of(cls, number: int, data: int, parity: int) -> Part:
        """Inverse of ``astuple``, for what was read. ``ValueError`` where there is no such part."""
        found = cls(number=number, data=data, parity=parity)
        is_fragment = data > 1 and parity > 0 and 0 < number <= data + parity <= FRAGMENTS_MAX
        if found != WHOLE and not is_fragment:
            raise ValueError(f"there is no fragment {number} of {data}+{parity}")
        return found

    def __str__(self) -> str:
        return "whole copies" if self.is_whole else f"fragment {self.number} of {self.data}+{self.parity}"


WHOLE = Part()


@dataclass(frozen=True, kw_only=True)
class Coding:
    """How a rank's captures are kept on other nodes: ``holders`` nodes, of which any ``data`` rebuild all of it.

    With ``data`` 1 each holder has a whole copy.
    """

    holders: int
    data: int = 1

    @property
    def is_on(self) -> bool:
        """Whether holders keep fragments."""
        return self.data > 1

    @property
    def share(self) -> float:
        """Bytes that a rank sends, and that its holders keep, for each byte that it captures."""
        return self.holders / self.data

    @property
    def losses(self) -> int:
        """Node losses that an owner's state survives while all holders have their parts of it."""
        return self.survives(self.holders)

    def part(self, position: int) -> Part:
        """What the holder at this position of an owner's holders keeps, if all begin anew."""
        return Part(number=position + 1, data=self.data, parity=self.holders - self.data) if self.is_on else WHOLE

    def survives(self, parts: int) -> int:
        """Node losses that an owner's state survives while so many holders have their parts of it.

        The owner's own node is lost first: then ``data`` parts have to be left.
        """
        return max(0, parts - self.data + 1)


def coding_of(replicas: int, nodes: int) -> Coding:
    """From the settings: losses to survive, and the nodes of a group; 0 nodes: whole copies.

    ``ConfigError`` where fragments would save nothing, or cannot be.
    """
    if not nodes:
        return Coding(holders=replicas)
    if replicas < 2:
        given = f"{replicas}" if replicas >= 0 else "left to the run, which keeps 1"
        raise ConfigError(
            f"--moetion-coding-nodes {nodes} with --moetion-replicas {given}: fragments that survive the loss of one "
            f"node take as much memory and network as a copy. Give --moetion-replicas 2 or more, or leave "
            f"--moetion-coding-nodes out"
        )
    if not replicas + 2 <= nodes <= FRAGMENTS_MAX + 1:
        raise ConfigError(
            f"--moetion-coding-nodes is {nodes}; with --moetion-replicas {replicas} it must be from {replicas + 2} to "
            f"{FRAGMENTS_MAX + 1}, or 0 for whole copies"
        )
    return Coding(holders=nodes - 1, data=nodes - replicas)
