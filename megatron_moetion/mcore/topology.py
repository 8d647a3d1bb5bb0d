# SPDX-License-Identifier: Apache-2.0
"""How the ranks of a job are divided: the sizes that give a rank number its meaning."""

from __future__ import annotations

from collections.abc import Mapping

from megatron.core import parallel_state
from torch import distributed as dist


def parallel_sizes() -> dict[str, int]:
    """The job's number of ranks, and the size of each kind of parallelism."""
    return {
        "world": dist.get_world_size(),
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline": parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        "context": parallel_state.get_context_parallel_world_size(),
        "expert": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor": parallel_state.get_expert_tensor_parallel_world_size(),
        "data": parallel_state.get_data_parallel_world_size(),
    }


def parallel_ranks() -> dict[str, int]:
    """Where this rank is in the groups by which Megatron-LM keeps random states."""
    return {
        "tensor": parallel_state.get_tensor_model_parallel_rank(),
        "pipeline": parallel_state.get_pipeline_model_parallel_rank(),
        "data_context": parallel_state.get_data_parallel_rank(with_context_parallel=True),
    }


def is_same(saved: Mapping[str, int], now: Mapping[str, int]) -> bool:
    """Whether ``saved`` sizes are those of ``now``, as far as they were saved: checkpoints named fewer of them once."""
    return all(now.get(name) == size for name, size in saved.items())


def topology() -> str:
    """The sizes as an arena's identity names them: ``tp1 pp2 vpp1 cp1 ep2 dp2``."""
    sizes = parallel_sizes()
    return (
        f"tp{sizes['tensor']} pp{sizes['pipeline']} vpp{sizes['virtual_pipeline']} cp{sizes['context']} "
        f"ep{sizes['expert']} dp{sizes['data']}"
    )


def place() -> str:
    """Which parts of the job's tensors are this rank's: ``tp1 pp0 cp0 ep1 dp0 etp0/1``.

    Shards of one tensor have one name and one size on all ranks of a tensor parallel group, and another order of the
    kinds of parallelism gives a rank another shard: neither the sizes nor a rank's own layout tell.
    """
    return (
        f"tp{parallel_state.get_tensor_model_parallel_rank()} pp{parallel_state.get_pipeline_model_parallel_rank()} "
        f"cp{parallel_state.get_context_parallel_rank()} ep{parallel_state.get_expert_model_parallel_rank()} "
        f"dp{parallel_state.get_data_parallel_rank()} etp{parallel_state.get_expert_tensor_parallel_rank()}"
        f"/{parallel_state.get_expert_tensor_parallel_world_size()}"
    )
