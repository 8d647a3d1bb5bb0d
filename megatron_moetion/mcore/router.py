# SPDX-License-Identifier: Apache-2.0
"""Counts the tokens that each local expert processes, with a removable hook on the layer's experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from megatron_moetion.errors import UnsupportedState
from megatron_moetion.mcore.layout import MoeBlock


class TokenCounters:
    """One int64[num_local_experts] tensor a layer, on the experts' device; counts since the run began.

    Counts only while gradients are enabled: evaluation does not train, and recomputation runs a forward twice,
    once without gradients. Adds on the device, so nothing waits for the host.
    """

    def __init__(self, blocks: Sequence[MoeBlock]) -> None:
        self.totals: list[torch.Tensor] = []
        self._handles = []
        for block in blocks:
            if block.module.config.moe_pad_expert_input_to_capacity:
                raise UnsupportedState(
                    "--moe-pad-expert-input-to-capacity gives every expert the same token count, so popularity "
                    "cannot be read: use --moetion-mode full, or do not pad"
                )
            device = next(block.module.parameters()).device
            total = torch.zeros(len(block.experts), dtype=torch.int64, device=device)
            self.totals.append(total)
            self._handles.append(block.module.experts.register_forward_pre_hook(_Count(total)))

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


class _Count:
    def __init__(self, total: torch.Tensor) -> None:
        self._total = total

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled():
            tokens_per_expert: torch.Tensor = args[1]
            self._total += tokens_per_expert.to(self._total.device, torch.int64, non_blocking=True)
