# SPDX-License-Identifier: Apache-2.0
"""Newton-Schulz iteration towards the nearest orthogonal matrix, with the coefficients of K. Jordan's Muon."""

from __future__ import annotations

from typing import Any, Literal

import torch

NSCoeffT = Literal["quintic"]
_A, _B, _C = 3.4445, -4.7750, 2.0315


def newton_schulz_tp(
    x: torch.Tensor,
    steps: int,
    coefficient_type: NSCoeffT,
    tp_group: Any,
    partition_dim: int | None = None,
    tp_mode: str = "duplicated",
    mode: str = "duplicated",
) -> torch.Tensor:
    """Of a whole matrix; there is no tensor parallelism here."""
    assert partition_dim is None or tp_group.size() == 1
    is_tall = x.size(0) > x.size(1)
    x = x.mT if is_tall else x
    x = x / x.norm().clamp_min(1e-12)
    for _ in range(steps):
        square = x @ x.mT
        x = _A * x + (_B * square + _C * (square @ square)) @ x
    return x.mT if is_tall else x
