# SPDX-License-Identifier: Apache-2.0
"""The lanes of timelines, traces and charts. Pure."""

from __future__ import annotations

import enum


class Lane(enum.Enum):
    """What a span is about. The value is its name in pictures, which show the lanes in this order."""

    ITERATION = "iteration"
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
