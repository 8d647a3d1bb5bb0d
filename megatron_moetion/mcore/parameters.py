# SPDX-License-Identifier: Apache-2.0
"""Makes all model parameters on every rank from the main parameters after a recovery, by Megatron's own calls.

Where parameters are quantised this takes all ranks of a group: a scale follows from the largest value of a whole
parameter, of which a rank may hold a part. There are two ways, and the settings of DDP tell which:

- Each rank quantises its own shards into the parameters, and quantised bytes are gathered (tensor and block scales).
- Each rank puts its shards in bf16 into the memory that DDP gathers in, which is that of the gradients, and each
  quantises all of what it has gathered (MXFP8, ``reuse_grad_buf_for_mxfp8_param_ag``). A gather of memory that was
  not filled before makes parameters out of gradients, and nothing tells.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_moetion.mcore.chain import layer_wise
from megatron_moetion.mcore.shards import copy_main_to_model


def copy_parameters(links: Sequence[MegatronOptimizer]) -> None:
    """This rank's shards into the model, where that takes no other rank. Under ``no_grad``."""
    for link in links:
        if not _is_quantised(link):
            copy_main_to_model(link)


def gather_parameters(model: Sequence[DistributedDataParallel], links: Sequence[MegatronOptimizer]) -> None:
    """All parameters on all ranks; returns when it is done, also where gathering overlaps the forward pass.

    Collective, under ``no_grad``, after ``copy_parameters``, only between an optimizer step and the next forward.
    Gradients that share memory with the gather are zero afterwards. The next forward that overlaps with a gather
    gathers again, as after a step.
    """
    for chunk in model:
        if chunk.ddp_config.reuse_grad_buf_for_mxfp8_param_ag:
            chunk.zero_grad_buffer()
    for link in links:  # all of them before any gather: dense and expert parameters have the same chunks
        if not _is_quantised(link):
            continue
        if link.ddp_config.reuse_grad_buf_for_mxfp8_param_ag:
            link._copy_main_params_to_param_buffer()
        else:
            copy_main_to_model(link)
    for chunk in model:
        if chunk.ddp_config.use_distributed_optimizer:
            _gather(chunk)


def gather_whole_parameters(model: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
    """What ``gather_parameters`` leaves to a ``LayerWiseDistributedOptimizer``. Collective, under the same conditions.

    Where DDP's buffers are laid out for it, DDP gathers all parameters of a chunk. Elsewhere the optimizer exchanges
    whole parameters, by a call of its own that waits, also where training overlaps it with the forward pass.
    """
    if not any(chunk.ddp_config.use_distributed_optimizer for chunk in model):
        for link in layer_wise(optimizer):
            link.allgather_params()


def _is_quantised(link: MegatronOptimizer) -> bool:
    return isinstance(link, DistributedOptimizer) and bool(link.ddp_config.fp8_param_gather)


def _gather(chunk: DistributedDataParallel) -> None:
    if not chunk.ddp_config.overlap_param_gather:
        chunk.start_param_sync(force_sync=True)
        return
    # Not forced: in megatron-core 0.16 a forced gather leaves out what quantised parameters need after it.
    chunk.start_param_sync(force_dispatch=True)
    for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
        group.finish_param_sync(skip_next_bucket_dispatch=True)
        # As after a step: a forward that finds it set neither gathers what the loop has staged in shared memory since,
        # nor clears that memory for gradients. To gather unchanged parameters once more changes nothing.
        group.param_gather_dispatched = False
