# SPDX-License-Identifier: Apache-2.0
"""A step that Megatron's rerun state machine has put off to the next job, which is started from memory.

The machine runs a step with a suspicious result again, and then, to tell a fault of the GPU from one of the data, ends
the job with exit code 16. What it knows so far is in the checkpoint that Megatron saves before. Memory has the same
iteration and the same state, but not this knowledge: without it a restart would accept the result unseen.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from megatron_moetion.mcore.tracker import checkpoint_folder
from megatron_moetion.megatron_lm.flags import tracked

_SIZES = ("world_size", "tensor_model_parallel_size", "pipeline_model_parallel_size", "data_parallel_size")
_logger = logging.getLogger("megatron_moetion")


def take_over(flags: Any, iteration: int) -> bool:
    """Hand the machine what the newest checkpoint below ``--load`` says of a step to be run again, if there is one.

    Collective; called where memory has recovered ``iteration``. Nothing is handed over from a checkpoint of another
    iteration or of other parallel sizes. Returns whether there was such a step.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.rerun_state_machine import get_rerun_state_machine
    from torch import distributed as dist

    if flags.load is None or flags.finetune:
        return False
    machine = get_rerun_state_machine()
    folder = str(checkpoint_folder(flags.load, iteration))
    found = [False]
    if dist.get_rank() == 0 and tracked(Path(flags.load)) == iteration:
        try:
            common = dist_checkpointing.load_common_state_dict(folder)
        except Exception as error:  # whatever is wrong with it, memory has the state
            _logger.warning("[moetion] rank 0 iteration %d: %s cannot be read: %s", iteration, folder, error)
        else:
            sizes = common.get("args")
            is_ours = all(getattr(sizes, name, None) == getattr(flags, name) for name in _SIZES)
            found = [is_ours and machine.validate_state_dict(common.get("rerun_state_machine"))]
    dist.broadcast_object_list(found, src=0)
    if found[0]:
        wanted = machine.state_dict(data_iterator=None, ckpt_format="torch_dist", force=True)
        loaded = dist_checkpointing.load({"rerun_state_machine": wanted}, folder)
        machine.load_state_dict(loaded["rerun_state_machine"])
    return found[0]
