# SPDX-License-Identifier: Apache-2.0
"""A step that Megatron's rerun state machine has put off to the next job, which is started from memory.

The machine runs a step with a suspicious result again, and then, to tell a fault of the GPU from one of the data, ends
the job with exit code 16. What it knows so far is in the checkpoint that Megatron saves before. Memory has the same
iteration and the same state, but not this knowledge: without it a restart would accept the result unseen.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_moetion.megatron_lm.flags import tracked
from megatron_moetion.persist.tracker import checkpoint_folder

_SIZES = ("world_size", "tensor_model_parallel_size", "pipeline_model_parallel_size", "data_parallel_size")
_logger = logging.getLogger("megatron_moetion")


def take_over(flags: Any, iteration: int, on_all: Callable[[bool], bool]) -> bool:
    """Hand the machine what the newest checkpoint below ``--load`` says of a step to be run again, if there is one.

    Collective; called where memory has recovered ``iteration``. ``on_all``: whether something holds on all ranks.
    Nothing is taken from a checkpoint of another iteration or of other parallel sizes. Returns whether there was such a
    step.
    """
    if flags.load is None or flags.finetune:
        return False
    folder = str(checkpoint_folder(flags.load, iteration))
    if not on_all(_newest_is(flags.load, iteration) and _holds_a_step(folder, flags, iteration)):
        return False
    from megatron.core import dist_checkpointing
    from megatron.core.rerun_state_machine import get_rerun_state_machine

    machine = get_rerun_state_machine()
    wanted = machine.state_dict(data_iterator=None, ckpt_format="torch_dist", force=True)
    machine.load_state_dict(dist_checkpointing.load({"rerun_state_machine": wanted}, folder)["rerun_state_machine"])
    return True


def _newest_is(root: str, iteration: int) -> bool:
    try:
        return tracked(Path(root)) == iteration
    except (OSError, ValueError):
        return False


def _holds_a_step(folder: str, flags: Any, iteration: int) -> bool:
    from megatron.core import dist_checkpointing
    from megatron.core.rerun_state_machine import get_rerun_state_machine

    try:
        common = dist_checkpointing.load_common_state_dict(folder)
    except Exception as error:  # whatever is wrong with it, memory has the state
        _logger.warning("[moetion] iteration %d is recovered from memory; %s is no help: %s", iteration, folder, error)
        return False
    sizes = common.get("args")
    is_ours = all(getattr(sizes, name, None) == getattr(flags, name) for name in _SIZES)
    return is_ours and get_rerun_state_machine().validate_state_dict(common.get("rerun_state_machine"))
