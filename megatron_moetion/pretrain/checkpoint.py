# SPDX-License-Identifier: Apache-2.0
"""Reads and writes Megatron's ``torch_dist`` checkpoints, in folders named and tracked as Megatron-LM does."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import unwrap_model
from torch import distributed as dist

from megatron_moetion.errors import ConfigError, UnsupportedState
from megatron_moetion.mcore.disk_format import checkpoint_metadata
from megatron_moetion.mcore.rng import load_rng_states, rng_states
from megatron_moetion.mcore.topology import is_same, parallel_sizes
from megatron_moetion.persist.tracker import TRACKER, checkpoint_folder, latest_iteration, write_tracker
from megatron_moetion.pretrain.progress import RunState

_GROUP_STATE = ("params", "step")
"""The fields of a parameter group that are no settings; the scheduler computes rate and decay."""


def check_supported(optimizer: MegatronOptimizer) -> None:
    """Raise ``UnsupportedState`` for an optimizer whose checkpoints Megatron-Core 0.16 loads wrongly.

    Torch's Adam and AdamW keep ``step`` in each parameter's state; it is lost on the way.
    """
    for inner in optimizer.chained_optimizers:
        if isinstance(inner.optimizer, torch.optim.Adam):
            raise UnsupportedState(
                f"--save and --load do not work with torch's {type(inner.optimizer).__name__}: Megatron-Core restores "
                "its step counts wrongly; install Apex or Transformer Engine for a FusedAdam"
            )


def last_saved(root: str) -> int:
    """The iteration of the newest complete checkpoint, -1 without one. All ranks call it, rank 0 looks."""
    iteration = None
    if dist.get_rank() == 0:
        with suppress(OSError, ValueError):  # whatever it is, the next save replaces it
            iteration = latest_iteration(root)
    found = torch.tensor([-1 if iteration is None else iteration], device=torch.cuda.current_device())
    dist.broadcast(found, src=0)
    return int(found.item())


def save_checkpoint(
    root: str,
    model: list[Any],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    progress: RunState,
) -> Path:
    """Write the whole training state; the tracker moves only when everything is on disk. All ranks call it."""
    folder = checkpoint_folder(root, progress.iteration)
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    metadata = checkpoint_metadata()
    state = _sharded_state(model, optimizer, metadata, is_loading=False)
    state["rng_state"] = _sharded_rng(rng_states())
    state |= {
        "iteration": progress.iteration,
        "checkpoint_version": 3.0,
        "opt_param_scheduler": scheduler.state_dict(),
        "progress": progress.state_dict(),
        "topology": parallel_sizes(),
    }
    common_metadata = {k: v for k, v in metadata.items() if k != "dp_cp_group"}
    dist_checkpointing.save(state, str(folder), content_metadata=common_metadata)
    dist.barrier()
    if dist.get_rank() == 0:
        write_tracker(Path(root), progress.iteration)
    dist.barrier()
    return folder


def load_checkpoint(
    root: str,
    model: list[Any],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    load_progress: Callable[[dict[str, Any]], None],
    seed: int,
) -> int | None:
    """Load the newest checkpoint below ``root``. Returns its iteration, or None if there is none.

    ``load_progress`` takes the training loop's own state, before anything else is loaded; it may refuse by raising.
    Settings of optimizer and scheduler stay as they are, whatever the checkpoint was trained with.

    With the topology it was saved with, training continues bitwise. With another one the random streams
    cannot be carried over: they start anew from ``seed`` and the iteration.
    """
    iteration = latest_iteration(root)
    if iteration is None:
        return None
    folder = checkpoint_folder(root, iteration)
    if not folder.is_dir():
        raise ConfigError(f"{Path(root) / TRACKER} names iteration {iteration}, but there is no folder {folder}")
    common = dist_checkpointing.load_common_state_dict(str(folder))
    load_progress(common["progress"])
    same_topology = is_same(common["topology"], parallel_sizes())
    settings_of_groups = [{k: v for k, v in group.items() if k not in _GROUP_STATE} for group in optimizer.param_groups]
    metadata = checkpoint_metadata()
    with torch.no_grad():
        state = _sharded_state(model, optimizer, metadata, is_loading=True)
        if same_topology:
            state["rng_state"] = _sharded_rng(rng_states())
        loaded = dist_checkpointing.load(state, str(folder))
        for key, chunk in zip(_model_keys(model), model, strict=True):
            unwrap_model(chunk).load_state_dict(loaded[key], strict=True)
        optimizer.load_state_dict(loaded["optimizer"])
    for group, settings in zip(optimizer.param_groups, settings_of_groups, strict=True):
        group.update(settings)
    # The scheduler's own method would replace this run's settings by the checkpoint's.
    scheduler.num_steps = 0
    scheduler.step(increment=loaded["opt_param_scheduler"]["num_steps"])
    if same_topology:
        load_rng_states(loaded["rng_state"])
    else:
        offset = 100 * parallel_state.get_pipeline_model_parallel_rank() + iteration
        tensor_parallel.model_parallel_cuda_manual_seed(seed + offset, force_reset_rng=True)
    return iteration


def _model_keys(model: list[Any]) -> list[str]:
    return ["model"] if len(model) == 1 else [f"model{i}" for i in range(len(model))]


def _sharded_state(
    model: list[Any], optimizer: MegatronOptimizer, metadata: dict[str, Any], *, is_loading: bool
) -> dict[str, Any]:
    state: dict[str, Any] = {
        key: unwrap_model(chunk).sharded_state_dict(metadata=metadata)
        for key, chunk in zip(_model_keys(model), model, strict=True)
    }
    state["optimizer"] = optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=metadata)
    return state


def _sharded_rng(states: dict[str, Any]) -> ShardedObject:
    """One entry a global rank: expert parallel ranks draw from streams of their own."""
    return ShardedObject("rng_state", states, (dist.get_world_size(),), (dist.get_rank(),))
