# SPDX-License-Identifier: Apache-2.0
"""Gives every rank all parameters again after a recovery, by Megatron's own calls."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_moetion.mcore.chain import layer_wise


def gather_parameters(model: Sequence[DistributedDataParallel]) -> None:
    """Collective, under ``no_grad``, only between an optimizer step and the next forward.

    Forced, so that it is done when this returns, also where gathering overlaps the forward pass.
    """
    for chunk in model:
        if chunk.ddp_config.use_distributed_optimizer:
            chunk.start_param_sync(force_sync=True)


def gather_whole_parameters(model: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
    """What ``gather_parameters`` leaves to a ``LayerWiseDistributedOptimizer``. Collective, under the same conditions.

    Where DDP's buffers are laid out for it, DDP gathers all parameters of a chunk. Elsewhere the optimizer exchanges
    whole parameters, by a call of its own that waits, also where training overlaps it with the forward pass.
    """
    if not any(chunk.ddp_config.use_distributed_optimizer for chunk in model):
        for link in layer_wise(optimizer):
            link.allgather_params()
