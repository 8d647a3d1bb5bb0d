# SPDX-License-Identifier: Apache-2.0
"""The words of scheduling: links, lanes, spans, timelines. Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Link(enum.Enum):
    """What snapshots travel over."""

    D2H = "device to host"
    NETWORK = "network"


class Lane(enum.Enum):
    """What a span of a timeline is about. The value is its name in pictures."""

    COMPUTE = "compute"
    WAIT = "wait"
    PIPELINE = "pipeline"
    ALL_TO_ALL = "all-to-all"
    GRADIENT = "gradient sync"
    PARAMETER = "parameter gather"
    D2H = "device to host"
    REPLICATION = "replication"


TRAFFIC = (Lane.PIPELINE, Lane.ALL_TO_ALL, Lane.GRADIENT, Lane.PARAMETER)
"""Training's own communication."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """A stretch of one iteration, in seconds since the end of the optimizer step before it.

    ``sent_bytes`` and ``received_bytes`` are what crossed the network between nodes; both are 0 for what stayed on
    the node. A span of traffic that moved nothing over the network does not keep that link busy. ``taken_s`` is when
    the network had taken all that the span sends, where that was seen: the peer may let a sender wait for it.
    """

    lane: Lane
    begin_s: float
    end_s: float
    sent_bytes: int = 0
    received_bytes: int = 0
    taken_s: float | None = None

    @property
    def leaves_s(self) -> float:
        """From when on its bytes are on the wire: when the network has taken them.

        Of a pipeline call of which that was not seen, when it returned; of a collective, from its beginning.
        """
        if self.taken_s is not None:
            return self.taken_s
        return self.end_s if self.lane is Lane.PIPELINE else self.begin_s


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """One iteration of one rank, from the end of one optimizer step to the end of the next."""

    iteration: int
    begin_s: float
    """On the host's monotonic clock, for lining up ranks of one machine."""
    duration_s: float
    spans: tuple[Span, ...] = ()
