# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint on disk has once, and not in shards: optimizer settings, scheduler, the loop's own state."""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import FP32Optimizer

from megatron_moetion.mcore.rng import decoded

CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}
"""What a loader is told of the content: as ``checkpoint_metadata``, less its group."""


def common_part(rank: int, guide: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """What one rank knows of it, as values that a host state can hold. ``state``: the adapter's host state."""
    names = ("optimizers", "scheduler", "given", "user")
    fixed = {"rank": rank, "sizes": guide["sizes"], "flags": guide["flags"]}
    return {**fixed, "links": [kind["link"] for kind in guide["optimizers"]], **{name: state[name] for name in names}}


def random_states(rank: int, guide: Mapping[str, Any], state: Mapping[str, Any]) -> list[ShardedObject]:
    """One rank's, as the bundled trainer's checkpoints have them, and where a loop has Megatron-LM's flags, as its do.

    Megatron-LM keeps those of one rank for all that differ in data parallelism only. It gathers those of all with
    ``--data-parallel-random-init``; then there are none of its kind here.
    """
    sizes, ranks, states = guide["sizes"], guide["ranks"], decoded(state["rng"])
    found = [ShardedObject("rng_state", states, (sizes["world"],), (rank,))]
    if has_random_states_of_megatron_lm(guide["flags"]) and ranks["data_context"] == 0:
        shape, place = (sizes["pipeline"], sizes["tensor"]), (ranks["pipeline"], ranks["tensor"])
        found.append(ShardedObject("rng_state", [states], shape, place))
    return found


def has_random_states_of_megatron_lm(flags: Mapping[str, Any] | None) -> bool:
    """Whether Megatron-LM finds random states in an export of a run with these flags."""
    return flags is not None and not flags.get("data_parallel_random_init")


def telling(ranks: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those of these ranks that ``common_state`` would listen to: two at most."""
    if not ranks:
        return []
    lowest, fullest = min(ranks, key=lambda r: int(r["rank"])), max(ranks, key=_fullness)
    return [lowest] if lowest is fullest else [lowest, fullest]


def common_state(
    ranks: Sequence[Mapping[str, Any]], iteration: int, expert_parallel_size: int | None = None
) -> dict[str, Any]:
    """The content of ``common.pt``. ``ranks``: ``common_part`` of each rank; the lowest one speaks for all."""
    lowest = min(ranks, key=lambda r: int(r["rank"]))
    found: dict[str, Any] = {
        "optimizer": _common_of_optimizers(ranks, expert_parallel_size),
        "iteration": iteration,
        "checkpoint_version": 3.0,
        "progress": lowest["user"],
        "topology": lowest["sizes"],
        "content_metadata": CONTENT,
    }
    if lowest["scheduler"] is not None:
        found["opt_param_scheduler"] = _scheduler(lowest)
    if lowest["flags"] is not None:
        found["args"] = _arguments(lowest)
        found["num_floating_point_operations_so_far"] = lowest["user"].get("operations", 0)
    return found


def _arguments(rank: Mapping[str, Any]) -> Namespace:
    """Megatron-LM's ``args``: flags as training began with them, and counters of samples as of the iteration."""
    saved = {"no_save_optim": None, "no_save_rng": not has_random_states_of_megatron_lm(rank["flags"]) or None}
    counters = {name: value for name, value in rank["user"].items() if name.endswith("_samples")}
    return Namespace(**{**rank["flags"], "ckpt_format": "torch_dist", **saved, **counters})


def _common_of_optimizers(states: Sequence[Mapping[str, Any]], expert_parallel_size: int | None) -> dict[Any, Any]:
    """Groups and loss scalers. A rank without experts has fewer of them, so the fullest rank's are taken.

    With expert parallelism Megatron has one optimizer for dense parameters and one for experts, else one for all.
    """
    fullest = max(states, key=_fullness)
    found = [_common_of_one(*link) for link in zip(fullest["links"], fullest["optimizers"], strict=True)]
    if expert_parallel_size == 1 and len(found) > 1:
        found = [one for one in found if not any(map(_is_of_experts, _groups_of(one)))]
    elif expert_parallel_size is not None and expert_parallel_size > 1 and len(found) == 1:
        experts = copy.deepcopy(found[0])
        for group in _groups_of(experts):
            group["is_expert_parallel"] = True
        found.append(experts)
    return found[0] if len(found) == 1 else dict(enumerate(found))


def _fullness(state: Mapping[str, Any]) -> tuple[int, int]:
    return len(state["optimizers"]), sum(len(fields["groups"]) for fields in state["optimizers"])


def _groups_of(common: Mapping[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = common.get("optimizer", common)["param_groups"]
    return found


def _is_of_experts(group: Mapping[str, Any]) -> bool:
    return bool(group.get("is_expert_parallel"))


def _common_of_one(link: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Of one optimizer; ``link`` is the name of its class, which says how its checkpoints are."""
    if link == DistributedOptimizer.__name__:
        found = {
            "optimizer": {"param_groups": _with_steps(fields)},
            "param_state_sharding_type": CONTENT["distrib_optim_sharding_type"],
        }
    else:
        found = {"param_groups": [dict(group) for group in fields["groups"]]}
        if fields["steps"] is not None:
            found["state"] = {"common_step": torch.tensor(fields["steps"])}
        if link != FP32Optimizer.__name__:
            found = {"optimizer": found}
    if fields["grad_scaler"] is not None:
        scaler = dict(fields["grad_scaler"])
        scaler["scale"] = torch.tensor([scaler["scale"]], dtype=torch.float32)
        found["grad_scaler"] = scaler
    return found


def _with_steps(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Parameter groups with the count of steps in each, wherever the optimizer keeps it."""
    counts = [g["step"] for g in fields["groups"] if "step" in g]
    step = fields["steps"] if fields["steps"] is not None else (counts[0] if counts else None)
    return [{**group, **({"step": int(step)} if step is not None else {})} for group in fields["groups"]]


def _scheduler(state: Mapping[str, Any]) -> dict[str, Any]:
    """As ``OptimizerParamScheduler.state_dict`` has it."""
    names = (
        "max_lr", "lr_warmup_steps", "lr_decay_style", "lr_decay_steps", "min_lr", "start_wd", "end_wd",
        "wd_incr_style", "wd_incr_steps",
    )  # fmt: skip
    given = state["given"]["scheduler"] or {}
    return {**{name: given[name] for name in names if name in given}, "num_steps": state["scheduler"]}
