# SPDX-License-Identifier: Apache-2.0
"""A name that Megatron-Core imports and that no test makes."""

from __future__ import annotations

import torch


class SOAP(torch.optim.Optimizer):
    """Not there."""
