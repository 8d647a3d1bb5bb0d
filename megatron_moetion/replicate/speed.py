# SPDX-License-Identifier: Apache-2.0
"""How fast the link to another rank is, by sending something over it.

A probe is one connection. The sender sends blocks, each behind its length (8 bytes, little-endian), then a length of 0;
the receiver throws them away and answers with one byte.
"""

from __future__ import annotations

import numpy as np

from megatron_moetion.arrays import Bytes
from megatron_moetion.clock import Clock
from megatron_moetion.replicate.channel import Connection, Mesh

PROBE_BYTES = 64 << 20
PROBE_S = 0.5
_PURPOSE = "probe"
_BLOCK_BYTES = 1 << 20
_LENGTH_BYTES = 8


def serve_probes(mesh: Mesh) -> None:
    """Let other ranks measure their links to this one."""
    mesh.serve(_PURPOSE, _throw_away)


def measure_link(
    mesh: Mesh, peer: int, *, clock: Clock, timeout_s: float, most_bytes: int = PROBE_BYTES, most_s: float = PROBE_S
) -> float:
    """Bytes per second from this rank to ``peer``, which must have called ``serve_probes``.

    Sends ``most_bytes``, or fewer where that would take longer than ``most_s``. What else is on the network at the
    time takes its share. ``ChannelError`` where the peer does not answer within ``timeout_s``, or is lost.
    """
    block = np.zeros(_BLOCK_BYTES, dtype=np.uint8)
    connection = mesh.dial(peer, _PURPOSE, timeout_s)
    try:
        began_s, sent = clock.monotonic(), 0
        while sent < most_bytes and clock.monotonic() - began_s < most_s:
            part = block[: min(_BLOCK_BYTES, most_bytes - sent)]
            connection.send([_length(part.nbytes), part])
            sent += part.nbytes
        connection.send([_length(0)])
        connection.receive([np.empty(1, dtype=np.uint8)], timeout_s)
        return sent / max(clock.monotonic() - began_s, 1e-9)
    finally:
        connection.close()


def _throw_away(connection: Connection) -> None:
    block, length = np.empty(_BLOCK_BYTES, dtype=np.uint8), np.empty(_LENGTH_BYTES, dtype=np.uint8)
    while True:
        connection.receive([length])
        nbytes = int.from_bytes(length.tobytes(), "little")
        if not 0 < nbytes <= _BLOCK_BYTES:
            break
        connection.receive([block[:nbytes]])
    connection.send([np.ones(1, dtype=np.uint8)])


def _length(nbytes: int) -> Bytes:
    return np.frombuffer(nbytes.to_bytes(_LENGTH_BYTES, "little"), dtype=np.uint8)
