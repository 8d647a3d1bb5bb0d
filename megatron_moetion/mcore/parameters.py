# SPDX-License-Identifier: Apache-2.0
"""Gives every rank all parameters again after a recovery, by Megatron's own calls."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.distributed import DistributedDataParallel


def gather_parameters(model: Sequence[DistributedDataParallel]) -> None:
    """Collective, under ``no_grad``, only between an optimizer step and the next forward.

    Forced, so that it is done when this returns, also where gathering overlaps the forward pass.
    """
    for chunk in model:
        if chunk.ddp_config.use_distributed_optimizer:
            chunk.start_param_sync(force_sync=True)
