# SPDX-License-Identifier: Apache-2.0
"""The format of ``torch_dist`` checkpoints. Saving and loading them takes nothing of the checkpointing runtime."""

from __future__ import annotations

from typing import Any

from megatron.core import parallel_state


def checkpoint_metadata() -> dict[str, Any]:
    """How Megatron-Core lays the state out; 'fully_reshardable' loads under another topology, too."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
