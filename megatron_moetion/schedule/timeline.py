# SPDX-License-Identifier: Apache-2.0
"""The words of scheduling: links, spans, timelines; lanes are those of pictures. Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_moetion.observe.lanes import TRAFFIC
from megatron_moetion.observe.lanes import Lane as Lane


class Link(enum.Enum):
    """What snapshots travel over."""

    D2H = "device to host"
    NETWORK = "network"


class Span(NamedTuple):
    """A stretch of one iteration, in seconds since the end of the optimizer step before it.

    ``sent_bytes`` and ``received_bytes`` are what crossed the network between nodes; both are 0 for what stayed on
    the node. A span of traffic that moved nothing over the network does not keep that link busy. ``accepted_s`` is
    when the network had accepted all that the span sends, where that was seen: a peer may let a sender wait for it.
    """

    lane: Lane
    begin_s: float
    end_s: float
    sent_bytes: int = 0
    received_bytes: int = 0
    accepted_s: float | None = None

    @property
    def quiet_since_s(self) -> float:
        """When the link is left to others but for the bytes that are on their way: when the network has accepted them.

        Where that was not seen, when the call returned. A collective's peers may send and ask for bytes at any moment
        until then.
        """
        return self.end_s if self.accepted_s is None else self.accepted_s


@dataclass(frozen=True, kw_only=True, eq=False)
class Sends:
    """What training sent over the network in one iteration, by when the calls began."""

    begin_s: npt.NDArray[np.float64]
    quiet_since_s: npt.NDArray[np.float64]
    nbytes: npt.NDArray[np.int64]
    left_bytes: npt.NDArray[np.int64]
    """What is still to go on the wire then: all of a pipeline's message, and nothing of a collective."""


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """One iteration of one rank, from the end of one optimizer step to the end of the next."""

    iteration: int
    begin_s: float
    """On the host's monotonic clock, for lining up ranks of one machine."""
    duration_s: float
    spans: tuple[Span, ...] = ()

    @cached_property
    def sends(self) -> Sends:
        """The spans of training's traffic that sent bytes. Kept: each iteration is looked at several times."""
        found = [s for s in self.spans if s.sent_bytes and s.lane in TRAFFIC]
        found.sort(key=lambda s: s.begin_s)
        return Sends(
            begin_s=np.array([s.begin_s for s in found], dtype=np.float64),
            quiet_since_s=np.array([s.quiet_since_s for s in found], dtype=np.float64),
            nbytes=np.array([s.sent_bytes for s in found], dtype=np.int64),
            left_bytes=np.array([s.sent_bytes * (s.lane is Lane.PIPELINE) for s in found], dtype=np.int64),
        )
