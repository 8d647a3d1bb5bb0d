# SPDX-License-Identifier: Apache-2.0
"""What libraries import when they are used first, which is in a rank: a parent does it for all its forks."""

from __future__ import annotations

LATER = (
    "torch._dynamo",  # torch imports it while it builds the first optimizer
    "numpy.ma",  # NumPy 2 imports it in its first ``unique``, which is in a recovery
)
